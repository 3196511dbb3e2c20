"""Assignment of samples to optimizer steps and processes: pure functions of the seed and the position."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from detr_dist.data.columns import counted
from detr_dist.errors import UsageError

SampleKey = tuple[int, int] | tuple[int, int, int]
"""Epoch and index of a sample, and with `data.multi_scale` the shortest edge of its optimizer step; with the
seed they determine the sample. The index is the row of an image, or with `EpochSamples` a place in them."""

SizeOf = Callable[[SampleKey], tuple[int, int]]
"""A function that returns height and width of a sample after augmentation."""

WINDOW_STEPS = 32
"""Similar shapes are grouped within this many steps. With more there is less padding, and less shuffling."""


class Purpose(IntEnum):
    """Uses of random numbers; the same position draws independent numbers for each of them."""

    SHUFFLE = 1
    AUGMENT = 2
    DROPOUT = 3
    TRANSFORM = 4
    PARTNERS = 5
    DENOISE = 6
    SCALE = 7
    REPEAT = 8
    WINDOW = 9
    COPY_PASTE = 10


def random_numbers(
    purpose: Purpose, seed: int, epoch: int, index: int = 0, *place: int
) -> np.random.Generator:
    """Return a generator that depends on these numbers alone; neighbouring positions are unrelated."""
    return np.random.default_rng((purpose, seed, epoch, index, *place))


@lru_cache(maxsize=2)
def epoch_order(num_samples: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return a permutation of the samples, read-only."""
    order = random_numbers(Purpose.SHUFFLE, seed, epoch).permutation(num_samples)
    order.setflags(write=False)
    return order


def group_by_shape(sizes_hw: NDArray[np.int64], step_size: int) -> NDArray[np.int64]:
    """Group images of sizes [S * step_size, 2] by similar shape; return their positions, [S, step_size].

    All images of a step are padded to one canvas. The images are halved by the side that differs most, and
    the halves again. A step takes the place of its first image, and similar images stay in their order.
    Integers only: all processes must agree.
    """
    steps = np.array(list(_halve(np.arange(len(sizes_hw)), sizes_hw, step_size)))
    return steps[np.argsort(steps[:, 0])]


def _halve(
    places: NDArray[np.int64], sizes_hw: NDArray[np.int64], step_size: int
) -> Iterator[NDArray[np.int64]]:
    num_steps = len(places) // step_size
    if num_steps == 1:
        yield np.sort(places)
        return
    (least_height, least_width), (height, width) = sizes_hw[places].min(axis=0), sizes_hw[places].max(axis=0)
    side = int(width * least_height > height * least_width)
    places = places[np.argsort(sizes_hw[places, side], kind="stable")]
    middle = num_steps // 2 * step_size
    yield from _halve(places[:middle], sizes_hw, step_size)
    yield from _halve(places[middle:], sizes_hw, step_size)


SAMPLE = 2**32
"""Units of `EpochSamples.ends` in one sample."""

_GOLDEN = 2654435769  # SAMPLE divided by the golden ratio


@dataclass(frozen=True, slots=True, eq=False)
class EpochSamples:
    """The images of every epoch, where some appear more often than others, by their place in it.

    Systematic sampling: image `row` has a part of a line that is as long as its expected number of samples,
    and points at distances of one sample select the images. In every epoch each image appears as often as
    expected, rounded down or up, and any run of images whose part is a whole number of samples exactly so
    often. The points move from epoch to epoch by the golden ratio, so that rounding evens out. Integers
    only: all processes agree. Nothing is stored for an epoch.
    """

    ends: NDArray[np.int64]  # [N], where each image's part ends, in units
    first_offset: int  # of the points in epoch 0, in units

    @classmethod
    def of(cls, factors: Sequence[NDArray[np.float64]], num_samples: Sequence[int], seed: int) -> Self:
        """Return samples of consecutive groups of images, exactly `num_samples[g]` of group g.

        Within a group the expected numbers of samples are proportional to `factors[g]`, all above 0.
        """
        ends, start = [], 0
        for each, count in zip(factors, num_samples, strict=True):
            until = np.cumsum(each)
            ends.append(start + np.rint(until / until[-1] * (count * SAMPLE)).astype(np.int64))
            start += count * SAMPLE
        offset = random_numbers(Purpose.REPEAT, seed, 0).integers(SAMPLE)
        return cls(np.concatenate(ends), int(offset))

    def __len__(self) -> int:
        """Return the number of samples of an epoch."""
        return int(self.ends[-1]) // SAMPLE

    def row(self, epoch: int, place: int) -> int:
        """Return the image at a place of an epoch, from 0; copies of an image are neighbours."""
        return int(np.searchsorted(self.ends, place * SAMPLE + self._offset(epoch), side="right"))

    def counts(self, epoch: int) -> NDArray[np.int64]:
        """Return how often each image appears in an epoch, [N]."""
        until = -((self._offset(epoch) - self.ends) // SAMPLE)  # points before each end
        return np.diff(until, prepend=0)

    def _offset(self, epoch: int) -> int:
        return (self.first_offset + epoch * _GOLDEN) % SAMPLE


def samples_by_weight(num_samples: int, weights: Sequence[float]) -> list[int]:
    """Divide a number of samples in proportion to weights; the largest remainders are rounded up."""
    exact = [Fraction(num_samples) * Fraction(each) / sum(map(Fraction, weights)) for each in weights]
    counts = [math.floor(each) for each in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for index in by_remainder[: num_samples - sum(counts)]:
        counts[index] += 1
    return counts


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The split of an epoch into optimizer steps, of a step over processes, and of these into micro-batches.

    Only the product `global_batch_size` decides which samples a step has. The incomplete tail of an epoch is
    left out, so that every step normalises over the same number of images.
    """

    num_samples: int  # of an epoch
    batch_size: int  # images per process and micro-batch
    num_processes: int
    accumulation: int  # micro-batches per optimizer step

    def __post_init__(self) -> None:
        if self.steps_per_epoch == 0:
            raise UsageError(
                f"an optimizer step takes {self.global_batch_size} images (training.batch_size "
                f"{self.batch_size} x {counted(self.num_processes, 'process')} x "
                f"training.gradient_accumulation_steps {self.accumulation}), but the training data has "
                f"{self.num_samples}; lower one of the three"
            )

    @property
    def global_batch_size(self) -> int:
        """Images per optimizer step, over all processes and micro-batches."""
        return self.batch_size * self.num_processes * self.accumulation

    @property
    def steps_per_epoch(self) -> int:
        """Complete optimizer steps per epoch."""
        return self.num_samples // self.global_batch_size

    @property
    def num_dropped(self) -> int:
        """Count the samples that an epoch leaves out; which ones changes with the epoch."""
        return self.num_samples % self.global_batch_size


def edge_of_step(edges: Sequence[int], seed: int, step: int) -> int:
    """Return the one of `data.multi_scale` to which an optimizer step resizes its images."""
    return edges[int(random_numbers(Purpose.SCALE, seed, step).integers(len(edges)))]


@dataclass(frozen=True, slots=True)
class MicroBatchSampler:
    """The keys of this process's micro-batches for `num_steps` optimizer steps, starting at `start_step`.

    Steps are numbered through all epochs. A loader with this batch sampler delivers one stream without a
    pause between epochs. With `size_hw` the samples of every `WINDOW_STEPS` steps are grouped into steps of
    similar shape; with `edges` each step resizes its images to one of them, in the same proportions.
    """

    plan: StepPlan
    seed: int
    process_index: int
    start_step: int
    num_steps: int
    size_hw: SizeOf | None = None
    edges: Sequence[int] = ()

    def __len__(self) -> int:
        return self.num_steps * self.plan.accumulation

    def __iter__(self) -> Iterator[list[SampleKey]]:
        plan, window_of, end = self.plan, (-1, -1), self.start_step + self.num_steps
        window = np.empty((0, 0), np.int64)
        size_hw = self.size_hw and lru_cache(2 * WINDOW_STEPS * plan.global_batch_size)(self.size_hw)
        for step in range(self.start_step, end):
            epoch, step_in_epoch = divmod(step, plan.steps_per_epoch)
            number, step_in_window = divmod(step_in_epoch, WINDOW_STEPS)
            if window_of != (epoch, number):
                window, window_of = self._window(step - step_in_window, size_hw), (epoch, number)
            of_step = window[step_in_window]
            own = of_step.reshape(plan.num_processes, plan.accumulation, plan.batch_size)[self.process_index]
            edge = (edge_of_step(self.edges, self.seed, step),) if self.edges else ()
            for micro_batch in own.tolist():
                yield [(epoch, index, *edge) for index in micro_batch]
            if size_hw is not None and step + WINDOW_STEPS < end:
                # Prepare a part of the next window in each step, so that training does not pause for it.
                for key in self._keys(step + WINDOW_STEPS):
                    size_hw(key)

    def _window(self, first: int, size_hw: SizeOf | None) -> NDArray[np.int64]:
        """Return the samples [steps, global batch] of up to `WINDOW_STEPS` steps of an epoch from `first`."""
        left_in_epoch = self.plan.steps_per_epoch - first % self.plan.steps_per_epoch
        steps = range(first, first + min(WINDOW_STEPS, left_in_epoch))
        keys = [key for step in steps for key in self._keys(step)]
        samples = np.array([key[1] for key in keys])
        if size_hw is None:
            return samples.reshape(len(steps), -1)
        sizes_hw = np.array([size_hw(key) for key in keys])
        grouped: NDArray[np.int64] = samples[group_by_shape(sizes_hw, self.plan.global_batch_size)]
        return grouped

    def _keys(self, step: int) -> list[SampleKey]:
        """Return the keys of an optimizer step, before samples of similar shape are grouped."""
        epoch, step_in_epoch = divmod(step, self.plan.steps_per_epoch)
        first = step_in_epoch * self.plan.global_batch_size
        order = epoch_order(self.plan.num_samples, self.seed, epoch)
        return [(epoch, index) for index in order[first : first + self.plan.global_batch_size].tolist()]


def round_up(size_hw: tuple[int, int], multiple: int) -> tuple[int, int]:
    """Return the smallest height and width that are multiples of `multiple` and hold an image."""
    height, width = size_hw
    return math.ceil(height / multiple) * multiple, math.ceil(width / multiple) * multiple


@dataclass(frozen=True, slots=True)
class CanvasRule:
    """The size to which the images of a step are padded.

    A GPU plans its convolutions and its attention again for each new size, so there should be few.
    """

    multiple: int = 1
    """Round height and width up to multiples of this many pixels."""
    keep_one_size: bool = True
    """Leave the images of a step unpadded if all have one size. Off for augmentations that produce many
    sizes, as each would be one more to plan for."""

    def canvas_hw(self, least_hw: tuple[int, int], most_hw: tuple[int, int]) -> tuple[int, int]:
        """Return the canvas for the images of all processes, from their smallest and largest sides."""
        if self.keep_one_size and least_hw == most_hw:
            return most_hw
        return round_up(most_hw, self.multiple)


class EvaluationBatch(NamedTuple):
    """Images of one size that are evaluated together."""

    size_hw: tuple[int, int]  # of each image after the resize
    indices: list[int]


def evaluation_batches(
    sizes_hw: ArrayLike, batch_size: int, *, num_processes: int, process_index: int
) -> list[EvaluationBatch]:
    """Return this process's batches; each image is in one batch of one process.

    Images share a batch only if they have one size after the resize, because a convolution sees the padding
    at an image's edge. Without padding, detections depend neither on the batch size, nor on the number of
    processes, nor on the other images. The largest batches come first, so that a lack of memory shows at
    once. A process may get none.
    """
    by_size: dict[tuple[int, int], list[int]] = {}
    for index, (height, width) in enumerate(np.asarray(sizes_hw).tolist()):
        by_size.setdefault((height, width), []).append(index)
    batches = [
        EvaluationBatch(size_hw, indices[first : first + batch_size])
        for size_hw, indices in by_size.items()
        for first in range(0, len(indices), batch_size)
    ]
    batches.sort(key=lambda b: -len(b.indices) * b.size_hw[0] * b.size_hw[1])
    return batches[process_index::num_processes]
