"""From a sample's key to the sample, and from samples to the batch that crosses to the device."""

import copy
import math
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import Dataset, get_worker_info

from detr_dist.boxes import xyxy_to_cxcywh
from detr_dist.config import Config
from detr_dist.config_types import ExifRule
from detr_dist.data.coco import CocoData
from detr_dist.data.copy_paste import CopyPaste
from detr_dist.data.example import Example, ReadOnAccess, example_of
from detr_dist.data.images import UnreadableImageError, decode_reduced, decode_rgb
from detr_dist.data.sampling import EpochSamples, Purpose, SampleKey, random_numbers
from detr_dist.data.transforms import DetectionTransform, Plan, apply, build_transform
from detr_dist.errors import DataError, LoaderError, UsageError, as_one_line
from detr_dist.resize import Resize

MAX_UNREADABLE_IN_A_ROW = 10
"""More than this in a row mean that a disk is gone or a folder is empty."""

_SIDES_SWAPPED: dict[ExifRule, str] = {
    "auto": "; it has no EXIF rotation that swaps them",
    "apply": " (data.exif=apply; auto applies an EXIF rotation only where the annotated size fits then)",
    "ignore": " (data.exif=ignore; auto applies the EXIF rotation of such an image, if it has one)",
}
"""Addition to the report of an image whose height and width are those of its annotation, swapped."""

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
    )


def _black(shape: tuple[int, ...]) -> Tensor:
    """Return a black canvas; in a loader process in memory shared with the parent, which saves a copy."""
    if get_worker_info() is None:
        return torch.zeros(shape, dtype=torch.uint8)
    storage: torch.UntypedStorage = torch.UntypedStorage._new_shared(
        math.prod(shape)
    )  # new memory from the system is zero
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)


class _NoneReadableError(DataError):
    """Too many images in a row cannot be read."""


class CocoDetectionDataset(Dataset[Sample]):
    """Images, boxes and labels, looked up by (epoch, index).

    A sample depends on the seed and its key alone, whichever process makes it and when.

    An image that cannot be read, or is not of the annotated size, is reported in `Sample.unreadable`. In
    training it is replaced by the next one that can be read; in evaluation, where each image must appear
    once, by a black one of the annotated size.
    """

    def __init__(
        self,
        data: CocoData,
        transform: DetectionTransform,
        *,
        seed: int,
        train: bool,
        recipe_only_from: float = math.inf,
        samples: EpochSamples | None = None,
        copy_paste: CopyPaste | None = None,
    ) -> None:
        """Take a `transform` from `build_transform` with the same `train`.

        With `samples`, an index is a place in an epoch, otherwise the row of an image. From epoch
        `recipe_only_from` on, counted from 0, the transform applies its recipe alone, and nothing is pasted.
        """
        self.data = data
        self.transform = transform
        self.seed = seed
        self.train = train
        self._recipe_only_from = recipe_only_from
        self._samples = samples
        self.copy_paste = copy_paste
        for each in transform.beside:
            if each.num_partners >= len(self):
                raise UsageError(
                    f"data.augmentation: {each.name} needs {each.num_partners} other images, but the "
                    f"training data has {len(data)} in all"
                )

    def __len__(self) -> int:
        """Return the number of samples of an epoch."""
        return len(self.data) if self._samples is None else len(self._samples)

    def row(self, epoch: int, index: int) -> int:
        """Return the row of the image of a sample."""
        return index if self._samples is None else self._samples.row(epoch, index)

    @property
    def most_boxes_per_image(self) -> int:
        """Boxes of the image that has most, if its partners have as many, and with what is pasted."""
        num_images = 1 + sum(each.num_partners for each in self.transform.beside)
        num_pasted = self.copy_paste.most if self.copy_paste and self.copy_paste.num_objects else 0
        return self.data.max_boxes_per_image * num_images + num_pasted

    def __getitem__(self, key: SampleKey) -> Sample:
        epoch, index, *edge = key
        if edge:
            return self._resized_to(*edge)[epoch, index]
        unreadable: list[Unreadable] = []
        index, row, example = self._example(epoch, index, unreadable)
        is_augmented = epoch < self._recipe_only_from
        if self.copy_paste is not None and is_augmented:
            example = self._with_pasted(self.copy_paste, example, epoch, index, row)
        beside = self.transform.beside if is_augmented else ()
        changed_by: set[str] = set()
        for place, transform in enumerate(beside):
            if changed_by.isdisjoint(transform.not_after):
                given, example = example, self._transformed(place, example, epoch, index, row)
                if example.image.data_ptr() != given.image.data_ptr():  # it did not return the image itself
                    changed_by.add(transform.name)
        image, boxes, labels = example
        height, width = image.shape[-2:]
        corners = boxes.as_subclass(Tensor) / torch.tensor([width, height, width, height])
        return Sample(
            image=image.as_subclass(Tensor),
            labels=labels,
            boxes_cxcywh=xyxy_to_cxcywh(corners.clamp(0, 1)),
            image_id=int(self.data.image_ids[row]),
            original_size_hw=self.data.size_hw(row),
            unreadable=tuple(unreadable),
        )

    def size_hw(self, key: SampleKey) -> tuple[int, int]:
        """Return height and width of a training sample after augmentation, assuming its image is readable."""
        epoch, index, *edge = key
        dataset = self._resized_to(*edge) if edge else self
        return dataset._plan(epoch, index, self.row(epoch, index)).size_hw

    def _resized_to(self, shortest_edge: int) -> Self:
        """Return the same samples, and partners of them, resized to another edge."""
        dataset = copy.copy(self)
        dataset.transform = replace(self.transform, resize=self.transform.resize.at(shortest_edge))
        return dataset

    def _plan(self, epoch: int, index: int, row: int) -> Plan:
        rng = random_numbers(Purpose.AUGMENT, self.seed, epoch, index)
        return self.transform.plan(self.data.size_hw(row), rng)

    def _example(self, epoch: int, index: int, unreadable: list[Unreadable]) -> tuple[int, int, Example]:
        """Return index, row and the prepared example of an image; in training, of the first readable one.

        Unreadable images are added to `unreadable`.
        """
        first_index, first_row = index, self.row(epoch, index)
        for attempt in range(MAX_UNREADABLE_IN_A_ROW if self.train else 1):
            # The next image, not the next sample, which may be a copy.
            index, row = (first_index + attempt) % len(self), (first_row + attempt) % len(self.data)
            plan = self._plan(epoch, index, row)
            try:
                return index, row, self._prepared(row, plan, self._read_image(row, plan))
            except UnreadableImageError as error:
                unreadable.append((row, str(error)))
        if not self.train:
            black = torch.zeros(3, *self.data.size_hw(row), dtype=torch.uint8)
            return index, row, self._prepared(row, plan, black)
        raise _NoneReadableError(
            f"{MAX_UNREADABLE_IN_A_ROW} images in a row cannot be read, the last is {unreadable[-1][1]}; "
            "check that the folder is reachable and its images are intact"
        )

    def _read_image(self, row: int, plan: Plan) -> Tensor:
        """Read an image; in training at a reduced scale if that is enough for the plan.

        With a window the full scale is read, because windows are in the pixels of the file.
        """
        path, size_hw = self.data.image_path(row), self.data.size_hw(row)
        may_be_reduced = self.train and plan.window is None
        exif = self.data.exif
        image = decode_reduced(path, size_hw, plan.size_hw, exif) if may_be_reduced else None
        if image is None:
            image = decode_rgb(path, exif, size_hw)
            _check_size(path, tuple(image.shape[-2:]), size_hw, exif)
        return image

    def _prepared(self, row: int, plan: Plan, image: Tensor) -> Example:
        """Return the image and boxes of a row with the plan applied."""
        boxes_xywh, classes = self.data.training_targets(row)
        boxes_xyxy = np.hstack([boxes_xywh[:, :2], boxes_xywh[:, :2] + boxes_xywh[:, 2:]])
        boxes, labels = torch.from_numpy(boxes_xyxy).float(), torch.from_numpy(classes)
        return apply(plan, example_of(image, boxes, labels, self.data.size_hw(row)))

    def _with_pasted(
        self, copy_paste: CopyPaste, example: Example, epoch: int, index: int, row: int
    ) -> Example:
        def read(partner: int, least_hw: tuple[int, int]) -> Tensor:
            return self._read_image(partner, Plan(False, None, least_hw, None))

        scale_yx = self._plan(epoch, index, row).scale_yx(self.data.size_hw(row))
        rng = random_numbers(Purpose.COPY_PASTE, self.seed, epoch, index)
        return copy_paste(example, rng, read, epoch=epoch, row=row, scale_yx=scale_yx)

    def _transformed(self, place: int, example: Example, epoch: int, index: int, row: int) -> Example:
        """Apply the transform at this place of the list to the example of a sample, with its partners.

        Partners that cannot be read are replaced silently; they are reported as samples of their own.
        """
        transform, position = self.transform.beside[place], (self.seed, epoch, index, place)
        chosen = random_numbers(Purpose.PARTNERS, *position).choice(
            len(self) - 1, transform.num_partners, replace=False
        )
        others = [(index + 1 + other) % len(self) for other in chosen.tolist()]
        partners = ReadOnAccess(others, lambda other: self._example(epoch, other, [])[2])
        rng = random_numbers(Purpose.TRANSFORM, *position)
        try:
            return transform(example, rng, partners, self.data.num_classes)
        except _NoneReadableError:
            raise
        except Exception as error:  # users' code may raise anything
            what = f"{transform.name} failed on image {self.data.image_ids[row]}, {self.data.image_path(row)}"
            raise failure(f"data.augmentation: {what}", error) from error


def training_dataset(
    data: CocoData, config: Config, samples: EpochSamples | None = None
) -> CocoDetectionDataset:
    """Return the training data with its augmentation; `samples` are those of every epoch.

    Raises:
        UsageError: a transform in `data.augmentation` or a class in `data.copy_paste` cannot be used.
    """
    resize, pasted = Resize.of(config.data), config.data.copy_paste
    transform = build_transform(config.data.augmentation, resize, train=True)
    return CocoDetectionDataset(
        data,
        transform,
        seed=config.training.seed,
        train=True,
        recipe_only_from=config.training.num_epochs - config.data.augmentation_off_epochs,
        samples=samples,
        copy_paste=CopyPaste(data, resize, pasted, samples) if pasted is not None else None,
    )


def failure(what: str, error: Exception) -> LoaderError:
    """Return an error that can be sent to another process: one line, and the traceback as a note."""
    advice = ""
    if isinstance(error, MemoryError):
        advice = "; memory ran out: lower data.num_workers, data.prefetch_factor or training.batch_size"
    failed = LoaderError(f"{what}: {as_one_line(error)}{advice}")
    failed.add_note("".join(traceback.format_exception(error)).strip())
    return failed


def _check_size(path: Path, found_hw: tuple[int, ...], annotated_hw: tuple[int, int], exif: ExifRule) -> None:
    """Refuse an image of another size: its boxes would be wrong without any other sign."""
    if found_hw != annotated_hw:
        (height, width), (annotated_height, annotated_width) = found_hw, annotated_hw
        turned = _SIDES_SWAPPED[exif] if found_hw == annotated_hw[::-1] else ""
        raise UnreadableImageError(
            f"{path}: the image is {width}x{height} but its annotation says "
            f"{annotated_width}x{annotated_height}{turned}; correct the JSON or save the image in the "
            "annotated size"
        )
