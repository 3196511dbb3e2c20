"""Precision against recall and F1 against the threshold, with the thresholds that count."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from detr_dist.evaluation.figures import empty_figure, new_figure
from detr_dist.evaluation.lettering import class_label
from detr_dist.evaluation.matching import MIN_IOU
from detr_dist.evaluation.operating_point import ClassPoint, Counts, Curve

MOST_NAMED = 10  # as many as colours
"""Curves with a colour and a name of their own; of more classes the best and the worst have one."""
COLOURS = ("C0", "C1", "C2", "C3", "C4", "C5", "C6", "C8", "C9", "navy")
GREY = "0.8"

Points = NDArray[np.float64]
"""[P, 2], x and y."""


class _View(NamedTuple):
    """What of the curves is drawn."""

    title: str
    x: str
    y: str
    points: Callable[[Curve], Points]
    dot: Callable[[Counts, float], tuple[float, float]]  # at the threshold that counts


def precision_recall_figure(class_names: Sequence[str], classes: Sequence[ClassPoint | None]) -> Figure:
    """Every class with a box, and all together, each with its operating point."""
    view = _View(
        f"Precision and recall at IoU {MIN_IOU:g}",
        "recall",
        "precision",
        points=lambda curve: np.stack([curve.recall, curve.precision], axis=1),
        dot=lambda counts, _: (counts.recall, counts.precision),
    )
    return _figure(view, class_names, classes)


def f1_figure(class_names: Sequence[str], classes: Sequence[ClassPoint | None]) -> Figure:
    """The same classes, by the least score of the detections that count."""
    view = _View(
        f"F1 at IoU {MIN_IOU:g}, by score threshold",
        "score threshold",
        "F1",
        points=_f1_over_threshold,
        dot=lambda counts, threshold: (threshold, counts.f1),
    )
    return _figure(view, class_names, classes)


def _f1_over_threshold(curve: Curve) -> Points:
    """Steps from 1 down to 0: a threshold lets its own score through, and up to the next nothing changes."""
    thresholds = np.concatenate([[1.0], curve.thresholds, [0.0]])
    f1 = np.concatenate([[0.0], curve.f1])
    return np.stack([np.repeat(thresholds, 2)[1:-1], np.repeat(f1, 2)], axis=1)


def pooled(curves: Sequence[Curve]) -> Curve:
    """All classes together at one threshold for all: their counts are added up."""
    thresholds = np.concatenate([curve.thresholds for curve in curves])
    order = np.argsort(-thresholds, kind="stable")
    tp, fp = (
        np.concatenate([np.diff(getattr(curve, name), prepend=0) for curve in curves])[order].cumsum()
        for name in ("tp", "fp")
    )
    last = np.flatnonzero(np.diff(thresholds[order], append=-1))  # equal scores pass together
    return Curve(thresholds[order][last], tp[last], fp[last], sum(curve.num_truth for curve in curves))


def _figure(view: _View, class_names: Sequence[str], classes: Sequence[ClassPoint | None]) -> Figure:
    known = [(label, point) for label, point in enumerate(classes) if point is not None]
    if not known:
        return empty_figure(view.title)
    figure = new_figure(view.title, 9, 5.5)
    ticks = np.linspace(0, 1, 6)
    axes = figure.add_subplot(xlabel=view.x, ylabel=view.y, xticks=ticks, yticks=ticks)
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    axes.grid(color="0.93")
    axes.set_axisbelow(True)
    known.sort(key=lambda pair: -pair[1].counts.f1)
    half = MOST_NAMED // 2
    others = known[half:-half] if len(known) > MOST_NAMED else []
    unnamed = [view.points(point.curve) for _, point in others]
    axes.add_collection(LineCollection(unnamed, colors=GREY, linewidths=0.6))
    entries: list[tuple[Line2D, str]] = []
    for number, (label, point) in enumerate(known[:half] + known[half + len(others) :]):
        if others and number == half:
            entries.append((Line2D([], [], color=GREY), f"{len(others):,} classes between"))
        line = _draw_curve(axes, view, point, color=COLOURS[number], linewidth=1.4)
        entries.append((line, _entry(class_label(label, class_names[label]), point)))
    if len(known) > 1:
        together = _together([point for _, point in known])
        line = _draw_curve(axes, view, together, color="black", linewidth=2.2)
        entries.insert(0, (line, _entry("all, at one threshold", together)))
    lines, texts = zip(*entries, strict=True)
    legend = "F1 and threshold"
    figure.legend(lines, texts, loc="outside right upper", frameon=False, title=legend, alignment="left")
    return figure


def _draw_curve(axes: Axes, view: _View, point: ClassPoint, *, color: str, linewidth: float) -> Line2D:
    """With a dot at the threshold that counts."""
    (line,) = axes.plot(*view.points(point.curve).T, color=color, linewidth=linewidth)
    if point.threshold is not None:
        x, y = view.dot(point.counts, point.threshold)
        axes.plot(x, y, "o", color=color, markeredgecolor="white", markersize=7, zorder=3, clip_on=False)
    return line


def _together(points: Sequence[ClassPoint]) -> ClassPoint:
    """At the threshold that all have, or the best one."""
    curve = pooled([point.curve for point in points])
    thresholds = {point.threshold for point in points}
    threshold = thresholds.pop() if len(thresholds) == 1 else curve.best_threshold()
    return ClassPoint(threshold, curve.at(np.inf if threshold is None else threshold), curve)


def _entry(name: str, point: ClassPoint) -> str:
    if point.threshold is None:
        return f"{name}: no detections"
    return f"{name}: {point.counts.f1:.2f} at {point.threshold:.2f}"
