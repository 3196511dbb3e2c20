"""The pictures of an evaluation."""

from collections.abc import Callable
from pathlib import Path

from detr_dist.data.coco import CocoData
from detr_dist.evaluation.contact_sheet import contact_sheet
from detr_dist.evaluation.curve_plots import f1_figure, precision_recall_figure
from detr_dist.evaluation.evaluate import Details
from detr_dist.evaluation.figures import figure_style, save
from detr_dist.evaluation.table_plots import confusion_figure, size_figure


def draw_pictures(folder: Path, data: CocoData, details: Details) -> list[str]:
    """Draw an evaluation on `data` into files of an existing folder.

    `precision_recall.png`, `f1_threshold.png`, `confusion_matrix.png`, `ap_by_size.png` and
    `worst_images.jpg`. It needs no display and leaves matplotlib's settings as they are.

    Returns:
        A line on each picture that could not be drawn; the others are there.

    Raises:
        OSError: the folder cannot be written to.
    """
    names, points = data.class_names, details.operating_points
    pictures: dict[str, Callable[[Path], object]] = {
        "precision_recall.png": lambda path: save(precision_recall_figure(names, points.classes), path),
        "f1_threshold.png": lambda path: save(f1_figure(names, points.classes), path),
        "confusion_matrix.png": lambda path: save(confusion_figure(names, points.confusion), path),
        "ap_by_size.png": lambda path: save(size_figure(data, details.coco), path),
        "worst_images.jpg": lambda path: contact_sheet(data, points.matches).save(path, quality=88),
    }
    failures = []
    with figure_style():
        for name, draw in pictures.items():
            try:
                draw(folder / name)
            except OSError:
                raise
            except Exception as error:  # a library's trouble: no reason to lose the other pictures
                failures.append(f"{name}: {type(error).__name__}: {' '.join(str(error).split())}")
    return failures
