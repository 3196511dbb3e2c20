"""Detection in windows of an image: the grid of windows, and the merging of what is found in them.

An object of eight pixels is lost when a large image is shrunk to what a network takes. In windows it is not.
Shapes: W windows of an image, D detections in all of them together.
"""

import math
from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True)
class Grid:
    """How an image is divided into windows."""

    window_hw: tuple[int, int]
    """Height and width of a window in pixels of the image; along a shorter side of the image, that side."""
    overlap: float
    """Least overlap of neighbours, as a fraction of a window's side, from 0 to 0.9."""
    full_image: bool
    """Whether the full image is a window too, for objects that are larger than a window."""

    def windows(self, height: int, width: int) -> NDArray[np.int64]:
        """Return the windows of an image, [W, 4]: left, top, right, bottom; the full image is the last.

        All others have one size, are spread evenly, and cover every pixel. Without others the full image is
        the only one.
        """
        tops, lefts = (
            self._starts(side, window) for side, window in zip((height, width), self.window_hw, strict=True)
        )
        corners = np.array([(left, top) for top in tops for left in lefts])
        windows = np.hstack((corners, corners + np.minimum(self.window_hw, (height, width))[::-1]))
        if self.full_image and len(windows) > 1:
            windows = np.vstack((windows, [[0, 0, width, height]]))
        return windows

    def num_windows(self, height: int, width: int) -> int:
        """Return the number of windows of an image without the full image, at least 1."""
        sides = zip((height, width), self.window_hw, strict=True)
        return math.prod(len(self._starts(side, window)) for side, window in sides)

    def _starts(self, side: int, window: int) -> list[int]:
        """Return the first pixel of each window along a side: as few as overlap enough, evenly spread."""
        last = max(0, side - window)
        num_gaps = math.ceil(last / max(1, math.floor(window * (1 - self.overlap))))
        return [last * index // max(1, num_gaps) for index in range(num_gaps + 1)]


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
        windows: [W, 4], from `Grid.windows`.
        most: The largest number of detections that remain.

    Returns:
        Indices of what remains by descending score; equal scores keep their order.
    """
    cut = _are_cut(boxes_xyxy_px, windows, window_rows)
    worth = np.where(cut, np.float32(WORTH_OF_CUT) * scores, scores)
    order = np.argsort(-worth, kind="stable")[:MERGED_FROM]
    boxes, labels, rows, cut = boxes_xyxy_px[order], labels[order], window_rows[order], cut[order]
    areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    remaining, chosen = np.ones(len(order), dtype=np.bool_), list[int]()
    for index in range(len(order)):
        if not remaining[index]:
            continue
        chosen.append(index)
        if len(chosen) == most:
            break
        later = (
            index
            + 1
            + np.flatnonzero(
                remaining[index + 1 :]
                & (labels[index + 1 :] == labels[index])
                & (rows[index + 1 :] != rows[index])
            )
        )
        sides = np.minimum(boxes[later, 2:], boxes[index, 2:]) - np.maximum(
            boxes[later, :2], boxes[index, :2]
        )
        shared = np.prod(sides.clip(min=0), axis=1)
        union = areas[later] + areas[index] - shared
        is_same = shared >= SAME_IOU * union
        is_part = shared >= SAME_OVER_SMALLER * np.minimum(areas[later], areas[index])
        remaining[later[(shared > 0) & (is_same | (is_part & (cut[later] | cut[index])))]] = False
    found: NDArray[np.int64] = order[chosen]
    return found[np.lexsort((found, -scores[found]))]


def _are_cut(
    boxes_xyxy_px: NDArray[np.float32], windows: NDArray[np.int64], window_rows: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Return which detections end at a border of their window that lies inside the image, [D]."""
    image_xyxy = np.concatenate((windows[:, :2].min(axis=0), windows[:, 2:].max(axis=0)))
    margins = NEAR_BORDER * np.tile(windows[:, 2:] - windows[:, :2], 2)
    near = np.abs(boxes_xyxy_px - windows[window_rows]) <= margins[window_rows]
    is_cut: NDArray[np.bool_] = (near & (windows != image_xyxy)[window_rows]).any(axis=1)
    return is_cut
