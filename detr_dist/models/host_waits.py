"""Where a `transformers` detector waits for its device in the middle of a forward pass, and how it is spared
that.

Each such wait leaves a GPU with nothing queued, and ends a compiled region. One is left: Deformable DETR
copies the sizes of its feature maps to the device.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel


def spare_finite_checks(network: PreTrainedModel) -> None:
    """Let the encoder layers take for granted that what they have computed is finite.

    In training the library asks, and clamps what is not. Here predictions that are not finite end the run.
    """
    for layer in network.model.encoder.layers:
        put_before(layer, _Unasked)


def put_before(module: nn.Module, methods: type[nn.Module]) -> None:
    """Let the methods of another class come before a module's own, which they call by `super()`.

    Unlike a wrapper that changes no name in the state dict, and unlike a function on the instance it survives
    a copy.
    """
    kind = type(module)
    module.__class__ = type(kind.__name__, (methods, kind), {})


class _Unasked(nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with _AssumeFinite():
            return super().forward(*args, **kwargs)


class _Finite:
    def all(self) -> bool:
        return True


class _AssumeFinite(TorchFunctionMode):
    """While entered, `torch.isfinite` is not computed."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _Finite() if function is torch.isfinite else function(*args, **(kwargs or {}))


class PaddingMasks:
    """Makes the masks by which attention leaves out padding; the library would first ask whether there is
    any."""

    def __init__(self, network: PreTrainedModel) -> None:
        self.is_padded = True
        """Of the images that come next. Without padding there is no mask, and attention has faster ways."""
        self._is_additive = network.config._attn_implementation == "eager"
        for part in (network.model.encoder, network.model.decoder):
            part.register_forward_pre_hook(self._make, with_kwargs=True)

    def _make(
        self, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        masks = {name: mask for name, mask in kwargs.items() if name.endswith("mask") and mask is not None}
        return args, kwargs | {name: self._mask(mask) for name, mask in masks.items() if mask.ndim == 2}

    def _mask(self, is_image: Tensor) -> Tensor | None:
        """For all heads and queries [B, 1, 1, S], from what is known of the S positions of the feature map
        [B, S]."""
        if not self.is_padded:
            return None
        is_image = is_image[:, None, None]
        if not self._is_additive:
            return is_image
        return torch.zeros_like(is_image, dtype=torch.float32).masked_fill_(~is_image, float("-inf"))
