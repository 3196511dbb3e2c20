"""A sample, and the batch of samples that crosses to the device."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import get_worker_info

from detr_dist.boxes import IgnoredRegions

Unreadable = tuple[int, str]
"""Row of an image that could not be read, and the text "path: reason"."""


class Sample(NamedTuple):
    """One image as the network will see it, and its targets."""

    image: Tensor  # uint8 [3, H, W]
    labels: Tensor  # int64 [T]
    boxes_cxcywh: Tensor  # float32 [T, 4], normalised by H and W
    image_id: int
    original_size_hw: tuple[int, int]  # before the resize
    unreadable: tuple[Unreadable, ...] = ()  # for this sample
    ignored: tuple[Tensor, Tensor] | None = None  # labels and boxes, as above, of its ignored regions


@dataclass(slots=True)
class Batch:
    """B images in one tensor and their T targets in one list, in the order of the images."""

    images: Tensor  # uint8 [B, 3, H, W], channels-last, zero to the right of and below each image
    sizes_hw: Tensor  # int64 [B, 2], of each image inside the canvas H, W
    labels: Tensor  # int64 [T]
    boxes_cxcywh: Tensor  # float32 [T, 4], normalised by the image's own size, not by the canvas
    num_boxes: list[int]  # per image
    image_ids: list[int]
    original_sizes_hw: list[tuple[int, int]]  # before the resize
    unreadable: list[Unreadable]  # each is replaced by another image or a black one
    is_padded: bool  # whether any image is smaller than the canvas, known without asking the device
    ignored: IgnoredRegions | None = None

    def pin_memory(self) -> "Batch":
        """Return the batch in pinned memory; the loader calls this by name, in its own thread."""
        return self._with_tensors(Tensor.pin_memory)

    def to(self, device: torch.device | str, non_blocking: bool = True) -> "Batch":
        """Return the batch on `device`; the copy overlaps with computation only from pinned memory."""
        return self._with_tensors(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def share_memory(self) -> "Batch":
        """Move all tensors but the images, which are there already, to memory that processes can share."""
        return self._with_tensors(Tensor.share_memory_)

    def pad_to(self, height: int, width: int) -> "Batch":
        """Return the same images on a canvas of this size, which must not be smaller."""
        below, right = height - self.images.shape[2], width - self.images.shape[3]
        if below < 0 or right < 0:
            raise ValueError(f"{tuple(self.images.shape[2:])} does not fit into {(height, width)}")
        if not below and not right:
            return self
        return replace(self, images=pad(self.images, (0, right, 0, below)), is_padded=True)

    def _with_tensors(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        return replace(
            self,
            images=change(self.images),
            sizes_hw=change(self.sizes_hw),
            labels=change(self.labels),
            boxes_cxcywh=change(self.boxes_cxcywh),
            ignored=self.ignored
            and IgnoredRegions(change(self.ignored[0]), change(self.ignored[1]), self.ignored.num_boxes),
        )


def collate(samples: Sequence[Sample]) -> Batch:
    """Put samples on one canvas, just large enough for the highest and the widest.

    Its memory is channels-last, as decoders write images: separating the colours costs as much as the resize
    here, and next to nothing on an accelerator.
    """
    sizes_hw = [tuple(sample.image.shape[-2:]) for sample in samples]
    height, width = (max(sides) for sides in zip(*sizes_hw, strict=True))
    images = _black((len(samples), height, width, 3)).permute(0, 3, 1, 2)
    for canvas, sample, (own_height, own_width) in zip(images, samples, sizes_hw, strict=True):
        canvas[:, :own_height, :own_width] = sample.image
    return Batch(
        images=images,
        sizes_hw=torch.tensor(sizes_hw),
        labels=torch.cat([sample.labels for sample in samples]),
        boxes_cxcywh=torch.cat([sample.boxes_cxcywh for sample in samples]),
        num_boxes=[len(sample.labels) for sample in samples],
        image_ids=[sample.image_id for sample in samples],
        original_sizes_hw=[sample.original_size_hw for sample in samples],
        unreadable=[image for sample in samples for image in sample.unreadable],
        is_padded=len(set(sizes_hw)) > 1,
        ignored=_ignored_of(samples),
    )


def _ignored_of(samples: Sequence[Sample]) -> IgnoredRegions | None:
    """Return the ignored regions of all samples; None if there are none."""
    found = [sample.ignored for sample in samples if sample.ignored is not None]
    if not found:
        return None
    labels, boxes_cxcywh = (torch.cat(each) for each in zip(*found, strict=True))
    num_boxes = [0 if sample.ignored is None else len(sample.ignored[0]) for sample in samples]
    return IgnoredRegions(labels, boxes_cxcywh, num_boxes)


def _black(shape: tuple[int, ...]) -> Tensor:
    """Return a black canvas; in a loader process in memory shared with the parent, which saves a copy."""
    if get_worker_info() is None:
        return torch.zeros(shape, dtype=torch.uint8)
    storage: torch.UntypedStorage = torch.UntypedStorage._new_shared(
        math.prod(shape)
    )  # new memory from the system is zero
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)
