"""Precision, recall and F1 of the detections that a threshold lets through, and what is taken for what.

docs/evaluation.md has the definitions, with an example.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from detr_dist.data.coco import CocoData
from detr_dist.evaluation.coco_metrics import metric_names
from detr_dist.evaluation.matching import MIN_IOU, best_of_each_image, find_candidates, match
from detr_dist.evaluation.records import DetectionRecords


@dataclass(frozen=True)
class Counts:
    """Of the detections at or over a threshold."""

    tp: int
    """Detections that found a box."""
    fp: int
    """Detections that did not."""
    fn: int
    """Boxes that no detection found."""

    @property
    def precision(self) -> float:
        """0 without any detection."""
        return self.tp / max(self.tp + self.fp, 1)

    @property
    def recall(self) -> float:
        return self.tp / max(self.tp + self.fn, 1)

    @property
    def f1(self) -> float:
        return 2 * self.tp / max(2 * self.tp + self.fp + self.fn, 1)


@dataclass(frozen=True)
class Curve:
    """One class at every threshold that makes a difference: P distinct scores, the highest first."""

    thresholds: NDArray[np.float64]
    """[P]."""
    tp: NDArray[np.int64]
    """[P]."""
    fp: NDArray[np.int64]
    """[P]."""
    num_truth: int
    """Boxes of the class, at least 1."""

    @property
    def precision(self) -> NDArray[np.float64]:
        return self.tp / (self.tp + self.fp)

    @property
    def recall(self) -> NDArray[np.float64]:
        return self.tp / self.num_truth

    @property
    def f1(self) -> NDArray[np.float64]:
        return 2 * self.tp / (self.tp + self.fp + self.num_truth)

    def best_threshold(self) -> float | None:
        """The highest one of those with the best F1; none without any detection."""
        return float(self.thresholds[self.f1.argmax()]) if len(self.thresholds) else None

    def at(self, threshold: float) -> Counts:
        num_points = int((self.thresholds >= threshold).sum())
        if num_points == 0:
            return Counts(0, 0, self.num_truth)
        tp, fp = int(self.tp[num_points - 1]), int(self.fp[num_points - 1])
        return Counts(tp, fp, self.num_truth - tp)


@dataclass(frozen=True)
class ClassPoint:
    """One class at its threshold."""

    threshold: float | None
    """None where the best one was asked for and there is no detection to choose it by."""
    counts: Counts
    curve: Curve


@dataclass(frozen=True)
class Matches:
    """The detections that count, D at or over their class's threshold, and what each found."""

    detections: DetectionRecords
    boxes: NDArray[np.int64]
    """[D], the row of the box or crowd, of any class; -1 for none."""
    missed: NDArray[np.int64]
    """Rows of the boxes that none of them found."""

    def in_crowd(self, data: CocoData) -> NDArray[np.bool_]:
        """[D], those that lie in a crowd: neither right nor wrong."""
        return _in_crowd(data, self.boxes)


@dataclass(frozen=True)
class OperatingPoints:
    """All classes at their thresholds."""

    classes: list[ClassPoint | None]
    """By class index; None for a class without any box, of which nothing can be said."""
    matches: Matches
    """What `confusion` counts."""
    confusion: NDArray[np.int64]
    """[C + 1, C + 1], rows truth, columns predicted, the last of each is background."""

    @property
    def overall(self) -> Counts | None:
        """All classes' counts together; None if none has a box."""
        counts = [point.counts for point in self.classes if point is not None]
        if not counts:
            return None
        return Counts(sum(c.tp for c in counts), sum(c.fp for c in counts), sum(c.fn for c in counts))

    def metrics(self, class_names: Sequence[str]) -> dict[str, float]:
        """`precision`, `recall`, `f1`, and for each class with a box `<class>_precision` and so on, with
        `<class>_threshold`."""
        overall = self.overall
        metrics = {} if overall is None else _figures("", overall)
        for name, point in zip(metric_names(class_names), self.classes, strict=True):
            if point is not None:
                metrics |= _figures(f"{name}_", point.counts)
                if point.threshold is not None:
                    metrics[f"{name}_threshold"] = point.threshold
        return metrics


def known_thresholds(metrics: Mapping[str, float], class_names: Sequence[str]) -> dict[str, float]:
    """The thresholds among the logged figures of an evaluation, by class name."""
    keys = {
        name: f"val_{each}_threshold"
        for name, each in zip(class_names, metric_names(class_names), strict=True)
    }
    return {name: metrics[key] for name, key in keys.items() if key in metrics}


def _figures(prefix: str, counts: Counts) -> dict[str, float]:
    return {
        f"{prefix}precision": counts.precision,
        f"{prefix}recall": counts.recall,
        f"{prefix}f1": counts.f1,
    }


Thresholds = float | Literal["auto"] | Sequence[float | None]
"""The least score that counts: one for all classes, `auto` for that of each class's best F1, or one for each
class, where None lets nothing through."""


def operating_points(
    data: CocoData, records: DetectionRecords, score_threshold: Thresholds
) -> OperatingPoints:
    """All classes at their thresholds."""
    detections = best_of_each_image(data, records)
    found = match_all(data, detections, by_class=True)
    in_crowd = _in_crowd(data, found)
    num_truth = np.bincount(data.box_classes[~data.iscrowd], minlength=data.num_classes)
    classes: list[ClassPoint | None] = []
    for label, num_boxes in enumerate(num_truth.tolist()):
        own = (detections.labels == label) & ~in_crowd
        curve = _curve(detections.scores[own], found[own] >= 0, num_boxes)
        classes.append(_at_threshold(curve, score_threshold, label) if num_boxes else None)
    matches = _match_over_thresholds(data, detections, classes)
    return OperatingPoints(classes, matches, _confusion(data, matches))


def _at_threshold(curve: Curve, thresholds: Thresholds, label: int) -> ClassPoint:
    if isinstance(thresholds, str):
        threshold = curve.best_threshold()
    else:
        threshold = thresholds if isinstance(thresholds, int | float) else thresholds[label]
    return ClassPoint(threshold, curve.at(np.inf if threshold is None else threshold), curve)


def _curve(scores: NDArray[np.float32], is_tp: NDArray[np.bool_], num_truth: int) -> Curve:
    """From one class's detections by descending score."""
    last_of_score = np.flatnonzero(np.diff(scores, append=-1))  # equal scores pass a threshold together
    tp = np.cumsum(is_tp, dtype=np.int64)[last_of_score]
    return Curve(scores[last_of_score].astype(np.float64), tp, last_of_score + 1 - tp, num_truth)


def _match_over_thresholds(
    data: CocoData, detections: DetectionRecords, classes: Sequence[ClassPoint | None]
) -> Matches:
    thresholds = np.array(
        [np.inf if point is None or point.threshold is None else point.threshold for point in classes]
    )
    shown = detections.take(np.flatnonzero(detections.scores >= thresholds[detections.labels]))
    found = match_all(data, shown, by_class=False)
    is_missed = ~data.iscrowd
    is_missed[found[found >= 0]] = False
    return Matches(shown, found, np.flatnonzero(is_missed))


def _confusion(data: CocoData, matches: Matches) -> NDArray[np.int64]:
    background = data.num_classes
    counted = ~matches.in_crowd(data)
    of_class = np.append(data.box_classes, background)  # -1, nothing found, is the last
    missed = data.box_classes[matches.missed]
    truth = np.concatenate([of_class[matches.boxes[counted]], missed])
    predicted = np.concatenate([matches.detections.labels[counted], np.full_like(missed, background)])
    confusion = np.zeros((background + 1, background + 1), dtype=np.int64)
    np.add.at(confusion, (truth, predicted), 1)
    return confusion


def match_all(data: CocoData, detections: DetectionRecords, *, by_class: bool) -> NDArray[np.int64]:
    """The row of the box that each detection finds, -1 for none; [D] for D detections, the best score
    first."""
    candidates = find_candidates(data, detections, by_class=by_class)
    found = np.full(len(detections.scores), -1)
    (found[candidates.rows],) = match(candidates, data.iscrowd, data.iscrowd, [MIN_IOU])
    return found


def _in_crowd(data: CocoData, found: NDArray[np.int64]) -> NDArray[np.bool_]:
    return np.append(data.iscrowd, False)[found]
