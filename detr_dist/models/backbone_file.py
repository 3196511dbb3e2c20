"""Weights of a backbone from a file that is at hand, for hosts that reach no hub."""

import pickle
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from detr_dist.errors import UsageError

WAY_OUT = "give a timm state dict (.safetensors or .pth), or set model.pretrained_backbone=false"


def load_backbone_file(path: Path, body: nn.Module, backbone: str) -> None:
    """Put the weights of a timm classification or feature network into `body`, the backbone of a detector.

    `body` is timm's network or the library's own ResNet. Heads in the file are ignored. Nothing but tensors
    is loaded, so that a file cannot run code.

    Raises:
        UsageError: naming the file, when it is missing, unreadable, or not of this network.
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
    import timm  # a network that begins from scratch starts sooner without it

    if not path.is_file():
        what = "a folder; name the file in it" if path.is_dir() else "no such file"
        raise _refusal(path, f"{what} ({path.absolute()})", WAY_OUT)
    try:
        content = timm.models.load_state_dict(str(path), weights_only=True)
        weights = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    except Exception as error:  # of what they cannot read torch and safetensors raise nearly everything
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
    """Whether it counts the batches of batch norm, which no forward pass uses."""
    return name.endswith("num_batches_tracked")


def _flat_name(name: str) -> str:
    """The same for a network and for its features alone, where timm calls `stages.0` `stages_0`."""
    return _timm_name(name).replace(".", "_")


def _timm_name(name: str) -> str:
    """The name of a tensor in timm's ResNet, for one in the library's own; others stay as they are."""
    name = name.removeprefix("resnet.")  # of the library's classification network
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
