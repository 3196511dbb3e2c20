"""The pass of a data set's images, or of windows of them, through a detector."""

from collections.abc import Generator, Mapping
from contextlib import ExitStack, closing
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2 import functional as F

class Predicted(NamedTuple):
    """The predictions of a detector for one batch of images."""

    rows: list[int]
    """Rows of the images in the data set."""
    batch: Batch
    """The batch, on the device."""
    outputs: dict[str, Tensor]
    """`pred_logits` and `pred_boxes` of all decoder layers, float32."""
    records: DetectionRecords
    """The detections, on the host."""
    unreadable: dict[int, str]
    """Row and reason of each image that cannot be read; a black one was evaluated, and has no detections."""


class _Images(CocoDetectionDataset):
    """The images of a data set; some of them may be in memory instead of in files."""

    def __init__(self, data: CocoData, resize: Resize, pixels: Mapping[int, Tensor]) -> None:
        super().__init__(data, build_transform("none", resize, train=False), seed=0, train=False)
        self._pixels = pixels

    def __getitem__(self, key: SampleKey) -> Sample:
        row = key[1]
        if row not in self._pixels:
            return super().__getitem__(key)
        image = self._pixels[row]
        height, width = image.shape[-2:]
        resized = F.resize(image, [*self.transform.resize.size_hw(height, width)], antialias=True)
        labels, boxes = torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4)
        return Sample(resized, labels, boxes, int(self.data.image_ids[row]), (height, width))


class ImagePass:
    """Passes this process's part of a data set's images through a detector, any number of times.

    Images are resized but not padded, so that the predictions for an image do not depend on the batch size,
    the number of processes or the other images.
    """

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
        self._device = device
        self._has_bar = process_index == 0
        self._memory = DeviceMemory(config, device)
        self._precision = config.training.mixed_precision
        resize = Resize.of(config.data)
        sizes_hw = np.array([resize.size_hw(height, width) for height, width in data.sizes_hw.tolist()])
        self._batches = evaluation_batches(
            sizes_hw,
            config.training.batch_size,
            num_processes=num_processes,
            process_index=process_index,
        )
        self._loader = BatchLoader(
            _Images(data, resize, pixels or {}),
            [[(0, index) for index in batch.indices] for batch in self._batches],
            config.data,
            pin_memory=device.type == "cuda",
            need=shared_memory_need(config, data, train=False),
        )

    @torch.no_grad()
    def run(self, detector: Detector) -> Generator[Predicted]:
        """Yield the predictions of a detector in evaluation mode, batch by batch, with a progress bar."""
        with closing(iter(self._loader)) as batches, ExitStack() as held:
            bar: ProgressBar | None = None
            if self._has_bar and len(self._batches) > 1:
                bar = held.enter_context(closing(ProgressBar("batches of images", len(self._batches))))
            for planned, batch in zip(self._batches, batches, strict=True):
                on_device = batch.to(self._device)
                outputs = self._forward(detector, on_device, planned)
                sizes_hw = torch.tensor(batch.original_sizes_hw, device=self._device)
                detections = postprocess(outputs, sizes_hw, detector.loss_settings.kind)
                rows, unreadable = np.array(planned.indices, dtype=np.int64), dict(batch.unreadable)
                readable = ~np.isin(rows, list(unreadable))
                records = DetectionRecords(
                    evaluated_rows=rows,
                    image_rows=np.repeat(rows[readable], detections.scores.shape[1]),
                    boxes_xyxy_px=detections.boxes_xyxy_px.cpu().numpy()[readable].reshape(-1, 4),
                    scores=detections.scores.cpu().numpy()[readable].reshape(-1),
                    labels=detections.labels.cpu().numpy()[readable].reshape(-1),
                )
                yield Predicted(planned.indices, on_device, outputs, records, unreadable)
                if bar is not None:
                    bar.advance()

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
