"""The definition of a family of detectors, and how families are registered and found."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, cast

from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from detr_dist.config import ModelConfig
from detr_dist.config_types import ClassLoss
from detr_dist.errors import UsageError
from detr_dist.extensions import FAMILIES
from detr_dist.models.denoising import DenoisingSettings
from detr_dist.models.losses import LossSettings
from detr_dist.models.matcher import ClassKind

SHAPE_OPTIONS = {
    "hidden_dim": "d_model",
    "num_encoder_layers": "encoder_layers",
    "num_decoder_layers": "decoder_layers",
    "num_queries": "num_queries",
    "dropout": "dropout",
}
LOSS_OPTIONS = {
    "cost_class": "class_cost",
    "cost_bbox": "bbox_cost",
    "cost_giou": "giou_cost",
    "bbox": "bbox_loss_coefficient",
    "giou": "giou_loss_coefficient",
    "eos_coef": "eos_coefficient",
    "focal_alpha": "focal_alpha",
}
FLOAT32_MODULES = (
    "class_labels_classifier",
    "class_embed",
    "bbox_predictor",
    "bbox_embed",
    "reference_points",
    "ref_point_head",
    "ref_anchor_head",
)
_NUMBERS = {field.name for field in fields(LossSettings)} - {"kind", "weights", "num_classes"}
_CLASS_TERMS: dict[ClassLoss, str] = {
    "softmax": "ce",
    "focal": "ce",
    "vfl": "vfl",
    "mal": "mal",
    "ia_bce": "ia_bce",
}
LAST_STRIDE = 32
"""Stride of the last feature map of ResNet and the other backbones with stages; each one before has half."""

_KEY = "detr_dist_family"
"""Key in a network's configuration, which is saved with it, for a family that is not the package's own."""


def decoder_rows(*, outputs_class: Tensor, outputs_coord: Tensor, **_: object) -> dict[str, Tensor]:
    """Return one row for each decoder layer."""
    return {"pred_logits": outputs_class, "pred_boxes": outputs_coord}


def _nothing(network: PreTrainedModel) -> None:
    """Leave the network as the library builds it."""


def _any_size(network_config: PreTrainedConfig) -> int:
    return 1


def stride_of_last_map(network_config: PreTrainedConfig) -> int:
    """Return the stride of the backbone's last feature map: 32, or 16 with dilated convolutions."""
    return LAST_STRIDE // 2 if getattr(network_config, "dilation", False) else LAST_STRIDE


@dataclass(frozen=True, kw_only=True)
class Family:
    """The definition of a family of detectors.

    Define a variant of an existing one by `dataclasses.replace(FAMILY, name="mine", ...)`.
    """

    name: str
    """Its name in `model.model_architecture`."""
    model_type: str
    """Transformers' name of its network, one of those of `AutoModelForObjectDetection`."""
    loss_kind: ClassKind
    """Meaning of its class logits: a softmax with "no object" last, or a sigmoid for each class."""
    weights: Mapping[str, float]
    """Weights of the terms of its loss that are not in the network's configuration (`loss_options`);
    `loss.weights` overrides both."""
    config_defaults: Mapping[str, Any] = field(default_factory=dict)
    """Options of the network's configuration whose values in the paper differ from transformers' defaults."""
    derived: Callable[[dict[str, Any]], dict[str, Any]] = dict
    """Completes the options of a new network's configuration by those that follow from them, such as a
    width that the library names twice."""
    shape_options: Mapping[str, str] = field(default_factory=SHAPE_OPTIONS.copy)
    """The option of the network's configuration that each key of the section `model` sets. A key that is left
    out is refused."""
    loss_options: Mapping[str, str] = field(default_factory=LOSS_OPTIONS.copy)
    """The option of the network's configuration that holds the weight of each term of the loss, or another
    number of `LossSettings`."""
    class_heads: tuple[str, ...] = ("class_embed",)
    """Names of the modules that predict classes, anywhere in the network."""
    float32_modules: tuple[str, ...] = FLOAT32_MODULES
    """Names of the modules that compute in float32 whatever the autocast: the heads that predict classes,
    boxes and reference points."""
    float32_outputs: tuple[str, ...] = ()
    """Names of modules whose outputs are converted to float32, the type in which the network then makes
    positions from them."""
    masks_attention: bool = True
    """Whether attention uses a mask [B, 1, 1, S] of the positions that are not padding, which is then made
    without waiting for the device; otherwise the network makes what it needs."""
    size_multiple: Callable[[PreTrainedConfig], int] = _any_size
    """Returns the number of pixels of which every side of an image must be a multiple, for a network of this
    configuration."""
    finest_stride: Callable[[PreTrainedConfig], int | None] = stride_of_last_map
    """Returns the number of pixels a side that a cell of the finest feature map stands for, in a network of
    this configuration; None if it is unknown."""
    square_only: bool = False
    """Whether the network takes square images only."""
    imagenet_normalization: bool = True
    """Whether a new network gets pixels normalized as for ImageNet, as any with a pretrained backbone does;
    otherwise it gets values from 0 to 1."""
    image_processor: str = "ConditionalDetrImageProcessor"
    """Transformers' class that prepares its images: the class written into `preprocessor_config.json`."""
    uses_mask: bool = True
    """Whether boxes are fractions of the image, which the pixel mask describes, or of the padded canvas."""
    default_backbone: str | None = "resnet50"
    """The timm backbone of a new network for which `model.backbone` is unset; None: the one of the library's
    configuration."""
    backbone_type: str | None = None
    """`model_type` of the only backbones that the network can have; None: any, also timm's."""
    onnx_opset: int = 17
    """Version of ONNX's operators for an export: 17 is the first with layer normalisation."""
    has_denoising: bool = False
    """Whether the network is trained with denoising queries, unless its configuration has `num_denoising`
    0."""
    union: bool = False
    """Whether the box terms of every row compare the pairs that are matched in any row."""
    trial_edge: int = 128
    """Pixels of a square image on which a network of the default size runs; rounded up to `size_multiple`."""
    begin: Callable[[PreTrainedModel], None] = _nothing
    """Called once with a new network, to initialize what the library initializes unlike the paper."""
    prepare: Callable[[PreTrainedModel], None] = _nothing
    """Called once with the network, for hooks that its training needs."""
    rows: Callable[..., dict[str, Tensor]] = decoder_rows
    """Called in place of the library's loss, with the same keyword arguments: `config`, `logits`,
    `pred_boxes`, `outputs_class`, `outputs_coord` and others of the family. Returns `pred_logits`
    [R, B, Q, C] and `pred_boxes` [R, B, Q, 4]: R rows of predictions, each matched and trained independently;
    the last row is the prediction. What else it may return is described in `SetCriterion.__call__`."""

    def shape_of(self, network_config: PreTrainedConfig) -> dict[str, Any]:
        """Return the values of hidden_dim, num_queries and the other shape options that the network has."""
        return {key: getattr(network_config, option, None) for key, option in self.shape_options.items()}

    def num_queries_in(self, network_config: PreTrainedConfig) -> int | None:
        """Return the largest number of objects that a network of this configuration finds in an image."""
        num_queries = self.shape_of(network_config).get("num_queries")
        if getattr(network_config, "two_stage", False):
            num_queries = getattr(network_config, "two_stage_num_proposals", num_queries)
        return cast(int | None, num_queries)

    def loss_settings(
        self, network_config: PreTrainedConfig, class_loss: ClassLoss | None = None
    ) -> LossSettings:
        """Return the settings of matching and loss for a network of this configuration.

        Raises:
            UsageError: the class loss is not one for the family's class logits.
        """
        known = {
            name: float(getattr(network_config, option))
            for name, option in self.loss_options.items()
            if hasattr(network_config, option)
        }
        numbers = {name: known.pop(name) for name in _NUMBERS.intersection(known)}
        return LossSettings(
            kind=self.loss_kind,
            weights=self._with_class_loss({**self.weights, **known, **self.weights}, class_loss),
            num_classes=cast(int, network_config.num_labels),
            union=bool(numbers.pop("union", self.union)),
            **numbers,
        )

    def _with_class_loss(self, weights: dict[str, float], class_loss: ClassLoss | None) -> dict[str, float]:
        """Replace the terms of classes by the wanted one, which keeps its weight or else has weight 1."""
        if class_loss is None:
            return weights
        if (class_loss == "softmax") != (self.loss_kind == "softmax"):
            fitting = [each for each in _CLASS_TERMS if (each == "softmax") == (self.loss_kind == "softmax")]
            raise UsageError(
                f"model.class_loss: {class_loss} does not fit the class heads of {self.name}; "
                f"choose {' or '.join(fitting)}, or leave it out"
            )
        term = _CLASS_TERMS[class_loss]
        others = {name: weight for name, weight in weights.items() if name not in _CLASS_TERMS.values()}
        return {term: weights.get(term, 1.0), **others}

    def denoising_settings(self, network_config: PreTrainedConfig) -> DenoisingSettings | None:
        """Return how denoising queries are made for a network of this configuration; None: there are none."""
        num_queries = getattr(network_config, "num_denoising", 0) if self.has_denoising else 0
        if num_queries <= 0:
            return None
        return DenoisingSettings(
            num_queries=num_queries,
            num_classes=cast(int, network_config.num_labels),
            label_noise_ratio=network_config.label_noise_ratio,
            box_noise_scale=network_config.box_noise_scale,
        )


def register_family(family: Family) -> None:
    """Register a family under its name.

    A module may register its own family again with other contents, as a notebook's cell does.

    Raises:
        UsageError: a family of another module has that name.
    """
    caller = sys._getframe(1).f_globals.get("__name__", "")
    FAMILIES.add(family.name, family, origin=(caller, family.name))


def find_family(name: str) -> Family:
    """Return the family that `model.model_architecture` names.

    Raises:
        UsageError: there is none.
    """
    key = "model.model_architecture"
    family = cast(Family, FAMILIES.find(name, key))
    if family.name not in FAMILIES.names:  # its models could not be loaded again
        raise UsageError(f"{key}: {name} is not registered; let its module call register_family")
    return family


def keep_family(network_config: PreTrainedConfig, family: Family) -> None:
    """Store `family` in the network's configuration, which is saved with it."""
    if family.name in FAMILIES.built_in:
        network_config.__dict__.pop(_KEY, None)
    else:
        setattr(network_config, _KEY, family.name)


def family_of(network_config: PreTrainedConfig) -> Family:
    """Return the family of the network with this configuration.

    Raises:
        UsageError: the family is unknown.
    """
    families = [find_family(name) for name in FAMILIES.names]
    name, model_type = getattr(network_config, _KEY, None), network_config.model_type
    for family in families:
        if (family.name == name) if name is not None else (family.model_type == model_type):
            return family
    if name is not None:
        raise UsageError(
            f"is of the family {name!r}, which is not registered; first import the module that registers it, "
            "the one that its training named in training.extensions"
        )
    known = sorted({family.model_type for family in families})
    raise UsageError(f"is a {model_type}, none of {', '.join(known)}")


def num_queries_of(config: ModelConfig) -> int | None:
    """Return how many objects the configured model can find in an image, without building it.

    None if that depends on an extension or pretrained model that is not available.
    """
    if (described := _describe(config)) is None:
        return config.num_queries
    family, network_config = described
    return family.num_queries_in(network_config)


def finest_stride_of(config: ModelConfig) -> int | None:
    """Return the pixels a side of a cell of the configured model's finest feature map, without building it.

    None if that depends on an extension or pretrained model that is not available.
    """
    if (described := _describe(config)) is None:
        return None
    family, network_config = described
    return family.finest_stride(network_config)


def _describe(config: ModelConfig) -> tuple[Family, PreTrainedConfig] | None:
    """Return the family and the network's configuration, without what does not concern queries and scales."""
    if config.model_architecture not in FAMILIES.names:
        return None
    family = find_family(config.model_architecture)
    options = {**family.config_defaults, **config.config_overrides}
    if config.num_queries is not None:
        options[family.shape_options.get("num_queries", "num_queries")] = config.num_queries
    try:
        if config.pretrained is None:
            if isinstance(config.backbone, dict):
                options["backbone_config"] = config.backbone
            return family, AutoConfig.for_model(family.model_type, **family.derived(options))
        network_config = AutoConfig.from_pretrained(config.pretrained, trust_remote_code=False)
        if network_config.model_type != family.model_type:
            return None
        for name, value in options.items():
            setattr(network_config, name, value)
        return family, network_config
    except Exception:  # the hub and transformers raise many types; building it reports what is wrong
        return None
