"""Which samples make which optimizer step, on which process: pure functions of the seed and the position."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from detr_dist.errors import UsageError

SampleKey = tuple[int, int]
"""Epoch and index of a sample: all that decides, with the seed, how it looks."""


class Purpose(IntEnum):
    """What random numbers are for; the same position draws independent ones for each purpose."""

    SHUFFLE = 1
    AUGMENT = 2
    DROPOUT = 3


def random_numbers(purpose: Purpose, seed: int, epoch: int, index: int = 0) -> np.random.Generator:
    """A generator that depends on these numbers alone; neighbouring positions are unrelated."""
    return np.random.default_rng((purpose, seed, epoch, index))


def epoch_order(num_samples: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """A permutation of the samples."""
    return random_numbers(Purpose.SHUFFLE, seed, epoch).permutation(num_samples)


def group_by_shape(
    order: NDArray[np.int64], sizes_hw: NDArray[np.int64], step_size: int
) -> NDArray[np.int64]:
    """The same samples as in the whole steps of `order`, portraits and others in steps of their own.

    All images of a step are padded to one canvas, which would have to be a square for both. What is left of
    both makes one mixed step. A step stands where its first sample stood: the two kinds alternate by chance,
    and samples of one kind stay in their order.
    """
    height, width = sizes_hw[order[: len(order) // step_size * step_size]].T
    places = [np.flatnonzero(height <= width), np.flatnonzero(height > width)]
    ends = [len(kind) // step_size * step_size for kind in places]
    whole = [kind[:end] for kind, end in zip(places, ends, strict=True)]
    mixed = np.sort(np.concatenate([kind[end:] for kind, end in zip(places, ends, strict=True)]))
    steps = np.concatenate([*whole, mixed]).reshape(-1, step_size)
    grouped: NDArray[np.int64] = order[steps[np.argsort(steps[:, 0])].reshape(-1)]
    return grouped


@dataclass(frozen=True, slots=True)
class StepPlan:
    """How an epoch is cut into optimizer steps, those into processes, those into micro-batches.

    Only the product `global_batch_size` decides which samples a step sees. The incomplete tail of an epoch is
    left out: every step normalises over the same number of images.
    """

    num_samples: int
    batch_size: int  # images per process and micro-batch
    num_processes: int
    accumulation: int  # micro-batches per optimizer step

    def __post_init__(self) -> None:
        if self.steps_per_epoch == 0:
            raise UsageError(
                f"an optimizer step takes {self.global_batch_size} images (training.batch_size "
                f"{self.batch_size} x {self.num_processes} processes x "
                f"training.gradient_accumulation_steps {self.accumulation}), but the training data has "
                f"{self.num_samples}; lower one of the three"
            )

    @property
    def global_batch_size(self) -> int:
        return self.batch_size * self.num_processes * self.accumulation

    @property
    def steps_per_epoch(self) -> int:
        return self.num_samples // self.global_batch_size

    @property
    def num_dropped(self) -> int:
        """Samples that an epoch leaves out; which ones changes with the epoch."""
        return self.num_samples % self.global_batch_size


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatchSampler:
    """The keys of this process's micro-batches, from optimizer step `start_step` on for `num_steps` steps.

    Steps count through all epochs. A loader that takes this as its batch sampler delivers one stream without
    a pause between epochs. With `sizes_hw`, steps are made of images of like shape.
    """

    plan: StepPlan
    seed: int
    process_index: int
    start_step: int
    num_steps: int
    sizes_hw: NDArray[np.int64] | None = None  # [N, 2] of all samples

    def __len__(self) -> int:
        return self.num_steps * self.plan.accumulation

    def __iter__(self) -> Iterator[list[SampleKey]]:
        plan, order_of = self.plan, -1
        order = np.empty(0, np.int64)
        for step in range(self.start_step, self.start_step + self.num_steps):
            epoch, step_in_epoch = divmod(step, plan.steps_per_epoch)
            if epoch != order_of:
                order, order_of = self._order(epoch), epoch
            first = step_in_epoch * plan.global_batch_size
            of_step = order[first : first + plan.global_batch_size]
            own = of_step.reshape(plan.num_processes, plan.accumulation, plan.batch_size)[self.process_index]
            for micro_batch in own.tolist():
                yield [(epoch, index) for index in micro_batch]

    def _order(self, epoch: int) -> NDArray[np.int64]:
        order = epoch_order(self.plan.num_samples, self.seed, epoch)
        if self.sizes_hw is None:
            return order
        return group_by_shape(order, self.sizes_hw, self.plan.global_batch_size)


class EvaluationBatch(NamedTuple):
    canvas_hw: tuple[int, int]  # pad the images to this
    indices: list[int]


def evaluation_batches(
    sizes_hw: ArrayLike, batch_size: int, *, num_processes: int, process_index: int, multiple: int = 32
) -> list[EvaluationBatch]:
    """This process's share of all images, each image in one batch of one process.

    Images share a batch only if their resized sizes round up to the same canvas, so what surrounds an image,
    and with it its detections, does not depend on the batch size or on the number of processes. The largest
    batches come first, so that a lack of memory shows at once. A process may get none.
    """
    by_canvas: dict[tuple[int, int], list[int]] = {}
    for index, (height, width) in enumerate(np.asarray(sizes_hw).tolist()):
        canvas_hw = math.ceil(height / multiple) * multiple, math.ceil(width / multiple) * multiple
        by_canvas.setdefault(canvas_hw, []).append(index)
    batches = [
        EvaluationBatch(canvas_hw, indices[first : first + batch_size])
        for canvas_hw, indices in by_canvas.items()
        for first in range(0, len(indices), batch_size)
    ]
    batches.sort(key=lambda b: -len(b.indices) * b.canvas_hw[0] * b.canvas_hw[1])
    return batches[process_index::num_processes]
