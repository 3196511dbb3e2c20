"""D-FINE.

Source: Peng et al., "D-FINE: Redefine Regression Task in DETRs as Fine-grained Distribution Refinement",
ICLR 2025, and its code.
"""

from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from detr_dist.models.families import rt_detr
from detr_dist.models.families.family import register_family


def begin(network: PreTrainedModel) -> None:
    """Begin as in the paper: the boxes of encoder and first head are the anchors."""
    rt_detr.begin(network)
    last = network.model.decoder.pre_bbox_head.layers[-1]
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)


def prepare(network: PreTrainedModel) -> None:
    """Prepare as for RT-DETR, and let the loss know the scale of the network's distributions.

    Published weights hold it, and not all of their configurations do.
    """
    rt_detr.prepare(network)
    decoder = network.model.decoder
    network.config.reg_scale, network.config.up = decoder.reg_scale.item(), decoder.up.item()


def rows(*, predicted_corners: Tensor, initial_reference_points: Tensor, **further: Any) -> dict[str, Tensor]:
    """Return a row for the encoder's proposals, one for the first head, and one for each decoder layer.

    The layers have distributions of edges. In evaluation the library omits the first head and all layers but
    the last.
    """
    rows = rt_detr.proposal_and_layer_rows(**further)
    edges, reference = predicted_corners.transpose(0, 1), initial_reference_points[:, 0]
    num_denoising = rows["denoising_logits"].shape[2] if "denoising_logits" in rows else 0
    rows |= {
        "edge_logits": edges[:, :, num_denoising:],
        "reference_boxes": reference[:, num_denoising:],
    }
    if num_denoising:
        rows |= {
            "denoising_edge_logits": edges[:, :, :num_denoising],
            "denoising_reference_boxes": reference[:, :num_denoising],
        }
    return rows


FAMILY = replace(
    rt_detr.FAMILY,
    name="d_fine",
    model_type="d_fine",
    loss_options={
        **rt_detr.FAMILY.loss_options,
        "fgl": "weight_loss_fgl",
        "ddf": "weight_loss_ddf",
        "up": "up",
        "reg_scale": "reg_scale",
    },
    float32_modules=(*rt_detr.FAMILY.float32_modules, "pre_bbox_head", "integral", "lqe_layers"),
    union=True,
    begin=begin,
    prepare=prepare,
    rows=rows,
)
register_family(FAMILY)
