"""From a sample's key to the sample."""

import copy
import math
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Self

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as F

from detr_dist.boxes import xyxy_to_cxcywh
from detr_dist.config import Config, specific_tiles
from detr_dist.config_types import ExifRule
from detr_dist.data.batch import Batch as Batch
from detr_dist.data.batch import Sample as Sample
from detr_dist.data.batch import Unreadable
from detr_dist.data.batch import collate as collate
from detr_dist.data.coco import CocoData
from detr_dist.data.copy_paste import CopyPaste
from detr_dist.data.example import Example, ReadOnAccess, example_of
from detr_dist.data.images import decode_reduced
from detr_dist.data.sampling import EpochSamples, Purpose, SampleKey, random_numbers
from detr_dist.data.transforms import DetectionTransform, Plan, apply, build_transform
from detr_dist.data.windows import WindowRule, inside
from detr_dist.errors import DataError, LoaderError, UsageError, as_one_line
from detr_dist.resize import Resize
from detr_dist.serving.decoding import UnreadableImageError, decode_rgb

MAX_UNREADABLE_IN_A_ROW = 10
"""More than this in a row mean that a disk is gone or a folder is empty."""

_SIDES_SWAPPED: dict[ExifRule, str] = {
    "auto": "; it has no EXIF rotation that swaps them",
    "apply": " (data.exif=apply; auto applies an EXIF rotation only where the annotated size fits then)",
    "ignore": " (data.exif=ignore; auto applies the EXIF rotation of such an image, if it has one)",
}
"""Addition to the report of an image whose height and width are those of its annotation, swapped."""


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
        windows: WindowRule | None = None,
        copy_paste: CopyPaste | None = None,
    ) -> None:
        """Take a `transform` from `build_transform` with the same `train`.

        With `samples`, an index is a place in an epoch, otherwise the row of an image. From epoch
        `recipe_only_from` on, counted from 0, the transform applies its recipe alone, and nothing is pasted.
        With `windows`, a sample is a part of an image, drawn from the annotations alone.
        """
        self.data = data
        self.transform = transform
        self.seed = seed
        self.train = train
        self._recipe_only_from = recipe_only_from
        self._samples = samples
        self._windows = windows
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
        boxes_cxcywh, ignored, is_ignored = xyxy_to_cxcywh(corners.clamp(0, 1)), None, labels < 0
        if is_ignored.any():
            ignored = -1 - labels[is_ignored], boxes_cxcywh[is_ignored]
            labels, boxes_cxcywh = labels[~is_ignored], boxes_cxcywh[~is_ignored]
        return Sample(
            image=image.as_subclass(Tensor),
            labels=labels,
            boxes_cxcywh=boxes_cxcywh,
            image_id=int(self.data.image_ids[row]),
            original_size_hw=self.data.size_hw(row),
            unreadable=tuple(unreadable),
            ignored=ignored,
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
        size_hw = self.data.size_hw(row)
        if self._windows is None:
            return self.transform.plan(size_hw, rng)
        of_window = random_numbers(Purpose.WINDOW, self.seed, epoch, index)
        shown = self._windows.draw(size_hw, *self.data.training_corners(row), of_window)
        return self.transform.plan(size_hw if shown is None else shown.size_hw, rng)._replace(shown=shown)

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
        """Read the part of an image that the plan shows; in training at a reduced scale if that is enough.

        With a window the full scale is read, because windows are in the pixels of the file.
        """
        path, size_hw = self.data.image_path(row), self.data.size_hw(row)
        may_be_reduced = self.train and plan.window is None and plan.shown is None
        exif = self.data.exif
        image = decode_reduced(path, size_hw, plan.size_hw, exif) if may_be_reduced else None
        if image is None:
            image = self._decoded(row)
        return image if plan.shown is None else F.crop(image, *plan.shown)

    def _decoded(self, row: int) -> Tensor:
        """Return all pixels of an image.

        Raises:
            UnreadableImageError: with the reason.
        """
        path, size_hw, exif = self.data.image_path(row), self.data.size_hw(row), self.data.exif
        image = decode_rgb(path, exif, size_hw)
        _check_size(path, tuple(image.shape[-2:]), size_hw, exif)
        return image

    def _prepared(self, row: int, plan: Plan, image: Tensor) -> Example:
        """Return the image and boxes of a row, or of the part that the plan shows, with the plan applied."""
        boxes_xyxy, classes = self.data.training_corners(row)
        size_hw = self.data.size_hw(row)
        if self._windows is not None and plan.shown is not None:
            size_hw = plan.shown.size_hw
            boxes_xyxy, classes = inside(plan.shown, boxes_xyxy, classes, self._windows.tiles.min_visible)
        boxes, labels = torch.from_numpy(boxes_xyxy).float(), torch.from_numpy(classes)
        return apply(plan, example_of(image, boxes, labels, size_hw))

    def _with_pasted(
        self, copy_paste: CopyPaste, example: Example, epoch: int, index: int, row: int
    ) -> Example:
        def read(partner: int, least_hw: tuple[int, int]) -> Tensor:
            return self._read_image(partner, Plan(False, None, least_hw, None))

        plan = self._plan(epoch, index, row)
        scale_yx = plan.scale_yx(self.data.size_hw(row) if plan.shown is None else plan.shown.size_hw)
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
            may_ignore = self._windows is not None
            return transform(example, rng, partners, self.data.num_classes, may_ignore=may_ignore)
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
    tiles = specific_tiles(config)
    return CocoDetectionDataset(
        data,
        transform,
        seed=config.training.seed,
        train=True,
        recipe_only_from=config.training.num_epochs - config.data.augmentation_off_epochs,
        samples=samples,
        windows=None if tiles is None else WindowRule.of(tiles, data),
        copy_paste=CopyPaste(data, resize, tiles, pasted, samples) if pasted is not None else None,
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
