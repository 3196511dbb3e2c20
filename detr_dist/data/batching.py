"""Samples put together into the batch that crosses from the loader to the device."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import get_worker_info


class Sample(NamedTuple):
    """One picture as the network will see it, and its targets."""

    image: Tensor  # uint8 [3, H, W]
    labels: Tensor  # int64 [T]
    boxes_cxcywh: Tensor  # float32 [T, 4], normalised by H and W
    image_id: int
    original_size_hw: tuple[int, int]  # before the resize
    unreadable: tuple[tuple[int, str], ...] = ()  # row and "path: reason" of images that could not be read


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
    unreadable: list[tuple[int, str]]  # row and "path: reason" of images that could not be read
    is_padded: bool  # whether any image is smaller than the canvas; the device need not be asked

    def pin_memory(self) -> "Batch":
        """The loader calls this by name, in its own thread."""
        return replace(
            self,
            images=self.images.pin_memory(),
            sizes_hw=self.sizes_hw.pin_memory(),
            labels=self.labels.pin_memory(),
            boxes_cxcywh=self.boxes_cxcywh.pin_memory(),
        )

    def to(self, device: torch.device | str, non_blocking: bool = True) -> "Batch":
        """The tensors on `device`; the copy overlaps with computing only from pinned memory."""
        return replace(
            self,
            images=self.images.to(device, non_blocking=non_blocking),
            sizes_hw=self.sizes_hw.to(device, non_blocking=non_blocking),
            labels=self.labels.to(device, non_blocking=non_blocking),
            boxes_cxcywh=self.boxes_cxcywh.to(device, non_blocking=non_blocking),
        )

    def share_memory(self) -> "Batch":
        """Move all tensors to memory that another process can map; that of the images is there already."""
        for tensor in (self.images, self.sizes_hw, self.labels, self.boxes_cxcywh):
            tensor.share_memory_()
        return self

    def pad_to(self, height: int, width: int) -> "Batch":
        """The same images on a canvas of this size, which must not be smaller."""
        below, right = height - self.images.shape[2], width - self.images.shape[3]
        if below < 0 or right < 0:
            raise ValueError(
                f"a canvas of {tuple(self.images.shape[2:])} does not fit into {(height, width)}"
            )
        if not below and not right:
            return self
        return replace(self, images=pad(self.images, (0, right, 0, below)), is_padded=True)


def collate(samples: Sequence[Sample]) -> Batch:
    """The samples on one canvas, just large enough for the highest and the widest.

    Its memory is channels-last, as decoders write pictures: to sort the colours apart costs as much as the
    resize here, and next to nothing on an accelerator.
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
    )


def _black(shape: tuple[int, ...]) -> Tensor:
    """In a loader process it lies in memory shared with the parent: one copy of the batch less."""
    if get_worker_info() is None:
        return torch.zeros(shape, dtype=torch.uint8)
    storage: torch.UntypedStorage = torch.UntypedStorage._new_shared(prod(shape))  # new from the system: zero
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)
