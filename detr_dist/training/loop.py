"""The training loop. Two units of progress only: the micro-batch and the optimizer step."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol, Self

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from detr_dist.data.dataset import Batch
from detr_dist.data.sampling import Purpose, StepPlan, random_numbers
from detr_dist.models.average import WeightAverage
from detr_dist.models.criterion import SetCriterion
from detr_dist.models.denoising import Denoising, DenoisingSettings, denoising_queries
from detr_dist.models.device_memory import DeviceMemory
from detr_dist.training.step_sync import Agreed, StepSync
from detr_dist.training.strategy import Replicated


@dataclass
class TrainState:
    """Progress of a run. All randomness is a function of the seed and these numbers."""

    step: int = 0
    """Optimizer steps done."""
    closed_step: int = 0
    """Steps done at the end of the last epoch that is complete, including its evaluation if one was due."""
    best_map: float | None = None
    """Highest `val_map` of all evaluations so far."""
    best_step: int | None = None
    """Optimizer step of that evaluation."""
    evaluations_since_best: int = 0
    """Evaluations in a row that did not raise `best_map`: what early stopping counts."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Metrics of the last evaluation."""

    def without_best(self) -> Self:
        """Return the same progress without a best score: scores on other data cannot be compared."""
        return replace(self, best_map=None, best_step=None, evaluations_since_best=0)

    def evaluated(self, metrics: dict[str, float]) -> bool:
        """Record an evaluation of the current step; return whether it is the best so far."""
        self.metrics = metrics
        val_map = metrics.get("val_map", 0.0)
        if self.best_map is None or val_map > self.best_map:
            self.best_map, self.best_step, self.evaluations_since_best = val_map, self.step, 0
            return True
        self.evaluations_since_best += 1
        return False


class StepDone(NamedTuple):
    """The result of an optimizer step."""

    losses: dict[str, Tensor]
    """This process's part of each loss that is logged, on the device."""
    learning_rate: float
    """Learning rate of the parameters outside the backbone in this step."""


class Observer(Protocol):
    """Receives the events of the loop, on every process, in the same order."""

    def after_step(self, state: TrainState, done: StepDone) -> None:
        """Log and save after an optimizer step."""

    def evaluate(self, state: TrainState) -> None:
        """Evaluate at the end of an epoch, if an evaluation is due."""

    def after_epoch(self, state: TrainState) -> None:
        """Save after the evaluation of an epoch."""


@dataclass(frozen=True)
class Training:
    """Everything the loop works with."""

    accelerator: Accelerator
    strategy: Replicated
    step_sync: StepSync
    model: nn.Module
    average: WeightAverage
    criterion: SetCriterion
    optimizer: AcceleratedOptimizer
    scheduler: LambdaLR
    plan: StepPlan
    total_steps: int
    seed: int
    gradient_clip: float
    patience: int
    denoising: DenoisingSettings | None = None
    """How denoising queries are made, for families that have them."""
    memory: DeviceMemory = field(default_factory=DeviceMemory)

    def is_over(self, state: TrainState) -> bool:
        """Return whether all epochs are complete, or `patience` evaluations in a row have not improved."""
        is_stale = 0 < self.patience <= state.evaluations_since_best
        return state.closed_step >= self.total_steps or is_stale

    def check(self, step: int) -> None:
        """Make sure that the first `step` steps went well. Collective; see `StepSync.check`."""
        self.step_sync.check(step, self.model, self.criterion.broken_terms())


def fit(training: Training, state: TrainState, groups: Iterator[list[Batch]], observer: Observer) -> None:
    """Train from `state`, at any step of an epoch, to `total_steps`.

    An epoch that `total_steps` cuts short counts as complete. Collective.

    Raises:
        StopRequested: between two steps; save `state`.
        TrainingError: loading fails, predictions are not finite, or a device runs out of memory.
    """
    steps_per_epoch = training.plan.steps_per_epoch
    while not training.is_over(state):
        epoch_end = (state.closed_step // steps_per_epoch + 1) * steps_per_epoch
        while state.step < min(epoch_end, training.total_steps):
            agreed = training.step_sync.next_step(state.step, groups)
            with training.memory.explained(
                f"at step {state.step} of {agreed.counts.num_images:.0f} images",
                num_images=training.plan.batch_size,
                canvas_hw=agreed.canvas_hw,
                is_training=True,
            ):
                done = train_step(training, state.step, agreed)
            state.step += 1
            observer.after_step(state, done)
        training.check(state.step)
        observer.evaluate(state)
        state.closed_step = state.step
        observer.after_epoch(state)


def train_step(training: Training, step: int, agreed: Agreed) -> StepDone:
    """Do one optimizer step, number `step` from 0.

    Collective.
    """
    accelerator = training.accelerator
    learning_rate = float(training.scheduler.get_last_lr()[0])
    parts: list[Tensor] = []
    for index, micro_batch in enumerate(agreed.group, accelerator.process_index * len(agreed.group)):
        # Dropout is a function of seed, step and position in the step. A resumed run needs no generator
        # state, and two processes drop the same as one process with two accumulation steps.
        dropout = random_numbers(Purpose.DROPOUT, training.seed, step, index)
        torch.manual_seed(int(dropout.integers(2**63)))
        with accelerator.accumulate(training.model):
            batch = micro_batch.to(accelerator.device).pad_to(*agreed.canvas_hw)
            denoising = _denoising(training, micro_batch, step, index * training.plan.batch_size)
            outputs = training.model(batch.images, batch.sizes_hw, batch.is_padded, denoising)
            targets = (batch.labels, batch.boxes_cxcywh, batch.num_boxes)
            losses = training.criterion(outputs, *targets, agreed.counts, denoising, batch.ignored)
            training.step_sync.report(finite=losses.finite, broken_terms=losses.broken_terms)
            # The losses are parts of a sum, but DDP and accumulation will average their gradients.
            accelerator.backward(losses.total * (accelerator.num_processes * len(agreed.group)))
            if accelerator.sync_gradients and training.gradient_clip > 0:
                accelerator.clip_grad_norm_(training.model.parameters(), training.gradient_clip)
            training.optimizer.step()
            training.optimizer.zero_grad()
            parts.append(torch.stack([*losses.logged.values()]))
    if not accelerator.optimizer_step_was_skipped:
        training.scheduler.step()
        training.average.update(step)
    return StepDone(dict(zip(losses.logged, torch.stack(parts).sum(0), strict=True)), learning_rate)


def _denoising(training: Training, batch: Batch, step: int, first: int) -> Denoising | None:
    """Make the denoising queries of a micro-batch whose first image has this place in the optimizer step.

    Their noise is a function of seed, step and place, and the same however the step is split.
    """
    if training.denoising is None:
        return None
    places = range(first, first + len(batch.num_boxes))
    rngs = [random_numbers(Purpose.DENOISE, training.seed, step, place) for place in places]
    queries = denoising_queries(training.denoising, batch.labels, batch.boxes_cxcywh, batch.num_boxes, rngs)
    return queries.to(training.accelerator.device)
