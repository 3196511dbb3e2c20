"""COCO's average precision and recall, vectorised; docs/performance.md compares it with pycocotools."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from detr_dist.data.coco import CocoData
from detr_dist.evaluation.detections import DetectionRecords
from detr_dist.evaluation.matching import (
    MAX_DETECTIONS,
    Candidates,
    best_of_each_image,
    find_candidates,
    match_at_ious,
    rank_in_group,
)

IOUS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)
"""Recall values at which precision is sampled."""
SIZES = ("small", "medium", "large")
"""Sizes of boxes, by their area in pixels of the original image."""
METRICS_OF_CLASS = ("map", "precision", "recall", "f1", "threshold")
"""Ends of the names of the metrics that an evaluation has for each class."""

AREAS = ((0.0, 1e10), (0.0, 32.0**2), (32.0**2, 96.0**2), (96.0**2, 1e10))
"""Smallest and largest area, for all sizes together and for each; a box at a limit belongs to both sides."""
DETECTION_LIMITS = (1, 10, MAX_DETECTIONS)
"""Numbers of detections of an image and class for which recall is computed."""
MAX_NAME_BYTES = 250 - len("val__error_classification_dap")
"""Largest class name in a metric's name: MLflow takes 250 characters, which its file store uses in paths."""


@dataclass(frozen=True)
class CocoMetrics:
    """COCO's AP and AR."""

    metrics: dict[str, float]
    """Values by metric name; metrics without any box to compute them from are absent."""
    ap_by_size: NDArray[np.float64]
    """[C, 3], AP of each class for boxes of each of `SIZES`; NaN without any such box."""


def compute_coco_metrics(data: CocoData, records: DetectionRecords) -> CocoMetrics:
    """Compute COCO's metrics of all detections on `data`.

    AP at IoU 0.50:0.05:0.95: `map` over all classes, `<class>_map` of each, `map_small`, `map_medium` and
    `map_large` of boxes of that size; `map_50` and `map_75` at these IoUs; `mar_1`, `mar_10` and `mar_100`,
    the average recall with at most that many detections of each image and class.

    Source: COCOeval of pycocotools, equal to the last digits.
    """
    detections = best_of_each_image(data, records)
    candidates = find_candidates(data, detections, by_class=True)
    ranks = rank_in_group(detections.image_rows * data.num_classes + detections.labels)
    (precision, recall), *of_sizes = [
        _precision_and_recall(judge(data, detections, candidates, area=area), ranks) for area in AREAS
    ]
    values = {"map": precision, "map_50": precision[:, 0], "map_75": precision[:, 5]}
    values |= {f"map_{size}": each for size, (each, _) in zip(SIZES, of_sizes, strict=True)}
    values |= {f"mar_{limit}": recall[:, :, index] for index, limit in enumerate(DETECTION_LIMITS)}
    values |= {
        f"{name}_map": each for name, each in zip(metric_names(data.class_names), precision, strict=True)
    }
    means = {name: mean_of_known(each) for name, each in values.items()}
    ap_by_size = [[mean_of_known(each[label]) for each, _ in of_sizes] for label in range(data.num_classes)]
    return CocoMetrics(
        {name: mean for name, mean in means.items() if not np.isnan(mean)}, np.array(ap_by_size)
    )


@dataclass(frozen=True, eq=False)
class Judged:
    """D detections as true and false positives; those that are neither are ignored."""

    labels: NDArray[np.int64]
    """[D], class indices, by descending score."""
    is_tp: NDArray[np.bool_]
    """[T, D], at each of T minima of the IoU."""
    is_fp: NDArray[np.bool_]
    """[T, D]."""
    num_truth: NDArray[np.int64]
    """[C], boxes to find of each class."""


def judge(
    data: CocoData,
    detections: DetectionRecords,
    candidates: Candidates,
    *,
    area: tuple[float, float] = AREAS[0],
    least: ArrayLike = IOUS,
) -> Judged:
    """Match detections with boxes of one range of areas, at each minimum IoU.

    A detection is ignored if it matches a crowd or a box of another area, or no box and has another area
    itself.
    """
    low, high = area
    ignored = data.iscrowd | (data.areas < low) | (data.areas > high)
    found = match_at_ious(candidates, data.iscrowd, ignored, least)
    left, top, right, bottom = detections.boxes_xyxy_px.T.astype(np.float64)
    extents = (right - left) * (bottom - top)
    is_tp = np.zeros((len(found), len(extents)), dtype=np.bool_)
    is_tp[:, candidates.rows] = (found >= 0) & ~ignored[found]
    is_fp = np.tile((extents >= low) & (extents <= high), (len(found), 1))
    is_fp[:, candidates.rows] &= found < 0
    num_truth = np.bincount(data.box_classes[~ignored], minlength=data.num_classes)
    return Judged(detections.labels, is_tp, is_fp, num_truth)


def precision_of_classes(judged: Judged) -> NDArray[np.float64]:
    """Return the precision [C, T, R] at the R `RECALLS`; NaN for classes without boxes to find."""
    num_minima = len(judged.is_tp)
    precision = np.full((len(judged.num_truth), num_minima, len(RECALLS)), np.nan)
    for label in np.flatnonzero(judged.num_truth).tolist():
        own = np.flatnonzero(judged.labels == label)
        for index in range(num_minima):
            tp, fp = judged.is_tp[index, own], judged.is_fp[index, own]
            precision[label, index] = _precision_at_recalls(tp, fp, judged.num_truth[label])
    return precision


def average_precision(judged: Judged) -> NDArray[np.float64]:
    """Return the AP [C], the mean precision over `RECALLS` and minima; NaN without boxes to find."""
    ap: NDArray[np.float64] = precision_of_classes(judged).mean(axis=(1, 2))
    return ap


def _precision_and_recall(
    judged: Judged, ranks: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return precision [C, T, R] and recall [C, T, 3] with the `DETECTION_LIMITS`.

    Both are NaN for classes without boxes to find. `ranks` [D] is each detection's rank among those of its
    image and class.
    """
    recall = np.full((len(judged.num_truth), len(IOUS), len(DETECTION_LIMITS)), np.nan)
    for label in np.flatnonzero(judged.num_truth).tolist():
        own = np.flatnonzero(judged.labels == label)
        num_tp = [judged.is_tp[:, own[ranks[own] < limit]].sum(axis=1) for limit in DETECTION_LIMITS]
        recall[label] = np.stack(num_tp, axis=1) / judged.num_truth[label]
    return precision_of_classes(judged), recall


def _precision_at_recalls(
    is_tp: NDArray[np.bool_], is_fp: NDArray[np.bool_], num_truth: int
) -> NDArray[np.float64]:
    """Return the best precision [R] at each recall or a higher one, 0 if the recall is not reached.

    Detections are given by descending score.
    """
    num_tp = np.cumsum(is_tp, dtype=np.float64)
    precision = num_tp / (num_tp + np.cumsum(is_fp) + np.spacing(1))
    best_from_here = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
    reached: NDArray[np.float64] = best_from_here[np.searchsorted(num_tp / num_truth, RECALLS)]
    return reached


def mean_of_known(values: NDArray[np.float64]) -> float:
    """Return the mean of the values that are not NaN; NaN if there are none."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else np.nan


def metric_names(class_names: Sequence[str]) -> list[str]:
    """Return the form of each class name in metric names.

    Lower case, with _ for anything but letters, digits and _. A name that another class already has gets its
    class index appended. A name that is too long for MLflow is cut and ends in a hash.
    """
    names: dict[str, None] = {}
    for index, class_name in enumerate(class_names):
        name = _shortened(re.sub(r"\W+", "_", class_name.lower()).strip("_") or "class")
        while name in names:
            name = _shortened(f"{name}_{index}")
        names[name] = None
    return list(names)


def _shortened(name: str) -> str:
    encoded = name.encode()
    if len(encoded) <= MAX_NAME_BYTES:
        return name
    digest = hashlib.sha256(encoded).hexdigest()[:12]
    return f"{encoded[: MAX_NAME_BYTES - 13].decode(errors='ignore')}_{digest}"
