"""Deformable DETR, also with two stages, where the encoder proposes the boxes that the decoder refines.

Source: Zhu et al., "Deformable DETR", 2021, and its code; appendix A.4 on two stages.
"""

from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from detr_dist.models.families.family import LAST_STRIDE, Family, register_family, stride_of_last_map


def derived(options: dict[str, Any]) -> dict[str, Any]:
    """Let the number of queries and that of proposals, which take their place, follow from each other."""
    given = {options[key] for key in ("num_queries", "two_stage_num_proposals") if key in options}
    if not options.get("two_stage") or not given:
        return options
    number = options.get("two_stage_num_proposals", max(given))
    return {**options, "num_queries": number, "two_stage_num_proposals": number}


def finest_stride(network_config: PreTrainedConfig) -> int:
    """Return the stride of the first of the backbone's maps."""
    if network_config.num_feature_levels == 1:
        return stride_of_last_map(network_config)
    indices = network_config.backbone_config.out_indices
    return LAST_STRIDE >> int(max(indices) - min(indices))


def begin(network: PreTrainedModel) -> None:
    """Begin with two stages as in the paper: every box is its proposal, and that its anchor."""
    if network.config.two_stage:
        heads: Any = network.bbox_embed
        for head in heads:
            nn.init.zeros_(head.layers[-1].weight)
            nn.init.zeros_(head.layers[-1].bias)


def prepare(network: PreTrainedModel) -> None:
    """With two stages, return the proposals of every position as well."""
    if network.config.two_stage:
        network.register_forward_hook(_return_proposals)


def _return_proposals(network: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    # Where there is padding, and at the very edge, the logits are infinite: the box is the complete image.
    output.loss_dict["proposal_logits"] = output.enc_outputs_class[None]
    output.loss_dict["proposal_boxes"] = output.enc_outputs_coord_logits.sigmoid()[None]


FAMILY = Family(
    name="deformable_detr",
    model_type="deformable_detr",
    loss_kind="sigmoid",
    weights={"ce": 2.0},
    config_defaults={"class_cost": 2},
    image_processor="DeformableDetrImageProcessor",
    # The feature maps are float32 already on a GPU, where autocast computes group normalization in float32.
    float32_outputs=("input_proj", "pos_trans_norm"),
    masks_attention=False,  # it samples points; padding is zero
    derived=derived,
    finest_stride=finest_stride,
    trial_edge=256,  # has more positions, each a proposal, than the default number of queries
    begin=begin,
    prepare=prepare,
)
register_family(FAMILY)
