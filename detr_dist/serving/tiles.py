"""Detection in windows of an image: the merging of what is found in them.

Shapes: W windows of an image, D detections in all of them together.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

MERGED_FROM = 1000
"""Most detections of an image that are merged, the best ones of all windows."""

SAME_IOU = 0.5
"""Intersection over union from which detections of two windows are the same object."""

SAME_OVER_SMALLER = 0.6
"""Intersection over the smaller box from which a part at a window's border is the same object."""

NEAR_BORDER = 0.01
"""Distance from a window's border, as a fraction of its side, up to which a detection counts as cut."""

WORTH_OF_CUT = 0.5
"""Factor for the score of a cut detection in the order of merging."""

BATCHES_AHEAD = 16
"""Full batches that are formed of the windows of some images before those of the next images: few enough that
their detections fit into memory, and enough that few batches are smaller than the others."""


class Found(NamedTuple):
    """D detections in a window or an image."""

    boxes_xyxy_px: NDArray[np.float32]
    """[D, 4], in its pixels."""
    scores: NDArray[np.float32]
    """[D], descending."""
    labels: NDArray[np.int64]
    """[D], class indices."""


def found_in_image(found: Sequence[Found], windows: NDArray[np.int64], *, most: int) -> Found:
    """Return the detections in an image, at most `most`, of those in each of its windows [W, 4]."""
    if len(windows) == 1:
        return found[0]
    boxes, scores, labels = (np.concatenate(each) for each in zip(*found, strict=True))
    window_rows = np.repeat(np.arange(len(found)), [len(each.scores) for each in found])
    boxes = boxes + np.tile(windows[window_rows, :2], 2).astype(np.float32)
    kept = merge_windows(boxes, scores, labels, window_rows, windows, most=most)
    return Found(boxes[kept], scores[kept], labels[kept])


def rounds(nums_windows: Sequence[int], batch_size: int) -> list[range]:
    """Divide images with these numbers of windows into those whose windows form batches together."""
    starts, num_windows = [0], 0
    for image, number in enumerate(nums_windows):
        if num_windows >= BATCHES_AHEAD * batch_size:
            starts.append(image)
            num_windows = 0
        num_windows += number
    return [range(*each) for each in pairwise([*starts, len(nums_windows)])] if nums_windows else []


def merge_windows(
    boxes_xyxy_px: NDArray[np.float32],
    scores: NDArray[np.float32],
    labels: NDArray[np.int64],
    window_rows: NDArray[np.int64],
    windows: NDArray[np.int64],
    *,
    most: int,
) -> NDArray[np.int64]:
    """Choose the detections of an image that remain of those in its windows, at most `most`.

    Two detections of one class in different windows are the same object if their intersection over union
    reaches `SAME_IOU`, or, where a window's border inside the image cuts one of them, if their intersection
    over the smaller box reaches `SAME_OVER_SMALLER`. Of these the better one remains, where the score of a
    cut one counts `WORTH_OF_CUT` times. Detections of one window never exclude each other: the network tells
    one object once, and players do overlap.

    Args:
        boxes_xyxy_px: [D, 4], in pixels of the image.
        scores: [D].
        labels: [D], class indices.
        window_rows: [D], the row in `windows` of each detection.
        windows: [W, 4], from `grid.Grid.windows`.
        most: The largest number of detections that remain.

    Returns:
        Indices of what remains by descending score; equal scores keep their order.
    """
    cut = _are_cut(boxes_xyxy_px, windows, window_rows)
    worth = np.where(cut, np.float32(WORTH_OF_CUT) * scores, scores)
    order = np.argsort(-worth, kind="stable")[:MERGED_FROM]
    chosen = list[int]()
    for label in np.unique(labels[order]):
        own = order[labels[order] == label]  # classes do not mix
        same = _are_same(boxes_xyxy_px[own], cut[own], window_rows[own])
        remaining = np.ones(len(own), dtype=np.bool_)
        for index in range(len(own)):
            if remaining[index]:
                remaining[index + 1 :] &= ~same[index, index + 1 :]
        chosen += own[remaining].tolist()
    found = np.array(sorted(chosen, key=lambda index: (-worth[index], index))[:most], dtype=np.int64)
    in_order: NDArray[np.int64] = found[np.lexsort((found, -scores[found]))]
    return in_order


def _are_same(
    boxes_xyxy_px: NDArray[np.float32], cut: NDArray[np.bool_], window_rows: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Return which pairs of detections of one class are the same object, [D, D]."""
    left, top, right, bottom = boxes_xyxy_px.T
    areas = (right - left) * (bottom - top)
    widths = np.minimum(right[:, None], right) - np.maximum(left[:, None], left)
    heights = np.minimum(bottom[:, None], bottom) - np.maximum(top[:, None], top)
    shared = widths.clip(min=0) * heights.clip(min=0)
    is_same = shared >= SAME_IOU * (areas[:, None] + areas - shared)
    is_part = shared >= SAME_OVER_SMALLER * np.minimum(areas[:, None], areas)
    is_between = window_rows[:, None] != window_rows
    found: NDArray[np.bool_] = is_between & (shared > 0) & (is_same | (is_part & (cut[:, None] | cut)))
    return found


def _are_cut(
    boxes_xyxy_px: NDArray[np.float32], windows: NDArray[np.int64], window_rows: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Return which detections end at a border of their window that lies inside the image, [D]."""
    image_xyxy = np.concatenate((windows[:, :2].min(axis=0), windows[:, 2:].max(axis=0)))
    margins = NEAR_BORDER * np.tile(windows[:, 2:] - windows[:, :2], 2)
    near = np.abs(boxes_xyxy_px - windows[window_rows]) <= margins[window_rows]
    is_cut: NDArray[np.bool_] = (near & (windows != image_xyxy)[window_rows]).any(axis=1)
    return is_cut
