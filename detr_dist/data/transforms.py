"""Augmentation and resizing of one image and its boxes, in uint8.

The built-in recipe crops, flips and resizes an image by a plan made before decoding. Then the other
transforms that `data.augmentation` names follow. They get the image at the network's input size: an effect
measured in pixels means the same for every camera, and there are fewer pixels to change. A transform keeps
the size, because optimizer steps are planned from the sizes alone.

Every random choice comes from the generator that the caller passes; nothing here uses global random state.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2 import functional as F

import detr_dist.data.augmentations  # noqa: F401, registers the transforms of the package
import detr_dist.data.footage  # noqa: F401, likewise
from detr_dist.config_types import Augmentation
from detr_dist.data.example import Example, clipped, crop, example_of
from detr_dist.data.windows import Window
from detr_dist.errors import DataError, UsageError, as_one_line
from detr_dist.extensions import FOOTAGE, RECIPES, TRANSFORMS
from detr_dist.resize import Resize

# The published recipe in its own pixels: the shorter side of a full image has 800.
DETR_EDGE = 800
DETR_RESIZE_EDGES = tuple(range(480, DETR_EDGE + 1, 32))
DETR_CROP_RESIZE_EDGES = (400, 500, 600)
DETR_CROP_EDGES = (384, 600)

# Mild photometric changes of every second image, as factors of 1 - range to 1 + range.
BRIGHTNESS_RANGE = 0.2
CONTRAST_RANGE = 0.2
CAST_RANGE = 0.1  # for red, green and blue each: simulates other light and white balance


class Transform(Protocol):
    """A function, or a class that is instantiated without arguments, that changes an example.

    It keeps no state between calls, and draws from `rng`, which depends only on seed, epoch, sample and the
    transform's place in the list. Torch's default generator is seeded from it for the call, so that
    `torchvision.transforms.v2` can be used. The image keeps its size. Afterwards boxes are clipped to the
    image, and those without extent dropped.
    """

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Return the changed example, with an image of the same size."""
        ...


class TransformWithPartners(Protocol):
    """A `Transform` of several images: it also gets `num_partners` others of the training data.

    They are chosen at random, and each is read when it is first used. The built-in recipe has prepared each
    as its own sample, so that sizes may differ.
    """

    num_partners: int

    def __call__(self, example: Example, rng: np.random.Generator, partners: Sequence[Example]) -> Example:
        """Return the changed example, with an image of the same size."""
        ...


class Colours(NamedTuple):
    """Arguments of `adjust_colours`."""

    contrast: float
    gains_rgb: list[float]


class Plan(NamedTuple):
    """The operations of the recipe on one image, in this order."""

    flip: bool
    window: tuple[int, int, int, int] | None  # top, left, height, width of the crop, in pixels of the file
    size_hw: tuple[int, int]  # after the resize
    colours: Colours | None
    shown: Window | None = None  # the part of the file's image that all this is done to; None: all of it

    def scale_yx(self, size_hw: tuple[int, int]) -> tuple[float, float]:
        """Return by how much objects in an image of this size are scaled."""
        height, width = self.window[2:] if self.window is not None else size_hw
        return self.size_hw[0] / height, self.size_hw[1] / width


class NamedTransform(NamedTuple):
    """A transform that `data.augmentation` names in addition to the recipe."""

    name: str
    function: Callable[..., Any]

    @property
    def num_partners(self) -> int:
        """Number of other images that it needs."""
        return getattr(self.function, "num_partners", 0)

    @property
    def not_after(self) -> Sequence[str]:
        """Names of transforms: it is not applied to an image that one of them has changed."""
        return getattr(self.function, "not_after", ())

    def __call__(
        self,
        example: Example,
        rng: np.random.Generator,
        partners: Sequence[Example],
        num_classes: int,
        *,
        may_ignore: bool = False,
    ) -> Example:
        """Return the transformed example, which may have ignored regions if `may_ignore` says so.

        Raises:
            DataError: the transform returned something invalid. Its own exceptions are passed on.
        """
        height, width = example.image.shape[-2:]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(rng.spawn(1)[0].integers(2**63)))
            result = self.function(example, rng, *([partners] if self.num_partners else []))
        is_unchanged = result is example and self.name in TRANSFORMS.built_in
        if is_unchanged:  # the check takes half a millisecond
            return example
        return _checked(result, (height, width), range(-num_classes if may_ignore else 0, num_classes))


@dataclass(frozen=True, slots=True)
class DetectionTransform:
    """The augmentation and resize of images."""

    recipe: str
    resize: Resize
    beside: tuple[NamedTransform, ...] = ()  # applied after the recipe, in this order

    def plan(self, size_hw: tuple[int, int], rng: np.random.Generator) -> Plan:
        """Make all random choices for an image of this size, before it is decoded."""
        if self.recipe == "none":
            return Plan(False, None, self.resize.size_hw(*size_hw), None)
        flip, window, resized = rng.random() < 0.5, None, self.resize.size_hw(*size_hw)
        if self.recipe == "detr":
            if rng.random() < 0.5:
                window = _random_window(size_hw, rng)
            if self.resize.keeps_aspect_ratio:
                edge = round(self.resize.shortest_edge * _one_of(DETR_RESIZE_EDGES, rng) / DETR_EDGE)
                height, width = window[2:] if window is not None else size_hw
                resized = replace(self.resize, shortest_edge=edge).size_hw(height, width)
        return Plan(flip, window, resized, _random_colours(rng) if rng.random() < 0.5 else None)


def apply(plan: Plan, example: Example) -> Example:
    """Apply a plan to an example, and drop boxes that the crop leaves without extent.

    Boxes are in pixels of the file; the image may have been decoded at a reduced scale, unless the plan has a
    window.
    """
    image, boxes, labels = example
    if plan.flip:
        image, boxes = F.horizontal_flip(image), F.horizontal_flip(boxes)
    if plan.window is not None:
        image, boxes, labels = crop(Example(image, boxes, labels), plan.window)
    size = list(plan.size_hw)
    image, boxes = F.resize(image, size, antialias=True), F.resize(boxes, size)
    if plan.colours is not None:
        image = adjust_colours(image, *plan.colours)
    return Example(image, boxes, labels)


def build_transform(augmentation: Augmentation, resize: Resize, train: bool) -> DetectionTransform:
    """Return the transform for `data.augmentation` in training; evaluation only resizes.

    Raises:
        UsageError: in training, a transform cannot be found or instantiated.
    """
    names = _names(augmentation) if train else []
    beside = tuple(_find_transform(name) for name in names if name not in RECIPES)
    return DetectionTransform(recipe_of(names), resize, beside)


def recipe_of(augmentation: Augmentation) -> str:
    """Return the built-in recipe of `data.augmentation`: `none`, `light` or `detr`, also for `footage`."""
    return next((name for name in _names(augmentation) if name in RECIPES), "none")


def _names(augmentation: Augmentation) -> list[str]:
    """Return the recipe and the transforms, with what `footage` stands for: its effects come last."""
    names = [augmentation] if isinstance(augmentation, str) else augmentation
    return ["detr", *names[1:], *FOOTAGE] if names[:1] == ["footage"] else names


def _find_transform(name: str) -> NamedTransform:
    found = TRANSFORMS.find(name, "data.augmentation")
    try:
        function = found() if isinstance(found, type) else found
    except Exception as error:  # users' code may raise anything
        raise UsageError(
            f"data.augmentation: {name} cannot be instantiated without arguments: {as_one_line(error)}"
        ) from error
    if not callable(function):
        raise UsageError(f"data.augmentation: {name} is neither a function nor a class with __call__")
    return NamedTransform(name, function)


def _checked(result: object, size_hw: tuple[int, int], valid_labels: range) -> Example:
    """Check that a transform returned a valid example, and return it with boxes clipped to the image."""
    if not (isinstance(result, tuple) and len(result) == 3 and all(isinstance(r, Tensor) for r in result)):
        raise DataError(f"it returned a {type(result).__name__} in place of an Example of three tensors")
    image, boxes, labels = result
    num_boxes = len(boxes) if boxes.ndim else 1
    for name, tensor, dtype, shape in (
        ("image", image, torch.uint8, [3, *size_hw]),
        ("boxes", boxes, torch.float32, [num_boxes, 4]),
        ("labels", labels, torch.int64, [num_boxes]),
    ):
        wanted, given = f"{dtype} {shape}", f"{tensor.dtype} {list(tensor.shape)}"
        if given != wanted:
            raise DataError(f"it returned {name} of {given} in place of {wanted}")
    is_wrong = ~(boxes.isfinite().all(dim=1) & (boxes[:, :2] <= boxes[:, 2:]).all(dim=1))
    if is_wrong.any():
        raise DataError(f"it returned the box {boxes[is_wrong][0].tolist()}; boxes are [x1, y1, x2, y2]")
    if not set(labels.tolist()) <= set(valid_labels):
        ends = f"from {valid_labels[0]} to {valid_labels[-1]}"
        raise DataError(f"it returned the labels {labels.tolist()}; they are {ends}")
    return clipped(example_of(image, boxes, labels, size_hw))


def areas_after_resize(
    sizes_hw: NDArray[np.int64], augmentation: Augmentation, resizes: Sequence[Resize]
) -> tuple[int, int]:
    """Return the areas of the smallest and largest image after any of the resizes, for sizes [N, 2].

    In pixels. Images of the recipe `detr` lie between them.
    """
    sizes = [each.size_hw(h, w) for h, w in np.unique(sizes_hw, axis=0).tolist() for each in resizes]
    areas = [height * width for height, width in sizes]
    if recipe_of(augmentation) == "detr" and resizes[0].keeps_aspect_ratio:  # a crop of almost any shape
        smallest_scale = DETR_RESIZE_EDGES[0] / DETR_EDGE
        least = min(*areas, *(each.shortest_edge**2 for each in resizes)) * smallest_scale**2
        return int(least), max(each.shortest_edge * each.longest_edge for each in resizes)
    return min(areas), max(areas)


def adjust_colours(image: Tensor, contrast: float, gains_rgb: Sequence[float]) -> Tensor:
    """Scale every pixel's distance to the mean grey of the image by `contrast`, then multiply its colours.

    One pass in 16-bit integers, where 64 means 1, so products of 2 and more would overflow. Pixels stay
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
    """Draw one value like `rng.choice`, in a fifth of its time."""
    return values[rng.integers(len(values))]


def _random_window(size_hw: tuple[int, int], rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Return a random window like DETR's: 384 to 600 pixels a side after a resize to 400, 500 or 600.

    Source: DETR. Departure: the window is cut from the original, so that its pixels are interpolated only
    once, by the resize that follows.
    """
    height, width = size_hw
    unit = min(height, width) / _one_of(DETR_CROP_RESIZE_EDGES, rng)
    smallest, largest = (edge * unit for edge in DETR_CROP_EDGES)
    crop_height, crop_width = (round(rng.uniform(smallest, min(side, largest))) for side in (height, width))
    top, left = rng.integers(0, (height - crop_height + 1, width - crop_width + 1)).tolist()
    return top, left, crop_height, crop_width
