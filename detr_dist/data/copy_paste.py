"""Copy-paste of small objects (`data.copy_paste`): balls of another image at random places of an image.

All objects that are pasted into an image come from one other image, so that at most one more is decoded.
They keep their size in relation to the image's own objects, up to a random factor, and their edges fade.

Source: Kisantal et al. 2019, "Augmentation for small object detection". Departures: from another image, and
with a soft ellipse instead of an outline, because there are only boxes.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from detr_dist.config_tiles import Tiles
from detr_dist.config_types import CopyPasteConfig
from detr_dist.data.coco import CocoData
from detr_dist.data.example import Example
from detr_dist.data.sampling import EpochSamples
from detr_dist.errors import UsageError
from detr_dist.resize import Resize
from detr_dist.serving.decoding import UnreadableImageError
from detr_dist.text import hint_of_class

SMALL_AREA_PX = 32**2
"""COCO's limit of small objects: larger ones are neither pasted nor fully protected from being covered."""

MARGIN = 0.25
"""Width of the fading edge around a box, as a fraction of the box's side."""

LARGEST_FACTOR = 1.25
"""Objects are scaled by a random factor of up to this, or of down to its inverse."""

MOST_COVERED = 0.2
"""Fraction of a larger object's box that each pasted one may cover; no small object is covered at all."""

PLACING_ATTEMPTS = 20

ReadImage = Callable[[int, tuple[int, int]], Tensor]
"""Reads the image of a row, uint8 [3, H, W], of at least this height and width if its file is as large."""


class Patch(NamedTuple):
    """An object with the fading edge around it."""

    pixels: Tensor  # uint8 [3, h, w]
    opacity: Tensor  # float32 [h, w]
    box_xyxy: NDArray[np.float64]  # [4], in pixels of the patch
    label: int


class CopyPaste:
    """Pastes small objects of some classes; without any in the data it does nothing."""

    def __init__(
        self,
        data: CocoData,
        resize: Resize,
        tiles: Tiles | None,
        settings: CopyPasteConfig,
        samples: EpochSamples | None,
    ) -> None:
        """Find the boxes that can be pasted: not of crowds, off the border, and small after the resize.

        With `tiles` that is the resize of a window.

        Raises:
            UsageError: the data has no such class.
        """
        for name in settings.classes:
            if name not in data.class_names:
                hint = hint_of_class(name, data.class_names)
                raise UsageError(f"data.copy_paste: there is no class {name!r}; {hint}")
        self.most = settings.most
        self._data, self._samples = data, samples
        self._classes = np.array([data.class_names.index(name) for name in settings.classes])
        of_class = np.flatnonzero(np.isin(data.box_classes, self._classes) & ~data.iscrowd)
        rows = data.image_rows[of_class]
        boxes, sizes_hw = data.boxes_xywh_px[of_class], data.sizes_hw[rows]
        shown_hw = sizes_hw if tiles is None else sizes_hw.clip(max=tiles.size_hw)
        areas = boxes[:, 2:].prod(axis=1) * resize.scales(shown_hw) ** 2
        starts = boxes[:, :2] - MARGIN * boxes[:, 2:]
        ends = boxes[:, :2] + (1 + MARGIN) * boxes[:, 2:]
        inside = (starts >= 0).all(axis=1) & (ends <= sizes_hw[:, ::-1]).all(axis=1)
        self._boxes = of_class[(areas < SMALL_AREA_PX) & inside]  # in the columns of boxes, by row
        self._rows = rows[(areas < SMALL_AREA_PX) & inside]
        self._of_epoch: tuple[int, NDArray[np.int64]] | None = None

    @property
    def num_objects(self) -> int:
        """Number of boxes that can be pasted."""
        return len(self._boxes)

    def __call__(
        self,
        example: Example,
        rng: np.random.Generator,
        read: ReadImage,
        *,
        epoch: int,
        row: int,
        scale_yx: tuple[float, float],
    ) -> Example:
        """Return the example of `row` with up to `most` objects of another image of the epoch.

        It was scaled by `scale_yx`, and so are they. An object for which no place is found is left out, and
        all are if the other image cannot be read, which is reported as a sample of its own.
        """
        number = int(rng.integers(self.most, endpoint=True))
        found = self._boxes_of_another_image(epoch, row, rng) if number else None
        if found is None:
            return example
        partner, boxes = found
        height, width = self._data.size_hw(partner)
        least_hw = math.ceil(height * scale_yx[0]), math.ceil(width * scale_yx[1])
        try:
            source = read(partner, least_hw)
        except UnreadableImageError:
            return example
        own = np.array(
            [source.shape[1] / height, source.shape[2] / width]
        )  # below 1 if read at a reduced scale
        image = example.image.as_subclass(Tensor).clone()
        xyxy, labels = example.boxes.numpy().astype(np.float64), example.labels.tolist()
        for _ in range(number):
            box = int(rng.choice(boxes))
            factor = LARGEST_FACTOR ** rng.uniform(-1, 1)
            patch = self._patch(source, box, own, np.array(scale_yx) * factor / own, rng.random() < 0.5)
            place = self._place(patch, tuple(image.shape[1:]), xyxy, np.array(labels), rng)
            if place is not None:
                paste(image, patch, *place)
                xyxy = np.vstack([xyxy, patch.box_xyxy + np.tile(place[::-1], 2)])
                labels.append(patch.label)
        return example._replace(
            image=tv_tensors.wrap(image, like=example.image),
            boxes=tv_tensors.wrap(torch.from_numpy(xyxy).float(), like=example.boxes),
            labels=torch.tensor(labels, dtype=torch.int64),
        )

    def _boxes_of_another_image(
        self, epoch: int, row: int, rng: np.random.Generator
    ) -> tuple[int, NDArray[np.int64]] | None:
        """Return the row of the image of a random object, and all its boxes that can be pasted."""
        candidates = self._candidates(epoch)
        rows = self._rows[candidates]
        first, end = np.searchsorted(rows, [row, row + 1])  # those of the image itself
        if len(rows) == end - first:
            return None
        chosen = int(rng.integers(len(rows) - (end - first)))
        partner = int(rows[chosen + (end - first) * (chosen >= first)])
        return partner, self._boxes[candidates[slice(*np.searchsorted(rows, [partner, partner + 1]))]]

    def _candidates(self, epoch: int) -> NDArray[np.int64]:
        """Return which objects are in images of the epoch, some of which may have none of its samples."""
        if self._of_epoch is None or self._of_epoch[0] != epoch:
            is_there = np.ones(len(self._rows), dtype=bool)
            if self._samples is not None:
                is_there = self._samples.counts(epoch)[self._rows] > 0
            self._of_epoch = epoch, np.flatnonzero(is_there)
        return self._of_epoch[1]

    def _patch(
        self, source: Tensor, box: int, own_yx: NDArray[np.float64], scale_yx: NDArray[np.float64], flip: bool
    ) -> Patch:
        """Cut out a box with its edge, from an image scaled by `own_yx`, and scale it by `scale_yx` more."""
        x, y, w, h = self._data.boxes_xywh_px[box] * np.tile(own_yx[::-1], 2)
        left, top = math.floor(x - MARGIN * w), math.floor(y - MARGIN * h)
        right, bottom = math.ceil(x + (1 + MARGIN) * w), math.ceil(y + (1 + MARGIN) * h)
        part = source[:, max(top, 0) : bottom, max(left, 0) : right]
        before = np.array(part.shape[1:])
        size = np.maximum(1, np.rint(before * scale_yx)).astype(int)
        factor_x, factor_y = (size / before)[::-1]
        start_x, start_y = (x - max(left, 0)) * factor_x, (y - max(top, 0)) * factor_y
        corners = np.array([start_x, start_y, start_x + w * factor_x, start_y + h * factor_y])
        pixels = F.resize(part, size.tolist(), antialias=True)
        if flip:
            pixels = F.horizontal_flip(pixels)
            corners[[0, 2]] = size[1] - corners[[2, 0]]
        return Patch(pixels, _opacity(size, corners), corners, int(self._data.box_classes[box]))

    def _place(
        self,
        patch: Patch,
        size_hw: tuple[int, ...],
        boxes_xyxy: NDArray[np.float64],
        labels: NDArray[np.int64],
        rng: np.random.Generator,
    ) -> tuple[int, int] | None:
        """Return top and left of the first random place where the patch covers no box too much."""
        patch_hw = np.array(patch.opacity.shape)
        room = np.array(size_hw) - patch_hw
        if (room < 0).any():
            return None
        places = rng.integers(0, room + 1, (PLACING_ATTEMPTS, 2))  # top, left
        starts = np.maximum(places[:, None, ::-1], boxes_xyxy[:, :2])
        ends = np.minimum((places + patch_hw)[:, None, ::-1], boxes_xyxy[:, 2:])
        covered = (ends - starts).clip(min=0).prod(axis=2)  # [attempts, boxes]
        areas = (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).prod(axis=1)
        may_cover = (areas >= SMALL_AREA_PX) & ~np.isin(labels, self._classes)
        suitable = np.flatnonzero((covered <= MOST_COVERED * areas * may_cover).all(axis=1))
        return tuple(places[suitable[0]].tolist()) if len(suitable) else None


def paste(image: Tensor, patch: Patch, top: int, left: int) -> None:
    """Blend a patch into an image, in place."""
    height, width = patch.opacity.shape
    below = image[:, top : top + height, left : left + width]
    below.copy_((below + patch.opacity * (patch.pixels.float() - below)).round_())


def _opacity(size_hw: NDArray[np.int_], box_xyxy: NDArray[np.float64]) -> Tensor:
    """Return 1 inside the ellipse in the box, falling to 0 towards one that is larger by the margin."""
    (left, top, right, bottom), (height, width) = box_xyxy, size_hw
    y = (np.arange(height)[:, None] + 0.5 - (top + bottom) / 2) * 2 / (bottom - top)
    x = (np.arange(width)[None] + 0.5 - (left + right) / 2) * 2 / (right - left)
    return torch.from_numpy(((1 + 2 * MARGIN - np.hypot(x, y)) / (2 * MARGIN)).clip(0, 1)).float()
