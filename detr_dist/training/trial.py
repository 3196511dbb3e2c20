"""A trial of a run's largest batch before the first step, so that a lack of memory shows immediately."""

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from detr_dist.errors import TrainingError
from detr_dist.models.criterion import StepCounts
from detr_dist.models.denoising import Denoising, denoising_queries
from detr_dist.training.groups import GroupStream
from detr_dist.training.loop import Training, TrainState
from detr_dist.training.setup import Setup

_logger = logging.getLogger(__name__)


def try_before_first_step(setup: Setup, training: Training, state: TrainState, groups: GroupStream) -> None:
    """Run the largest batch once, if each GPU holds the complete network. Collective."""
    settings, device = setup.config.training, setup.accelerator.device
    if not settings.try_largest_batch or device.type == "cpu" or setup.strategy.zero_stage:
        return
    if not training.is_over(state):
        try_largest_batch(
            training,
            state.step,
            num_images=settings.batch_size,
            num_boxes=min(groups.most_boxes_per_image, setup.detector.num_queries),
            canvas_hw=groups.largest_canvas_hw(),
        )


def try_largest_batch(
    training: Training, step: int, *, num_images: int, num_boxes: int, canvas_hw: tuple[int, int]
) -> None:
    """Compute the loss and gradients of black images, with `num_boxes` boxes each, and discard them.

    Afterwards weights, buffers, optimizer and random numbers are unchanged, to the bit.

    Collective.

    Raises:
        TrainingError: on every process, if any of them has run out of memory.
    """
    device = training.accelerator.device
    try:
        with training.memory.explained(
            "at the largest batch of the run, tried before the first step (training.try_largest_batch)",
            num_images=num_images,
            canvas_hw=canvas_hw,
            is_training=True,
        ):
            _compute(training, torch.zeros(num_images, 3, *canvas_hw, dtype=torch.uint8), num_boxes)
    except TrainingError as error:
        if training.memory.config.training.compile_model:  # the trial ran uncompiled
            _logger.warning(f"without compilation the largest batch does not fit: {error}")
        else:
            training.step_sync.report_failure(error)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    training.step_sync.check(step, training.model)


def _compute(training: Training, images: Tensor, num_boxes: int) -> None:
    """Run forward and backward, with memory allocated for the state that the optimizer will create."""
    device, (num_images, _, *size_hw) = training.accelerator.device, images.shape
    is_replicated = isinstance(training.model, DistributedDataParallel)
    detector = (
        training.model.module if isinstance(training.model, DistributedDataParallel) else training.model
    )
    labels = torch.zeros(num_images * num_boxes, dtype=torch.int64, device=device)
    boxes_cxcywh = torch.full((num_images * num_boxes, 4), 0.5, device=device)
    learning = [parameter for parameter in detector.parameters() if parameter.requires_grad]
    with _unchanged(detector, device), torch.compiler.set_stance("force_eager"):
        moments = [
            torch.empty_like(p) for p in learning for _ in range(2) if p not in training.optimizer.state
        ]
        # DDP keeps gradients in its own buckets, which are allocated already.
        hooks = [p.register_post_accumulate_grad_hook(_forget_gradient) for p in learning if is_replicated]
        try:
            all_boxes = float(num_images * num_boxes)
            counts = StepCounts(all_boxes, num_images, class_weight=all_boxes)
            targets = (labels, boxes_cxcywh, [num_boxes] * num_images)
            denoising = _denoising(training, *targets)
            sizes_hw = torch.tensor([size_hw] * num_images, device=device)
            outputs = detector(images.to(device), sizes_hw, True, denoising)
            criterion = copy.copy(training.criterion)  # which keeps track of terms that are not finite
            losses = criterion(outputs, *targets, counts, denoising)
            losses.total.backward()
        finally:
            for hook in hooks:
                hook.remove()
        del moments


def _denoising(
    training: Training, labels: Tensor, boxes_cxcywh: Tensor, num_boxes: list[int]
) -> Denoising | None:
    if training.denoising is None:
        return None
    rngs = [np.random.default_rng()] * len(num_boxes)
    return denoising_queries(training.denoising, labels.cpu(), boxes_cxcywh.cpu(), num_boxes, rngs).to(
        labels.device
    )


def _forget_gradient(parameter: Tensor) -> None:
    parameter.grad = None


@contextmanager
def _unchanged(detector: nn.Module, device: torch.device) -> Iterator[None]:
    """Remove gradients, and restore buffers and random numbers after the block.

    Batch norm does not wait in it for other processes, which may have run out of memory.
    """
    synchronised = [module for module in detector.modules() if isinstance(module, nn.SyncBatchNorm)]
    buffers = [(buffer, buffer.clone()) for buffer in detector.buffers()]
    devices = [device] if device.type != "cpu" else []
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        try:
            for module in synchronised:
                module.eval()
            yield
        finally:
            for module in synchronised:
                module.train()
            detector.zero_grad()
            for buffer, before in buffers:
                buffer.copy_(before)
