"""The pictures of an evaluation."""

from pathlib import Path

from detr_dist.data.coco import CocoData
from detr_dist.evaluation.contact_sheet import contact_sheet
from detr_dist.evaluation.curve_plots import f1_figure, precision_recall_figure
from detr_dist.evaluation.evaluate import Details
from detr_dist.evaluation.figures import figure_style, save
from detr_dist.evaluation.table_plots import confusion_figure, size_figure


def draw_pictures(folder: Path, data: CocoData, details: Details) -> list[Path]:
    """Draws an evaluation on `data` into files of an existing folder, and says which.

    `precision_recall.png`, `f1_threshold.png`, `confusion_matrix.png`, `ap_by_size.png` and
    `worst_images.jpg`. It needs no display and leaves matplotlib's settings as they are.
    """
    points = details.operating_points
    with figure_style():
        paths = [
            save(precision_recall_figure(data.class_names, points.classes), folder / "precision_recall.png"),
            save(f1_figure(data.class_names, points.classes), folder / "f1_threshold.png"),
            save(confusion_figure(data.class_names, points.confusion), folder / "confusion_matrix.png"),
            save(size_figure(data, details.coco), folder / "ap_by_size.png"),
        ]
    sheet = folder / "worst_images.jpg"
    contact_sheet(data, points.matches).save(sheet, quality=88)
    return [*paths, sheet]
