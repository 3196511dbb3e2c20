"""One image with its boxes, as the data set and all augmentations handle it."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from detr_dist.data.records import MIN_BOX_EXTENT_PX


class Example(NamedTuple):
    """One image with its boxes, as transforms get and return it.

    They get a `tv_tensors.Image` and `tv_tensors.BoundingBoxes`, which the functions of
    `torchvision.transforms.v2` support; they may return ordinary tensors.
    """

    image: Tensor  # uint8 [3, H, W]
    boxes: Tensor  # float32 [T, 4], xyxy in pixels
    labels: Tensor  # int64 [T], class indices; -1 - class of an ignored region, see `data.tiles`


def example_of(image: Tensor, boxes: Tensor, labels: Tensor, size_hw: tuple[int, int]) -> Example:
    """Return an example of ordinary tensors, with boxes in pixels of an image of this size."""
    corners = tv_tensors.BoundingBoxes(boxes.as_subclass(Tensor), format="XYXY", canvas_size=size_hw)
    return Example(tv_tensors.Image(image), corners, labels)


def crop(example: Example, window: tuple[int, int, int, int]) -> Example:
    """Cut out a window (top, left, height, width); boxes are clipped to it or dropped."""
    image, boxes, labels = example
    return clipped(Example(F.crop(image, *window), F.crop(boxes, *window), labels))


def clipped(example: Example) -> Example:
    """Clip boxes to the image, and drop those without extent together with their labels."""
    boxes = F.clamp_bounding_boxes(example.boxes)
    kept = (boxes[:, 2:] - boxes[:, :2] > MIN_BOX_EXTENT_PX).all(dim=1)
    return Example(example.image, tv_tensors.wrap(boxes[kept], like=boxes), example.labels[kept])


class ReadOnAccess(Sequence[Example]):
    """Examples of some samples, each of which is read once, when it is first asked for."""

    def __init__(self, indices: list[int], read: Callable[[int], Example]) -> None:
        self._indices = indices
        self._read = cache(read)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, place: Any) -> Any:
        found = self._indices[place]
        return [self._read(index) for index in found] if isinstance(found, list) else self._read(found)
