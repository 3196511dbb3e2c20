"""The augmentations of the package that `data.augmentation` may name after a recipe.

They are those of RT-DETR, D-FINE and DEIM. torchvision has the last three, but takes 65 ms of CPU time for
all of them on an image of 640x640, several times that of decoding; ours take 9 ms.
"""

import math
from collections.abc import Sequence
from itertools import pairwise, product
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.ops import box_iou
from torchvision.transforms.v2 import functional as F

from detr_dist.data.example import Example, crop
from detr_dist.extensions import register_transform

MIXUP_SHARES = (29, 35)  # of 64: 0.45 to 0.55

BRIGHTNESS_FACTORS = (0.875, 1.125)
CONTRAST_FACTORS = (0.5, 1.5)
SATURATION_FACTORS = (0.5, 1.5)
HUE_TURNS = (-0.05, 0.05)  # of the colour circle
LUMINANCE_RGB = np.array([0.299, 0.587, 0.114])
TURN_AROUND_GREY = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)  # by a right angle

IOU_CROP_PROBABILITY = 0.8
CROP_SCALES = (0.3, 1.0)
MOST_CROP_ELONGATION = 2.0
LEAST_IOUS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, None)  # None keeps the image as it is
TRIALS_PER_IOU = 40


@register_transform("mosaic")
class Mosaic:
    """Composes every second image of four: more objects in a step, so more matched queries.

    The image is divided at a point in its middle half. Each part is filled with a random window of one of
    the four images, at a scale between the smallest that fills it and the image's own.

    Source: YOLOv4; for DETR, DEIM (dense one-to-one matching).
    """

    num_partners: ClassVar[int] = 3

    def __call__(self, example: Example, rng: np.random.Generator, partners: Sequence[Example]) -> Example:
        """Return the example itself, or a mosaic of it and its partners."""
        if rng.random() < 0.5:
            return example
        image, boxes, labels = torch.empty_like(example.image), [], []
        ends = [(0, round(side * rng.uniform(0.25, 0.75)), side) for side in example.image.shape[-2:]]
        parts = product(*map(pairwise, ends))
        for source, ((top, bottom), (left, right)) in zip((example, *partners), parts, strict=True):
            if top < bottom and left < right:
                part = _random_part(source, (bottom - top, right - left), rng)
                image[:, top:bottom, left:right] = part.image
                boxes.append(part.boxes.as_subclass(Tensor) + torch.tensor([left, top, left, top]))
                labels.append(part.labels)
        return Example(image, torch.cat(boxes), torch.cat(labels))


@register_transform("mixup")
class Mixup:
    """Blends every second image with another one, about half and half; boxes of both stay.

    Of a partner of another size a random window is used, as in a mosaic.

    Source: DEIM. Departures: it draws for each image, not for each batch; the partner may be any image.
    """

    num_partners: ClassVar[int] = 1

    def __call__(self, example: Example, rng: np.random.Generator, partners: Sequence[Example]) -> Example:
        """Return the example itself, or its blend with the partner."""
        if rng.random() < 0.5:
            return example
        height, width = example.image.shape[-2:]
        other = _random_part(partners[0], (height, width), rng)
        share = int(rng.integers(*MIXUP_SHARES, endpoint=True))
        # In 16-bit integers, where 64 means 1, as in `adjust_colours`.
        blend = example.image.as_subclass(Tensor).to(torch.int16).mul_(share)
        blend.add_(other.image.as_subclass(Tensor), alpha=64 - share).add_(32).bitwise_right_shift_(6)
        boxes = torch.cat([example.boxes.as_subclass(Tensor), other.boxes.as_subclass(Tensor)])
        return Example(blend.to(torch.uint8), boxes, torch.cat([example.labels, other.labels]))


@register_transform("photometric")
def photometric(example: Example, rng: np.random.Generator) -> Example:
    """Change brightness, contrast, saturation and hue, each in every second image.

    Source: SSD, with RT-DETR's ranges (those of torchvision's RandomPhotometricDistort). Departures: colour
    channels are not permuted, because shirts tell referees and goalkeepers from players; colours are rounded
    and clipped once, at the end; the hue turns in a circle, not in HSV's hexagon.
    """
    # The middle of each range changes nothing.
    ranges = (BRIGHTNESS_FACTORS, CONTRAST_FACTORS, SATURATION_FACTORS, HUE_TURNS)
    drawn = [rng.uniform(*each) if rng.random() < 0.5 else sum(each) / 2 for each in ranges]
    return example._replace(image=distort_colours(example.image, *drawn))


def distort_colours(
    image: Tensor, brightness: float, contrast: float, saturation: float, hue_turns: float
) -> Tensor:
    """Change the colours of an image by three factors and a turn of the colour circle.

    All four are linear in a pixel's colours, so that together they are one product with a matrix. The hue is
    turned by Rodrigues' formula, with grey as the axis. Contrast scales the distance to the mean luminance.
    """
    to_grey = np.tile(LUMINANCE_RGB, (3, 1))
    angle = 2 * math.pi * hue_turns
    turn = math.cos(angle) * np.eye(3) + (1 - math.cos(angle)) / 3 + math.sin(angle) * TURN_AROUND_GREY
    matrix = brightness * contrast * turn @ (saturation * np.eye(3) + (1 - saturation) * to_grey)
    mean_rgb = image[:, ::4, ::4].mean(dim=(1, 2), dtype=torch.float32).numpy()
    offset = brightness * (1 - contrast) * float(LUMINANCE_RGB @ mean_rgb)
    rows = tuple(np.column_stack([matrix, np.full(3, offset)]).ravel().tolist())
    pixels = Image.fromarray(image.permute(1, 2, 0).numpy()).convert("RGB", rows)
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)


@register_transform("zoom_out")
class ZoomOut:
    """Shrinks every second image to as little as a quarter, at a random place of a black canvas.

    Source: SSD, as in RT-DETR; not of a mosaic, as in DEIM. Departure: the canvas has the image's own size
    from the start.
    """

    not_after: ClassVar = ("mosaic",)
    probability: ClassVar = 0.5
    most: ClassVar = 4.0

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Return the example itself, or the shrunk one."""
        if rng.random() < 1 - self.probability:
            return example
        image, boxes, labels = example
        ratio = rng.uniform(1, self.most)
        size = [max(1, round(side / ratio)) for side in image.shape[-2:]]
        top, left = (
            int(rng.integers(side - part + 1)) for side, part in zip(image.shape[-2:], size, strict=True)
        )
        canvas = torch.zeros_like(image)
        canvas[:, top : top + size[0], left : left + size[1]] = F.resize(image, size, antialias=True)
        moved = F.resize(boxes, size).as_subclass(Tensor) + torch.tensor([left, top, left, top])
        return Example(canvas, moved, labels)


@register_transform("iou_crop")
class IouCrop:
    """Enlarges a random window that holds a box, in four of five images.

    The window has a least IoU, drawn from a list, with a box whose centre it holds. Boxes with their centre
    outside are dropped.

    Source: SSD, as in RT-DETR (torchvision's RandomIoUCrop); not of a mosaic, as in DEIM.
    """

    not_after: ClassVar = ("mosaic",)

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Return the example itself, or the enlarged window."""
        image, boxes, labels = example
        if len(boxes) == 0 or rng.random() >= IOU_CROP_PROBABILITY:
            return example
        height, width = image.shape[-2:]
        window = _window_with_box(boxes.as_subclass(Tensor), (height, width), rng)
        if window is None:
            return example
        kept = _holds_centres(window[None], boxes.as_subclass(Tensor))[0]
        left, top, right, bottom = window.int().tolist()
        inside = Example(image, tv_tensors.wrap(boxes[kept], like=boxes), labels[kept])
        part = crop(inside, (top, left, bottom - top, right - left))
        size = [height, width]
        return Example(F.resize(part.image, size, antialias=True), F.resize(part.boxes, size), part.labels)


def _window_with_box(boxes_xyxy: Tensor, size_hw: tuple[int, int], rng: np.random.Generator) -> Tensor | None:
    """Return a window as xyxy in whole pixels, float32 [4], or None to keep the image as it is."""
    while (least_iou := LEAST_IOUS[rng.integers(len(LEAST_IOUS))]) is not None:
        windows = torch.from_numpy(_random_windows(size_hw, rng)).float()
        ious = box_iou(windows, boxes_xyxy).where(_holds_centres(windows, boxes_xyxy), -1)
        suitable = (ious >= least_iou).any(dim=1)
        if suitable.any():
            return windows[suitable.int().argmax()]
    return None


def _random_windows(size_hw: tuple[int, int], rng: np.random.Generator) -> NDArray[np.int64]:
    """Return up to `TRIALS_PER_IOU` windows [N, 4], xyxy, that are not too elongated."""
    sides = np.array(size_hw[::-1])
    parts = np.maximum(1, rng.uniform(*CROP_SCALES, (TRIALS_PER_IOU, 2)) * sides).astype(np.int64)
    starts = (rng.random((TRIALS_PER_IOU, 2)) * (sides - parts)).astype(np.int64)
    elongation = parts.max(axis=1) / parts.min(axis=1)
    windows: NDArray[np.int64] = np.hstack([starts, starts + parts])[elongation <= MOST_CROP_ELONGATION]
    return windows


def _holds_centres(windows_xyxy: Tensor, boxes_xyxy: Tensor) -> Tensor:
    """Return whether each window holds the centre of each box, [W, T]."""
    centres = (boxes_xyxy[:, :2] + boxes_xyxy[:, 2:]) / 2
    return ((windows_xyxy[:, None, :2] < centres) & (centres < windows_xyxy[:, None, 2:])).all(dim=2)


def _random_part(example: Example, size_hw: tuple[int, int], rng: np.random.Generator) -> Example:
    image, boxes, labels = example
    least = max(part / side for part, side in zip(size_hw, image.shape[-2:], strict=True))
    scale = rng.uniform(least, max(least, 1))
    resized = [max(part, round(scale * side)) for part, side in zip(size_hw, image.shape[-2:], strict=True)]
    top, left = (int(rng.integers(side - part + 1)) for side, part in zip(resized, size_hw, strict=True))
    window = (top, left, *size_hw)
    return crop(Example(F.resize(image, resized, antialias=True), F.resize(boxes, resized), labels), window)
