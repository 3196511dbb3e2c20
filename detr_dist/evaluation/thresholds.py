"""Precision, recall and F1 of the detections at or over a score threshold, and the confusion matrix.

docs/evaluation.md has the definitions, with an example.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from detr_dist.data.coco import CocoData
from detr_dist.evaluation.coco_metrics import metric_names
from detr_dist.evaluation.detections import DetectionRecords
from detr_dist.evaluation.matching import best_of_each_image, find_candidates, match_detections

Thresholds = float | Literal["auto"] | Sequence[float | None]
"""The minimum score that counts: one for all classes, `auto` for the one with each class's best F1, or one
for each class, where None excludes all detections."""


class Counts(NamedTuple):
    """True positives, false positives and false negatives at a threshold."""

    tp: int
    fp: int
    fn: int

    @property
    def precision(self) -> float:
        """Fraction of detections that are true positives; 0 without any detection."""
        return self.tp / max(self.tp + self.fp, 1)

    @property
    def recall(self) -> float:
        """Fraction of boxes that are found; 0 without any box."""
        return self.tp / max(self.tp + self.fn, 1)

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall; 0 without any box or detection."""
        return 2 * self.tp / max(2 * self.tp + self.fp + self.fn, 1)

    def metrics(self, prefix: str = "") -> dict[str, float]:
        """Return `precision`, `recall` and `f1`, with a prefix before each name."""
        return {f"{prefix}{name}": getattr(self, name) for name in ("precision", "recall", "f1")}


@dataclass(frozen=True)
class Curve:
    """One class at each of the P distinct scores that can be its threshold, the highest first."""

    thresholds: NDArray[np.float64]
    tp: NDArray[np.int64]
    fp: NDArray[np.int64]
    num_truth: int
    """Boxes of the class, at least 1."""

    @classmethod
    def of_steps(
        cls, scores: NDArray[Any], tp: NDArray[np.int64], fp: NDArray[np.int64], num_truth: int
    ) -> "Curve":
        """Build a curve from descending scores and the contribution of each to the counts."""
        last_of_score = np.flatnonzero(np.diff(scores, append=-1))  # equal scores pass a threshold together
        return cls(
            scores[last_of_score].astype(np.float64),
            np.cumsum(tp)[last_of_score],
            np.cumsum(fp)[last_of_score],
            num_truth,
        )

    @property
    def precision(self) -> NDArray[np.float64]:
        """Precision at each score, [P]."""
        return self.tp / (self.tp + self.fp)

    @property
    def recall(self) -> NDArray[np.float64]:
        """Recall at each score, [P]."""
        return self.tp / self.num_truth

    @property
    def f1(self) -> NDArray[np.float64]:
        """F1 at each score, [P]."""
        return 2 * self.tp / (self.tp + self.fp + self.num_truth)

    def best_threshold(self) -> float | None:
        """Return the highest threshold with the best F1; None without any detection."""
        return float(self.thresholds[self.f1.argmax()]) if len(self.thresholds) else None

    def at_precision(self, precision: float) -> tuple[float, float | None]:
        """Return the largest recall with at least this precision, and its threshold, the highest in a tie.

        Recall 0 and None if no threshold has this precision.
        """
        recall = np.where(self.precision >= precision, self.recall, 0.0)
        best = int(recall.argmax()) if len(recall) else 0
        if not recall[best : best + 1].any():
            return 0.0, None
        return float(recall[best]), float(self.thresholds[best])

    def at(self, threshold: float | None) -> Counts:
        """Return the counts at a threshold; None excludes all detections."""
        num_points = 0 if threshold is None else int((self.thresholds >= threshold).sum())
        if num_points == 0:
            return Counts(0, 0, self.num_truth)
        tp, fp = int(self.tp[num_points - 1]), int(self.fp[num_points - 1])
        return Counts(tp, fp, self.num_truth - tp)


def pooled(curves: Sequence[Curve]) -> Curve:
    """Return the curve of all classes together at a common threshold: their counts are added."""
    scores = np.concatenate([curve.thresholds for curve in curves])
    order = np.argsort(-scores, kind="stable")
    tp, fp = (
        np.concatenate([np.diff(getattr(curve, name), prepend=0) for curve in curves])[order]
        for name in ("tp", "fp")
    )
    return Curve.of_steps(scores[order], tp, fp, sum(curve.num_truth for curve in curves))


@dataclass(frozen=True)
class ClassPoint:
    """One class at its threshold."""

    threshold: float | None
    """None if the best one was requested and there is no detection to choose it from."""
    curve: Curve

    @property
    def counts(self) -> Counts:
        """The counts at the threshold."""
        return self.curve.at(self.threshold)


@dataclass(frozen=True)
class Matches:
    """The D detections at or above their class's threshold, and the box of any class that each matches."""

    detections: DetectionRecords
    boxes: NDArray[np.int64]
    """[D], the row of the box or crowd; -1 for none."""
    in_crowd: NDArray[np.bool_]
    """[D], whether it matches a crowd, so that it is neither a true nor a false positive."""
    is_duplicate: NDArray[np.bool_]
    """[D], whether it matches none because another detection has taken its box of the same class."""
    false_negatives: NDArray[np.int64]
    """Rows of the boxes that no detection matches."""


@dataclass(frozen=True)
class OperatingPoints:
    """All classes at their thresholds."""

    classes: list[ClassPoint | None]
    """The classes by index; None for a class without any box."""
    matches: Matches
    """The matches that `confusion` counts."""
    confusion: NDArray[np.int64]
    """[C + 1, C + 1], rows truth, columns predicted; the last row and column are the background."""

    @property
    def overall(self) -> Counts | None:
        """Return the sum of all classes' counts; None if no class has a box."""
        counts = [point.counts for point in self.classes if point is not None]
        return Counts(*map(sum, zip(*counts, strict=True))) if counts else None

    def metrics(self, class_names: Sequence[str]) -> dict[str, float]:
        """Return `precision`, `recall` and `f1`, over all classes and as `<class>_precision` etc. for each.

        Classes with a threshold also have `<class>_threshold`; those without any box have no metrics.
        """
        overall = self.overall
        metrics = {} if overall is None else overall.metrics()
        for name, point in zip(metric_names(class_names), self.classes, strict=True):
            if point is not None:
                metrics |= point.counts.metrics(f"{name}_")
                if point.threshold is not None:
                    metrics[f"{name}_threshold"] = point.threshold
        return metrics


def known_thresholds(metrics: Mapping[str, float], class_names: Sequence[str]) -> dict[str, float]:
    """Return the thresholds among the logged metrics of an evaluation, by class name."""
    keys = zip(class_names, metric_names(class_names), strict=True)
    found = {name: metrics.get(f"val_{key}_threshold") for name, key in keys}
    return {name: threshold for name, threshold in found.items() if threshold is not None}


def operating_points(data: CocoData, records: DetectionRecords, thresholds: Thresholds) -> OperatingPoints:
    """Count the detections of each class at its threshold."""
    detections = best_of_each_image(data, records)
    boxes = match_detections(data, detections, by_class=True)
    in_crowd = _in_crowd(data, boxes)
    num_truth = data.boxes_per_class
    classes: list[ClassPoint | None] = [None] * data.num_classes
    for label in np.flatnonzero(num_truth).tolist():
        own = (detections.labels == label) & ~in_crowd
        is_tp = boxes[own] >= 0
        scores, ones = detections.scores[own], is_tp.astype(np.int64)
        curve = Curve.of_steps(scores, ones, 1 - ones, int(num_truth[label]))
        if isinstance(thresholds, str):
            threshold = curve.best_threshold()
        else:
            threshold = thresholds if isinstance(thresholds, int | float) else thresholds[label]
        classes[label] = ClassPoint(threshold, curve)
    matches = _match_over_thresholds(data, detections, classes)
    return OperatingPoints(classes, matches, _confusion(data, matches))


def _match_over_thresholds(
    data: CocoData, detections: DetectionRecords, classes: Sequence[ClassPoint | None]
) -> Matches:
    thresholds = np.array(
        [np.inf if point is None or point.threshold is None else point.threshold for point in classes]
    )
    counted = detections.take(np.flatnonzero(detections.scores >= thresholds[detections.labels]))
    boxes = match_detections(data, counted, by_class=False)
    is_unmatched = ~data.iscrowd
    is_unmatched[boxes[boxes >= 0]] = False
    is_duplicate = np.zeros(len(boxes), dtype=np.bool_)
    is_duplicate[find_candidates(data, counted, by_class=True).rows] = True
    is_duplicate &= boxes < 0  # it would match a crowd, or a box that is free
    return Matches(counted, boxes, _in_crowd(data, boxes), is_duplicate, np.flatnonzero(is_unmatched))


def _confusion(data: CocoData, matches: Matches) -> NDArray[np.int64]:
    background = data.num_classes
    of_class = np.append(data.box_classes, background)  # index -1, no match, selects the background
    unmatched = data.box_classes[matches.false_negatives]
    truth = np.concatenate([of_class[matches.boxes[~matches.in_crowd]], unmatched])
    predicted = np.concatenate(
        [matches.detections.labels[~matches.in_crowd], np.full_like(unmatched, background)]
    )
    confusion = np.zeros((background + 1, background + 1), dtype=np.int64)
    np.add.at(confusion, (truth, predicted), 1)
    return confusion


def _in_crowd(data: CocoData, boxes: NDArray[np.int64]) -> NDArray[np.bool_]:
    return np.append(data.iscrowd, False)[boxes]
