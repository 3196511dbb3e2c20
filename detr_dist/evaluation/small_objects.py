"""Metrics for objects of a few pixels, whose IoU halves with an offset of two; docs/evaluation.md."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from detr_dist.data.coco import CocoData
from detr_dist.evaluation.calibration import calibration_errors
from detr_dist.evaluation.coco_metrics import AREAS, average_precision, judge, mean_of_known, metric_names
from detr_dist.evaluation.detections import DetectionRecords
from detr_dist.evaluation.matching import (
    MIN_CLOSENESS_OF_CENTRES,
    best_of_each_image,
    closeness_of_centres,
    find_candidates,
)
from detr_dist.evaluation.thresholds import ClassPoint

LOW_IOU = 0.25
HIGH_PRECISION = 0.95


def small_object_metrics(
    data: CocoData,
    records: DetectionRecords,
    points: Sequence[ClassPoint | None],
    size_bands: Sequence[int],
) -> dict[str, float]:
    """Compute the metrics for small objects, by name, of each class and as means over the classes.

    AP at IoU 0.25 and by the distance of centres, AP in each band of sizes, recall at 95 % precision with its
    threshold, and the calibration error. What cannot be computed is absent.

    Args:
        data: The annotations.
        records: All detections.
        points: The classes' curves, as of `operating_points`.
        size_bands: Sides in pixels between the bands, ascending.
    """
    detections = best_of_each_image(data, records)
    low = find_candidates(data, detections, by_class=True, least=LOW_IOU)
    centres = find_candidates(
        data, detections, by_class=True, closeness=closeness_of_centres, least=MIN_CLOSENESS_OF_CENTRES
    )
    ap = {
        "map_25": average_precision(judge(data, detections, low, least=[LOW_IOU])),
        "map_center": average_precision(judge(data, detections, centres, least=[MIN_CLOSENESS_OF_CENTRES])),
    }
    if size_bands:
        candidates = find_candidates(data, detections, by_class=True)
        ap |= {
            f"map_{name}": average_precision(judge(data, detections, candidates, area=area))
            for name, area in bands(size_bands)
        }
    recalls, thresholds = _at_high_precision(points)
    values = ap | {"recall_p95": recalls, "calibration_error": calibration_errors(points)}
    means = {name: mean_of_known(each) for name, each in values.items()}
    of_class = {"center_map" if name == "map_center" else name: each for name, each in values.items()}
    found = means | by_class(data.class_names, of_class | {"threshold_p95": thresholds})
    return {name: value for name, value in found.items() if not np.isnan(value)}


def bands(edges: Sequence[int]) -> Iterator[tuple[str, tuple[float, float]]]:
    """Yield the name of each band of sizes, and its smallest and largest area.

    The name is that in metrics, such as `lt8`, `8_16` and `gt16`; a box at an edge belongs to both bands.
    Without edges there are none.
    """
    if not edges:
        return
    smallest, largest = AREAS[0]
    areas = pairwise([smallest, *(float(edge) ** 2 for edge in edges), largest])
    names = [f"lt{edges[0]}", *(f"{low}_{high}" for low, high in pairwise(edges)), f"gt{edges[-1]}"]
    yield from zip(names, areas, strict=True)


def by_class(class_names: Sequence[str], values: Mapping[str, NDArray[np.float64]]) -> dict[str, float]:
    """Return `<class>_<name>` for each class and each of the values [C] by name."""
    keys = metric_names(class_names)
    return {
        f"{key}_{name}": float(each[label]) for label, key in enumerate(keys) for name, each in values.items()
    }


def _at_high_precision(
    points: Sequence[ClassPoint | None],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return each class's recall [C] at high precision, and its threshold [C]; NaN where not defined."""
    found = [(None, None) if each is None else each.curve.at_precision(HIGH_PRECISION) for each in points]
    recalls, thresholds = np.array(found, dtype=np.float64).reshape(-1, 2).T
    return recalls, thresholds
