"""What is taken for what, and AP by the size of boxes, as coloured tables."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from detr_dist.data.coco import CocoData
from detr_dist.evaluation.coco_metrics import AREAS, SIZES, CocoFigures
from detr_dist.evaluation.figures import empty_figure, extent_inches, few_of_many, most_telling, new_figure
from detr_dist.evaluation.lettering import class_label

SIZE_LABELS = ("small\nup to 32² px", "medium\n32² to 96² px", "large\nfrom 96² px")


def confusion_figure(class_names: Sequence[str], confusion: NDArray[np.int64]) -> Figure:
    """Counts [C + 1, C + 1], coloured by their share of the row. Classes that are not in it are left out."""
    background = len(class_names)
    inside = confusion[:-1].sum(axis=1) + confusion[:, :-1].sum(axis=0)
    known = np.flatnonzero(inside).tolist()
    title = "Confusions: counts, coloured by share of the row"
    if not known:
        return empty_figure(title)
    labels = most_telling(known, inside - confusion.diagonal()[:-1])
    counts = confusion[np.ix_([*labels, background], [*labels, background])]
    names = [class_label(label, class_names[label]) for label in labels] + ["background"]
    title += few_of_many(len(labels), len(known), "those with most errors")
    cell = float(np.clip(9 / len(names), 0.2, 0.8))  # inches
    is_small = cell < 0.3
    around = extent_inches(names, _font_size(is_small)) + cell * len(names)
    figure = new_figure(title, around + 1.5, around + 1.1)
    axes = figure.add_subplot(xlabel="predicted", ylabel="truth")
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, shrink=0.5, fraction=0.04, pad=0.02, aspect=25, label="share of the row")
    _label_cells(axes, names, names, is_small=is_small)
    axes.tick_params(axis="x", rotation=90)
    for row, column in np.argwhere(counts).tolist():
        text = _short(int(counts[row, column]))
        fits = cell * 72 / (0.75 * len(text))
        _write(axes, row, column, text, shares[row, column], min(_font_size(is_small), fits))
    _draw_lines_between(axes, len(labels))
    return figure


def size_figure(data: CocoData, coco: CocoFigures) -> Figure:
    """AP of small, medium and large boxes: bars for all classes, and a table of each class."""
    num_boxes = _boxes_by_size(data)
    known = np.flatnonzero(num_boxes.sum(axis=1)).tolist()
    title = "AP by size of the boxes"
    if not known:
        return empty_figure(title)
    labels = most_telling(known, num_boxes.sum(axis=1))
    names = [class_label(label, data.class_names[label]) for label in labels]
    title += few_of_many(len(labels), len(known), "those with most boxes")
    is_small = len(names) > 25
    cell = 0.2 if is_small else 0.3  # inches
    bars, table = 2.2, max(cell * len(names), 0.3)
    figure = new_figure(title, 6.5, bars + table + 1.3)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[bars, table])
    above.set(ylim=(0, 1.12), ylabel="AP of all classes", yticks=np.linspace(0, 1, 6))
    for column, size in enumerate(SIZES):
        ap, total = coco.metrics.get(f"map_{size}", np.nan), int(num_boxes[:, column].sum())
        above.bar(column, ap, color="C0", width=0.6)
        told = "no boxes" if np.isnan(ap) else f"{ap:.2f}\n{total:,} boxes"
        above.text(column, 0 if np.isnan(ap) else ap, told, ha="center", va="bottom")
    ap_by_size = coco.ap_by_size[labels]
    below.imshow(ap_by_size, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    _label_cells(below, names, SIZE_LABELS, is_small=is_small)
    for row, column in np.argwhere(~np.isnan(ap_by_size)).tolist():
        ap, number = float(ap_by_size[row, column]), int(num_boxes[labels[row], column])
        _write(below, row, column, f"{ap:.2f}  ({number:,})", ap, _font_size(is_small))
    below.set_xlabel("AP of each class (boxes)")
    return figure


def _boxes_by_size(data: CocoData) -> NDArray[np.int64]:
    """[C, 3], without crowds. A box on a limit counts on both sides of it, as in COCO's AP."""
    areas, classes = data.areas[~data.iscrowd], data.box_classes[~data.iscrowd]
    columns = [
        np.bincount(classes[(least <= areas) & (areas <= most)], minlength=data.num_classes)
        for least, most in AREAS[1:]
    ]
    return np.stack(columns, axis=1)


def _label_cells(axes: Axes, rows: Sequence[str], columns: Sequence[str], *, is_small: bool) -> None:
    size = _font_size(is_small)
    axes.set_xticks(range(len(columns)), columns, fontsize=size)
    axes.set_yticks(range(len(rows)), rows, fontsize=size)
    axes.tick_params(length=0)


def _draw_lines_between(axes: Axes, num_labels: int) -> None:
    """The last one, before the background, is stronger."""
    between = np.arange(num_labels) + 0.5
    for lines in (axes.hlines, axes.vlines):
        lines(between[:-1], -0.5, num_labels + 0.5, color="0.92", linewidth=0.5)
        lines(between[-1], -0.5, num_labels + 0.5, color="0.4", linewidth=1)


def _font_size(is_small: bool) -> float:
    return 7 if is_small else 9


def _write(axes: Axes, row: int, column: int, text: str, share: float, size: float) -> None:
    colour = "white" if share > 0.55 else "black"  # on the blue of the cell
    # Not in the layout, as it lies inside: with thousands of cells that is half the time.
    axes.text(column, row, text, ha="center", va="center", fontsize=size, color=colour, in_layout=False)


def _short(count: int) -> str:
    """At most four characters."""
    return str(count) if count < 10_000 else f"{count / 1000:.0f}k"
