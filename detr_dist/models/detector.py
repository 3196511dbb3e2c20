"""A `transformers` detector as the one module that training, evaluation and packaging work with."""

import copy
from collections.abc import Iterator, Mapping
from typing import cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForObjectDetection, PreTrainedConfig, PreTrainedModel

from detr_dist.models.criterion import LossSettings
from detr_dist.models.decoder_layers import return_every_layer
from detr_dist.models.host_waits import PaddingMasks, spare_finite_checks
from detr_dist.models.normalization import normalization_of
from detr_dist.models.precision import keep_heads_in_float32, keep_type_in_frozen_norms
from detr_dist.models.timm_norms import restore_timm_norms


class Detector(nn.Module):
    """A `transformers` detector that takes uint8 images and returns the predictions of every decoder layer.

    Conversion to float, normalisation and the pixel mask are made on the network's device, so that only bytes
    travel. Predictions are float32 whatever the autocast. `network` is the library's module, and belongs to
    this one with the hooks that it gets; its state dict and `plain_config` are what gets saved.
    """

    def __init__(
        self,
        network: PreTrainedModel,
        loss_settings: LossSettings,
        *,
        channels_last: bool = False,
        masks_attention: bool = True,
    ) -> None:
        super().__init__()
        self._has_auxiliary_loss = network.config.auxiliary_loss
        return_every_layer(network)
        network.loss_function = _every_layer
        spare_finite_checks(network)
        keep_heads_in_float32(network)
        keep_type_in_frozen_norms(backbone_body(network))
        self.network = network
        self._masks = PaddingMasks(network) if masks_attention else None
        self.loss_settings = loss_settings
        self.channels_last = channels_last
        if channels_last:
            nn.Module.to(network, memory_format=torch.channels_last)
        normalization = normalization_of(network.config)
        self.mean = nn.Buffer(torch.tensor(normalization.mean).view(1, 3, 1, 1) * 255, persistent=False)
        self.std = nn.Buffer(torch.tensor(normalization.std).view(1, 3, 1, 1) * 255, persistent=False)

    @property
    def class_names(self) -> tuple[str, ...]:
        return class_names_of(self.network.config)

    @property
    def num_queries(self) -> int:
        """The most objects that can be found in one image."""
        config = self.network.config
        two_stage = getattr(config, "two_stage", False)
        return int(config.two_stage_num_proposals if two_stage else config.num_queries)

    @property
    def plain_config(self) -> PreTrainedConfig:
        """The configuration by which the library alone predicts the same with these weights."""
        config = copy.deepcopy(self.network.config)
        config.auxiliary_loss = self._has_auxiliary_loss
        return config

    def forward(self, images: Tensor, sizes_hw: Tensor, is_padded: bool = True) -> dict[str, Tensor]:
        """`images` uint8 [B, 3, H, W] padded at the right and bottom, `sizes_hw` [B, 2] each image's own size
        in pixels; `is_padded` False if all of them are H x W.

        Returns `pred_logits` [L, B, Q, C] (softmax family: C + 1, the last one is no-object) and `pred_boxes`
        [L, B, Q, 4], cxcywh as fractions of the image's own size; L decoder layers, the last one is the
        prediction, which is the library's.
        """
        height, width = images.shape[-2:]
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
        # Any labels but None make the library call its loss function, which hands us all layers instead.
        output = self.network(pixel_values=pixels, pixel_mask=mask, labels=())
        return cast(dict[str, Tensor], output.loss_dict)

    def backbone_parameters(self) -> Iterator[nn.Parameter]:
        return backbone_body(self.network).parameters()


def plain_network(detector: Detector) -> PreTrainedModel:
    """A copy on the CPU that is all the library's own: loss function and frozen batch norm, as if never
    trained here.

    Frozen and trained batch norm compute the same in evaluation, so its predictions are the detector's.
    """
    network = AutoModelForObjectDetection.from_config(detector.plain_config)
    restore_timm_norms(network, backbone_body(network))
    load_plain_weights(network, detector.network.state_dict())
    return cast(PreTrainedModel, network.eval())


def load_plain_weights(network: PreTrainedModel, weights: Mapping[str, Tensor]) -> None:
    """Put a detector's weights, on any device, into a plain network; frozen batch norm counts no batches."""
    network.load_state_dict({k: v for k, v in weights.items() if not k.endswith("num_batches_tracked")})


def class_names_of(config: PreTrainedConfig) -> tuple[str, ...]:
    """Return a name for each class that the network tells apart, in the order of its outputs; one that the
    configuration does not name gets the library's."""
    names = cast(dict[int, str], config.id2label)
    return tuple(names.get(index, f"LABEL_{index}") for index in range(cast(int, config.num_labels)))


def unwrapped_body(network: PreTrainedModel) -> nn.Module:
    """Return the backbone without what the library may wrap around timm's."""
    body = backbone_body(network)
    return cast(nn.Module, getattr(body, "_backbone", body))


def backbone_body(network: PreTrainedModel) -> nn.Module:
    encoder = network.model.backbone
    return cast(nn.Module, getattr(encoder, "conv_encoder", encoder).model)


def _every_layer(
    logits: Tensor,
    labels: object,
    device: object,
    pred_boxes: Tensor,
    config: object,
    outputs_class: Tensor,
    outputs_coord: Tensor,
    **_: object,
) -> tuple[None, dict[str, Tensor], None]:
    """Stands where the library computes its loss (which is wrong with several processes) and computes
    nothing."""
    return None, {"pred_logits": outputs_class, "pred_boxes": outputs_coord}, None
