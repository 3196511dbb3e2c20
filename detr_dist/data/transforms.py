"""Augmentation and resizing of one image and its boxes, in uint8.

Every random choice comes from the generator that the caller passes; nothing here uses global random state.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from detr_dist.config_types import Augmentation
from detr_dist.data.records import MIN_BOX_EXTENT_PX

# The published recipe in its own pixels, where a full image has 800 on its shorter side.
DETR_EDGE = 800
DETR_RESIZE_EDGES = tuple(range(480, DETR_EDGE + 1, 32))
DETR_CROP_RESIZE_EDGES = (400, 500, 600)
DETR_CROP_EDGES = (384, 600)

# Mild photometric changes of every second image, as factors of 1 - range to 1 + range.
BRIGHTNESS_RANGE = 0.2
CONTRAST_RANGE = 0.2
CAST_RANGE = 0.1  # of red, green and blue each: another light, another white balance


class Example(NamedTuple):
    image: tv_tensors.Image  # uint8 [3, H, W]
    boxes: tv_tensors.BoundingBoxes  # float32 [T, 4], xyxy in pixels
    labels: Tensor  # int64 [T]


class Colours(NamedTuple):
    """Arguments of `adjust_colours`."""

    contrast: float
    gains_rgb: list[float]


class Plan(NamedTuple):
    """What is done to one image, in this order."""

    flip: bool
    window: tuple[int, int, int, int] | None  # top, left, height, width of the crop, in pixels of the file
    size_hw: tuple[int, int]  # after the resize
    colours: Colours | None


@dataclass(frozen=True, slots=True)
class DetectionTransform:
    """Chooses what is done to an image."""

    augmentation: Augmentation
    shortest_edge: int
    longest_edge: int

    def plan(self, size_hw: tuple[int, int], rng: np.random.Generator) -> Plan:
        """Make all random choices for an image of this size, before it is decoded."""
        if self.augmentation == "none":
            return Plan(False, None, resized_hw(*size_hw, self.shortest_edge, self.longest_edge), None)
        flip, window, shortest_edge = rng.random() < 0.5, None, self.shortest_edge
        if self.augmentation == "detr":
            if rng.random() < 0.5:
                window = _random_window(size_hw, rng)
            shortest_edge = round(shortest_edge * _one_of(DETR_RESIZE_EDGES, rng) / DETR_EDGE)
        height, width = window[2:] if window is not None else size_hw
        resized = resized_hw(height, width, shortest_edge, self.longest_edge)
        return Plan(flip, window, resized, _random_colours(rng) if rng.random() < 0.5 else None)


def apply(plan: Plan, example: Example) -> Example:
    """Return the example as planned, without the boxes that a crop has left without extent.

    Boxes are in pixels of the file; the image may have been decoded at a reduced scale, unless a window is
    cut from it.
    """
    image, boxes, labels = example
    if plan.flip:
        image, boxes = F.horizontal_flip(image), F.horizontal_flip(boxes)
    if plan.window is not None:
        image, boxes, labels = _crop(Example(image, boxes, labels), plan.window)
    size = list(plan.size_hw)
    image, boxes = F.resize(image, size, antialias=True), F.resize(boxes, size)
    if plan.colours is not None:
        image = adjust_colours(image, *plan.colours)
    return Example(image, boxes, labels)


def build_transform(
    augmentation: Augmentation, shortest_edge: int, longest_edge: int, train: bool
) -> DetectionTransform:
    """Return what `data.augmentation` means in training; evaluation only resizes."""
    return DetectionTransform(augmentation if train else "none", shortest_edge, longest_edge)


def resized_hw(height: int, width: int, shortest_edge: int, longest_edge: int) -> tuple[int, int]:
    """Return the size after the resize: the shorter side as configured, unless the longer would be too long.

    Source: DETR. Departure: integer arithmetic, so that the limit holds to the pixel.
    """
    short, long = sorted((height, width))
    if shortest_edge * long <= longest_edge * short:
        short, long = shortest_edge, shortest_edge * long // short
    else:
        short, long = max(1, round(longest_edge * short / long)), longest_edge
    return (short, long) if height <= width else (long, short)


def areas_after_resize(
    sizes_hw: NDArray[np.int64], augmentation: Augmentation, shortest_edge: int, longest_edge: int
) -> tuple[int, int]:
    """Return the pixels of the smallest and largest image that the resize makes of these sizes [N, 2]; `detr`
    may stay between them."""
    sizes = [resized_hw(h, w, shortest_edge, longest_edge) for h, w in np.unique(sizes_hw, axis=0).tolist()]
    areas = [height * width for height, width in sizes]
    if augmentation == "detr":  # with a crop of almost any shape
        smallest_scale = DETR_RESIZE_EDGES[0] / DETR_EDGE
        return int(min(*areas, shortest_edge**2) * smallest_scale**2), shortest_edge * longest_edge
    return min(areas), max(areas)


def adjust_colours(image: Tensor, contrast: float, gains_rgb: Sequence[float]) -> Tensor:
    """Pull every pixel from or to the mean grey of the image, then multiply its three colours.

    One pass in 16-bit integers, 64 standing for 1, so products of 2 and more would overflow. Pixels stay
    interleaved, as the decoder and the resize leave them. Saturation is left out: it needs a pixel's three
    colours at once, which costs as much as the resize, and in torchvision's ColorJitter ten times that.
    """
    height, width = image.shape[-2:]
    mean_grey = float(image[:, ::16, ::16].mean(dtype=torch.float32))
    factors = [round(64 * gain * contrast) for gain in gains_rgb]
    half = 32  # the shift below rounds down
    constants = [round(64 * gain * (1 - contrast) * mean_grey) + half for gain in gains_rgb]
    rows = image.permute(1, 2, 0).reshape(height, 3 * width).to(torch.int16)
    rows.mul_(torch.tensor(factors, dtype=torch.int16).repeat(width))
    rows.add_(torch.tensor(constants, dtype=torch.int16).repeat(width))
    rows.bitwise_right_shift_(6).clamp_(0, 255)
    return rows.to(torch.uint8).reshape(height, width, 3).permute(2, 0, 1)


def _random_colours(rng: np.random.Generator) -> Colours:
    brightness, contrast = (rng.uniform(1 - r, 1 + r) for r in (BRIGHTNESS_RANGE, CONTRAST_RANGE))
    cast_rgb = rng.uniform(1 - CAST_RANGE, 1 + CAST_RANGE, size=3)
    return Colours(contrast, (brightness * cast_rgb).tolist())


def _one_of(values: tuple[int, ...], rng: np.random.Generator) -> int:
    """Return what `rng.choice` does, in a fifth of its time."""
    return values[rng.integers(len(values))]


def _random_window(size_hw: tuple[int, int], rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Return a window as DETR cuts it: of 384 to 600 pixels a side after a resize to 400, 500 or 600.

    Source: DETR. Departure: cut from the original, so that its pixels are interpolated only once, in the
    resize that follows.
    """
    height, width = size_hw
    unit = min(height, width) / _one_of(DETR_CROP_RESIZE_EDGES, rng)
    smallest, largest = (edge * unit for edge in DETR_CROP_EDGES)
    crop_height, crop_width = (round(rng.uniform(smallest, min(side, largest))) for side in (height, width))
    top, left = rng.integers(0, (height - crop_height + 1, width - crop_width + 1)).tolist()
    return top, left, crop_height, crop_width


def _crop(example: Example, window: tuple[int, int, int, int]) -> Example:
    boxes = F.clamp_bounding_boxes(F.crop(example.boxes, *window))
    kept = (boxes[:, 2:] - boxes[:, :2] > MIN_BOX_EXTENT_PX).all(dim=1)
    boxes = tv_tensors.wrap(boxes[kept], like=boxes)
    return Example(F.crop(example.image, *window), boxes, example.labels[kept])
