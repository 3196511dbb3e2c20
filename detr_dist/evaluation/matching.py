"""Matching of detections and boxes by the rules of COCO's evaluation, for all images at once.

docs/evaluation.md explains the rules.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

from detr_dist.data.coco import CocoData
from detr_dist.evaluation.detections import DetectionRecords

MAX_DETECTIONS = 100
"""Only this many detections of an image and class count, the best ones, as in COCO's own evaluation."""
MIN_IOU = 0.5
"""The minimum IoU of a detection with the box that it matches."""
MIN_RADIUS_PX = 5.0
"""The minimum distance of centres, in pixels, within which a detection may match a box by its centre."""
MIN_CLOSENESS_OF_CENTRES = float(np.finfo(np.float64).min)
"""The minimum closeness of a detection with the box that it matches by its centre; others have -inf."""
PAIRS_AT_ONCE = 2**18
"""Pairs of detection and box whose IoU is computed at once: some 50 MB of memory."""

Columns = NDArray[np.float64]
Closeness = Callable[[Columns, Columns, NDArray[np.bool_]], Columns]
"""Function of boxes [4, P], other boxes [4, P], xywh, and whether those are crowds [P]: larger is closer."""


def best_of_each_image(data: CocoData, records: DetectionRecords) -> DetectionRecords:
    """Return the detections by descending score, at most `MAX_DETECTIONS` of an image and class.

    Equal scores are in the order of the images' ids; within an image they keep their order.
    """
    ordered = records.take(np.lexsort((data.image_ranks[records.image_rows], -records.scores)))
    rank = rank_in_group(ordered.image_rows * data.num_classes + ordered.labels)
    return (
        ordered
        if rank.max(initial=0) < MAX_DETECTIONS
        else ordered.take(np.flatnonzero(rank < MAX_DETECTIONS))
    )


def rank_in_group(group: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return for each element how many of the same group come before it."""
    by_group = np.argsort(group, kind="stable")
    ordered = group[by_group]
    rank = np.empty_like(group)
    rank[by_group] = np.arange(len(group)) - np.searchsorted(ordered, ordered)
    return rank


@dataclass(frozen=True)
class Candidates:
    """K detections that may match a box, in P pairs of detection and box."""

    rows: NDArray[np.int64]
    """[K], rows of the detections, in their order."""
    turns: NDArray[np.int64]
    """[K], how many candidates of the same image (and class) choose before this one."""
    positions: NDArray[np.int64]
    """[P], of the pair's detection in `rows`."""
    boxes: NDArray[np.int64]
    """[P], rows of boxes."""
    closeness: NDArray[np.float64]
    """[P], the IoU, or another measure that is larger for a closer pair."""


def iou_of_pairs(found_xywh: Columns, truth_xywh: Columns, iscrowd: NDArray[np.bool_]) -> Columns:
    """Return the IoU of boxes [4, P] with boxes [4, P], pair by pair.

    With a crowd, return the fraction of the first box that lies in it. Operations are in COCO's order, so
    that rounding decides the same way for pairs at a limit.
    """
    left, top, width, height = found_xywh
    truth_left, truth_top, truth_width, truth_height = truth_xywh
    across = np.minimum(left + width, truth_left + truth_width) - np.maximum(left, truth_left)
    down = np.minimum(top + height, truth_top + truth_height) - np.maximum(top, truth_top)
    intersection = across.clip(min=0) * down.clip(min=0)
    area = width * height
    union = np.where(iscrowd, area, area + truth_width * truth_height - intersection)
    iou: NDArray[np.float64] = np.divide(
        intersection, union, out=np.zeros_like(union), where=intersection > 0
    )
    return iou


def closeness_of_centres(found_xywh: Columns, truth_xywh: Columns, iscrowd: NDArray[np.bool_]) -> Columns:
    """Return the negative distance in pixels between the centres of boxes [4, P] and [4, P], pair by pair.

    It is -inf beyond half the side of the second box (the root of its area), or `MIN_RADIUS_PX` if that is
    more. For a crowd it is -inf unless the centre of the first box lies in it.
    """
    found, truth = (xywh[:2] + xywh[2:] / 2 for xywh in (found_xywh, truth_xywh))
    distance = np.hypot(*(found - truth))
    radius = np.maximum(np.sqrt(truth_xywh[2] * truth_xywh[3]) / 2, MIN_RADIUS_PX)
    is_in_crowd = (np.abs(found - truth) <= truth_xywh[2:] / 2).all(axis=0)
    return np.where(np.where(iscrowd, is_in_crowd, distance <= radius), -distance, -np.inf)


def find_candidates(
    data: CocoData,
    detections: DetectionRecords,
    *,
    by_class: bool,
    closeness: Closeness = iou_of_pairs,
    least: float = MIN_IOU,
) -> Candidates:
    """Pair detections with boxes of their image that are at least as close as `least`; by default, by IoU.

    Detections come by descending score. With `by_class` the classes must be equal too.
    """
    num_groups = data.num_classes if by_class else 1
    box_group = data.image_rows * num_groups + (data.box_classes if by_class else 0)
    group = detections.image_rows * num_groups + (detections.labels if by_class else 0)
    boxes_of_groups = np.argsort(box_group, kind="stable")
    first = np.searchsorted(box_group[boxes_of_groups], group, side="left")
    num_boxes = np.searchsorted(box_group[boxes_of_groups], group, side="right") - first
    # Coordinates are separate, [4, ...]: takes a third less time if many boxes overlap many detections.
    truth_xywh = np.ascontiguousarray(data.boxes_xywh_px.T)
    parts = [(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))]
    near = np.flatnonzero(num_boxes)
    for rows in np.array_split(near, 1 + num_boxes.sum() // PAIRS_AT_ONCE):
        found_xywh = detections.boxes_xyxy_px[rows].T.astype(np.float64, order="C")
        found_xywh[2:] -= found_xywh[:2]
        pair = np.repeat(np.arange(len(rows)), num_boxes[rows])
        ends = np.cumsum(num_boxes[rows])
        in_group = np.arange(len(pair)) - (ends - num_boxes[rows])[pair]
        box = boxes_of_groups[first[rows][pair] + in_group]
        close = closeness(found_xywh[:, pair], truth_xywh[:, box], data.iscrowd[box])
        enough = close >= least
        parts.append((rows[pair[enough]], box[enough], close[enough]))
    detection, boxes, close = (np.concatenate(column) for column in zip(*parts, strict=True))
    rows, positions = np.unique(detection, return_inverse=True)
    return Candidates(rows, rank_in_group(group[rows]), positions, boxes, close)


def match_at_ious(
    candidates: Candidates,
    iscrowd: NDArray[np.bool_],
    ignored: NDArray[np.bool_],
    least: ArrayLike,
) -> NDArray[np.int64]:
    """Return the row of the box that each candidate matches at each of T minimum IoUs, -1 for none: [T, K].

    Candidates choose in order of their score. Each takes the free box with the highest sufficient IoU, and an
    ignored box ([M], including crowds) only if there is no other. A crowd may match any number of detections.
    Of equal IoUs the later box wins. The same applies to another measure of closeness, with its minima.

    Source: COCOeval.evaluateImg of pycocotools. Instead of one image and detection at a time, the n-th
    detections of all images choose together.
    """
    turn = candidates.turns[candidates.positions]
    order = np.lexsort(
        (-candidates.boxes, -candidates.closeness, ignored[candidates.boxes], candidates.positions, turn)
    )
    positions, boxes, closeness = (
        column[order] for column in (candidates.positions, candidates.boxes, candidates.closeness)
    )
    limits = np.asarray(least)[:, None]
    found = np.full((len(limits), len(candidates.rows)), -1)
    is_free = np.ones((len(limits), len(iscrowd)), dtype=np.bool_)
    ends = np.cumsum(np.bincount(turn))
    for start, end in pairwise(np.append(0, ends)):
        chooser, choices = positions[start:end], boxes[start:end]
        can = (closeness[start:end] >= limits) & (is_free[:, choices] | iscrowd[choices])
        of_chooser = np.flatnonzero(np.diff(chooser, prepend=-1))
        none = end - start
        best = np.minimum.reduceat(np.where(can, np.arange(none), none), of_chooser, axis=1)
        at, which = np.nonzero(best < none)
        box = choices[best[at, which]]
        found[at, chooser[of_chooser][which]] = box
        is_free[at, box] = False
    return found


def match_detections(data: CocoData, detections: DetectionRecords, *, by_class: bool) -> NDArray[np.int64]:
    """Return the row of the box that each detection matches with an IoU of at least `MIN_IOU`: [D].

    Detections come by descending score; -1 means none.
    """
    candidates = find_candidates(data, detections, by_class=by_class)
    found = np.full(len(detections.scores), -1)
    (found[candidates.rows],) = match_at_ious(candidates, data.iscrowd, data.iscrowd, [MIN_IOU])
    return found
