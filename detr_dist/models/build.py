"""Building a network of the DETR family in `transformers`, new or with pretrained weights."""

import difflib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForObjectDetection, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from detr_dist.config import ModelConfig
from detr_dist.errors import CheckpointError, UsageError
from detr_dist.models.backbone import check_backbone, is_stem, load_pretrained_weights, mark_timm_norms
from detr_dist.models.detector import (
    UNNORMALIZED,
    Detector,
    class_names_of,
    keep_normalization,
    normalization_at,
)
from detr_dist.models.families import Family, family_of, find_family
from detr_dist.models.families.family import SHAPE_OPTIONS, keep_family
from detr_dist.models.optimizations import freeze_batch_norm
from detr_dist.serving.network import backbone_body, restore_timm_norms, thaw_batch_norm
from detr_dist.text import one_line


@contextmanager
def quiet_transformers(*, only_errors: bool = False) -> Iterator[None]:
    """Let transformers show no progress bars and, with `only_errors`, log errors alone; then restore both."""
    had_bars, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    if only_errors:
        transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if had_bars:
            transformers_logging.enable_progress_bar()


def build_detector(
    config: ModelConfig,
    class_names: Sequence[str],
    *,
    channels_last: bool = False,
    train_backbone: bool = True,
    structure: Path | None = None,
) -> Detector:
    """Build the detector that `config` describes, with one output per class name.

    With `structure`, a folder with a transformers `config.json`, the network is built from that file, nothing
    is downloaded, and the caller loads the weights.

    A ResNet with pretrained weights keeps its stem and first stage fixed, as in the DETR paper (appendix
    A.4); from scratch all weights are trained.

    Raises:
        UsageError: the architecture lacks an option or refuses a value, or weights are not available.
    """
    if config.num_classes is not None and config.num_classes != len(class_names):
        raise UsageError(
            f"model.num_classes is {config.num_classes}, but the training data hold {len(class_names)} "
            f"classes ({', '.join(class_names)}); correct it or leave it out"
        )
    family = find_family(config.model_architecture)
    if config.backbone is None:
        config = config.model_copy(update={"backbone": family.default_backbone})
    labels = {
        "id2label": dict(enumerate(class_names)),
        "label2id": {name: i for i, name in enumerate(class_names)},
    }
    if structure is not None:
        network = _network_like(structure)
    elif config.pretrained is not None:
        network = _pretrained_network(config, family, labels)
    else:
        network = _new_network(config, family, labels)
        mark_timm_norms(network)
        if config.pretrained_backbone is not False:
            load_pretrained_weights(config, network)
    keep_family(network.config, family)
    restore_timm_norms(network)
    if not freezes_batch_norm(config):
        thaw_batch_norm(network)
    elif config.freeze_batch_norm is True:
        freeze_batch_norm(network)
    for name, parameter in backbone_body(network).named_parameters():
        parameter.requires_grad_(train_backbone and not (_has_pretrained_backbone(config) and is_stem(name)))
    detector = Detector(network, family, class_loss=config.class_loss, channels_last=channels_last)
    _check_forward(detector)
    return detector


def trained_detector(network: PreTrainedModel, config: ModelConfig, *, channels_last: bool) -> Detector:
    """Build a detector, in evaluation mode, around a network that `load_network` has loaded.

    With the `config` of its training, results equal those in training to the last bit; the two kinds of batch
    norm round differently.
    """
    if not freezes_batch_norm(config):
        thaw_batch_norm(network)
    family, class_loss = family_of(network.config), config.class_loss
    return Detector(network, family, class_loss=class_loss, channels_last=channels_last).eval()


def _shape_options(config: ModelConfig, family: Family) -> dict[str, Any]:
    """Return the options for the network's shape that are set.

    Raises:
        UsageError: the family has no such option.
    """
    wanted = {key: getattr(config, key) for key in SHAPE_OPTIONS if getattr(config, key) is not None}
    for key in wanted:
        if key not in family.shape_options:
            raise UsageError(f"model.{key}: {family.name} has no such option; leave it out")
    return {family.shape_options[key]: value for key, value in wanted.items() if key != "dropout"}


def _further_options(config: ModelConfig, family: Family) -> dict[str, Any]:
    """Return the options besides the shape: the paper's constants, dropout, and the user's overrides.

    Raises:
        UsageError: an override is not one of the family's options, or has its own configuration key.
    """
    own_keys = {option: f"model.{key}" for key, option in family.shape_options.items()} | {
        "hidden_size": "model.hidden_dim",
        "backbone_config": "model.backbone",
        "num_labels": "model.num_classes",
    }
    config_class = type(AutoConfig.for_model(family.model_type))
    known = set(config_class.__dataclass_fields__)
    ours = {"id2label", "label2id", "auxiliary_loss"}
    for name in config.config_overrides:
        key = f"model.config_overrides.{name}"
        if name in own_keys:
            raise UsageError(f"{key}: this option has a key of its own, {own_keys[name]}; use that")
        if name not in known - ours:
            valid = sorted(set(config_class.__annotations__) - ours - set(own_keys))  # none of the base class
            close = difflib.get_close_matches(name, valid, n=1)
            nearest = f"; did you mean {close[0]}?" if close else f"; it has {', '.join(valid)}"
            raise UsageError(f"{key}: not an option of {family.name}{nearest}")
    options = {**family.config_defaults, **config.config_overrides}
    return options if config.dropout is None else options | {family.shape_options["dropout"]: config.dropout}


def _has_pretrained_backbone(config: ModelConfig) -> bool:
    return config.pretrained is not None or config.pretrained_backbone is not False


def freezes_batch_norm(config: ModelConfig) -> bool:
    """Return whether the backbone's batch norm keeps its weights and statistics."""
    if config.freeze_batch_norm == "auto":
        return _has_pretrained_backbone(config)
    return config.freeze_batch_norm


def _network_like(structure: Path) -> PreTrainedModel:
    """Build the network of a `config.json`; only transformers' own classes, code beside it is not run."""
    try:
        network_config = AutoConfig.from_pretrained(structure, trust_remote_code=False)
        check_backbone(network_config)
        return cast(PreTrainedModel, AutoModelForObjectDetection.from_config(network_config))
    except Exception as error:  # the library raises many types
        reason = one_line(error)
        raise CheckpointError(f"{structure}: transformers cannot build its network ({reason})") from error


def load_network(reference: str, location: str) -> PreTrainedModel:
    """Load the trained detector at `location`, a folder or hub id, in evaluation mode, from safetensors only.

    Raises:
        UsageError: naming it as `reference`, if it is no detector of a known family, or lacks weights.
    """
    try:
        network_config = AutoConfig.from_pretrained(location, trust_remote_code=False)
        family_of(network_config)
        check_backbone(network_config)
        network, report = _from_pretrained(location, network_config, use_safetensors=True)
        if report["missing_keys"]:
            raise UsageError(
                f"lacks {len(report['missing_keys'])} weights, {min(report['missing_keys'])} first"
            )
    except UsageError as error:
        raise UsageError(f"{reference}: {error}") from None
    except Exception as error:  # the hub, safetensors and transformers raise many kinds
        reason = one_line(error)
        raise UsageError(
            f"{reference}: cannot be loaded ({reason}); give the folder of a model or checkpoint, an MLflow "
            "URI or a hub id"
        ) from error
    restore_timm_norms(network)
    return cast(PreTrainedModel, network.eval())


def _from_pretrained(
    source: str, network_config: PreTrainedConfig, **options: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load a network, and return it with a report on its weights; code beside them is not run."""
    return AutoModelForObjectDetection.from_pretrained(  # type: ignore[no-any-return]
        source,
        config=network_config,
        dtype=torch.float32,
        output_loading_info=True,
        trust_remote_code=False,
        **options,
    )


def _new_network(config: ModelConfig, family: Family, labels: dict[str, Any]) -> PreTrainedModel:
    options = _shape_options(config, family) | _further_options(config, family) | labels
    if isinstance(config.backbone, str):
        options["backbone"] = config.backbone
    elif config.backbone is not None:
        options["backbone_config"] = config.backbone
    _check_backbone_type(config, family)
    try:
        network_config = AutoConfig.for_model(family.model_type, **family.derived(options))
        check_backbone(network_config)
        if not family.imagenet_normalization and config.pretrained_backbone is False:
            keep_normalization(network_config, UNNORMALIZED)
        network: PreTrainedModel = AutoModelForObjectDetection.from_config(network_config)
    except Exception as error:  # the libraries raise many types for a value they refuse
        reason = one_line(error)
        raise UsageError(f"model: transformers cannot build it as configured: {reason}") from error
    family.begin(network)
    _begin_class_heads(network, family, renew=False)
    return network


def _check_backbone_type(config: ModelConfig, family: Family) -> None:
    backbone = config.backbone
    if backbone is None or family.backbone_type is None:
        return
    found = backbone if isinstance(backbone, str) else backbone.get("model_type")
    if isinstance(backbone, str) or found != family.backbone_type:
        raise UsageError(
            f"model.backbone: {family.name} cannot have {found}, only a backbone of its own; leave it out, "
            f"or give its options, as in {{model_type: {family.backbone_type}, ...}}"
        )


def _pretrained_network(config: ModelConfig, family: Family, labels: dict[str, Any]) -> PreTrainedModel:
    """Load a complete detector's weights; the class head is replaced unless it is for the same classes."""
    source = cast(str, config.pretrained)
    try:
        network_config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        _check_pretrained(source, network_config, config, family)
        same_classes = class_names_of(network_config) == tuple(labels["id2label"].values())
        for name, value in (_further_options(config, family) | labels).items():
            setattr(network_config, name, value)
        network, report = _from_pretrained(source, network_config, ignore_mismatched_sizes=True)
        keep_normalization(network.config, normalization_at(source, network.config))
    except UsageError:
        raise
    except Exception as error:  # the hub, safetensors and transformers raise many kinds
        reason = one_line(error)
        raise UsageError(
            f"the pretrained model {source} cannot be loaded ({reason}); give a folder that holds it, or set "
            "model.pretrained=null and model.pretrained_backbone=false to train from scratch"
        ) from error
    lacking = {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}
    lacking = {key for key in lacking if not _is_of_class_head(key, family)}
    if lacking:
        raise UsageError(
            f"the pretrained model {source} has no weights that fit {len(lacking)} parts of the network, "
            f"such as {min(lacking)}; leave out model.config_overrides that change its shape"
        )
    if not same_classes:
        _begin_class_heads(network, family, renew=True)
    return network


def _check_pretrained(
    source: str, network_config: PreTrainedConfig, config: ModelConfig, family: Family
) -> None:
    if network_config.model_type != family.model_type:
        raise UsageError(
            f"the pretrained model {source} is a {network_config.model_type}, not a "
            f"{family.model_type}; set model.model_architecture to match"
        )
    for name, wanted in _shape_options(config, family).items():
        found = getattr(network_config, name)
        if found != wanted:
            raise UsageError(
                f"the pretrained model {source} has {name} {found}, the configuration says {wanted}; "
                f"leave that key out of the model section or make it {found}"
            )


def _begin_class_heads(network: PreTrainedModel, family: Family, *, renew: bool) -> None:
    for name, layer in network.named_modules():
        if not isinstance(layer, nn.Linear | nn.Embedding) or not _is_of_class_head(name, family):
            continue
        if isinstance(layer, nn.Embedding):  # of classes, for denoising queries
            layer.reset_parameters()
            continue
        if renew:
            layer.reset_parameters()
        if family.loss_kind == "sigmoid":
            # Each class starts with probability 1 / (C + 1), about the 0.01 of the released codes for COCO's
            # 91 classes. Otherwise the first steps would teach little but that most queries are background.
            # Source: Lin et al. 2017 (focal loss), section 3.3; the rule for other C is DAB-DETR's in
            # transformers.
            nn.init.constant_(layer.bias, -math.log(layer.out_features))


def _is_of_class_head(name: str, family: Family) -> bool:
    return not set(name.split(".")).isdisjoint(family.class_heads)


def _check_forward(detector: Detector) -> None:
    """Run the network once: some values that transformers accepts fail only then, better now than later."""
    edge = detector.trial_edge
    try:
        with torch.no_grad():
            image = torch.zeros(1, 3, edge, edge, dtype=torch.uint8)
            detector.eval()(image, torch.tensor([[edge, edge]]))
    except Exception as error:
        reason = one_line(error)
        raise UsageError(
            f"model: it cannot run as configured ({reason}); change the model section"
        ) from error
