"""The rules of matching and of average precision as loops over single detections."""

from collections.abc import Callable

import numpy as np

from detr_dist.data.coco import CocoData
from detr_dist.evaluation.detections import DetectionRecords

Closeness = Callable[[np.ndarray, np.ndarray, bool], float | None]
"""Function of a detection xyxy, a box xywh and whether that is a crowd; None if they cannot match."""


def slow_iou(detection: np.ndarray, truth_xywh: np.ndarray, crowd: bool) -> float:
    left, top, right, bottom = (float(v) for v in detection)
    x, y, w, h = (float(v) for v in truth_xywh)
    width, height = min(right, x + w) - max(left, x), min(bottom, y + h) - max(top, y)
    if width <= 0 or height <= 0:
        return 0.0
    area = (right - left) * (bottom - top)
    return width * height / (area if crowd else area + w * h - width * height)


def iou_from(least: float) -> Closeness:
    """Return the IoU as closeness, with its minimum."""

    def closeness(detection: np.ndarray, truth_xywh: np.ndarray, crowd: bool) -> float | None:
        iou = slow_iou(detection, truth_xywh, crowd)
        return iou if iou >= least else None

    return closeness


def slow_match(
    data: CocoData, records: DetectionRecords, rows: list[int], by_class: bool, closeness: Closeness
) -> dict[int, int | str | None]:
    """Return for each detection of `rows` its box, None, or "crowd"."""
    outcome: dict[int, int | str | None] = {}
    for image in range(len(data)):
        taken = set()
        own = [row for row in rows if records.image_rows[row] == image]
        for row in sorted(own, key=lambda row: -records.scores[row]):  # stable
            best, closest, in_crowd = None, -np.inf, False
            for box in range(data.box_offsets[image], data.box_offsets[image + 1]):
                if by_class and data.box_classes[box] != records.labels[row]:
                    continue
                crowd = bool(data.iscrowd[box])
                close = closeness(records.boxes_xyxy_px[row], data.boxes_xywh_px[box], crowd)
                if crowd:
                    in_crowd = in_crowd or close is not None
                elif close is not None and box not in taken and close >= closest:
                    best, closest = box, close
            if best is not None:
                taken.add(best)
                outcome[row] = best
            else:
                outcome[row] = "crowd" if in_crowd else None
    return outcome


def considered(records: DetectionRecords) -> list[int]:
    """Return the hundred best detections of each image and class."""
    rows = []
    for image in set(records.image_rows.tolist()):
        for label in set(records.labels.tolist()):
            own = np.flatnonzero((records.image_rows == image) & (records.labels == label)).tolist()
            rows += sorted(own, key=lambda row: -records.scores[row])[:100]
    return sorted(rows)


def slow_ap(ranked: list[bool], num_truth: int) -> float:
    """Return COCO's AP of true (True) and false positives by descending score."""
    points = []
    for end in range(1, 1 + len(ranked)):
        tp = sum(ranked[:end])
        points.append((tp / num_truth, tp / end))
    best = [
        max((precision for reached, precision in points if reached >= recall), default=0.0)
        for recall in np.linspace(0, 1, 101)
    ]
    return float(np.mean(best))
