"""DETR, and how DETR and its closest relatives return the predictions of every decoder layer.

Source: Carion et al., "End-to-End Object Detection with Transformers", 2020, and its code.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from detr_dist.models.families.family import Family, register_family


def return_every_layer(network: PreTrainedModel) -> None:
    """Make the last row of the decoder layers' predictions equal to the network's own prediction.

    With `auxiliary_loss` set, the library computes something else: it also normalizes what each layer passes
    to the next, and the last output twice. Published weights were not trained like that. With the option
    unset, as in the papers, only the inputs of the heads are normalized. A network whose configuration sets
    the option keeps it, because its weights were trained with it.
    """
    decoder = network.model.decoder
    if network.config.auxiliary_loss:
        decoder.register_forward_hook(_end_with_the_prediction)
    else:
        decoder.layernorm.register_forward_hook(_leave_one_layer)
        decoder.register_forward_hook(_normalize_all_layers)


def _leave_one_layer(norm: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
    """Normalize only the outputs of all layers [L, B, Q, D], not what a layer passes on [B, Q, D]."""
    return args[0] if args[0].ndim == 3 else output


def _normalize_all_layers(decoder: Any, args: Any, output: Any) -> None:
    output.intermediate_hidden_states = decoder.layernorm(output.intermediate_hidden_states)
    output.last_hidden_state = output.intermediate_hidden_states[-1]


def _end_with_the_prediction(decoder: Any, args: Any, output: Any) -> None:
    layers = output.intermediate_hidden_states[:-1]
    output.intermediate_hidden_states = torch.cat((layers, output.last_hidden_state[None]))


FAMILY = Family(
    name="detr",
    model_type="detr",
    loss_kind="softmax",
    weights={"ce": 1.0},
    class_heads=("class_labels_classifier",),
    image_processor="DetrImageProcessor",
    prepare=return_every_layer,
)
register_family(FAMILY)
