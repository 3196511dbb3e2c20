"""A `transformers` detector as the one module that training, evaluation and packaging work with.

Pixels are normalized as for ImageNet, unless the model's image processor does it differently.
"""

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForObjectDetection, PreTrainedConfig, PreTrainedModel
from transformers.utils import IMAGE_PROCESSOR_NAME

from detr_dist.config_types import ClassLoss
from detr_dist.errors import UsageError
from detr_dist.models.denoising import Denoising
from detr_dist.models.families import Family
from detr_dist.models.optimizations import PaddingMasks, spare_finite_checks
from detr_dist.serving.network import (
    backbone_body,
    keep_in_float32,
    keep_type_in_frozen_norms,
    on_pixels,
    restore_timm_norms,
    return_float32,
)


@dataclass(frozen=True)
class Normalization:
    """Mean and standard deviation of red, green and blue, for values from 0 to 1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


IMAGENET = Normalization(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
"""The normalization that most published backbones expect."""

UNNORMALIZED = Normalization(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
"""Values from 0 to 1."""

_NORMALIZATION_KEY = "pixel_normalization"
"""Key in a network's configuration, which is saved with it, for a normalization other than ImageNet's."""


def normalization_of(config: PreTrainedConfig) -> Normalization:
    """Return the normalization that the network of this configuration expects."""
    kept = getattr(config, _NORMALIZATION_KEY, None)
    return IMAGENET if kept is None else Normalization(tuple(kept["mean"]), tuple(kept["std"]))


def keep_normalization(config: PreTrainedConfig, normalization: Normalization) -> None:
    """Store `normalization` in the network's configuration, which is saved with it."""
    if normalization != normalization_of(config):
        setattr(config, _NORMALIZATION_KEY, dataclasses.asdict(normalization))


def normalization_at(source: str, config: PreTrainedConfig) -> Normalization:
    """Return the normalization that the network at `source`, a folder or hub id, expects.

    Raises:
        OSError: its image processor cannot be read.
    """
    folder = Path(source)
    if folder.is_dir() and not (folder / IMAGE_PROCESSOR_NAME).exists():
        return normalization_of(config)  # a checkpoint, for example
    from transformers import AutoImageProcessor  # slow to import

    return normalization_by(AutoImageProcessor.from_pretrained(source, trust_remote_code=False))


def normalization_by(processor: Any) -> Normalization:
    """Combine the two steps of an image processor, a factor, then mean and deviation, into one."""
    scale = 255 * processor.rescale_factor if processor.do_rescale else 255.0
    mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else ([0.0], [1.0])
    red, green, blue = np.broadcast_to(np.array([mean, std]).T / scale, (3, 2)).tolist()
    mean, std = zip(red, green, blue, strict=True)
    return Normalization(mean, std)


class Detector(nn.Module):
    """A `transformers` detector that takes uint8 images and returns the predictions of every row.

    Conversion to float, normalisation and the pixel mask happen on the network's device, so that only bytes
    are copied to it. Predictions are float32 whatever the autocast. `network` is the library's module, owned
    by this one, which adds hooks to it; its state dict and `plain_config` are saved.
    """

    def __init__(
        self,
        network: PreTrainedModel,
        family: Family,
        *,
        class_loss: ClassLoss | None = None,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        self._has_auxiliary_loss = network.config.auxiliary_loss
        family.prepare(network)
        network.config.auxiliary_loss = True
        network.loss_function = _instead_of_loss(family.rows)
        spare_finite_checks(network)
        keep_in_float32(network, family.float32_modules)
        return_float32(network, family.float32_outputs)
        keep_type_in_frozen_norms(backbone_body(network))
        self.network = network
        self._masks = PaddingMasks(network) if family.masks_attention else None
        self.family = family
        self.loss_settings = family.loss_settings(network.config, class_loss)
        self.denoising = family.denoising_settings(network.config)
        self.channels_last = channels_last
        if channels_last:
            nn.Module.to(network, memory_format=torch.channels_last)
        normalization = normalization_of(network.config)
        self.mean = nn.Buffer(on_pixels(normalization.mean), persistent=False)
        self.std = nn.Buffer(on_pixels(normalization.std), persistent=False)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Name of each class, in the order of the outputs."""
        return class_names_of(self.network.config)

    @property
    def num_queries(self) -> int:
        """Largest number of objects that can be found in one image."""
        return cast(int, self.family.num_queries_in(self.network.config))

    @property
    def trial_edge(self) -> int:
        """Pixels of a square image on which the network runs, whatever its size."""
        multiple = self.family.size_multiple(self.network.config)
        return math.ceil(self.family.trial_edge / multiple) * multiple

    @property
    def plain_config(self) -> PreTrainedConfig:
        """The configuration with which the library alone makes the same predictions from these weights."""
        config = copy.deepcopy(self.network.config)
        config.auxiliary_loss = self._has_auxiliary_loss
        return config

    def forward(
        self,
        images: Tensor,
        sizes_hw: Tensor,
        is_padded: bool = True,
        denoising: Denoising | None = None,
    ) -> dict[str, Tensor]:
        """Predict classes and boxes for a batch of images.

        Args:
            images: uint8 [B, 3, H, W], padded at the right and bottom.
            sizes_hw: [B, 2], each image's own size in pixels.
            is_padded: False if all images are H x W.
            denoising: Queries to be answered as well, by families that have them, in training.

        Returns:
            `pred_logits` [R, B, Q, C] (softmax families: C + 1, the last one is no-object) and `pred_boxes`
            [R, B, Q, 4], cxcywh as fractions of the image's own size. There is a row for each decoder layer,
            unless the family defines others; the last row is the prediction, equal to the library's. What
            else there may be is described in `SetCriterion.__call__`.

        Raises:
            UsageError: the family does not take images of this size.
        """
        height, width = images.shape[-2:]
        self._check_size(height, width)
        rows = torch.arange(height, device=images.device) < sizes_hw[:, :1]
        columns = torch.arange(width, device=images.device) < sizes_hw[:, 1:]
        mask = rows[:, :, None] & columns[:, None, :]
        pixels = (images - self.mean) / self.std
        if is_padded:
            pixels = pixels * mask[:, None]
        if self._masks is not None:
            self._masks.is_padded = is_padded
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        pixels = pixels.contiguous(memory_format=layout)
        # Any labels but None make the library call its loss function, which returns all rows instead.
        labels = () if denoising is None else denoising
        if is_padded and not self.family.uses_mask:
            # The network knows only the canvas: its boxes are fractions of that.
            share = torch.stack((sizes_hw[:, 1] / width, sizes_hw[:, 0] / height) * 2, 1)[:, None]
            if denoising is not None:
                labels = denoising._replace(boxes_cxcywh=denoising.boxes_cxcywh * share)
            found = self.network(pixel_values=pixels, pixel_mask=mask, labels=labels).loss_dict
            return {name: each / share if name.endswith("_boxes") else each for name, each in found.items()}
        output = self.network(pixel_values=pixels, pixel_mask=mask, labels=labels)
        return cast(dict[str, Tensor], output.loss_dict)

    def _check_size(self, height: int, width: int) -> None:
        multiple, square_only = self.family.size_multiple(self.network.config), self.family.square_only
        if height % multiple or width % multiple or (square_only and height != width):
            raise UsageError(
                f"{self.family.name} takes {'square ' if square_only else ''}images with sides that are "
                f"multiples of {multiple}, not images of {height} x {width} pixels"
            )

    def backbone_parameters(self) -> Iterator[nn.Parameter]:
        """Return the parameters that are trained with `training.learning_rate_backbone`."""
        return backbone_body(self.network).parameters()


def plain_network(detector: Detector) -> PreTrainedModel:
    """Return a copy on the CPU with only the library's modules: its loss function and frozen batch norm.

    Frozen and trained batch norm compute the same in evaluation, so its predictions equal the detector's.
    """
    network = AutoModelForObjectDetection.from_config(detector.plain_config)
    restore_timm_norms(network)
    load_plain_weights(network, detector.network.state_dict())
    return cast(PreTrainedModel, network.eval())


def load_plain_weights(network: PreTrainedModel, weights: Mapping[str, Tensor]) -> None:
    """Load a detector's weights, on any device, into a network of `plain_network`, without batch counters."""
    network.load_state_dict({k: v for k, v in weights.items() if not k.endswith("num_batches_tracked")})


def class_names_of(config: PreTrainedConfig) -> tuple[str, ...]:
    """Return the name of each class, in the order of the network's outputs.

    Classes without a name in the configuration get the library's default.
    """
    names = cast(dict[int, str], config.id2label)
    return tuple(names.get(index, f"LABEL_{index}") for index in range(cast(int, config.num_labels)))


def _instead_of_loss(rows: Callable[..., dict[str, Tensor]]) -> Callable[..., Any]:
    """Return the replacement for the library's loss function, which is wrong with several processes."""

    def loss_function(
        logits: Tensor,
        labels: object,
        device: object,
        pred_boxes: Tensor,
        config: PreTrainedConfig,
        outputs_class: Tensor,
        outputs_coord: Tensor,
        *proposals: Tensor,
        **further: Any,
    ) -> tuple[None, dict[str, Tensor], None]:
        predicted = {"config": config, "logits": logits, "pred_boxes": pred_boxes}
        layers = {"outputs_class": outputs_class, "outputs_coord": outputs_coord}
        further |= zip(("enc_outputs_class", "enc_outputs_coord"), proposals, strict=False)
        return None, rows(**predicted, **layers, **further), None

    return loss_function
