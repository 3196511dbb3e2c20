"""COCO's average precision and recall.

pycocotools computes the same from Python objects, one image at a time; docs/performance.md compares the two.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from detr_dist.data.coco import CocoData
from detr_dist.evaluation.matching import (
    MAX_DETECTIONS,
    Candidates,
    best_of_each_image,
    find_candidates,
    match,
    rank_in_group,
)
from detr_dist.evaluation.records import DetectionRecords

IOUS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)
"""Where precision is read off."""
SIZES = ("small", "medium", "large")
"""Of boxes, by their area in pixels of the original image."""
AREAS = ((0.0, 1e10), (0.0, 32.0**2), (32.0**2, 96.0**2), (96.0**2, 1e10))
"""From and to, of all sizes and of each; a box at a limit belongs to both sides."""
MAX_NAME_BYTES = 250 - len("val__precision")
"""Of a class in a metric's name: MLflow takes 250 characters, and its file store makes file names of them."""
DETECTION_LIMITS = (1, 10, MAX_DETECTIONS)
"""Detections of an image and class, for recall."""


@dataclass(frozen=True)
class CocoFigures:
    """COCO's AP and AR."""

    metrics: dict[str, float]
    """By name; those without any truth to compute them from are absent."""
    ap_by_size: NDArray[np.float64]
    """[C, 3], AP of each class for boxes of each of `SIZES`; nan without any such box."""


def coco_figures(data: CocoData, records: DetectionRecords) -> CocoFigures:
    """COCO's figures of all detections on `data`.

    AP at IoU 0.50:0.05:0.95: `map` over all classes, `<class>_map` of each, `map_small`, `map_medium` and
    `map_large` of boxes of that size; `map_50` and `map_75` at these IoUs; `mar_1`, `mar_10` and `mar_100`,
    the average recall with so many detections of each image and class.

    Source: COCOeval of pycocotools, equal to the last digits.
    """
    detections = best_of_each_image(data, records)
    candidates = find_candidates(data, detections, by_class=True)
    ranks = rank_in_group(detections.image_rows * data.num_classes + detections.labels)
    of_all, *of_sizes = [
        _read_off(data, detections, ranks, _judge(data, detections, candidates, area)) for area in AREAS
    ]
    precision = of_all.precision
    figures = {"map": precision, "map_50": precision[:, 0], "map_75": precision[:, 5]}
    figures |= {f"map_{size}": each.precision for size, each in zip(SIZES, of_sizes, strict=True)}
    figures |= {f"mar_{limit}": of_all.recall[:, :, index] for index, limit in enumerate(DETECTION_LIMITS)}
    figures |= {
        f"{name}_map": each for name, each in zip(metric_names(data.class_names), precision, strict=True)
    }
    means = {name: _mean_of_known(values) for name, values in figures.items()}
    ap_by_size = [
        [_mean_of_known(each.precision[label]) for each in of_sizes] for label in range(data.num_classes)
    ]
    return CocoFigures(
        {name: mean for name, mean in means.items() if not np.isnan(mean)}, np.array(ap_by_size)
    )


@dataclass(frozen=True)
class _Verdicts:
    """Of D detections at T least overlaps, on boxes of one range of areas."""

    num_truth: NDArray[np.int64]
    """[C], boxes to find."""
    is_right: NDArray[np.bool_]
    """[T, D], those that found one."""
    is_wrong: NDArray[np.bool_]
    """[T, D], those that found nothing. Neither: they found an ignored box, or are of another size."""


def _judge(
    data: CocoData, detections: DetectionRecords, candidates: Candidates, area: tuple[float, float]
) -> _Verdicts:
    low, high = area
    ignored = data.iscrowd | (data.areas < low) | (data.areas > high)
    found = match(candidates, data.iscrowd, ignored, IOUS)
    left, top, right, bottom = detections.boxes_xyxy_px.T.astype(np.float64)
    extents = (right - left) * (bottom - top)
    is_right = np.zeros((len(IOUS), len(extents)), dtype=np.bool_)
    is_right[:, candidates.rows] = (found >= 0) & ~ignored[found]
    is_wrong = np.tile((extents >= low) & (extents <= high), (len(IOUS), 1))
    is_wrong[:, candidates.rows] &= found < 0
    return _Verdicts(np.bincount(data.box_classes[~ignored], minlength=data.num_classes), is_right, is_wrong)


@dataclass(frozen=True)
class _ReadOff:
    """nan for classes without any box."""

    precision: NDArray[np.float64]
    """[C, T, R], at the least overlaps `IOUS` and recalls `RECALLS`."""
    recall: NDArray[np.float64]
    """[C, T, 3], with the numbers of detections `DETECTION_LIMITS`."""


def _read_off(
    data: CocoData, detections: DetectionRecords, ranks: NDArray[np.int64], verdicts: _Verdicts
) -> _ReadOff:
    """`ranks` [D] of each detection among those of its image and class."""
    shape = data.num_classes, len(IOUS)
    precision, recall = (
        np.full((*shape, len(RECALLS)), np.nan),
        np.full((*shape, len(DETECTION_LIMITS)), np.nan),
    )
    for label in np.flatnonzero(verdicts.num_truth).tolist():
        own, num_truth = np.flatnonzero(detections.labels == label), verdicts.num_truth[label]
        for index in range(len(IOUS)):
            is_right = verdicts.is_right[index, own]
            precision[label, index] = _precision_at_recalls(
                is_right, verdicts.is_wrong[index, own], num_truth
            )
            num_right = [is_right[ranks[own] < limit].sum() for limit in DETECTION_LIMITS]
            recall[label, index] = np.array(num_right) / num_truth
    return _ReadOff(precision, recall)


def _precision_at_recalls(
    is_right: NDArray[np.bool_], is_wrong: NDArray[np.bool_], num_truth: int
) -> NDArray[np.float64]:
    """[R], the best precision at each recall or beyond, 0 where it is not reached; from detections by
    descending score."""
    num_right = np.cumsum(is_right, dtype=np.float64)
    precision = num_right / (num_right + np.cumsum(is_wrong) + np.spacing(1))
    best_from_here = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
    reached: NDArray[np.float64] = best_from_here[np.searchsorted(num_right / num_truth, RECALLS)]
    return reached


def _mean_of_known(values: NDArray[np.float64]) -> float:
    """nan if there is none."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else np.nan


def metric_names(class_names: Sequence[str]) -> list[str]:
    """Each class name as it stands in metric names: lower case, anything but letters, digits and _ replaced
    by _.

    A name that another class has already gets its class index appended. A name that is too long for MLflow
    ends in a hash of it.
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
