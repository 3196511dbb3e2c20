"""Deformable DETR.

Source: Zhu et al., "Deformable DETR", 2021, and its code.
"""

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from detr_dist.models.families.family import Family, register_family


def keep_features_in_float32(network: PreTrainedModel) -> None:
    """Convert the feature maps to float32, because the network creates its reference points in their type.

    On a GPU they are float32 already: autocast computes group normalization in float32 there.
    """
    for projection in network.model.input_proj:
        projection.register_forward_hook(_to_float32)


def _to_float32(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return output.float()


FAMILY = Family(
    name="deformable_detr",
    model_type="deformable_detr",
    loss_kind="sigmoid",
    weights={"ce": 2.0},
    config_defaults={"class_cost": 2},
    image_processor="DeformableDetrImageProcessor",
    masks_attention=False,  # it samples points; padding is zero
    prepare=keep_features_in_float32,
)
register_family(FAMILY)
