"""A moving average of the weights, which is often the better model."""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property

import torch
from torch import Tensor

from detr_dist.models.detector import Detector


class WeightAverage:
    """Exponential moving average (EMA) of a detector's weights and buffers, kept on its device.

    `detector` has the averaged weights; with `decay` 0 nothing is averaged, and it is the trained one itself.
    In the first steps the decay is lower, so that the initial weights lose their influence: in update t it is
    min(decay, 1 - (1 + t)^(-2/3)), or with `warmup_steps` N, decay * (1 - exp(-t / N)).

    Source: Polyak and Juditsky 1992 for the average, timm's ModelEmaV3 for the warm-up, the codes of RT-DETR,
    D-FINE and RF-DETR for that with N. ModelEmaV3 itself is not used, because it averages weights that two
    layers share twice per step.
    """

    def __init__(self, trained: Detector, decay: float, warmup_steps: int = 0) -> None:
        self.decay = decay
        self.warmup_steps = warmup_steps
        self.detector = copy.deepcopy(trained).requires_grad_(False) if decay else trained
        self._trained = trained

    @contextmanager
    def current(self) -> Iterator[Detector]:
        """Yield `detector` with the current average, ready to predict within the block. Collective."""
        yield self.detector

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update the average with the weights after optimizer step `step`, counted from 0."""
        if not self.decay:
            return
        averaged, current, counters = self._tensors
        torch._foreach_lerp_(averaged, current, 1 - self._decay_at(step))
        for averaged_counter, counter in counters:
            averaged_counter.copy_(counter)

    def _decay_at(self, step: int) -> float:
        if self.warmup_steps:
            return self.decay * (1 - math.exp(-(step + 1) / self.warmup_steps))
        return min(self.decay, 1 - math.pow(2 + step, -2 / 3))

    @cached_property
    def _tensors(self) -> tuple[list[Tensor], list[Tensor], list[tuple[Tensor, Tensor]]]:
        """Return averaged and trained float tensors, then pairs of tensors that are copied, such as counters.

        Collected at the first update, because moving a model to its device replaces its buffers.
        """
        pairs = [
            *zip(self.detector.parameters(), self._trained.parameters(), strict=True),
            *zip(self.detector.buffers(), self._trained.buffers(), strict=True),
        ]
        floats = [pair for pair in pairs if pair[0].is_floating_point()]
        counters = [pair for pair in pairs if not pair[0].is_floating_point()]
        return [averaged for averaged, _ in floats], [current for _, current in floats], counters
