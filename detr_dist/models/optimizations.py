"""Optimizations of a network: no waits for the device, precision, compilation, less memory.

They change results only by rounding. A wait for the device in the middle of a forward pass leaves a GPU
without queued work, and ends a compiled region. One is left: Deformable DETR copies the sizes of its feature
maps to the device.
"""

import os
import shutil
import socket
import sys
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from detr_dist.errors import UsageError
from detr_dist.serving.network import backbone_body, unwrapped_body

# Compilations of one function before torch gives up on it: the library's layers share their code, and each is
# compiled with and without padding, for one size and for any.
_MOST_VARIANTS = 32


def _transformer_layers(network: PreTrainedModel, *kinds: str) -> list[nn.Module]:
    """Return the encoder and decoder layers outside the backbone, by the names of the library's classes."""
    body = set(backbone_body(network).modules())
    ends = tuple(f"{kind}Layer" for kind in kinds or ("Encoder", "Decoder"))
    found = (module for module in network.model.modules() if module not in body)
    return [module for module in found if type(module).__name__.endswith(ends)]


def spare_finite_checks(network: PreTrainedModel) -> None:
    """Make the encoder layers assume that their outputs are finite.

    In training the library checks, and clamps other values. Here predictions that are not finite end the run.
    """
    for layer in _transformer_layers(network, "Encoder"):
        _put_before(layer, _Unasked)


def _put_before(module: nn.Module, methods: type[nn.Module]) -> None:
    """Override a module's methods with those of another class, which call the originals by `super()`.

    Unlike a wrapper, this changes no name in the state dict; unlike a function on the instance, it survives a
    copy.
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
    """Skips the computation of `torch.isfinite` within the block."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _Finite() if function is torch.isfinite else function(*args, **(kwargs or {}))


def keep_sizes_on_host(network: PreTrainedModel) -> None:
    """Keep the sizes of feature maps on the host, and do not check their sum.

    The networks with a hybrid encoder copy each number to the device, and would wait for the check of each
    decoder layer. Nothing else uses these tensors.
    """
    module = sys.modules[type(network).__module__]
    setattr(module, "torch_compilable_check", _unchecked)  # noqa: B010
    on_host = _SizesOnHost()
    network.model.encoder.register_forward_hook(on_host.begin)
    network.model.enc_output.register_forward_pre_hook(on_host.end)
    network.model.register_forward_hook(on_host.end, always_call=True)  # after an error as well


def _unchecked(*_: object) -> None:
    """Do nothing in place of a check."""


class _SizesOnHost(TorchFunctionMode):
    """Creates empty tensors of integers on the host, between two modules of a forward pass."""

    is_active = False

    def begin(self, *_: object) -> None:
        self.is_active = True
        self.__enter__()  # type: ignore[no-untyped-call]

    def end(self, *_: object) -> None:
        if self.is_active:
            self.is_active = False
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.empty and kwargs.get("dtype") is torch.long:
            kwargs |= {"device": "cpu"}
        return function(*args, **kwargs)


class PaddingMasks:
    """Makes the masks that exclude padding from attention.

    The library would first wait for the device to find out whether there is any padding.
    """

    def __init__(self, network: PreTrainedModel) -> None:
        self.is_padded = True
        """Whether the next images are padded. Without padding there is no mask, and attention is faster."""
        self._is_additive = network.config._attn_implementation == "eager"
        for part in (network.model.encoder, network.model.decoder):
            part.register_forward_pre_hook(self._make, with_kwargs=True)

    def _make(
        self, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        masks = {name: mask for name, mask in kwargs.items() if name.endswith("mask") and mask is not None}
        return args, kwargs | {name: self._mask(mask) for name, mask in masks.items() if mask.ndim == 2}

    def _mask(self, is_image: Tensor) -> Tensor | None:
        """Return the mask for all heads and queries [B, 1, 1, S] from that of the feature map [B, S]."""
        if not self.is_padded:
            return None
        is_image = is_image[:, None, None]
        if not self._is_additive:
            return is_image
        return torch.zeros_like(is_image, dtype=torch.float32).masked_fill_(~is_image, float("-inf"))


def freeze_batch_norm(network: PreTrainedModel) -> None:
    """Keep weights and statistics of all batch norm, so that no image depends on others of its micro-batch.

    The backbone's is of a frozen kind already; the necks of some families have more.
    """
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.requires_grad_(False)
            _put_before(module, _InEvaluation)


class _InEvaluation(nn.Module):
    def train(self, mode: bool = True) -> Self:
        return super().train(False)


def compile_regions(network: PreTrainedModel, backend: Any = "inductor") -> None:
    """Compile the backbone and each layer of encoder and decoder, when they first run.

    Layers of one kind share their compiled code. A second image size is compiled again, this time for any
    size. Compiling the complete network takes several times as long, and again after each graph break.
    """
    import torch._dynamo.config as dynamo  # slow to import, and only here

    dynamo.recompile_limit = max(dynamo.recompile_limit, _MOST_VARIANTS)
    # Under DDP torch would split each region where its parameters fill a bucket, so that sums over processes
    # start sooner; the regions are smaller than a bucket already.
    dynamo.optimize_ddp = False
    for region in (backbone_body(network), *_transformer_layers(network)):
        region.compile(backend=backend)


def check_compiler(device_type: str) -> None:
    """Check that torch.compile finds its compiler: for C on a GPU, because of Triton, else for C++.

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
    """Return how many graphs this process has compiled; if it keeps growing, compiling wastes time."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def recompute_activations(network: PreTrainedModel) -> None:
    """Keep only the inputs of layers and of timm's stages, and recompute the rest in the backward pass.

    A backbone whose batch norm is trained keeps everything, because its statistics would be updated twice.
    """
    body = unwrapped_body(network)
    learns_statistics = any(isinstance(module, nn.BatchNorm2d) for module in body.modules())
    # The layers of a vision transformer. The library collects their outputs, which fails for larger parts.
    layers: list[nn.Module] = [
        module for module in body.modules() if isinstance(module, GradientCheckpointingLayer)
    ]
    stages = layers or [child for child in body.children() if any(child.children())]
    if learns_statistics:
        stages = []
    for part in (*stages, *_transformer_layers(network)):
        _put_before(part, _Recomputed)


class _Recomputed(nn.Module):
    """Recomputes around the call; inside `forward` it would split the compiled code."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.training:
            return super().__call__(*args, **kwargs)
        return checkpoint(super().__call__, *args, use_reentrant=False, **kwargs)
