"""The backbone of a detector: access to it, its pretrained weights, and its batch norm.

Transformers replaces the batch norm of every backbone by its own frozen one. In timm's EfficientNets,
MobileNets and others, batch norm includes the activation and has its own epsilon; both would be lost, and
published weights would be useless. In these networks timm's own batch norm is restored.
"""

import pickle
import re
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from detr_dist.config import ModelConfig
from detr_dist.errors import UsageError
from detr_dist.serving.network import TIMM_NORMS_KEY, backbone_body, original_norms, unwrapped_body
from detr_dist.text import one_line

_LIBRARYS_EPS = 1e-5
WAY_OUT = "give a timm state dict (.safetensors or .pth), or set model.pretrained_backbone=false"


def check_backbone(network_config: PreTrainedConfig) -> None:
    """Check that timm has the backbone of this configuration, if it is one of timm's.

    Raises:
        UsageError: it is not registered.
    """
    config = network_config.backbone_config
    if config.model_type != "timm_backbone" or ":" in config.backbone:  # ":" means a hub or a folder
        return
    import timm  # slow to import, and needed only here

    if not timm.is_model(config.backbone):
        raise UsageError(
            f"its backbone {config.backbone!r} is not registered with timm; one of your own is by importing "
            "its module first, in training by training.extensions"
        )


def is_stem(name: str) -> bool:
    """Return whether a parameter, by its name, belongs to the stem or first stage of a ResNet."""
    timm, transformers = r"(_backbone\.)?(conv1|bn1|layer1)\.", r"embedder\.embedder\.|encoder\.stages\.0\."
    return re.match(f"{timm}|{transformers}", name) is not None


def mark_timm_norms(network: PreTrainedModel) -> None:
    """Mark a new network if the library's batch norm would compute something else than its backbone's."""
    norms = original_norms(network).values()
    if any(type(norm) is not nn.BatchNorm2d or norm.eps != _LIBRARYS_EPS for norm in norms):
        setattr(network.config, TIMM_NORMS_KEY, True)


def freeze_unused_parts(network: PreTrainedModel) -> None:
    """Freeze the backbone's parameters that its feature maps do not depend on, such as its last layers.

    DDP would wait for their gradients.
    """
    body = backbone_body(network)
    learning = [parameter for parameter in body.parameters() if parameter.requires_grad]
    if not learning:
        return
    was_training = body.training
    image = torch.zeros(1, 3, 64, 64, device=learning[0].device)
    try:
        with torch.enable_grad():
            total = sum(each.sum() for each in body.eval()(image).feature_maps)
    except Exception:  # it takes other images only: a trial of the complete network tells which
        return
    finally:
        body.train(was_training)
    gradients = torch.autograd.grad(total, learning, allow_unused=True)
    for parameter, gradient in zip(learning, gradients, strict=True):
        parameter.requires_grad_(gradient is not None)


def load_pretrained_weights(config: ModelConfig, network: PreTrainedModel) -> None:
    """Load the weights that `model.pretrained_backbone` names, a file's or timm's, into the backbone.

    Raises:
        UsageError: they are not available, or do not fit this backbone.
    """
    own = network.config.backbone_config
    if isinstance(config.pretrained_backbone, str):
        name = getattr(own, "backbone", None) or own.model_type
        _load_file(Path(config.pretrained_backbone).expanduser(), unwrapped_body(network), name)
        return
    if not isinstance(config.backbone, str):
        raise UsageError(
            f"timm has no pretrained weights for this backbone, a {own.model_type}; set "
            "model.pretrained_backbone to false or to a file of weights, name a timm backbone if the "
            "architecture takes one, or fine-tune a complete detector by model.pretrained"
        )
    import timm  # slow to import, and needed only here

    try:
        source = timm.create_model(
            config.backbone, pretrained=True, features_only=True, out_indices=own.out_indices
        )
    except Exception as error:  # timm and the hub raise many types, for unknown names, broken downloads etc.
        reason = one_line(error)
        raise UsageError(
            f"the pretrained weights of backbone {config.backbone} are not available ({reason}); "
            "set model.pretrained_backbone=false to train without them, or to the path of a file with them"
        ) from error
    unwrapped_body(network).load_state_dict(source.state_dict())


def _load_file(path: Path, body: nn.Module, backbone: str) -> None:
    """Load the weights of a timm classification or feature network into `body`, the backbone of a detector.

    `body` is timm's network or the library's own ResNet. Heads in the file are ignored. Only tensors are
    loaded, so that a file cannot run code.

    Raises:
        UsageError: naming the file, if it is missing, unreadable, or does not fit this network.
    """
    weights = _read(path)
    wanted = {name: tensor for name, tensor in body.state_dict().items() if not _is_counter(name)}
    parts = tuple(f"{_timm_name(name).split('.')[0]}_" for name in wanted)
    names = {_flat_name(name): name for name in weights if not _is_counter(name)}
    found = {key: weights[name] for key, name in names.items()}
    keys = {name: _flat_name(name) for name in wanted}
    missing = [name for name, key in keys.items() if key not in found]
    reshaped = [name for name, key in keys.items() if key in found and found[key].shape != wanted[name].shape]
    unknown = [names[key] for key in found if key.startswith(parts) and key not in keys.values()]
    if missing or reshaped or unknown:
        differences = (
            (missing, f"of its {len(wanted)} tensors are missing"),
            (reshaped, "have another shape"),
            (unknown, "are of layers that it does not have"),
        )
        described = ", ".join(f"{len(names)} {what} ({names[0]})" for names, what in differences if names)
        raise _refusal(
            path, f"not the weights of backbone {backbone}: {described}", "set model.backbone to match"
        )
    damaged = [name for name, key in keys.items() if not bool(torch.isfinite(found[key]).all())]
    if damaged:
        raise _refusal(path, f"{len(damaged)} of its tensors contain NaN or Inf ({damaged[0]})", WAY_OUT)
    body.load_state_dict({name: found[key] for name, key in keys.items()}, strict=False)


def _read(path: Path) -> dict[str, Tensor]:
    import timm  # slow to import, and needed only here

    if not path.is_file():
        what = "a folder; name the file in it" if path.is_dir() else "no such file"
        raise _refusal(path, f"{what} ({path.absolute()})", WAY_OUT)
    try:
        content = timm.models.load_state_dict(str(path), weights_only=True)
        weights = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    except Exception as error:  # torch and safetensors raise nearly any type for files they cannot read
        if isinstance(error.__cause__, pickle.UnpicklingError):
            reason = (
                "no state dict, or one with other Python objects, which could run code and were not loaded"
            )
        else:
            reason = f"cannot be read as a state dict ({' '.join(str(error).split())[:200]})"
        raise _refusal(path, reason, WAY_OUT) from None
    if not weights:
        raise _refusal(path, "holds no tensors by name", WAY_OUT)
    return weights


def _refusal(path: Path, reason: str, remedy: str) -> UsageError:
    return UsageError(f"model.pretrained_backbone {path}: {reason}; {remedy}")


def _is_counter(name: str) -> bool:
    """Return whether a tensor is batch norm's counter of batches, which no forward pass uses."""
    return name.endswith("num_batches_tracked")


def _flat_name(name: str) -> str:
    """Return one name for both of timm's forms: a feature network calls `stages.0` `stages_0`."""
    return _timm_name(name).replace(".", "_")


def _timm_name(name: str) -> str:
    """Return the name in timm's ResNet of a tensor of the library's ResNet; other names stay unchanged."""
    name = name.removeprefix("resnet.")  # the prefix in the library's classification network
    name = name.replace("embedder.embedder.convolution", "conv1")
    name = name.replace("embedder.embedder.normalization", "bn1")
    block = re.fullmatch(r"encoder\.stages\.(\d+)\.layers\.(\d+)\.(.+)", name)
    if block is None:
        return name
    stage, layer, rest = block.groups()
    rest = rest.replace("shortcut.convolution", "downsample.0").replace(
        "shortcut.normalization", "downsample.1"
    )
    rest = re.sub(r"layer\.(\d+)\.convolution", lambda found: f"conv{int(found[1]) + 1}", rest)
    rest = re.sub(r"layer\.(\d+)\.normalization", lambda found: f"bn{int(found[1]) + 1}", rest)
    return f"layer{int(stage) + 1}.{layer}.{rest}"
