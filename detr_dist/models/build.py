"""From configuration to network: members of the DETR family out of `transformers`, behind one uniform
module."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import timm
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForObjectDetection, PreTrainedConfig, PreTrainedModel

from detr_dist.config import ModelConfig
from detr_dist.errors import UsageError
from detr_dist.models.criterion import LossSettings
from detr_dist.models.matcher import ClassKind

# Mean and standard deviation of ImageNet's RGB channels, which every published backbone expects.
IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Architecture:
    """What sets one member of the family apart for us.

    `weight_ce` and `config_defaults` hold what the paper's own code trains with where transformers differs.
    """

    model_type: str
    loss_kind: ClassKind
    weight_ce: float = 1.0
    width_option: str = "d_model"
    config_defaults: dict[str, Any] = dataclasses.field(default_factory=dict)


# Sources: Carion et al. 2020 (DETR), Meng et al. 2021 (Conditional DETR), Zhu et al. 2021 (Deformable DETR),
# Liu et al. 2022 (DAB-DETR), and the training options of their released code.
ARCHITECTURES = {
    "detr": Architecture("detr", "softmax"),
    "conditional_detr": Architecture("conditional_detr", "sigmoid", weight_ce=2.0),
    "deformable_detr": Architecture(
        "deformable_detr", "sigmoid", weight_ce=2.0, config_defaults={"class_cost": 2}
    ),
    "dab_detr": Architecture("dab-detr", "sigmoid", width_option="hidden_size"),
}


class Detector(nn.Module):
    """A `transformers` detector that takes uint8 images and returns the predictions of every decoder layer.

    Conversion to float, normalisation and the pixel mask are made on the network's device, so that only bytes
    travel. `network` is the plain library module; its state dict is what gets saved.
    """

    def __init__(
        self, network: PreTrainedModel, loss_settings: LossSettings, *, channels_last: bool = False
    ) -> None:
        super().__init__()
        network.loss_function = _every_layer
        self.network = network
        self.loss_settings = loss_settings
        self.channels_last = channels_last
        if channels_last:
            nn.Module.to(network, memory_format=torch.channels_last)
        self.mean = nn.Buffer(torch.tensor(IMAGE_MEAN).view(1, 3, 1, 1) * 255, persistent=False)
        self.std = nn.Buffer(torch.tensor(IMAGE_STD).view(1, 3, 1, 1) * 255, persistent=False)

    @property
    def class_names(self) -> tuple[str, ...]:
        names = cast(dict[int, str], self.network.config.id2label)
        return tuple(names[index] for index in range(len(names)))

    @property
    def num_queries(self) -> int:
        return num_queries(self.network.config)

    def forward(self, images: Tensor, sizes_hw: Tensor) -> dict[str, Tensor]:
        """`images` uint8 [B, 3, H, W] padded at the right and bottom, `sizes_hw` [B, 2] each image's own size
        in pixels.

        Returns `pred_logits` [L, B, Q, C] (softmax family: C + 1, the last one is no-object) and `pred_boxes`
        [L, B, Q, 4], cxcywh as shares of the image's own size; L decoder layers, the last one is the
        prediction.
        """
        height, width = images.shape[-2:]
        rows = torch.arange(height, device=images.device) < sizes_hw[:, :1]
        columns = torch.arange(width, device=images.device) < sizes_hw[:, 1:]
        mask = rows[:, :, None] & columns[:, None, :]
        pixels = (images - self.mean) / self.std * mask[:, None]
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        pixels = pixels.contiguous(memory_format=layout)
        # Any labels but None make the library call its loss function, which hands us all layers instead.
        output = self.network(pixel_values=pixels, pixel_mask=mask, labels=())
        return cast(dict[str, Tensor], output.loss_dict)

    def backbone_parameters(self) -> Iterator[nn.Parameter]:
        return _backbone_body(self.network).parameters()


def build_detector(
    config: ModelConfig,
    class_names: Sequence[str],
    *,
    channels_last: bool = False,
    train_backbone: bool = True,
) -> Detector:
    """The detector that `config` describes, with one output per class name.

    From pretrained weights the backbone's stem and first stage stay fixed, as in the DETR paper (appendix
    A.4); from scratch everything learns.

    Raises:
        UsageError: an option that this architecture does not have, a value it refuses, weights that cannot be
        had.
    """
    if config.num_classes is not None and config.num_classes != len(class_names):
        raise UsageError(
            f"model.num_classes is {config.num_classes}, but the training data hold {len(class_names)} "
            f"classes "
            f"({', '.join(class_names)}); correct it or leave it out"
        )
    architecture = ARCHITECTURES[config.model_architecture]
    labels = {
        "id2label": dict(enumerate(class_names)),
        "label2id": {name: i for i, name in enumerate(class_names)},
    }
    if config.pretrained is not None:
        network = _pretrained_network(config, architecture, labels)
    else:
        network = _new_network(config, architecture, labels)
        if config.pretrained_backbone:
            _load_backbone_weights(config, network)
    has_pretrained_backbone = config.pretrained is not None or config.pretrained_backbone
    body = _backbone_body(network)
    freeze = has_pretrained_backbone if config.freeze_batch_norm == "auto" else config.freeze_batch_norm
    if not freeze:
        _thaw_batch_norm(body)
    for name, parameter in body.named_parameters():
        parameter.requires_grad_(train_backbone and not (has_pretrained_backbone and _is_stem(name)))
    return Detector(network, _loss_settings(network.config, architecture), channels_last=channels_last)


def num_queries(network_config: PreTrainedConfig) -> int:
    """The most objects that a network with this configuration can find in one image."""
    if getattr(network_config, "two_stage", False):
        return int(network_config.two_stage_num_proposals)
    return int(network_config.num_queries)


def plain_network(detector: Detector) -> PreTrainedModel:
    """A copy on the CPU that is all the library's own: loss function and frozen batch norm, as if never
    trained here.

    Frozen and trained batch norm compute the same in evaluation, so its predictions are the detector's.
    """
    network = AutoModelForObjectDetection.from_config(detector.network.config)
    weights = {
        k: v.cpu() for k, v in detector.network.state_dict().items() if not k.endswith("num_batches_tracked")
    }
    network.load_state_dict(weights)
    return cast(PreTrainedModel, network.eval())


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


def _shape_options(config: ModelConfig, architecture: Architecture) -> dict[str, Any]:
    options = {
        architecture.width_option: config.hidden_dim,
        "encoder_layers": config.num_encoder_layers,
        "decoder_layers": config.num_decoder_layers,
        "num_queries": config.num_queries,
    }
    return {name: value for name, value in options.items() if value is not None}


def _new_network(config: ModelConfig, architecture: Architecture, labels: dict[str, Any]) -> PreTrainedModel:
    known = type(AutoConfig.for_model(architecture.model_type)).__dataclass_fields__
    for name in config.config_overrides:
        if name not in known or name in ("backbone_config", "id2label", "label2id", "auxiliary_loss"):
            raise UsageError(
                f"model.config_overrides.{name}: not an option for {config.model_architecture}; it has: "
                + ", ".join(
                    sorted(set(known) - {"backbone_config", "id2label", "label2id", "auxiliary_loss"})
                )
            )
    options = architecture.config_defaults | labels | {"auxiliary_loss": True}
    options |= _shape_options(config, architecture)
    if config.dropout is not None:
        options["dropout"] = config.dropout
    if isinstance(config.backbone, str):
        options["backbone"] = config.backbone
    else:
        options["backbone_config"] = config.backbone
    try:
        network_config = AutoConfig.for_model(architecture.model_type, **options | config.config_overrides)
        return cast(PreTrainedModel, AutoModelForObjectDetection.from_config(network_config))
    except Exception as error:  # the libraries raise many kinds for a value they refuse
        reason = " ".join(str(error).split())
        raise UsageError(
            f"model: transformers cannot build this {config.model_architecture}: {reason}"
        ) from error


def _pretrained_network(
    config: ModelConfig, architecture: Architecture, labels: dict[str, Any]
) -> PreTrainedModel:
    source = cast(str, config.pretrained)
    try:
        network_config = AutoConfig.from_pretrained(source)
        if network_config.model_type != architecture.model_type:
            raise UsageError(
                f"model.pretrained {source} is a {network_config.model_type}, not a "
                f"{architecture.model_type}; "
                "set model.model_architecture to match"
            )
        for name, wanted in _shape_options(config, architecture).items():
            found = getattr(network_config, name)
            if found != wanted:
                raise UsageError(
                    f"model.pretrained {source} has {name} {found}, the configuration says {wanted}; "
                    f"leave that key out of the model section or make it {found}"
                )
        options = dict(config.config_overrides) | {"auxiliary_loss": True}
        if config.dropout is not None:
            options["dropout"] = config.dropout
        for name, value in (options | labels).items():
            setattr(network_config, name, value)
        network = AutoModelForObjectDetection.from_pretrained(
            source, config=network_config, ignore_mismatched_sizes=True, dtype=torch.float32
        )
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise UsageError(
            f"model.pretrained {source} cannot be loaded ({reason}); give a folder that holds it, or set "
            "model.pretrained=null and model.pretrained_backbone=false to train from scratch"
        ) from error
    return cast(PreTrainedModel, network)


def _load_backbone_weights(config: ModelConfig, network: PreTrainedModel) -> None:
    if not isinstance(config.backbone, str):
        raise UsageError(
            "model.backbone is a configuration of its own, for which there are no pretrained weights; "
            "set model.pretrained_backbone=false, or name a timm backbone"
        )
    out_indices = network.config.backbone_config.out_indices
    try:
        source = timm.create_model(
            config.backbone, pretrained=True, features_only=True, out_indices=out_indices
        )
    except Exception as error:  # timm and the hub raise many kinds, from name look-up to a broken download
        reason = " ".join(str(error).split())
        raise UsageError(
            f"the pretrained weights of backbone {config.backbone} cannot be had ({reason}); "
            "set model.pretrained_backbone=false to train without them"
        ) from error
    body = _backbone_body(network)
    getattr(body, "_backbone", body).load_state_dict(source.state_dict())


def _backbone_body(network: PreTrainedModel) -> nn.Module:
    encoder = network.model.backbone
    return cast(nn.Module, getattr(encoder, "conv_encoder", encoder).model)


def _is_stem(name: str) -> bool:
    """Whether a ResNet parameter belongs to the stem or the first stage, in timm's or transformers'
    naming."""
    return any(part in name for part in ("conv1.", "bn1.", "layer1.", "embedder.", "stages.0.")) and not any(
        part in name for part in ("layer2.", "layer3.", "layer4.", "stages.1.", "stages.2.", "stages.3.")
    )


def _thaw_batch_norm(module: nn.Module) -> None:
    """Put trainable batch norm where the library has put frozen one, with the same weights and statistics."""
    for name, child in module.named_children():
        if type(child).__name__.endswith("FrozenBatchNorm2d"):
            trainable = nn.BatchNorm2d(len(cast(Tensor, child.weight)))
            trainable.load_state_dict(child.state_dict(), strict=False)
            setattr(module, name, trainable)
        else:
            _thaw_batch_norm(child)


def _loss_settings(network_config: PreTrainedConfig, architecture: Architecture) -> LossSettings:
    return LossSettings(
        kind=architecture.loss_kind,
        cost_class=float(network_config.class_cost),
        cost_bbox=float(network_config.bbox_cost),
        cost_giou=float(network_config.giou_cost),
        weight_ce=architecture.weight_ce,
        weight_bbox=float(network_config.bbox_loss_coefficient),
        weight_giou=float(network_config.giou_loss_coefficient),
        eos_coef=float(getattr(network_config, "eos_coefficient", 0.1)),
        focal_alpha=float(getattr(network_config, "focal_alpha", 0.25)),
        num_classes=cast(int, network_config.num_labels),
    )
