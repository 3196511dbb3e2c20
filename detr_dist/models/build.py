"""From configuration to network: members of the DETR family out of `transformers`, new or with pretrained
weights."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForObjectDetection, PreTrainedConfig, PreTrainedModel

from detr_dist.config import ModelConfig
from detr_dist.errors import CheckpointError, UsageError
from detr_dist.models.architectures import (
    ARCHITECTURES,
    Architecture,
    further_options,
    loss_settings_of,
    shape_options,
)
from detr_dist.models.backbone_file import load_backbone_file
from detr_dist.models.detector import Detector, backbone_body, class_names_of, unwrapped_body
from detr_dist.models.normalization import keep_normalization, normalization_at
from detr_dist.models.precision import is_frozen_norm
from detr_dist.models.timm_norms import (
    keeps_timm_norms,
    mark_timm_norms,
    restore_timm_norms,
    thaw_timm_norms,
)
from detr_dist.text import one_line


def build_detector(
    config: ModelConfig,
    class_names: Sequence[str],
    *,
    channels_last: bool = False,
    train_backbone: bool = True,
    structure: Path | None = None,
) -> Detector:
    """The detector that `config` describes, with one output per class name.

    With `structure`, a folder that holds a transformers `config.json`, the network is built by that one and
    its weights are for the caller to load: nothing is downloaded.

    A ResNet with pretrained weights keeps its stem and first stage fixed, as in the DETR paper (appendix
    A.4); from scratch everything learns.

    Raises:
        UsageError: an option that this architecture does not have, a value it refuses, weights that cannot be
        had.
    """
    if config.num_classes is not None and config.num_classes != len(class_names):
        raise UsageError(
            f"model.num_classes is {config.num_classes}, but the training data hold {len(class_names)} "
            f"classes ({', '.join(class_names)}); correct it or leave it out"
        )
    architecture = ARCHITECTURES[config.model_architecture]
    labels = {
        "id2label": dict(enumerate(class_names)),
        "label2id": {name: i for i, name in enumerate(class_names)},
    }
    if structure is not None:
        network = _network_like(structure)
    elif config.pretrained is not None:
        network = _pretrained_network(config, architecture, labels)
    else:
        network = _new_network(config, architecture, labels)
        mark_timm_norms(network)
        if isinstance(config.pretrained_backbone, str):
            _load_backbone_file(Path(config.pretrained_backbone).expanduser(), network)
        elif config.pretrained_backbone:
            _load_backbone_weights(config, network)
    body = backbone_body(network)
    restore_timm_norms(network, body)
    if not _freezes_batch_norm(config):
        _thaw_batch_norm(network)
    for name, parameter in body.named_parameters():
        parameter.requires_grad_(train_backbone and not (_has_pretrained_backbone(config) and _is_stem(name)))
    detector = _detector(network, architecture, channels_last=channels_last)
    _check_forward(detector)
    return detector


def trained_detector(network: PreTrainedModel, config: ModelConfig, *, channels_last: bool) -> Detector:
    """A detector around a network that `load_network` has loaded, in evaluation mode.

    With the `config` that it was trained by it computes what it did in training to the last bit: the two
    kinds of batch norm round differently.
    """
    if not _freezes_batch_norm(config):
        _thaw_batch_norm(network)
    model_type = network.config.model_type
    architecture = next(each for each in ARCHITECTURES.values() if each.model_type == model_type)
    return _detector(network, architecture, channels_last=channels_last).eval()


def _detector(network: PreTrainedModel, architecture: Architecture, *, channels_last: bool) -> Detector:
    return Detector(
        network,
        loss_settings_of(network.config, architecture),
        channels_last=channels_last,
        masks_attention=architecture.masks_attention,
    )


def _has_pretrained_backbone(config: ModelConfig) -> bool:
    return config.pretrained is not None or config.pretrained_backbone is not False


def _freezes_batch_norm(config: ModelConfig) -> bool:
    if config.freeze_batch_norm == "auto":
        return _has_pretrained_backbone(config)
    return config.freeze_batch_norm


def _network_like(structure: Path) -> PreTrainedModel:
    """Only what transformers has itself: code that lies beside a config.json is not run."""
    try:
        network_config = AutoConfig.from_pretrained(structure, trust_remote_code=False)
        return cast(PreTrainedModel, AutoModelForObjectDetection.from_config(network_config))
    except Exception as error:  # the library raises many kinds
        reason = one_line(error)
        raise CheckpointError(f"{structure}: transformers cannot build its network ({reason})") from error


def load_network(reference: str, location: str) -> PreTrainedModel:
    """The trained detector at `location`, a folder or hub id, in evaluation mode; only safetensors are read.

    Raises:
        UsageError: naming it as `reference`, when there is none of the family, or not all of its weights.
    """
    try:
        network_config = AutoConfig.from_pretrained(location, trust_remote_code=False)
        family = {architecture.model_type for architecture in ARCHITECTURES.values()}
        if network_config.model_type not in family:
            raise UsageError(f"is a {network_config.model_type}, none of {', '.join(sorted(family))}")
        network, report = AutoModelForObjectDetection.from_pretrained(
            location,
            config=network_config,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
            trust_remote_code=False,
        )
        if report["missing_keys"]:
            raise UsageError(
                f"lacks {len(report['missing_keys'])} weights, {min(report['missing_keys'])} first"
            )
    except Exception as error:  # the hub, safetensors and transformers raise many kinds
        reason = one_line(error)
        raise UsageError(
            f"{reference}: cannot be loaded ({reason}); give the folder of a model or checkpoint, an MLflow "
            "URI or a hub id"
        ) from error
    restore_timm_norms(network, backbone_body(network))
    return cast(PreTrainedModel, network.eval())


def _new_network(config: ModelConfig, architecture: Architecture, labels: dict[str, Any]) -> PreTrainedModel:
    options = further_options(config, architecture) | labels | shape_options(config, architecture)
    if isinstance(config.backbone, str):
        options["backbone"] = config.backbone
    else:
        options["backbone_config"] = config.backbone
    try:
        network_config = AutoConfig.for_model(architecture.model_type, **options)
        network: PreTrainedModel = AutoModelForObjectDetection.from_config(network_config)
    except Exception as error:  # the libraries raise many kinds for a value they refuse
        reason = one_line(error)
        raise UsageError(f"model: transformers cannot build it as configured: {reason}") from error
    _begin_class_head(network, architecture, renew=False)
    return network


def _pretrained_network(
    config: ModelConfig, architecture: Architecture, labels: dict[str, Any]
) -> PreTrainedModel:
    """Load a complete detector's weights; the class head is replaced unless it is for the same classes."""
    source = cast(str, config.pretrained)
    try:
        network_config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        _check_pretrained(source, network_config, config, architecture)
        same_classes = class_names_of(network_config) == tuple(labels["id2label"].values())
        for name, value in (further_options(config, architecture) | labels).items():
            setattr(network_config, name, value)
        network, report = AutoModelForObjectDetection.from_pretrained(
            source,
            config=network_config,
            ignore_mismatched_sizes=True,
            dtype=torch.float32,
            output_loading_info=True,
            trust_remote_code=False,
        )
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
    lacking = {key for key in lacking if architecture.class_head not in key}
    if lacking:
        raise UsageError(
            f"the pretrained model {source} has no weights that fit {len(lacking)} parts of the network, "
            f"such as {min(lacking)}; leave out model.config_overrides that change its shape"
        )
    if not same_classes:
        _begin_class_head(network, architecture, renew=True)
    return cast(PreTrainedModel, network)


def _check_pretrained(
    source: str, network_config: PreTrainedConfig, config: ModelConfig, architecture: Architecture
) -> None:
    if network_config.model_type != architecture.model_type:
        raise UsageError(
            f"the pretrained model {source} is a {network_config.model_type}, not a "
            f"{architecture.model_type}; set model.model_architecture to match"
        )
    if getattr(network_config, "two_stage", False):
        raise UsageError(f"the pretrained model {source} has two stages, and proposals have no loss here")
    for name, wanted in shape_options(config, architecture).items():
        found = getattr(network_config, name)
        if found != wanted:
            raise UsageError(
                f"the pretrained model {source} has {name} {found}, the configuration says {wanted}; "
                f"leave that key out of the model section or make it {found}"
            )


def _begin_class_head(network: PreTrainedModel, architecture: Architecture, *, renew: bool) -> None:
    head: nn.Module = getattr(network, architecture.class_head)
    for layer in (module for module in head.modules() if isinstance(module, nn.Linear)):
        if renew:
            layer.reset_parameters()
        if architecture.loss_kind == "sigmoid":
            # Each class begins with probability 1 / (C + 1), which for COCO's 91 classes is the 0.01 of the
            # released codes, or the first steps teach little but that most queries are background. Source:
            # Lin et al. 2017 (focal loss), section 3.3; the rule for other C is that of DAB-DETR in
            # transformers.
            nn.init.constant_(layer.bias, -math.log(layer.out_features))


def _load_backbone_weights(config: ModelConfig, network: PreTrainedModel) -> None:
    if not isinstance(config.backbone, str):
        raise UsageError(
            "model.backbone is a configuration of its own, for which there are no pretrained weights; "
            "set model.pretrained_backbone to false or to a file of weights, or name a timm backbone"
        )
    import timm  # a network that begins from scratch starts sooner without it

    out_indices = network.config.backbone_config.out_indices
    try:
        source = timm.create_model(
            config.backbone, pretrained=True, features_only=True, out_indices=out_indices
        )
    except Exception as error:  # timm and the hub raise many kinds, from name look-up to a broken download
        reason = one_line(error)
        raise UsageError(
            f"the pretrained weights of backbone {config.backbone} are not available ({reason}); "
            "set model.pretrained_backbone=false to train without them, or to the path of a file with them"
        ) from error
    unwrapped_body(network).load_state_dict(source.state_dict())


def _load_backbone_file(path: Path, network: PreTrainedModel) -> None:
    own = network.config.backbone_config
    load_backbone_file(path, unwrapped_body(network), getattr(own, "backbone", None) or own.model_type)


def _is_stem(name: str) -> bool:
    """Whether a parameter belongs to a ResNet's stem or first stage, in timm's or transformers' naming."""
    timm, transformers = r"(_backbone\.)?(conv1|bn1|layer1)\.", r"embedder\.embedder\.|encoder\.stages\.0\."
    return re.match(f"{timm}|{transformers}", name) is not None


def _thaw_batch_norm(network: PreTrainedModel) -> None:
    """Put trainable batch norm where there is frozen one, with the same weights and statistics."""
    body = backbone_body(network)
    if keeps_timm_norms(network):
        thaw_timm_norms(body)
    for name, module in list(body.named_modules()):
        if is_frozen_norm(module):
            trainable = nn.BatchNorm2d(len(cast(Tensor, module.weight)))
            trainable.load_state_dict(module.state_dict(), strict=False)
            body.set_submodule(name, trainable)


def _check_forward(detector: Detector) -> None:
    """Some values that transformers accepts fail only when the network runs: better now than after the
    start."""
    try:
        with torch.no_grad():
            detector.eval()(torch.zeros(1, 3, 128, 128, dtype=torch.uint8), torch.tensor([[128, 128]]))
    except Exception as error:
        reason = one_line(error)
        raise UsageError(
            f"model: it cannot run as configured ({reason}); change the model section"
        ) from error
