"""The part of an image that a training sample shows (`data.tiles`), and what becomes of the boxes there."""

from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from detr_dist.config_tiles import Tiles
from detr_dist.data.coco import CocoData
from detr_dist.data.records import MIN_BOX_EXTENT_PX
from detr_dist.tiling import num_windows, window_hw


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
        height, width = window_hw(self.tiles, size_hw)
        if (height, width) == size_hw:
            return None
        if self.tiles.full_image and rng.random() * (1 + num_windows(self.tiles, size_hw)) < 1:
            return None
        last = np.subtract(size_hw, (height, width))
        starts = np.stack((np.zeros_like(last), last))
        if len(classes) and rng.random() < self.tiles.rare_share:
            weights = self._box_weights(classes)
            starts = _starts_around(boxes_xyxy[rng.choice(len(classes), p=weights)], (height, width), last)
        top, left = rng.integers(starts[0], starts[1], endpoint=True).tolist()
        return Window(top, left, height, width)

    def _box_weights(self, classes: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the probability of each box: that of its class, divided among the class's boxes."""
        weights = self.class_weights[classes] / np.bincount(classes)[classes]
        probabilities: NDArray[np.float64] = weights / weights.sum()
        return probabilities


def _starts_around(
    box_xyxy: NDArray[np.float64], window_hw: tuple[int, int], last: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return the first and last top and left, [2, 2], of the windows that hold a box.

    Of a box that is larger than the window: of those that it fills.
    """
    left_top, right_bottom = box_xyxy[1::-1], box_xyxy[:1:-1]
    ends = np.stack((np.ceil(right_bottom - window_hw), np.floor(left_top))).astype(np.int64)
    return np.sort(ends, axis=0).clip(0, last)


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
    visible = extents.prod(axis=1) / full.prod(axis=1)
    is_there = (extents > MIN_BOX_EXTENT_PX).all(axis=1)
    return clipped[is_there], np.where(visible < min_visible, -1 - labels, labels)[is_there]
