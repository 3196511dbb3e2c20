"""Calibration: whether a score is the precision of the detections with that score; docs/evaluation.md."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from detr_dist.evaluation.thresholds import ClassPoint, Curve

EDGES = np.arange(1, 11) / 10
"""Edges of the bins of scores. Lower scores are left out: nearly all queries have them, and find nothing."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """Detections in bins of their score; bins without any are left out."""

    counts: NDArray[np.int64]
    """[B], detections that are true or false positives."""
    scores: NDArray[np.float64]
    """[B], their mean score."""
    precision: NDArray[np.float64]
    """[B], the fraction of true positives."""

    @property
    def error(self) -> float | None:
        """Return the expected calibration error; None without detections of at least the first edge.

        Source: Naeini et al., AAAI 2015, with precision for accuracy.
        """
        if not len(self.counts):
            return None
        return float(np.average(np.abs(self.scores - self.precision), weights=self.counts))


def calibration_of(curve: Curve) -> Calibration:
    """Count the detections of a curve in bins of their score."""
    # Bin 0 has the scores below the first edge; a score of 1 belongs to the last bin.
    bins = np.minimum(np.searchsorted(EDGES, curve.thresholds, side="right"), len(EDGES) - 1)
    num_tp, num = (np.diff(each, prepend=0) for each in (curve.tp, curve.tp + curve.fp))
    sums = [
        np.bincount(bins, weights=each, minlength=len(EDGES))[1:]
        for each in (num, num * curve.thresholds, num_tp)
    ]
    counts, scores, true_positives = (each[sums[0] > 0] for each in sums)
    return Calibration(counts.astype(np.int64), scores / counts, true_positives / counts)


def calibration_errors(points: Sequence[ClassPoint | None]) -> NDArray[np.float64]:
    """Return the expected calibration error of each class, [C]; NaN where it is not defined."""
    errors = [None if point is None else calibration_of(point.curve).error for point in points]
    return np.array([np.nan if error is None else error for error in errors])
