"""The part of an image that a training sample shows (`data.tiles`), and what becomes of the boxes there."""

import math
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from detr_dist.config_tiles import Tiles
from detr_dist.data.coco import CocoData
from detr_dist.data.records import MIN_BOX_EXTENT_PX

_ROUNDING = 1e-9
"""More than the rounding of a visible fraction: with `min_visible` 1 a complete box is not ignored."""


class Window(NamedTuple):
    """A part of an image, in whole pixels."""

    top: int
    left: int
    height: int
    width: int

    @property
    def size_hw(self) -> tuple[int, int]:
        """Height and width."""
        return self.height, self.width


@dataclass(frozen=True, slots=True, eq=False)
class WindowRule:
    """How the windows of training images are drawn."""

    tiles: Tiles
    class_weights: NDArray[np.float64]  # [C], the relative probabilities of the classes of an image

    @classmethod
    def of(cls, tiles: Tiles, data: CocoData) -> Self:
        """Return the rule for a data set, whose rare classes are drawn as often as frequent ones."""
        num_boxes = np.bincount(data.box_classes[~data.iscrowd], minlength=data.num_classes)
        return cls(tiles, 1 / num_boxes.clip(min=1))

    def draw(
        self,
        size_hw: tuple[int, int],
        boxes_xyxy: NDArray[np.float64],
        classes: NDArray[np.int64],
        rng: np.random.Generator,
    ) -> Window | None:
        """Draw the window of an image of this size with these boxes; None: the full image.

        With `full_image` the full image is as probable as each of the windows that its grid has: so often it
        occurs in evaluation.
        """
        height, width = np.minimum(self.tiles.size_hw, size_hw).tolist()
        if (height, width) == size_hw:
            return None
        if self.tiles.full_image and rng.random() * self.tiles.grid.num_windows(*size_hw) < 1:
            return None
        tops, lefts = (0, size_hw[0] - height), (0, size_hw[1] - width)
        if len(classes) and rng.random() < self.tiles.rare_share:
            x1, y1, x2, y2 = boxes_xyxy[self._chosen(classes, rng)].tolist()
            tops, lefts = _starts_around(y1, y2, height, tops[1]), _starts_around(x1, x2, width, lefts[1])
        top, left = (int(rng.integers(first, last + 1)) for first, last in (tops, lefts))
        return Window(top, left, height, width)

    def _chosen(self, classes: NDArray[np.int64], rng: np.random.Generator) -> int:
        """Draw one of the boxes of these classes: first the class, then a box of it."""
        until = np.cumsum(self.class_weights[classes] / np.bincount(classes)[classes])
        return min(int(np.searchsorted(until, rng.random() * until[-1], side="right")), len(classes) - 1)


def _starts_around(start: float, end: float, window: int, last: int) -> tuple[int, int]:
    """Return where the first and last of the windows begin that hold a box from `start` to `end`.

    Of a box that is larger than a window: of those that it fills. Windows begin at 0 to `last`.
    """
    first, final = sorted((math.ceil(end - window), math.floor(start)))
    return min(max(first, 0), last), min(max(final, 0), last)


def inside(
    window: Window, boxes_xyxy: NDArray[np.float64], labels: NDArray[np.int64], min_visible: float
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return boxes and labels in a window, clipped to it and in its coordinates.

    A box of which less than the fraction `min_visible` of its area is visible is an ignored region: it gets
    the label -1 - label. Boxes outside are left out.
    """
    origin = np.array([window.left, window.top] * 2)
    clipped = (boxes_xyxy - origin).clip(0, [window.width, window.height] * 2)
    extents, full = clipped[:, 2:] - clipped[:, :2], boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]
    visible = extents.prod(axis=1) / full.prod(axis=1) + _ROUNDING
    is_there = (extents > MIN_BOX_EXTENT_PX).all(axis=1)
    return clipped[is_there], np.where(visible < min_visible, -1 - labels, labels)[is_there]
