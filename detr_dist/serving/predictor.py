"""A saved network that detects objects in images, with the results of `detr-dist predict` to the bit."""

import copy
import os
import threading
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
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
from .postprocess import MAX_DETECTIONS, postprocess
from .precision import autocast, precision_on, temporary_numerics
from .resize import Resize
from .settings import ServingSettings
from .tiles import Found, found_in_image, rounds

DEVICE_VARIABLE = "MLFLOW_DEFAULT_PREDICTION_DEVICE"
"""MLflow's environment variable for the device, such as `cpu` or `cuda:1`.
Without it a GPU is used if there is one."""


class PreparedImage(NamedTuple):
    """The W windows of an image at the network's input size; the only one may be the image itself."""

    resized: list[Tensor]
    """[W] of uint8 [3, h, w]."""
    windows: list[tuple[int, int, int, int]]
    """[W], left, top, right and bottom in pixels of the image."""


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
        """Resize an image uint8 [3, H, W], or its windows, so that a large one need not be kept."""
        height, width = image.shape[-2:]
        whole, tiles = (0, 0, width, height), self.settings.tiles
        windows = [whole] if tiles is None else tiles.windows(height, width)
        return PreparedImage([self._prepared(image, *window) for window in windows], windows)

    def _prepared(self, image: Tensor, left: int, top: int, right: int, bottom: int) -> Tensor:
        size_hw = bottom - top, right - left
        window = image if image.shape[-2:] == size_hw else F.crop(image, top, left, *size_hw)
        resized: Tensor = F.resize(window, [*self._resize.size_hw(*size_hw)], antialias=True)
        return resized

    def detect(self, images: Sequence[PreparedImage]) -> list[Found]:
        """Return the detections in each image, at most `MAX_DETECTIONS`; no threshold is applied.

        Windows of one size share batches, because a convolution would see padding.
        """
        if self.settings.tiles is None:
            return self._detect_together(images)
        found: list[Found] = []
        for together in rounds([len(image.windows) for image in images], self.settings.batch_size):
            found += self._detect_together([images[index] for index in together])
        return found

    def _detect_together(self, images: Sequence[PreparedImage]) -> list[Found]:
        resized = [each for image in images for each in image.resized]
        sizes_hw = [
            (bottom - top, right - left) for image in images for left, top, right, bottom in image.windows
        ]
        by_size: dict[tuple[int, ...], list[int]] = {}
        for row, each in enumerate(resized):
            by_size.setdefault(tuple(each.shape), []).append(row)
        found: dict[int, Found] = {}
        size = self.settings.batch_size
        for rows in by_size.values():
            for first in range(0, len(rows), size):
                batch = rows[first : first + size]
                of_batch = self._detect([resized[row] for row in batch], [sizes_hw[row] for row in batch])
                found |= zip(batch, of_batch, strict=True)
        in_order = (found[row] for row in range(len(resized)))
        return [
            found_in_image(
                list(islice(in_order, len(image.windows))), np.array(image.windows), most=MAX_DETECTIONS
            )
            for image in images
        ]

    @torch.no_grad()
    def _detect(self, resized: list[Tensor], sizes_hw: list[tuple[int, int]]) -> list[Found]:
        batch = torch.stack(resized)
        with self._lock, temporary_numerics(self.settings), autocast(self.device, self._precision):
            pixels = (batch.to(self.device) - self._mean) / self._std
            output = self._network(
                pixel_values=pixels.contiguous(memory_format=self._layout),
                pixel_mask=torch.ones_like(pixels[:, 0], dtype=torch.bool),
            )
            outputs = {"pred_logits": output.logits[None], "pred_boxes": output.pred_boxes[None]}
            ranked = postprocess(
                outputs, torch.tensor(sizes_hw, device=self.device), self.settings.class_kind
            )
            columns = (ranked.boxes_xyxy_px, ranked.scores, ranked.labels)
            boxes, scores, labels = (column.cpu().numpy() for column in columns)
        return [Found(*each) for each in zip(boxes, scores, labels, strict=True)]


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
    # Loaded weights lie in the mapped file, at any address, and the CPU's kernels round by their alignment.
    return copy.deepcopy(cast(PreTrainedModel, network))
