"""The pass of a data set's images, or of the windows of each, through a detector.

Images and windows are resized but not padded, so that what is found in an image depends neither on the batch
size, nor on the number of processes, nor on the other images.
"""

from collections.abc import Generator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import cache
from itertools import chain, zip_longest
from typing import NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from detr_dist.config import Config, specific_tiles
from detr_dist.config_tiles import Tiles
from detr_dist.data.batch import Batch, Sample
from detr_dist.data.coco import CocoData
from detr_dist.data.dataset import CocoDetectionDataset
from detr_dist.data.loading import BatchLoader, num_loader_processes, shared_memory_need
from detr_dist.data.sampling import EvaluationBatch, SampleKey, evaluation_batches
from detr_dist.data.transforms import Plan, build_transform
from detr_dist.data.windows import Window, WindowRule, inside
from detr_dist.evaluation.detections import DetectionRecords
from detr_dist.models.detector import Detector
from detr_dist.models.device_memory import DeviceMemory
from detr_dist.progress_bar import ProgressBar
from detr_dist.resize import Resize
from detr_dist.serving.postprocess import MAX_DETECTIONS, RankedDetections, postprocess
from detr_dist.serving.precision import autocast
from detr_dist.serving.tiles import Found, found_in_image, rounds


@dataclass(frozen=True, eq=False)
class Views:
    """The V views of N images, in the order of the images: the image itself, or its windows."""

    rows: NDArray[np.int64]
    """[V], the image's row in the data set."""
    windows: NDArray[np.int64]
    """[V, 4], left, top, right, bottom in pixels of the image."""
    offsets: NDArray[np.int64]
    """[N + 1], where the views of each image begin and end."""

    @classmethod
    def of(cls, sizes_hw: NDArray[np.int64], tiles: Tiles | None) -> Self:
        """Return the views of images of these sizes [N, 2]."""
        if tiles is None:
            rows = np.arange(len(sizes_hw))
            return cls(rows, np.pad(sizes_hw[:, ::-1], ((0, 0), (2, 0))), np.arange(len(sizes_hw) + 1))
        windows_of = cache(tiles.grid.windows)  # most images have one of a few sizes
        windows = [windows_of(height, width) for height, width in sizes_hw.tolist()]
        numbers = np.array([len(each) for each in windows], dtype=np.int64)
        rows = np.repeat(np.arange(len(sizes_hw)), numbers)
        corners = np.array(list(chain.from_iterable(windows)), dtype=np.int64).reshape(-1, 4)
        return cls(rows, corners, np.append(0, np.cumsum(numbers)))

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def sizes_hw(self) -> NDArray[np.int64]:
        """Height and width of each view in pixels of the image, [V, 2]."""
        return (self.windows[:, 2:] - self.windows[:, :2])[:, ::-1]

    def window(self, view: int) -> Window:
        """Return the part of the image that a view shows."""
        left, top, right, bottom = self.windows[view].tolist()
        return Window(top, left, bottom - top, right - left)

    def of_image(self, row: int) -> range:
        """Return the views of an image."""
        return range(*self.offsets[row : row + 2].tolist())


class ViewTargets(NamedTuple):
    """What the losses of V views are divided by."""

    labels: NDArray[np.int64]
    """Classes of the boxes that count in all views, in their order."""
    num_boxes: NDArray[np.int64]
    """[V], the number of these in each view."""
    num_ignored: NDArray[np.int64]
    """[V], the number of ignored regions."""


class Predicted(NamedTuple):
    """The predictions of a detector for one batch of images."""

    rows: list[int]
    """Rows in the data set of the images that this batch completes."""
    batch: Batch
    """The batch of images or windows, on the device."""
    outputs: dict[str, Tensor]
    """`pred_logits` and `pred_boxes` of all decoder layers, float32."""
    records: DetectionRecords
    """The detections in these images, on the host."""
    unreadable: dict[int, str]
    """Row and reason of each image that cannot be read; a black one was evaluated, and has no detections."""


class _Started(NamedTuple):
    """A batch whose computation has been started, on the device."""

    planned: EvaluationBatch
    batch: Batch
    outputs: dict[str, Tensor]
    detections: RankedDetections


class _Views(CocoDetectionDataset):
    """The views of a data set's images; some of these may be in memory instead of in files."""

    def __init__(
        self, data: CocoData, resize: Resize, views: Views, tiles: Tiles | None, pixels: Mapping[int, Tensor]
    ) -> None:
        transform = build_transform("none", resize, train=False)
        rule = None if tiles is None else WindowRule.of(tiles, data)
        super().__init__(data, transform, seed=0, train=False, windows=rule)
        self._views = views
        self._pixels = pixels
        self._newest: tuple[int, Tensor] | None = None  # neighbours in a batch are often of one image

    def __len__(self) -> int:
        return len(self._views)

    def row(self, epoch: int, index: int) -> int:
        return int(self._views.rows[index])

    def __getitem__(self, key: SampleKey) -> Sample:
        return super().__getitem__(key)._replace(original_size_hw=self._views.window(key[1]).size_hw)

    def _plan(self, epoch: int, index: int, row: int) -> Plan:
        window = self._views.window(index)
        plan = self.transform.plan(window.size_hw, np.random.default_rng(0))
        return plan if window.size_hw == self.data.size_hw(row) else plan._replace(shown=window)

    def _decoded(self, row: int) -> Tensor:
        if row in self._pixels:
            return self._pixels[row]
        if self._newest is None or self._newest[0] != row:
            self._newest = row, super()._decoded(row)
        return self._newest[1]


class ImagePass:
    """Passes this process's part of a data set's images through a detector, any number of times."""

    def __init__(
        self,
        data: CocoData,
        config: Config,
        device: torch.device,
        *,
        num_processes: int = 1,
        process_index: int = 0,
        pixels: Mapping[int, Tensor] | None = None,
    ) -> None:
        """Prepare the images; `pixels` holds those that are in no file, as uint8 [3, H, W] by row."""
        tiles = specific_tiles(config)
        self.views = Views.of(data.sizes_hw, tiles)
        self._data, self._tiles = data, tiles
        self._device = device
        self._has_bar = process_index == 0
        self._memory = DeviceMemory(config, device)
        self._precision = config.training.mixed_precision
        resize, batch_size = Resize.of(config.data), config.training.batch_size
        size_after_resize = cache(resize.size_hw)  # most views have one of a few sizes
        sizes_hw = np.array([size_after_resize(*size_hw) for size_hw in self.views.sizes_hw.tolist()])
        if tiles is None:
            self._batches = evaluation_batches(
                sizes_hw, batch_size, num_processes=num_processes, process_index=process_index
            )
        else:
            own = range(process_index, len(data), num_processes)
            of_images = list(_batches_of_windows(self.views, sizes_hw, own, batch_size))
            self._batches = _in_turns(of_images, num_loader_processes(config.data.num_workers))
        self._loader = BatchLoader(
            _Views(data, resize, self.views, tiles, pixels or {}),
            [[(0, index) for index in batch.indices] for batch in self._batches],
            config.data,
            pin_memory=device.type == "cuda",
            need=shared_memory_need(config, data, train=False),
        )

    def targets(self) -> ViewTargets:
        """Return what the views of all images hold, those of other processes included."""
        data, tiles = self._data, self._tiles
        if tiles is None:
            return ViewTargets(data.box_classes[~data.iscrowd], data.num_boxes, np.zeros_like(data.num_boxes))
        visible = [
            inside(self.views.window(view), *data.training_corners(row), tiles.min_visible)[1]
            for view, row in enumerate(self.views.rows.tolist())
        ]
        labels = np.concatenate([np.zeros(0, dtype=np.int64), *visible])
        num_boxes = np.array([(each >= 0).sum() for each in visible], dtype=np.int64)
        num_visible = np.array([len(each) for each in visible], dtype=np.int64)
        return ViewTargets(labels[labels >= 0], num_boxes, num_visible - num_boxes)

    def run(self, detector: Detector) -> Generator[Predicted]:
        """Yield the predictions of a detector in evaluation mode, batch by batch, with a progress bar.

        A GPU computes the next batch meanwhile.
        """
        found = _OfViews(self.views)
        with ExitStack() as held:
            bar: ProgressBar | None = None
            if self._has_bar and len(self._batches) > 1:
                bar = held.enter_context(closing(ProgressBar("batches of images", len(self._batches))))
            started = held.enter_context(closing(self._started(detector)))
            before = next(started, None)
            while before is not None:
                following = next(started, None)
                found.add(before.planned.indices, before.detections, dict(before.batch.unreadable))
                rows, records, unreadable = found.take_complete()
                yield Predicted(rows, before.batch, before.outputs, records, unreadable)
                before = following
                if bar is not None:
                    bar.advance()

    @torch.no_grad()
    def _started(self, detector: Detector) -> Generator["_Started"]:
        """Yield each batch as soon as its computation has been started."""
        with closing(iter(self._loader)) as batches:
            for planned, on_host in zip(self._batches, batches, strict=True):
                batch = on_host.to(self._device)
                outputs = self._forward(detector, batch, planned)
                sizes_hw = torch.tensor(batch.original_sizes_hw, device=self._device)
                yield _Started(
                    planned, batch, outputs, postprocess(outputs, sizes_hw, detector.loss_settings.kind)
                )

    def _forward(self, detector: Detector, batch: Batch, planned: EvaluationBatch) -> dict[str, Tensor]:
        # The precision is not part of the detector. A network compiled for training would round differently
        # from the saved model, and be compiled again for each size of images.
        with (
            self._memory.explained(
                "in evaluation",
                num_images=len(planned.indices),
                canvas_hw=planned.size_hw,
                is_training=False,
            ),
            autocast(self._device, self._precision),
            torch.compiler.set_stance("force_eager"),
        ):
            outputs = detector(batch.images, batch.sizes_hw, batch.is_padded)
        return {name: predictions.float() for name, predictions in outputs.items()}


def _batches_of_windows(
    views: Views, sizes_hw: NDArray[np.int64], rows: range, batch_size: int
) -> Generator[list[EvaluationBatch]]:
    """Yield the batches of the windows of some of these images at a time, by size of the window."""
    for images in rounds([len(views.of_image(row)) for row in rows], batch_size):
        own = [view for image in images for view in views.of_image(rows[image])]
        batches = evaluation_batches(sizes_hw[own], batch_size, num_processes=1, process_index=0)
        yield [EvaluationBatch(batch.size_hw, [own[index] for index in batch.indices]) for batch in batches]


def _in_turns(of_images: list[list[EvaluationBatch]], num_workers: int) -> list[EvaluationBatch]:
    """Return all batches in such an order that each loader process gets those of the same images.

    The processes take batches in turns. Otherwise each of them would decode every image.
    """
    in_order, width = list[EvaluationBatch](), max(1, num_workers)
    for first in range(0, len(of_images), width):
        turns = zip_longest(*of_images[first : first + width])
        in_order += [batch for turn in turns for batch in turn if batch is not None]
    return in_order


class _OfViews:
    """Collects the detections in views until all those of an image are there, and merges them."""

    def __init__(self, views: Views) -> None:
        self._views = views
        self._found: dict[int, dict[int, Found]] = {}
        self._unreadable: dict[int, str] = {}
        self._complete: list[int] = []

    def add(self, views: list[int], detections: RankedDetections, unreadable: dict[int, str]) -> None:
        """Add the detections in some views, and the images that cannot be read."""
        self._unreadable |= unreadable
        boxes, scores, labels = (
            each.cpu().numpy() for each in (detections.boxes_xyxy_px, detections.scores, detections.labels)
        )
        for view, *found in zip(views, boxes, scores, labels, strict=True):
            row = int(self._views.rows[view])
            of_image = self._found.setdefault(row, {})
            of_image[view] = Found(*found)
            if len(of_image) == len(self._views.of_image(row)):
                self._complete.append(row)

    def take_complete(self) -> tuple[list[int], DetectionRecords, dict[int, str]]:
        """Return the rows of the images that are complete since the last call, and what is known of them."""
        rows, self._complete = self._complete, []
        unreadable = {row: self._unreadable.pop(row) for row in rows if row in self._unreadable}
        merged = [(row, self._merged(row, self._found.pop(row))) for row in rows]
        parts = [(row, each) for row, each in merged if row not in unreadable]
        columns = [np.concatenate(each) for each in zip(*(each for _, each in parts), strict=True)]
        none = DetectionRecords.none()
        boxes, scores, labels = columns or (none.boxes_xyxy_px, none.scores, none.labels)
        records = DetectionRecords(
            evaluated_rows=np.array(rows, dtype=np.int64),
            image_rows=np.repeat(
                np.array([row for row, _ in parts], dtype=np.int64), [len(each.scores) for _, each in parts]
            ),
            boxes_xyxy_px=boxes,
            scores=scores,
            labels=labels,
        )
        return rows, records, unreadable

    def _merged(self, row: int, found: dict[int, Found]) -> Found:
        """Return the detections in an image, by descending score."""
        views = self._views.of_image(row)
        return found_in_image(
            [found[view] for view in views], self._views.windows[views], most=MAX_DETECTIONS
        )
