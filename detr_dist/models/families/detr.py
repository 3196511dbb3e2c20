"""DETR, and how it and its nearest relatives return what every decoder layer predicts.

Source: Carion et al., "End-to-End Object Detection with Transformers", 2020, and its code.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from detr_dist.models.families.family import Family, register_family


def return_every_layer(network: PreTrainedModel) -> None:
    """Let the last of the decoder layers' predictions be the network's own.

    Where `auxiliary_loss` is set, the library computes something else: what one layer hands to the next is
    normalized too, and the last output twice. Published weights have not been trained like that. With the
    option unset, as in the papers, only what is predicted from is normalized; a network whose configuration
    sets it keeps to what its weights were trained by.
    """
    decoder = network.model.decoder
    if network.config.auxiliary_loss:
        decoder.register_forward_hook(_end_with_the_prediction)
    else:
        decoder.layernorm.register_forward_hook(_leave_one_layer)
        decoder.register_forward_hook(_normalize_all_layers)


def _leave_one_layer(norm: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
    """Leave what a layer hands on [B, Q, D] as it is; what all have given [L, B, Q, D] is normalized."""
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
    prepare=return_every_layer,
)
register_family(FAMILY)
