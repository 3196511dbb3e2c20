"""How weights and optimizer are spread over the processes of a run: the loop need not know."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.optim import Optimizer

from detr_dist.models.average import WeightAverage
from detr_dist.models.detector import Detector

OptimizerMemory = dict[int, dict[str, Any]]
"""What an optimizer remembers of each parameter, by the parameter's place in its groups."""


class Replicated:
    """Every process holds all of them: one process, or DDP."""

    zero_stage = 0

    def average(self, trained: Detector, decay: float) -> WeightAverage:
        return WeightAverage(trained, decay)

    def prepare(
        self, accelerator: Accelerator, detector: Detector, optimizer: Optimizer
    ) -> tuple[nn.Module, AcceleratedOptimizer]:
        """What trains: the detector, wrapped, and its optimizer with all that it remembers. Collective."""
        model, prepared = accelerator.prepare(detector, optimizer)
        return model, prepared

    @contextmanager
    def whole(self) -> Iterator[OptimizerMemory | None]:
        """Meanwhile the main process has all weights in the detector. Gives it what the optimizer remembers,
        unless the optimizer itself has all of it. Collective."""
        yield None
