"""RT-DETR and RT-DETRv2, and what they share with their successors.

Source: Zhao et al., "DETRs Beat YOLOs on Real-time Object Detection", CVPR 2024; Lv et al., "RT-DETRv2",
2024; and their code.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from detr_dist.errors import UsageError
from detr_dist.models.backbone import freeze_unused_parts
from detr_dist.models.denoising import INVERSE_SIGMOID_EPS, take_prepared_queries
from detr_dist.models.families.family import FLOAT32_MODULES, LOSS_OPTIONS, Family, register_family
from detr_dist.models.optimizations import keep_sizes_on_host
from detr_dist.serving.network import backbone_body


def derived(options: dict[str, Any]) -> dict[str, Any]:
    """Set the widths of encoder and decoder together, for as many scales as there are, and timm's outputs."""
    num_scales = len(options.get("feat_strides", (8, 16, 32)))
    if "d_model" in options:
        width = options["d_model"]
        options = {"encoder_hidden_dim": width, "decoder_in_channels": [width] * num_scales, **options}
    if "backbone" not in options:
        return options
    backbone = {"model_type": "timm_backbone", "backbone": options["backbone"]}
    backbone["out_indices"] = list(range(-num_scales, 0))  # the last ones
    return {k: v for k, v in options.items() if k != "backbone"} | {"backbone_config": backbone}


def begin(network: PreTrainedModel) -> None:
    """Begin as in the authors' code: batch norm passes everything on, and the encoder returns its anchors.

    The library scales what batch norm returns by random numbers around 0, gives positions hardly any weight,
    and class heads more than twice as much.
    """
    body = set(backbone_body(network).modules())
    for module in network.model.modules():
        if isinstance(module, nn.BatchNorm2d) and module not in body:
            nn.init.ones_(module.weight)
    last = network.model.enc_bbox_head.layers[-1]
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    decoder = network.model.decoder
    for layer in (network.model.enc_output[0], *decoder.query_pos_head.layers):
        nn.init.xavier_uniform_(layer.weight)
    for head in (network.model.enc_score_head, *decoder.class_embed):
        head.reset_parameters()


def prepare(network: PreTrainedModel) -> None:
    """Prepare the network for training.

    It takes prepared denoising queries.

    Raises:
        UsageError: the network should learn its queries, which the library cannot run.
    """
    if network.config.learn_initial_query:
        raise UsageError(
            "model.config_overrides.learn_initial_query: transformers cannot run networks with this option; "
            "leave it out"
        )
    freeze_unused_parts(network)
    take_prepared_queries(network)
    keep_sizes_on_host(network)
    for name, module in network.model.named_modules():
        if name.rpartition(".")[0].endswith("_input_proj"):
            module.register_forward_hook(_with_contiguous_gradient)


def _with_contiguous_gradient(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
    """Give batch norm a contiguous gradient.

    For a single image and the transposed gradient of a sequence, that of torch 2.14 on the CPU is wrong.
    """
    if output.requires_grad:
        output.register_hook(torch.Tensor.contiguous)


def encoder_and_decoder_rows(*, outputs_coord: Tensor, **further: Any) -> dict[str, Tensor]:
    """Return the rows of `proposal_and_layer_rows`, with the gradients of the paper."""
    boxes = look_forward_twice(outputs_coord.transpose(0, 1)).transpose(0, 1)
    return proposal_and_layer_rows(outputs_coord=boxes, **further)


def proposal_and_layer_rows(
    *,
    outputs_class: Tensor,
    outputs_coord: Tensor,
    enc_topk_logits: Tensor,
    enc_topk_bboxes: Tensor,
    denoising_meta_values: dict[str, Any] | None,
    **_: object,
) -> dict[str, Tensor]:
    """Return a row for the encoder's best proposals, then one for each decoder layer.

    The library's layers are [B, L, N + Q, ...], denoising queries first.
    """
    layers, boxes = outputs_class.transpose(0, 1), outputs_coord.transpose(0, 1)
    num_denoising = denoising_meta_values["dn_num_split"][0] if denoising_meta_values else 0
    rows = {
        "pred_logits": torch.cat((enc_topk_logits[None], layers[:, :, num_denoising:])),
        "pred_boxes": torch.cat((enc_topk_bboxes[None], boxes[:, :, num_denoising:])),
    }
    if num_denoising:
        rows |= {
            "denoising_logits": layers[:, :, :num_denoising],
            "denoising_boxes": boxes[:, :, :num_denoising],
        }
    return rows


def look_forward_twice(boxes: Tensor) -> Tensor:
    """Let the loss of each layer's boxes [L, B, Q, 4] also train the layer before, as in the paper.

    Each layer refines the boxes of the layer before, and the library stops gradients in between. Values stay
    equal to rounding.

    Source: Zhang et al., "DINO", 2022, section 3.4.
    """
    if not boxes.requires_grad:
        return boxes
    logits = boxes.logit(INVERSE_SIGMOID_EPS)
    before = logits[:-1]
    return torch.cat((boxes[:1], (logits[1:] + (before - before.detach())).sigmoid()))


def coarsest_stride(network_config: PreTrainedConfig) -> int:
    """Return the pixels a side of a cell of the smallest feature map, which is enlarged to fit the others."""
    return int(max(network_config.feat_strides))


def finest_stride(network_config: PreTrainedConfig) -> int:
    """Return the pixels a side of a cell of the largest feature map."""
    return int(min(network_config.feat_strides))


FAMILY = Family(
    name="rt_detr_v2",
    model_type="rt_detr_v2",
    loss_kind="sigmoid",
    weights={},
    derived=derived,
    loss_options={
        **LOSS_OPTIONS,
        "cost_class": "matcher_class_cost",
        "cost_bbox": "matcher_bbox_cost",
        "cost_giou": "matcher_giou_cost",
        "vfl": "weight_loss_vfl",
        "bbox": "weight_loss_bbox",
        "giou": "weight_loss_giou",
        "vfl_alpha": "focal_loss_alpha",
    },
    class_heads=("class_embed", "enc_score_head", "denoising_class_embed"),
    float32_modules=(*FLOAT32_MODULES, "enc_score_head", "enc_bbox_head"),
    float32_outputs=("decoder_input_proj",),  # anchors have the type of the features
    masks_attention=False,
    uses_mask=False,
    size_multiple=coarsest_stride,
    finest_stride=finest_stride,
    imagenet_normalization=False,
    image_processor="RTDetrImageProcessor",
    has_denoising=True,
    trial_edge=256,
    begin=begin,
    prepare=prepare,
    rows=encoder_and_decoder_rows,
)
register_family(FAMILY)
register_family(replace(FAMILY, name="rt_detr", model_type="rt_detr"))
