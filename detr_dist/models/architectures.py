"""The members of the DETR family: what sets them apart, and which options of theirs a configuration may
set."""

import dataclasses
from dataclasses import dataclass
from typing import Any, cast

from transformers import AutoConfig, PreTrainedConfig

from detr_dist.config import ModelConfig
from detr_dist.errors import UsageError
from detr_dist.models.criterion import LossSettings
from detr_dist.models.matcher import ClassKind


@dataclass(frozen=True)
class Architecture:
    """What sets one member of the family apart for us.

    `weight_ce` and `config_defaults` hold what the paper's own code trains with where transformers differs.
    """

    model_type: str
    loss_kind: ClassKind
    weight_ce: float = 1.0
    class_head: str = "class_embed"
    width_option: str = "d_model"
    masks_attention: bool = True
    """Whether attention leaves out padding; where it samples points instead, padding counts as zeros."""
    config_defaults: dict[str, Any] = dataclasses.field(default_factory=dict)


# Sources: Carion et al. 2020 (DETR), Meng et al. 2021 (Conditional DETR), Zhu et al. 2021 (Deformable DETR),
# Liu et al. 2022 (DAB-DETR), and the training options of their released code.
ARCHITECTURES = {
    "detr": Architecture("detr", "softmax", class_head="class_labels_classifier"),
    "conditional_detr": Architecture(
        "conditional_detr", "sigmoid", weight_ce=2.0, class_head="class_labels_classifier"
    ),
    "deformable_detr": Architecture(
        "deformable_detr", "sigmoid", weight_ce=2.0, masks_attention=False, config_defaults={"class_cost": 2}
    ),
    "dab_detr": Architecture("dab-detr", "sigmoid", width_option="hidden_size"),
}


def shape_options(config: ModelConfig, architecture: Architecture) -> dict[str, Any]:
    options = {
        architecture.width_option: config.hidden_dim,
        "encoder_layers": config.num_encoder_layers,
        "decoder_layers": config.num_decoder_layers,
        "num_queries": config.num_queries,
    }
    return {name: value for name, value in options.items() if value is not None}


def further_options(config: ModelConfig, architecture: Architecture) -> dict[str, Any]:
    """What goes beside the shape: the paper's constants, dropout, and the user's overrides once they are
    checked."""
    own_keys = {
        architecture.width_option: "model.hidden_dim",
        "hidden_size": "model.hidden_dim",
        "encoder_layers": "model.num_encoder_layers",
        "decoder_layers": "model.num_decoder_layers",
        "num_queries": "model.num_queries",
        "dropout": "model.dropout",
        "backbone_config": "model.backbone",
        "num_labels": "model.num_classes",
    }
    known = set(type(AutoConfig.for_model(architecture.model_type)).__dataclass_fields__)
    ours = {"id2label", "label2id", "auxiliary_loss"}
    for name in config.config_overrides:
        key = f"model.config_overrides.{name}"
        if name in own_keys:
            raise UsageError(f"{key}: this option has a key of its own, {own_keys[name]}; use that")
        if name not in known - ours:
            valid = ", ".join(sorted(known - ours - set(own_keys)))
            raise UsageError(f"{key}: not an option of {config.model_architecture}; it has: {valid}")
    if config.config_overrides.get("two_stage"):
        raise UsageError(
            "model.config_overrides.two_stage: the encoder's proposals have no loss here; leave it out"
        )
    options = architecture.config_defaults | config.config_overrides
    return options if config.dropout is None else options | {"dropout": config.dropout}


def loss_settings_of(network_config: PreTrainedConfig, architecture: Architecture) -> LossSettings:
    return LossSettings(
        kind=architecture.loss_kind,
        cost_class=float(network_config.class_cost),
        cost_bbox=float(network_config.bbox_cost),
        cost_giou=float(network_config.giou_cost),
        weights={
            "ce": architecture.weight_ce,
            "bbox": float(network_config.bbox_loss_coefficient),
            "giou": float(network_config.giou_loss_coefficient),
        },
        eos_coef=float(getattr(network_config, "eos_coefficient", 0.1)),
        focal_alpha=float(getattr(network_config, "focal_alpha", 0.25)),
        num_classes=cast(int, network_config.num_labels),
    )


def num_queries_of(config: ModelConfig) -> int | None:
    """Most objects that the configured model can find in an image, without building it; None where only the
    pretrained model knows, and it is not available."""
    if config.num_queries is not None:
        return config.num_queries
    if config.pretrained is None:
        network_config = AutoConfig.for_model(ARCHITECTURES[config.model_architecture].model_type)
    else:
        try:
            network_config = AutoConfig.from_pretrained(config.pretrained, trust_remote_code=False)
        except (OSError, ValueError):
            return None
    return getattr(network_config, "num_queries", None)
