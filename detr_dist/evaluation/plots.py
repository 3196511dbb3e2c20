"""The plots of an evaluation: curves, confusion matrix, AP by size, and the images with most errors."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray
from PIL import Image

from detr_dist.data.coco import CocoData
from detr_dist.errors import as_one_line
from detr_dist.evaluation.calibration import EDGES, calibration_of
from detr_dist.evaluation.coco_metrics import AREAS, SIZES, CocoMetrics
from detr_dist.evaluation.contact_sheet import contact_sheet
from detr_dist.evaluation.drawing import FONT, class_label, font
from detr_dist.evaluation.error_analysis import KINDS, ErrorAnalysis
from detr_dist.evaluation.evaluator import Details
from detr_dist.evaluation.matching import MIN_IOU
from detr_dist.evaluation.thresholds import ClassPoint, Counts, Curve, pooled
from detr_dist.storage import describe_disk_error, new_folder

STYLE: dict[str, Any] = {
    "text.parse_math": False,  # a class may be called $x$
    "font.family": [FONT],
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
DPI = 120
MAX_CLASSES = 80
"""Classes in a table; with more, the lines of text would be too close to be readable."""
MAX_NAMED = 10  # the number of colours
"""Curves with their own colour and name; of more classes only the best and the worst are named."""
COLOURS = ("C0", "C1", "C2", "C3", "C4", "C5", "C6", "C8", "C9", "navy")
GREY = "0.8"
SIZE_LABELS = ("small\nup to 32² px", "medium\n32² to 96² px", "large\nfrom 96² px")


def write_plots(folder: Path, data: CocoData, details: Details) -> list[str]:
    """Draw an evaluation on `data` into files of a new folder, whatever goes wrong.

    It needs no display and leaves matplotlib's settings unchanged.

    Returns:
        A line for each plot that could not be drawn, or one line if the folder cannot be written.
    """
    names, points = data.class_names, details.operating_points
    plots: dict[str, Callable[[Path], object]] = {
        "precision_recall.png": lambda path: _save(precision_recall_figure(names, points.classes), path),
        "f1_threshold.png": lambda path: _save(f1_figure(names, points.classes), path),
        "confusion_matrix.png": lambda path: _save(confusion_figure(names, points.confusion), path),
        "ap_by_size.png": lambda path: _save(size_figure(data, details.coco), path),
        "calibration.png": lambda path: _save(calibration_figure(names, points.classes), path),
        "errors.png": lambda path: _save(error_figure(names, details.errors), path),
        "worst_images.jpg": lambda path: contact_sheet(data, points.matches).save(path, quality=88),
    }
    failures = []
    try:
        with new_folder(folder) as partial, figure_style():
            for name, draw in plots.items():
                try:
                    draw(partial / name)
                except OSError:
                    raise
                except Exception as error:  # any failure of a library; the other plots are drawn
                    failures.append(f"{folder / name}: {as_one_line(error)}")
    except Exception as error:  # such as a full disk; the run continues
        return [f"{folder}: {describe_disk_error(error, folder.parent)}"]
    return failures


def figure_style() -> AbstractContextManager[None]:
    """Apply our matplotlib settings within the block, instead of the user's. They are global."""
    return matplotlib.style.context(["default", STYLE])


def _save(figure: Figure, path: Path) -> None:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # draws once, while Figure.savefig draws twice
    Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").save(path)


def _new_figure(title: str, width_inches: float, height_inches: float) -> Figure:
    figure = Figure(figsize=(width_inches, height_inches), dpi=DPI, layout="constrained")
    figure.suptitle(title, x=0.1 / width_inches, ha="left", fontsize=10)
    return figure


def _empty_figure(title: str) -> Figure:
    figure = _new_figure(title, 5, 3)
    figure.text(0.5, 0.5, "no boxes to find", ha="center", va="center")
    return figure


def precision_recall_figure(class_names: Sequence[str], classes: Sequence[ClassPoint | None]) -> Figure:
    """Plot precision over recall for every class with a box and for all together, with their thresholds."""
    return _curves_figure(
        (f"Precision and recall at IoU {MIN_IOU:g}", "recall", "precision"),
        class_names,
        classes,
        line_of=lambda curve: (curve.recall, curve.precision),
        dot_of=lambda counts, _: (counts.recall, counts.precision),
    )


def f1_figure(class_names: Sequence[str], classes: Sequence[ClassPoint | None]) -> Figure:
    """Plot F1 over the score threshold, for the same classes."""
    return _curves_figure(
        (f"F1 at IoU {MIN_IOU:g}, by score threshold", "score threshold", "F1"),
        class_names,
        classes,
        line_of=_f1_over_threshold,
        dot_of=lambda counts, threshold: (threshold, counts.f1),
    )


def calibration_figure(class_names: Sequence[str], classes: Sequence[ClassPoint | None]) -> Figure:
    """Plot precision over the score, for the same classes: on the diagonal a score is a precision."""
    figure = _curves_figure(
        (f"Calibration: precision at IoU {MIN_IOU:g} of detections with a score", "score", "precision"),
        class_names,
        classes,
        line_of=lambda curve: (calibration_of(curve).scores, calibration_of(curve).precision),
        caption_of=_calibration_caption,
        heading="calibration error",
        marker=".",
    )
    for axes in figure.axes:
        axes.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1, zorder=0)
    return figure


def _calibration_caption(point: ClassPoint) -> str:
    error = calibration_of(point.curve).error
    return f"no detections from {EDGES[0]:g}" if error is None else f"{error:.2f}"


def _f1_over_threshold(curve: Curve) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return thresholds from 1 down to 0, and F1 at each, as a step function.

    A detection with a score equal to the threshold counts.
    """
    thresholds = np.concatenate([[1.0], curve.thresholds, [0.0]])
    f1 = np.concatenate([[0.0], curve.f1])
    return np.repeat(thresholds, 2)[1:-1], np.repeat(f1, 2)


def _curves_figure(
    texts: tuple[str, str, str],
    class_names: Sequence[str],
    classes: Sequence[ClassPoint | None],
    *,
    line_of: Callable[[Curve], tuple[NDArray[np.float64], NDArray[np.float64]]],
    dot_of: Callable[[Counts, float], tuple[float, float]] | None = None,
    caption_of: Callable[[ClassPoint], str] | None = None,
    heading: str = "F1 and threshold",
    marker: str = "",
) -> Figure:
    """Plot a line for each class and a dot at its threshold; `texts` are the title and the axis labels."""
    caption_of = caption_of or _f1_caption
    title, x_label, y_label = texts
    known = [(label, point) for label, point in enumerate(classes) if point is not None]
    if not known:
        return _empty_figure(title)
    figure, ticks = _new_figure(title, 9, 5.5), np.linspace(0, 1, 6)
    axes = figure.add_subplot(xlabel=x_label, ylabel=y_label, xticks=ticks, yticks=ticks)
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    axes.grid(color="0.93")
    axes.set_axisbelow(True)
    legend: list[tuple[Line2D, str]] = []

    def plot(name: str, point: ClassPoint, color: str, linewidth: float = 1.4) -> None:
        (line,) = axes.plot(*line_of(point.curve), color=color, linewidth=linewidth, marker=marker)
        legend.append((line, f"{name}: {caption_of(point)}"))
        if dot_of is not None and point.threshold is not None:
            dot = dot_of(point.counts, point.threshold)
            axes.plot(*dot, "o", color=color, markeredgecolor="white", markersize=7, zorder=3, clip_on=False)

    known.sort(key=lambda pair: -pair[1].counts.f1)
    half = MAX_NAMED // 2
    unnamed = known[half:-half] if len(known) > MAX_NAMED else []
    for _, point in unnamed:
        axes.plot(*line_of(point.curve), color=GREY, linewidth=0.6)
    for number, (label, point) in enumerate(known[:half] + known[half + len(unnamed) :]):
        if unnamed and number == half:
            legend.append((Line2D([], [], color=GREY), f"{len(unnamed):,} classes between"))
        plot(class_label(label, class_names[label]), point, COLOURS[number])
    if len(known) > 1:
        together = _together([point for _, point in known])
        plot("all, at one threshold", together, "black", linewidth=2.2)
        legend.insert(0, legend.pop())
    lines, entries = zip(*legend, strict=True)
    figure.legend(lines, entries, loc="outside right upper", frameon=False, title=heading, alignment="left")
    return figure


def _f1_caption(point: ClassPoint) -> str:
    return "no detections" if point.threshold is None else f"{point.counts.f1:.2f} at {point.threshold:.2f}"


def _together(points: Sequence[ClassPoint]) -> ClassPoint:
    """Pool all classes at their common threshold, or else at the best one."""
    curve = pooled([point.curve for point in points])
    thresholds = {point.threshold for point in points}
    return ClassPoint(thresholds.pop() if len(thresholds) == 1 else curve.best_threshold(), curve)


def confusion_figure(class_names: Sequence[str], confusion: NDArray[np.int64]) -> Figure:
    """Plot counts [C + 1, C + 1], coloured by their fraction of the row, without classes of zero counts."""
    background = len(class_names)
    inside = confusion[:-1].sum(axis=1) + confusion[:, :-1].sum(axis=0)
    known = np.flatnonzero(inside).tolist()
    title = "Confusion matrix, coloured by fraction of the row"
    if not known:
        return _empty_figure(title)
    labels = _heaviest(known, inside - confusion.diagonal()[:-1])
    counts = confusion[np.ix_([*labels, background], [*labels, background])]
    names = [class_label(label, class_names[label]) for label in labels] + ["background"]
    cell = float(np.clip(9 / len(names), 0.2, 0.8))  # inches
    font_size = 7 if cell < 0.3 else 9
    longest = max(font(100).getlength(name) for name in names) / 100 * font_size / 72  # inches
    extent = longest + cell * len(names)
    title += _few_of_many(labels, known, "those with most errors")
    figure = _new_figure(title, extent + 1.5, extent + 1.1)
    axes = figure.add_subplot(xlabel="predicted", ylabel="truth")
    fractions = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(fractions, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, shrink=0.5, fraction=0.04, pad=0.02, aspect=25, label="fraction of the row")
    _label_cells(axes, names, names, font_size)
    axes.tick_params(axis="x", rotation=90)
    for row, column in np.argwhere(counts).tolist():
        count = int(counts[row, column])
        text = str(count) if count < 10_000 else f"{count / 1000:.0f}k"
        fits = cell * 72 / (0.75 * len(text))
        _write_cell(axes, row, column, text, fractions[row, column], min(font_size, fits))
    between = np.arange(len(labels)) + 0.5
    for lines in (axes.hlines, axes.vlines):
        lines(between[:-1], -0.5, len(labels) + 0.5, color="0.92", linewidth=0.5)
        lines(between[-1], -0.5, len(labels) + 0.5, color="0.4", linewidth=1)  # before the background
    return figure


def size_figure(data: CocoData, coco: CocoMetrics) -> Figure:
    """Plot AP of small, medium and large boxes: bars for all classes, and a table of each class."""
    num_boxes = _boxes_by_size(data)
    known = np.flatnonzero(num_boxes.sum(axis=1)).tolist()
    title = "AP by size of the boxes"
    if not known:
        return _empty_figure(title)
    labels = _heaviest(known, num_boxes.sum(axis=1))
    title += _few_of_many(labels, known, "those with most boxes")
    of_all = [coco.metrics.get(f"map_{size}") for size in SIZES]
    totals = [f"{total:,} boxes" for total in num_boxes.sum(axis=0).tolist()]
    bars = [
        (ap or 0.0, "no boxes" if ap is None else f"{ap:.2f}\n{total}")
        for ap, total in zip(of_all, totals, strict=True)
    ]
    names = [class_label(label, data.class_names[label]) for label in labels]
    figure = _bars_over_table(title, bars, names, SIZE_LABELS, coco.ap_by_size[labels], num_boxes[labels])
    above, below = figure.axes
    above.set_ylabel("AP of all classes")
    below.set_xlabel("AP of each class (boxes)")
    return figure


def error_figure(class_names: Sequence[str], errors: ErrorAnalysis) -> Figure:
    """Plot the AP that each kind of error costs: bars for all classes, and a table of each class."""
    known = np.flatnonzero(~np.isnan(errors.dap).any(axis=1)).tolist()
    title = f"AP at IoU {MIN_IOU:g} gained by correcting one kind of error"
    if not known:
        return _empty_figure(title)
    labels = _heaviest(known, errors.dap.sum(axis=1))
    title += _few_of_many(labels, known, "those with most to gain")
    totals = errors.counts.sum(axis=0).tolist()
    means = errors.dap[known].mean(axis=0).tolist()
    bars = [(dap, f"{dap:.2f}\n{total:,} errors") for dap, total in zip(means, totals, strict=True)]
    names = [class_label(label, class_names[label]) for label in labels]
    figure = _bars_over_table(title, bars, names, KINDS, errors.dap[labels], errors.counts[labels])
    above, below = figure.axes
    above.set_ylabel("mean over the classes")
    below.set_xlabel("of each class (errors)")
    return figure


def _bars_over_table(
    title: str,
    bars: Sequence[tuple[float, str]],
    rows: Sequence[str],
    columns: Sequence[str],
    values: NDArray[np.float64],
    counts: NDArray[np.int64],
) -> Figure:
    """Plot a bar with its text for each column, and below a table of values and counts, [rows, columns]."""
    cell, font_size = (0.2, 7) if len(rows) > 25 else (0.3, 9)  # inches, points
    height, table = 2.2, max(cell * len(rows), 0.3)
    figure = _new_figure(title, 2 + 1.5 * len(columns), height + table + 1.3)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[height, table])
    above.set(ylim=(0, 1.12), yticks=np.linspace(0, 1, 6))
    for column, (value, text) in enumerate(bars):
        above.bar(column, value, color="C0", width=0.6)
        above.text(column, value, text, ha="center", va="bottom")
    below.imshow(values, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    _label_cells(below, rows, columns, font_size)
    for row, column in np.argwhere(~np.isnan(values)).tolist():
        value, number = float(values[row, column]), int(counts[row, column])
        _write_cell(below, row, column, f"{value:.2f}  ({number:,})", value, font_size)
    return figure


def _boxes_by_size(data: CocoData) -> NDArray[np.int64]:
    """Count boxes [C, 3], without crowds. A box at a limit counts for both sizes, as in COCO's AP."""
    areas, classes = data.areas[~data.iscrowd], data.box_classes[~data.iscrowd]
    columns = [
        np.bincount(classes[(low <= areas) & (areas <= high)], minlength=data.num_classes)
        for low, high in AREAS[1:]
    ]
    return np.stack(columns, axis=1)


def _heaviest(labels: Sequence[int], weight: NDArray[Any]) -> list[int]:
    """Return the `MAX_CLASSES` classes with the most weight, in their original order."""
    return sorted(sorted(labels, key=lambda label: -weight[label])[:MAX_CLASSES])


def _few_of_many(shown: Sequence[int], known: Sequence[int], which: str) -> str:
    """Return the addition to a title if classes are left out."""
    return f"; {len(shown)} of {len(known):,} classes, {which}" if len(shown) < len(known) else ""


def _label_cells(axes: Axes, rows: Sequence[str], columns: Sequence[str], font_size: float) -> None:
    axes.set_xticks(range(len(columns)), columns, fontsize=font_size)
    axes.set_yticks(range(len(rows)), rows, fontsize=font_size)
    axes.tick_params(length=0)


def _write_cell(axes: Axes, row: int, column: int, text: str, value: float, font_size: float) -> None:
    colour = "white" if value > 0.55 else "black"  # on the blue of the cell
    # Excluded from the layout, as it is inside the axes: with thousands of cells this halves the time.
    axes.text(column, row, text, ha="center", va="center", fontsize=font_size, color=colour, in_layout=False)
