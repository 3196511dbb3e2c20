"""Optimizer and learning-rate schedule, counted in optimizer steps."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from detr_dist.config import TrainingConfig
from detr_dist.models.detector import Detector


def build_optimizer(detector: Detector, config: TrainingConfig) -> Optimizer:
    """Build AdamW with a separate learning rate of the backbone, and without decay on norms and biases.

    The first parameter group is never the backbone's, so its learning rate is the one to report.
    """
    backbone_ids = {id(parameter) for parameter in detector.backbone_parameters()}
    groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
    for parameter in detector.parameters():
        if parameter.requires_grad:
            key = (id(parameter) in backbone_ids, parameter.ndim <= 1)
            groups.setdefault(key, []).append(parameter)
    is_fp16 = config.mixed_precision == "fp16"
    return AdamW(
        [
            {
                "params": parameters,
                "lr": config.learning_rate_backbone if is_backbone else config.learning_rate,
                "weight_decay": 0.0 if is_norm_or_bias else config.weight_decay,
            }
            for (is_backbone, is_norm_or_bias), parameters in sorted(groups.items(), key=lambda item: item[0])
        ],
        # One pass over each tensor, on the CPU as well. But the fused version itself skips a step with
        # overflow, which Accelerate would not notice.
        fused=not is_fp16,
        # The second fastest. A step count on the GPU would make the host wait at each parameter.
        foreach=is_fp16,
        capturable=is_fp16 and detector.mean.is_cuda,
    )


def build_scheduler(
    optimizer: Optimizer, config: TrainingConfig, total_steps: int, *, done_steps: int = 0
) -> LambdaLR:
    """Build the schedule, to be stepped once per optimizer step that was not skipped, after `done_steps`."""
    schedules: dict[str, Callable[[int], float]] = {
        "constant": partial(_warm_up, config.warmup_steps),
        "step": partial(_step, config.warmup_steps, max(1, total_steps * 2 // 3)),
        "cosine": partial(_cosine, config.warmup_steps, total_steps),
    }
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return LambdaLR(optimizer, schedules[config.lr_schedule], last_epoch=done_steps - 1)


def _warm_up(warmup_steps: int, step: int) -> float:
    return min(1.0, (step + 1) / (warmup_steps + 1))


def _step(warmup_steps: int, drop_at: int, step: int) -> float:
    return _warm_up(warmup_steps, step) * (0.1 if step >= drop_at else 1.0)


def _cosine(warmup_steps: int, total_steps: int, step: int) -> float:
    if step < warmup_steps:
        return _warm_up(warmup_steps, step)
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
