"""How a network computes: without waiting for its device, in which precision, compiled, in less memory.

None of it changes what is computed but for rounding. Each wait for the device in the middle of a forward pass
leaves a GPU with nothing queued, and ends a compiled region. One is left: Deformable DETR copies the sizes of
its feature maps to the device.
"""

import functools
import os
import re
import shutil
import socket
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from detr_dist.errors import UsageError
from detr_dist.models.backbone import backbone_body, is_frozen_norm, unwrapped_body

# Of one piece of code, before torch gives it up: the library's layers share theirs, and each comes with and
# without padding, for one size and for any.
_MOST_VARIANTS = 32


def _transformer_layers(network: PreTrainedModel) -> list[nn.Module]:
    return [*network.model.encoder.layers, *network.model.decoder.layers]


def spare_finite_checks(network: PreTrainedModel) -> None:
    """Let the encoder layers take for granted that what they have computed is finite.

    In training the library asks, and clamps what is not. Here predictions that are not finite end the run.
    """
    for layer in network.model.encoder.layers:
        _put_before(layer, _Unasked)


def _put_before(module: nn.Module, methods: type[nn.Module]) -> None:
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
    any.
    """

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
        [B, S].
        """
        if not self.is_padded:
            return None
        is_image = is_image[:, None, None]
        if not self._is_additive:
            return is_image
        return torch.zeros_like(is_image, dtype=torch.float32).masked_fill_(~is_image, float("-inf"))


def keep_in_float32(network: PreTrainedModel, names: tuple[str, ...]) -> None:
    """Let the modules of these names, which are prediction heads, compute in float32 whatever the autocast.

    In bf16 a coordinate would lie on a grid of up to 1/256, which is 5.2 pixels of 1333, and converting it
    later repairs nothing. What follows a head (sigmoid, refinement) takes its type.
    """
    for name, module in network.named_modules():
        own_name = re.sub(r"\.\d+$", "", name).rpartition(".")[2]  # layers have their own in a list
        if own_name in names and not isinstance(module, nn.ModuleList):
            # On the instance, because a wrapper around the module would rename its weights. A copy of the
            # network gets its own: bound methods and partial functions are copied with what they refer to.
            setattr(module, "forward", functools.partial(_in_float32, module.forward))  # noqa: B010


def keep_type_in_frozen_norms(backbone: nn.Module) -> None:
    """Let frozen batch norm return the type that it takes.

    The library multiplies by float32 buffers, so that half precision would end at the first norm: the
    activations kept for the backward pass would take more memory than in float32, not less.
    """
    for module in backbone.modules():
        if is_frozen_norm(module):
            module.register_forward_hook(_to_input_type)


def _in_float32(forward: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    with torch.autocast(inputs.device.type, enabled=False):
        return forward(inputs.float())


def _to_input_type(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return output.to(args[0].dtype)


def compile_regions(network: PreTrainedModel, backend: Any = "inductor") -> None:
    """Compile the backbone and each layer of encoder and decoder, when they first run.

    Layers of one kind share what is compiled. Images of a second size are compiled for once more, then for
    sizes of any kind. `torch.compile` of the whole network takes several times as long, and again for each
    question in between.
    """
    import torch._dynamo.config as dynamo  # slow to import, and only here

    dynamo.recompile_limit = max(dynamo.recompile_limit, _MOST_VARIANTS)
    # Under DDP it would cut each region where its parameters fill a bucket, so that sums over processes begin
    # sooner; the regions are smaller than that already.
    dynamo.optimize_ddp = False
    for region in (backbone_body(network), *_transformer_layers(network)):
        region.compile(backend=backend)


def check_compiler(device_type: str) -> None:
    """Make sure that torch.compile finds a compiler: on a GPU Triton needs one for C, else it is C++.

    Raises:
        UsageError: there is none.
    """
    if device_type == "cuda":
        language, variable, named = "C", "CC", os.environ.get("CC")
        found = any(map(shutil.which, [named] if named else ["gcc", "clang"]))
    else:
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        language, variable, found = "C++", "CXX", True
        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            found = False
    if not found:
        raise UsageError(
            f"training.compile_model=true needs a {language} compiler, and there is none on "
            f"{socket.gethostname()}; install one (Debian: apt-get install g++), name it in the environment "
            f"variable {variable}, or set training.compile_model=false"
        )


def num_compiled_graphs() -> int:
    """Return this process's so far: a number that keeps growing costs more time than compiling saves."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def recompute_activations(network: PreTrainedModel) -> None:
    """Keep only what goes into each layer of encoder and decoder and each stage of a timm backbone, and
    compute what is inside again in the backward pass.

    A backbone whose batch norm learns keeps everything: its statistics would take in each batch twice.
    """
    body = unwrapped_body(network)
    learns_statistics = any(isinstance(module, nn.BatchNorm2d) for module in body.modules())
    stages = [] if learns_statistics else [child for child in body.children() if any(child.children())]
    for part in (*stages, *_transformer_layers(network)):
        _put_before(part, _Recomputed)


class _Recomputed(nn.Module):
    """Around the call and not inside `forward`, where it would cut what is compiled into pieces."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.training:
            return super().__call__(*args, **kwargs)
        return checkpoint(super().__call__, *args, use_reentrant=False, **kwargs)
