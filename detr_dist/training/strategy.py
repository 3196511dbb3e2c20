"""How weights and optimizer are spread over the processes of a run: the loop need not know."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from detr_dist.models.average import WeightAverage
from detr_dist.models.detector import Detector

OptimizerMemory = dict[int, dict[str, Any]]
"""The optimizer state of each parameter, by the parameter's place in its groups."""


class Replicated:
    """Every process holds all of them: one process, or DDP."""

    zero_stage = 0

    def average(self, trained: Detector, decay: float) -> WeightAverage:
        return WeightAverage(trained, decay)

    def prepare(
        self, accelerator: Accelerator, detector: Detector, optimizer: Optimizer
    ) -> tuple[nn.Module, AcceleratedOptimizer]:
        """Return what trains: the wrapped detector, and its optimizer with its state. Collective."""
        model, prepared = accelerator.prepare(detector, optimizer)
        if isinstance(model, DistributedDataParallel):
            # Buffers need not be sent in each forward pass: most are constants, and the statistics of batch
            # norm count in evaluation only, which takes the main process's (HostGroup.synchronise_buffers).
            # As an argument of DDP it would warn (torch 2.14), and not send them at the start either.
            model.broadcast_buffers = False
            _settle_order_of_sums(model, accelerator.device)
        return model, prepared

    @contextmanager
    def whole(self) -> Iterator[OptimizerMemory | None]:
        """Meanwhile the main process has all weights in the detector. Yields it the optimizer state,
        unless the optimizer itself has all of it. Collective."""
        yield None


def _settle_order_of_sums(model: DistributedDataParallel, device: torch.device) -> None:
    """Run forward and backward once, and forget the gradients. Collective.

    DDP rearranges the gradients by the first backward of a process, and where a gradient lies decides in
    which order more than two processes sum it: a run that is resumed would round its first step in another
    way than one that was not interrupted.
    """
    model.eval()  # statistics of batch norm stay as they are
    image = torch.zeros(1, 3, 128, 128, dtype=torch.uint8, device=device)
    with torch.compiler.set_stance("force_eager"):  # an image of this size does not come again
        outputs = model(image, torch.tensor([[128, 128]], device=device))
    torch.stack([output.sum() for output in outputs.values()]).sum().backward()
    model.zero_grad()
    model.train()
