"""The map from a sample's key to the sample, as loader processes run it."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from detr_dist.boxes import xyxy_to_cxcywh
from detr_dist.data.batching import Sample
from detr_dist.data.coco import CocoData
from detr_dist.data.decoding import decode_reduced, decode_rgb
from detr_dist.data.image_files import UnreadableImageError
from detr_dist.data.sampling import Purpose, SampleKey, random_numbers
from detr_dist.data.transforms import DetectionTransform, Example, Plan, apply
from detr_dist.errors import DataError

MAX_UNREADABLE_IN_A_ROW = 10
"""More than this is no accident: a disk is gone, or a folder is empty."""


class CocoDetectionDataset(Dataset[Sample]):
    """Images, boxes and labels, looked up by (epoch, index).

    How a sample looks depends on the seed and its key alone, whichever process makes it and when.

    An image that cannot be read, or is not of the annotated size, is reported in `Sample.unreadable`. In
    training the next one that can be read takes its place; in evaluation, where each image must appear once,
    a black one of the annotated size does.
    """

    def __init__(self, data: CocoData, transform: DetectionTransform, *, seed: int, train: bool) -> None:
        self.data = data
        self.transform = transform
        self.seed = seed
        self.train = train

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, key: SampleKey) -> Sample:
        epoch, index = key
        if not self.train:
            return self._evaluation_sample(epoch, index)
        unreadable: list[tuple[int, str]] = []
        for attempt in range(MAX_UNREADABLE_IN_A_ROW):
            row = (index + attempt) % len(self)
            try:
                return self._sample(epoch, row, unreadable)
            except UnreadableImageError as error:
                unreadable.append((row, str(error)))
                last_error = error
        raise DataError(
            f"{MAX_UNREADABLE_IN_A_ROW} images in a row cannot be read, the last is {last_error}; "
            "check that the folder is reachable and its images are whole"
        )

    def _evaluation_sample(self, epoch: int, index: int) -> Sample:
        try:
            return self._sample(epoch, index, [])
        except UnreadableImageError as error:
            blank = torch.zeros(3, *self.data.size_hw(index), dtype=torch.uint8)
            return self._sample(epoch, index, [(index, str(error))], blank)

    def size_hw(self, key: SampleKey) -> tuple[int, int]:
        """Height and width of a training sample as the network will see it, if its image can be read."""
        return self._plan(*key).size_hw

    def _plan(self, epoch: int, row: int) -> Plan:
        rng = random_numbers(Purpose.AUGMENT, self.seed, epoch, row)
        return self.transform.plan(self.data.size_hw(row), rng)

    def _read_image(self, row: int, plan: Plan) -> Tensor:
        """In training, at a reduced scale where the plan needs no more. A window is cut in the pixels of the
        file."""
        path, size_hw = self.data.image_path(row), self.data.size_hw(row)
        may_be_reduced = self.train and plan.window is None
        image = decode_reduced(path, size_hw, plan.size_hw) if may_be_reduced else None
        if image is None:
            image = decode_rgb(path)
            _check_size(path, tuple(image.shape[-2:]), size_hw)
        return image

    def _sample(
        self, epoch: int, row: int, unreadable: list[tuple[int, str]], image: Tensor | None = None
    ) -> Sample:
        """`image` stands for the file's own."""
        size_hw = self.data.size_hw(row)
        plan = self._plan(epoch, row)
        if image is None:
            image = self._read_image(row, plan)
        boxes_xywh, classes = self.data.training_targets(row)
        boxes_xyxy = np.hstack([boxes_xywh[:, :2], boxes_xywh[:, :2] + boxes_xywh[:, 2:]])
        example = Example(
            image=tv_tensors.Image(image),
            boxes=tv_tensors.BoundingBoxes(
                torch.from_numpy(boxes_xyxy).float(), format="XYXY", canvas_size=size_hw
            ),
            labels=torch.from_numpy(classes),
        )
        image, boxes, labels = apply(plan, example)
        height, width = image.shape[-2:]
        corners = boxes.as_subclass(Tensor) / torch.tensor([width, height, width, height])
        return Sample(
            image=image.as_subclass(Tensor),
            labels=labels,
            boxes_cxcywh=xyxy_to_cxcywh(corners.clamp(0, 1)),
            image_id=int(self.data.image_ids[row]),
            original_size_hw=size_hw,
            unreadable=tuple(unreadable),
        )


def _check_size(path: Path, found_hw: tuple[int, ...], annotated_hw: tuple[int, int]) -> None:
    """Boxes of a picture of another size would be wrong, and nothing else would ever show it."""
    if found_hw != annotated_hw:
        (height, width), (annotated_height, annotated_width) = found_hw, annotated_hw
        turned = "; its EXIF rotation is not applied" if found_hw == annotated_hw[::-1] else ""
        raise UnreadableImageError(
            f"{path}: the image is {width}x{height} but its annotation says "
            f"{annotated_width}x{annotated_height}{turned}; correct the JSON or save the image in the "
            "annotated size"
        )
