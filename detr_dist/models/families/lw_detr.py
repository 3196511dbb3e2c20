"""LW-DETR and RF-DETR: a vision transformer with windows, proposals, and groups of queries in training.

Source: Chen et al., "LW-DETR: A Transformer Replacement to YOLO for Real-Time Detection", 2024; Chen et al.,
"Group DETR", ICCV 2023; Robinson et al., "RF-DETR: Neural Architecture Search for Real-Time Detection
Transformers", 2025; and their code.
"""

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from detr_dist.errors import UsageError
from detr_dist.models.families.family import (
    FLOAT32_MODULES,
    LOSS_OPTIONS,
    SHAPE_OPTIONS,
    Family,
    register_family,
)
from detr_dist.serving.network import backbone_body


def group_rows(
    *,
    config: PreTrainedConfig,
    outputs_class: Tensor,
    outputs_coord: Tensor,
    enc_outputs_class: Tensor,
    enc_outputs_coord: Tensor,
    **_: object,
) -> dict[str, Tensor]:
    """Return a row for each group of queries, of the encoder's best proposals and of each decoder layer.

    The library's layers are [L, B, G * Q, ...] in training, with one group in evaluation. Each group is
    matched by itself and counts as 1 / G. The first group, which makes the prediction, comes last.
    """
    num_queries: int = config.num_queries
    num_groups = outputs_class.shape[2] // num_queries

    def rows(proposals: Tensor, layers: Tensor) -> Tensor:
        every_row = torch.cat((proposals[None], layers))
        grouped: Tensor = every_row.unflatten(2, (num_groups, num_queries))
        return grouped.movedim(2, 1).flip(1).flatten(0, 1)

    found = {
        "pred_logits": rows(enc_outputs_class, outputs_class),
        "pred_boxes": rows(enc_outputs_coord, outputs_coord),
    }
    if num_groups > 1:
        logits = found["pred_logits"]
        found["row_weights"] = logits.new_full((len(logits),), 1 / num_groups, dtype=torch.float32)
    return found


def begin(network: PreTrainedModel) -> None:
    """Begin with the proposals as reference points, as in the papers; the library moves them at random."""
    nn.init.zeros_(network.model.reference_point_embed.weight)


def prepare(network: PreTrainedModel) -> None:
    """Freeze what no prediction depends on, and refuse images with too few positions."""
    for parameter in _unused_parameters(network):
        parameter.requires_grad_(False)
    check = functools.partial(_check_num_positions, network.config.num_queries)
    network.model.backbone.projector.register_forward_hook(check)


def _unused_parameters(network: PreTrainedModel) -> list[nn.Parameter]:
    """Return those of the layers above the highest one that is used, and the token of masked patches.

    DDP would wait for their gradients.
    """
    body: Any = backbone_body(network)
    above = body.encoder.layer[max(body.out_indices) :]  # index 0 is the input of the first layer
    unused = list(above.parameters())
    mask_token = getattr(body.embeddings, "mask_token", None)
    return unused if mask_token is None else [*unused, mask_token]


def _check_num_positions(
    num_queries: int, projector: nn.Module, args: tuple[Any, ...], output: Tensor | list[Tensor]
) -> None:
    """Check that the feature maps have a position for each query.

    Raises:
        UsageError: there are fewer positions, each a proposal, than queries.
    """
    maps = [output] if isinstance(output, Tensor) else output
    num_positions = sum(each.shape[-2] * each.shape[-1] for each in maps)
    if num_positions < num_queries:
        raise UsageError(
            f"images of this size have {num_positions} positions, fewer than the {num_queries} queries of "
            "the network; take larger images, or a smaller model.num_queries"
        )


def size_multiple(network_config: PreTrainedConfig) -> int:
    """Return the pixels of a patch times the windows along a side."""
    backbone = network_config.backbone_config
    return int(backbone.patch_size * getattr(backbone, "num_windows_side", backbone.num_windows))


def finest_stride(network_config: PreTrainedConfig) -> int:
    """Return the pixels of a patch, divided by the factor by which the projector enlarges their map."""
    factors = getattr(network_config, "projector_scale_factors", None) or (1.0,)
    return int(network_config.backbone_config.patch_size / max(factors))


def derived(options: dict[str, Any]) -> dict[str, Any]:
    """Set one scale, that of the patches; the library's default has none, and cannot run."""
    return {"projector_scale_factors": [1.0], **options}


def without_dropout(options: dict[str, Any]) -> dict[str, Any]:
    """Set no dropout, as in the original; the library's default is 0.1."""
    return {"dropout": 0.0, **options}


LW_DETR = Family(
    name="lw_detr",
    model_type="lw_detr",
    loss_kind="sigmoid",
    weights={},
    derived=derived,
    shape_options={key: value for key, value in SHAPE_OPTIONS.items() if key != "num_encoder_layers"},
    loss_options={**LOSS_OPTIONS, "ia_bce": "class_loss_coefficient"},
    class_heads=("class_embed", "enc_out_class_embed"),
    float32_modules=(*FLOAT32_MODULES, "enc_out_class_embed", "enc_out_bbox_embed"),
    default_backbone=None,
    backbone_type="lw_detr_vit",
    # It is float32 already on a GPU, where autocast computes layer normalization in float32.
    float32_outputs=("projector",),
    masks_attention=False,
    size_multiple=size_multiple,
    finest_stride=finest_stride,
    trial_edge=512,  # has 1024 positions, each a proposal
    begin=begin,
    prepare=prepare,
    rows=group_rows,
)
register_family(LW_DETR)
register_family(
    replace(
        LW_DETR,
        name="rf_detr",
        model_type="rf_detr",
        derived=without_dropout,
        backbone_type="rf_detr_dinov2",
        square_only=True,
        onnx_opset=18,  # its position embeddings are resized with antialiasing
    )
)
