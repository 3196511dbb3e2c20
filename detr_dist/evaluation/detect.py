"""A detector's predictions on the images of a data set, in batches, each image once."""

import sys
from collections.abc import Generator, Iterable
from contextlib import closing
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from detr_dist.config import Config
from detr_dist.data.batching import Batch
from detr_dist.data.coco import CocoData
from detr_dist.data.dataset import CocoDetectionDataset
from detr_dist.data.loading import BatchLoader, shared_memory_need
from detr_dist.data.sampling import EvaluationBatch, evaluation_batches
from detr_dist.data.transforms import build_transform, resized_hw
from detr_dist.distributed import autocast
from detr_dist.evaluation.records import DetectionRecords
from detr_dist.models.detector import Detector
from detr_dist.models.device_memory import DeviceMemory
from detr_dist.models.postprocess import postprocess


class Predicted(NamedTuple):
    """What the network says of one batch of images."""

    rows: list[int]
    """Of the images in the data set."""
    batch: Batch
    """On the device."""
    outputs: dict[str, Tensor]
    """`pred_logits` and `pred_boxes` of all decoder layers, float32."""
    unreadable: dict[int, str]
    """Rows of images that cannot be read, for which a black one stands, with "path: reason"."""


class ImagePass:
    """Passes this process's share of a data set's images through a detector, again and again.

    Images are only resized, and padded by nothing: the predictions for an image depend neither on the batch
    size, nor on the number of processes, nor on the other images.
    """

    def __init__(self, data: CocoData, config: Config, accelerator: Accelerator) -> None:
        self.data = data
        self._accelerator = accelerator
        self._memory = DeviceMemory(config, accelerator.device)
        self._precision = config.training.mixed_precision
        edges = config.data.shortest_edge, config.data.longest_edge
        sizes_hw = np.array([resized_hw(height, width, *edges) for height, width in data.sizes_hw.tolist()])
        self._batches = evaluation_batches(
            sizes_hw,
            config.training.batch_size,
            num_processes=accelerator.num_processes,
            process_index=accelerator.process_index,
        )
        self._loader = BatchLoader(
            CocoDetectionDataset(data, build_transform("none", *edges, train=False), seed=0, train=False),
            [[(0, index) for index in batch.indices] for batch in self._batches],
            config.data,
            pin_memory=accelerator.device.type == "cuda",
            need=shared_memory_need(config, data, train=False),
        )

    @torch.no_grad()
    def run(self, detector: Detector) -> Generator[Predicted]:
        """The predictions of a detector in evaluation mode, batch by batch, with a bar on a terminal."""
        planned_batches: Iterable[EvaluationBatch] = self._batches
        if self._accelerator.is_main_process and sys.stderr.isatty():  # even a hidden bar starts a thread
            planned_batches = tqdm(
                self._batches, desc="images", unit="batch", leave=False, dynamic_ncols=True
            )
        with closing(iter(self._loader)) as batches:
            for planned, batch in zip(planned_batches, batches, strict=True):
                # The detector does not bring its own precision. What was compiled for training would round
                # otherwise than the same model does later, and be compiled for each size of images.
                with (
                    self._memory.explained(
                        "in evaluation",
                        num_images=len(planned.indices),
                        canvas_hw=planned.size_hw,
                        is_training=False,
                    ),
                    autocast(self._accelerator.device, self._precision),
                    torch.compiler.set_stance("force_eager"),
                ):
                    on_device = batch.to(self._accelerator.device)
                    outputs = detector(on_device.images, on_device.sizes_hw, on_device.is_padded)
                outputs = {name: predictions.float() for name, predictions in outputs.items()}
                yield Predicted(planned.indices, on_device, outputs, self._unreadable(planned, batch))

    def _unreadable(self, planned: EvaluationBatch, batch: Batch) -> dict[int, str]:
        starts = {row: f"{self.data.image_path(row)}:" for row in planned.indices}
        return {
            row: reason
            for row, start in starts.items()
            for reason in batch.unreadable
            if reason.startswith(start)
        }

    def records(self, detector: Detector, predicted: Predicted) -> DetectionRecords:
        """The detections on the host; an image that cannot be read has none."""
        sizes_hw = torch.tensor(predicted.batch.original_sizes_hw, device=self._accelerator.device)
        detections = postprocess(predicted.outputs, sizes_hw, detector.loss_settings.kind)
        rows = np.array(predicted.rows, dtype=np.int64)
        readable = ~np.isin(rows, list(predicted.unreadable))
        return DetectionRecords(
            evaluated_rows=rows,
            image_rows=np.repeat(rows[readable], detections.scores.shape[1]),
            boxes_xyxy_px=detections.boxes_xyxy_px.cpu().numpy()[readable].reshape(-1, 4),
            scores=detections.scores.cpu().numpy()[readable].reshape(-1),
            labels=detections.labels.cpu().numpy()[readable].reshape(-1),
        )
