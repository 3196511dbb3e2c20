"""How a detector computes in training: compiled by regions, or with less memory for more time."""

import os
import shutil
import socket
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from detr_dist.errors import UsageError
from detr_dist.models.detector import backbone_body, unwrapped_body
from detr_dist.models.host_waits import put_before

# Of one piece of code, before torch gives it up: the library's layers share theirs, and each comes with and
# without padding, for one size and for any.
_MOST_VARIANTS = 32


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
    encoder, decoder = network.model.encoder, network.model.decoder
    for region in (backbone_body(network), *encoder.layers, *decoder.layers):
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
    for part in (*stages, *network.model.encoder.layers, *network.model.decoder.layers):
        put_before(part, _Recomputed)


class _Recomputed(nn.Module):
    """Around the call and not inside `forward`, where it would cut what is compiled into pieces."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.training:
            return super().__call__(*args, **kwargs)
        return checkpoint(super().__call__, *args, use_reentrant=False, **kwargs)
