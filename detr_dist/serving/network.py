"""A saved network, and what makes it compute as in training: batch norm, and precision of its heads."""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoBackbone, PreTrainedModel

TIMM_NORMS_KEY = "timm_batch_norm"
"""Key of a mark in a network's configuration, which is saved with it. Networks that were trained without
their activations have no such mark and stay unchanged."""


def backbone_body(network: PreTrainedModel) -> nn.Module:
    """Return the backbone, including the library's wrapper around timm's."""
    model = network.model
    encoder = model.backbone if hasattr(model, "backbone") else model.conv_encoder
    encoder = getattr(encoder, "conv_encoder", encoder)
    return cast(nn.Module, encoder.model if hasattr(encoder, "model") else encoder.backbone)


def unwrapped_body(network: PreTrainedModel) -> nn.Module:
    """Return the backbone without the library's wrapper around timm's."""
    body = backbone_body(network)
    return cast(nn.Module, getattr(body, "_backbone", body))


def is_frozen_norm(module: nn.Module) -> bool:
    """Return whether this is frozen batch norm; each architecture and timm have their own class."""
    return type(module).__name__.endswith(("FrozenBatchNorm2d", "FrozenBatchNormAct2d"))


def keeps_timm_norms(network: PreTrainedModel) -> bool:
    """Return whether the network has timm's batch norm, which the library would replace."""
    return bool(getattr(network.config, TIMM_NORMS_KEY, False))


def restore_timm_norms(network: PreTrainedModel) -> None:
    """Put timm's frozen batch norm, with the same weights, into the backbone of a marked network."""
    if not keeps_timm_norms(network):
        return
    from timm.layers.norm_act import freeze_batch_norm_2d  # timm is loaded already in this case

    body = unwrapped_body(network)
    for name, norm in original_norms(network).items():
        norm.to_empty(device="cpu").load_state_dict(body.get_submodule(name).state_dict(), strict=False)
        body.set_submodule(name, freeze_batch_norm_2d(norm))


def original_norms(network: PreTrainedModel) -> dict[str, nn.BatchNorm2d]:
    """Return the backbone's batch norm modules as timm makes them, by name, without allocating memory."""
    config = network.config.backbone_config
    if config.model_type != "timm_backbone":
        return {}
    with torch.device("meta"):
        original = AutoBackbone.from_config(config)._backbone
    return {name: each for name, each in original.named_modules() if isinstance(each, nn.BatchNorm2d)}


def thaw_batch_norm(network: PreTrainedModel) -> None:
    """Replace frozen by trainable batch norm, with the same weights and statistics."""
    body = backbone_body(network)
    if keeps_timm_norms(network):
        from timm.layers.norm_act import unfreeze_batch_norm_2d

        unfreeze_batch_norm_2d(body)
    for name, module in list(body.named_modules()):
        if is_frozen_norm(module):
            trainable = nn.BatchNorm2d(len(cast(Tensor, module.weight)))
            trainable.load_state_dict(module.state_dict(), strict=False)
            body.set_submodule(name, trainable)


def keep_in_float32(network: PreTrainedModel, names: tuple[str, ...]) -> None:
    """Make the modules of these names, which are prediction heads, compute in float32 whatever the autocast.

    In bf16 a coordinate would be rounded to a grid of up to 1/256, which is 5.2 pixels of 1333; a later
    conversion cannot restore it. The operations after a head (sigmoid, refinement) use its type.
    """
    for module in _modules_of(network, names):
        # On the instance, because a wrapper around the module would rename its weights. A copy of the
        # network gets its own function: bound methods and partials are copied with their modules.
        setattr(module, "forward", functools.partial(_in_float32, module.forward))  # noqa: B010


def return_float32(network: PreTrainedModel, names: tuple[str, ...]) -> None:
    """Convert the outputs of the modules of these names, tensors or lists of tensors, to float32."""
    for module in _modules_of(network, names):
        module.register_forward_hook(_to_float32)


def _modules_of(network: PreTrainedModel, names: tuple[str, ...]) -> list[nn.Module]:
    """Return the modules of these names; a list of that name has one for each layer or scale."""
    return [
        module
        for name, module in network.named_modules()
        if re.sub(r"\.\d+$", "", name).rpartition(".")[2] in names and not isinstance(module, nn.ModuleList)
    ]


def keep_type_in_frozen_norms(backbone: nn.Module) -> None:
    """Make frozen batch norm return the type of its input.

    The library multiplies by float32 buffers, so that half precision would end at the first norm, and the
    activations kept for the backward pass would take more memory than in float32, not less.
    """
    for module in backbone.modules():
        if is_frozen_norm(module):
            module.register_forward_hook(_to_input_type)


def _in_float32(forward: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    with torch.autocast(inputs[0].device.type, enabled=False):
        return forward(*(each.float() for each in inputs))


def _to_input_type(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return output.to(args[0].dtype)


def _to_float32(
    module: nn.Module, args: tuple[Any, ...], output: Tensor | list[Tensor]
) -> Tensor | list[Tensor]:
    return output.float() if isinstance(output, Tensor) else [each.float() for each in output]


def on_pixels(values: Sequence[float]) -> Tensor:
    """Return a mean or deviation of red, green and blue, for values from 0 to 1, as one for uint8 images."""
    return torch.tensor(values).view(1, 3, 1, 1) * 255
