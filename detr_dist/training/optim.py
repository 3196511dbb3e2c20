"""Optimizer and learning-rate schedule, counted in optimizer steps."""

import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from detr_dist.config import TrainingConfig
from detr_dist.errors import UsageError
from detr_dist.models.detector import Detector

_LAYER = re.compile(r"\b(?:blocks|layers?|stages)[._]?(\d+)(?:\.(?:blocks\.|layers\.)?(\d+)\b)?")
"""The number of a layer in the name of a backbone's parameter, or its stage and its number there."""

_EMBEDDING = re.compile(r"\b(?:pos(?:ition)?_embed\w*|(?:cls|mask|reg|register)_tokens?)\b")
"""What a ViT adds to its patches. The published recipes exempt it from weight decay, like all vectors."""


class _Group(NamedTuple):
    """What the parameters of a group have in common; groups are sorted by it."""

    is_backbone: bool
    is_decoder: bool  # with a learning rate of its own
    layers_above: int  # in the backbone, with learning rates of their own
    is_exempt: bool  # from weight decay


def parameter_groups(detector: Detector, config: TrainingConfig) -> list[dict[str, Any]]:
    """Return the trained parameters by learning rate and weight decay, as an optimizer takes them.

    The first group belongs to neither backbone nor decoder, so its learning rate is the one to report.

    Raises:
        UsageError: `training.layer_decay` is set, and the backbone has no numbered layers.
    """
    backbone_ids = {id(parameter) for parameter in detector.backbone_parameters()}
    trained = {name: each for name, each in detector.named_parameters() if each.requires_grad}
    of_backbone = [name for name, parameter in trained.items() if id(parameter) in backbone_ids]
    layers_above = _layers_above(of_backbone) if config.layer_decay < 1 and of_backbone else {}
    groups: dict[_Group, list[torch.nn.Parameter]] = {}
    for name, parameter in trained.items():
        is_backbone = id(parameter) in backbone_ids
        group = _Group(
            is_backbone=is_backbone,
            is_decoder=config.learning_rate_decoder_factor < 1 and name.startswith("network.model.decoder."),
            layers_above=layers_above.get(name, 0),
            is_exempt=parameter.ndim <= 1 or (is_backbone and _EMBEDDING.search(name) is not None),
        )
        groups.setdefault(group, []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": _learning_rate(group, config),
            "weight_decay": 0.0 if group.is_exempt else config.weight_decay,
        }
        for group, parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def _learning_rate(group: _Group, config: TrainingConfig) -> float:
    if group.is_backbone:
        return config.learning_rate_backbone * config.layer_decay**group.layers_above
    return config.learning_rate * (config.learning_rate_decoder_factor if group.is_decoder else 1.0)


def _layers_above(names: Sequence[str]) -> dict[str, int]:
    """Return how many layers of the backbone lie above each of its parameters.

    What comes before the numbered layers, such as embeddings, counts as layer 0, and what follows them, such
    as a norm, as the last one.

    Source: layer-wise decay as in BEiT (Bao et al. 2022), LW-DETR and RF-DETR.
    """
    found = {name: _LAYER.search(name) for name in names}
    layers = {name: (int(m[1]), int(m[2] or 0)) for name, m in found.items() if m is not None}
    if not layers:
        raise UsageError(
            "training.layer_decay: the backbone has no numbered layers, its first parameter is "
            f"{names[0]}; leave the key out, or use a ViT"
        )
    order = sorted(set(layers.values()))
    first = next(place for place, name in enumerate(names) if name in layers)
    outside = dict.fromkeys(names[:first], len(order) + 1) | dict.fromkeys(names[first:], 0)
    return outside | {name: len(order) - order.index(layer) for name, layer in layers.items()}


def build_optimizer(detector: Detector, config: TrainingConfig) -> Optimizer:
    """Build AdamW on the detector's `parameter_groups`."""
    is_fp16 = config.mixed_precision == "fp16"
    return AdamW(
        parameter_groups(detector, config),
        # One pass over each tensor, on the CPU as well. But the fused version itself skips a step with
        # overflow, which Accelerate would not notice.
        fused=not is_fp16,
        # The second fastest. A step count on the GPU would make the host wait at each parameter.
        foreach=is_fp16,
        capturable=is_fp16 and detector.mean.is_cuda,
    )


def build_scheduler(
    optimizer: Optimizer,
    config: TrainingConfig,
    total_steps: int,
    *,
    last_steps: int = 0,
    done_steps: int = 0,
) -> LambdaLR:
    """Build the schedule, to be stepped once per optimizer step that was not skipped.

    Args:
        optimizer: The optimizer, with the peak learning rates.
        config: The section `training`.
        total_steps: Steps that the schedule spans.
        last_steps: The steps at the end in which `flat_cosine` stays at its minimum.
        done_steps: Steps that are done already.
    """
    warm_up = partial(_warm_up, config.warmup_steps, 2 if config.warmup == "quadratic" else 1)
    after_warm_up: dict[str, Callable[[int], float]] = {
        "constant": lambda step: 1.0,
        "step": partial(_step, max(1, total_steps * 2 // 3)),
        "cosine": partial(_cosine, config.warmup_steps, total_steps),
        "flat_cosine": partial(
            _flat_cosine,
            round(config.lr_flat_share * total_steps),
            total_steps - last_steps,
            config.lr_final_factor,
        ),
    }
    factor = after_warm_up[config.lr_schedule]
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return LambdaLR(optimizer, lambda step: warm_up(step) * factor(step), last_epoch=done_steps - 1)


def _warm_up(warmup_steps: int, power: int, step: int) -> float:
    return min(1.0, (step + 1) / (warmup_steps + 1)) ** power


def _step(drop_at: int, step: int) -> float:
    return 0.1 if step >= drop_at else 1.0


def _cosine(start: int, end: int, step: int) -> float:
    """Fall from 1 at `start` to 0 at `end`."""
    progress = (step - start) / max(1, end - start)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, max(0.0, progress))))


def _flat_cosine(start: int, end: int, final: float, step: int) -> float:
    """Fall from 1 at `start` to `final` at `end`.

    Source: the schedule of DEIM (Huang et al. 2025).
    """
    return final + (1.0 - final) * _cosine(start, end, step)
