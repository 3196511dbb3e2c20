"""What autocast may not coarsen, and what it should not widen again."""

import functools
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

# Whatever classes, boxes or reference points are computed by, in any architecture of the family. Layers have
# their own in a list.
_HEAD = re.compile(
    r"(.*\.)?(class_labels_classifier|class_embed|bbox_predictor|bbox_embed"
    r"|reference_points|ref_point_head|ref_anchor_head)(\.\d+)?"
)


def keep_heads_in_float32(network: PreTrainedModel) -> None:
    """Let every prediction head compute in float32 whatever the autocast.

    In bf16 a coordinate would lie on a grid of up to 1/256, which is 5.2 pixels of 1333, and converting it
    later repairs nothing. What follows a head (sigmoid, refinement) takes its type.
    """
    for name, module in network.named_modules():
        if _HEAD.fullmatch(name) and not isinstance(module, nn.ModuleList):
            # On the instance, because a wrapper around the module would rename its weights. A copy of the
            # network gets its own: bound methods and partial functions are copied with what they refer to.
            setattr(module, "forward", functools.partial(_in_float32, module.forward))  # noqa: B010
    for projection in getattr(network.model, "input_proj", ()):
        # Deformable DETR makes reference points in the type of its feature maps. On a GPU they are float32
        # already, which is how autocast computes group normalization there.
        projection.register_forward_hook(_to_float32)


def keep_type_in_frozen_norms(backbone: nn.Module) -> None:
    """Let frozen batch norm return the type that it takes.

    The library multiplies by float32 buffers, so that half precision would end at the first norm: the
    activations kept for the backward pass would take more memory than in float32, not less.
    """
    for module in backbone.modules():
        if is_frozen_norm(module):
            module.register_forward_hook(_to_input_type)


def is_frozen_norm(module: nn.Module) -> bool:
    """Return whether this is batch norm that learns nothing: each architecture and timm have their own."""
    return type(module).__name__.endswith(("FrozenBatchNorm2d", "FrozenBatchNormAct2d"))


def _in_float32(forward: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    with torch.autocast(inputs.device.type, enabled=False):
        return forward(inputs.float())


def _to_float32(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return output.float()


def _to_input_type(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return output.to(args[0].dtype)
