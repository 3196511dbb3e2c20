"""Batch norm of timm backbones, as timm computes it.

The library puts frozen batch norm of its own into every backbone. In timm's EfficientNets, MobileNets and
others batch norm holds the activation as well, and has its own epsilon: both would be lost, and published
weights would be of no use.
"""

import torch
from torch import nn
from transformers import AutoBackbone, PreTrainedModel

_LIBRARYS_EPS = 1e-5
_MARK = "timm_batch_norm"
"""Set in a network's configuration, which is saved with it. Networks that were trained without their
activations have no such mark and stay as they are."""


def keeps_timm_norms(network: PreTrainedModel) -> bool:
    """Return whether the network has timm's batch norm, which the library itself would leave out."""
    return bool(getattr(network.config, _MARK, False))


def mark_timm_norms(network: PreTrainedModel) -> None:
    """Mark a new network if the library's batch norm would not compute what its backbone's does."""
    norms = _original_norms(network).values()
    if any(type(norm) is not nn.BatchNorm2d or norm.eps != _LIBRARYS_EPS for norm in norms):
        setattr(network.config, _MARK, True)


def restore_timm_norms(network: PreTrainedModel, body: nn.Module) -> None:
    """Put timm's frozen batch norm, with the same weights, into `body`, the backbone of a marked network."""
    if not keeps_timm_norms(network):
        return
    from timm.layers.norm_act import freeze_batch_norm_2d  # only where timm is loaded in any case

    body = getattr(body, "_backbone", body)
    for name, norm in _original_norms(network).items():
        norm.to_empty(device="cpu").load_state_dict(body.get_submodule(name).state_dict(), strict=False)
        body.set_submodule(name, freeze_batch_norm_2d(norm))


def thaw_timm_norms(body: nn.Module) -> None:
    """Let timm's batch norm learn."""
    from timm.layers.norm_act import unfreeze_batch_norm_2d

    unfreeze_batch_norm_2d(body)


def _original_norms(network: PreTrainedModel) -> dict[str, nn.BatchNorm2d]:
    """Return the batch norm of the backbone as timm makes it, by name, without memory."""
    config = network.config.backbone_config
    if config.model_type != "timm_backbone":
        return {}
    with torch.device("meta"):
        original = AutoBackbone.from_config(config)._backbone
    return {name: each for name, each in original.named_modules() if isinstance(each, nn.BatchNorm2d)}
