"""A saved network that detects objects in images, with the results of `detr-dist predict` to the bit."""

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as F
from transformers import AutoModelForObjectDetection, PreTrainedModel

from .network import (
    backbone_body,
    keep_in_float32,
    keep_type_in_frozen_norms,
    on_pixels,
    restore_timm_norms,
    return_float32,
    thaw_batch_norm,
)
from .postprocess import RankedDetections, postprocess
from .precision import autocast, precision_on, temporary_numerics
from .resize import Resize
from .settings import ServingSettings

DEVICE_VARIABLE = "MLFLOW_DEFAULT_PREDICTION_DEVICE"
"""MLflow's environment variable for the device, such as `cpu` or `cuda:1`.
Without it a GPU is used if there is one."""


class PreparedImage(NamedTuple):
    """An image at the network's input size."""

    resized: Tensor  # uint8 [3, H, W]
    original_size_hw: tuple[int, int]


class Predictor:
    """Runs the network of a model's folder on a GPU, or without one on the CPU. Safe to use from threads."""

    def __init__(self, folder: Path) -> None:
        self.settings = settings = ServingSettings.read(folder)
        self.device = _device()
        self._resize = Resize.of(settings)
        self._precision = precision_on(self.device, settings.mixed_precision)
        self._layout = torch.channels_last if settings.channels_last else torch.contiguous_format
        network = _saved_network(folder)
        if settings.thaw_batch_norm:
            thaw_batch_norm(network)
        keep_in_float32(network, settings.float32_modules)
        return_float32(network, settings.float32_outputs)
        keep_type_in_frozen_norms(backbone_body(network))
        if settings.channels_last:
            nn.Module.to(network, memory_format=torch.channels_last)
        self._network = network.eval().to(self.device)
        self._mean, self._std = (on_pixels(each).to(self.device) for each in (settings.mean, settings.std))
        self._lock = threading.Lock()

    def prepare(self, image: Tensor) -> PreparedImage:
        """Resize an image uint8 [3, H, W], so that a large one need not be kept."""
        height, width = image.shape[-2:]
        resized = F.resize(image, [*self._resize.size_hw(height, width)], antialias=True)
        return PreparedImage(resized, (height, width))

    def detect(self, images: Sequence[PreparedImage]) -> list[RankedDetections]:
        """Return the detections [1, K, ...] of each image, on the CPU; no threshold is applied.

        Images of one size share batches, because a convolution would see padding.
        """
        by_size: dict[tuple[int, ...], list[int]] = {}
        for row, image in enumerate(images):
            by_size.setdefault(tuple(image.resized.shape), []).append(row)
        found: dict[int, RankedDetections] = {}
        size = self.settings.batch_size
        for rows in by_size.values():
            for batch in (rows[first : first + size] for first in range(0, len(rows), size)):
                found |= zip(batch, self._detect([images[row] for row in batch]), strict=True)
        return [found[row] for row in range(len(images))]

    @torch.no_grad()
    def _detect(self, images: list[PreparedImage]) -> list[RankedDetections]:
        batch = torch.stack([image.resized for image in images])
        sizes_hw = torch.tensor([image.original_size_hw for image in images], device=self.device)
        with self._lock, temporary_numerics(self.settings), autocast(self.device, self._precision):
            pixels = (batch.to(self.device) - self._mean) / self._std
            output = self._network(
                pixel_values=pixels.contiguous(memory_format=self._layout),
                pixel_mask=torch.ones_like(pixels[:, 0], dtype=torch.bool),
            )
            outputs = {"pred_logits": output.logits[None], "pred_boxes": output.pred_boxes[None]}
            found = postprocess(outputs, sizes_hw, self.settings.class_kind)
            columns = (found.boxes_xyxy_px.cpu(), found.scores.cpu(), found.labels.cpu())
        return [RankedDetections(*(c[i : i + 1] for c in columns)) for i in range(len(images))]


def _device() -> torch.device:
    name = os.environ.get(DEVICE_VARIABLE)
    if name:
        return torch.device(name)
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


def _saved_network(folder: Path) -> PreTrainedModel:
    """Load the network in a folder from its safetensors file; code beside it is not run."""
    network = AutoModelForObjectDetection.from_pretrained(
        str(folder),
        dtype=torch.float32,
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
    )
    restore_timm_norms(network)
    return cast(PreTrainedModel, network)
