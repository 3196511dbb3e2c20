from collections.abc import Iterator
from itertools import chain, pairwise

import numpy as np
import pytest
from numpy.typing import NDArray

from detr_dist.data.sampling import (
    MicroBatchSampler,
    Purpose,
    SampleKey,
    StepPlan,
    epoch_order,
    evaluation_batches,
    group_by_shape,
    random_numbers,
)
from detr_dist.errors import UsageError

LANDSCAPE, SQUARE, PORTRAIT = (480, 640), (500, 500), (640, 480)
MIXED = np.array([PORTRAIT if i % 10 < 3 else SQUARE if i % 10 < 5 else LANDSCAPE for i in range(100)])
SPLITS_OF_24 = [(24, 1, 1), (12, 2, 1), (6, 4, 1), (6, 2, 2), (3, 8, 1), (1, 1, 24), (4, 3, 2)]
NUM_SAMPLES, NUM_STEPS = 100, 11  # 4 steps an epoch, 4 samples left out


def steps(
    plan: StepPlan, *, seed: int = 5, start_step: int = 0, sizes_hw: NDArray[np.int64] | None = None
) -> Iterator[list[list[SampleKey]]]:
    """For every optimizer step the keys of each process, in the order of its micro-batches."""
    num_steps = NUM_STEPS - start_step
    streams = []
    for process_index in range(plan.num_processes):
        sampler = MicroBatchSampler(plan, seed, process_index, start_step, num_steps, sizes_hw)
        micro_batches = list(sampler)
        assert len(micro_batches) == len(sampler) == num_steps * plan.accumulation
        assert {len(keys) for keys in micro_batches} == {plan.batch_size}
        streams.append(micro_batches)
    for step in range(num_steps):
        rows = slice(step * plan.accumulation, (step + 1) * plan.accumulation)
        yield [list(chain.from_iterable(stream[rows])) for stream in streams]


@pytest.mark.parametrize(("batch_size", "num_processes", "accumulation"), SPLITS_OF_24)
def test_every_split_of_a_global_batch_sees_the_same_samples_in_each_step(
    batch_size: int, num_processes: int, accumulation: int
) -> None:
    whole = StepPlan(NUM_SAMPLES, 24, 1, 1)
    split = StepPlan(NUM_SAMPLES, batch_size, num_processes, accumulation)
    assert split.steps_per_epoch == 4
    assert split.num_dropped == 4
    for sizes_hw in (None, MIXED):
        streams = steps(whole, sizes_hw=sizes_hw), steps(split, sizes_hw=sizes_hw)
        for one, several in zip(*streams, strict=True):
            assert list(chain.from_iterable(several)) == one[0], (
                "process by process, in the order of the whole"
            )


@pytest.mark.parametrize("start_step", [0, 1, 4, 7, 10])
def test_a_resumed_stream_is_the_tail_of_the_uninterrupted_one(start_step: int) -> None:
    plan = StepPlan(NUM_SAMPLES, 6, 2, 2)
    for sizes_hw in (None, MIXED):
        whole = list(steps(plan, sizes_hw=sizes_hw))
        assert list(steps(plan, start_step=start_step, sizes_hw=sizes_hw)) == whole[start_step:]


def test_no_sample_comes_twice_in_an_epoch() -> None:
    plan = StepPlan(NUM_SAMPLES, 3, 4, 2)
    keys = [key for step in steps(plan) for process in step for key in process]
    assert len(set(keys)) == len(keys) == NUM_STEPS * 24
    assert {epoch for epoch, _ in keys} == {0, 1, 2}


def test_portraits_and_other_images_are_in_steps_of_their_own_and_all_but_one_step_is_pure() -> None:
    plan = StepPlan(NUM_SAMPLES, 6, 1, 1)
    for epoch in range(20):
        sampler = MicroBatchSampler(plan, 5, 0, epoch * 16, 16, MIXED)
        of_steps = [[index for _, index in keys] for keys in sampler]
        ungrouped = epoch_order(NUM_SAMPLES, 5, epoch)[:96].tolist()
        assert sorted(chain.from_iterable(of_steps)) == sorted(ungrouped)
        num_portraits = [int((MIXED[rows, 0] > MIXED[rows, 1]).sum()) for rows in of_steps]
        assert sum(0 < number < 6 for number in num_portraits) <= 1


def test_kinds_of_shape_alternate_by_chance_through_an_epoch() -> None:
    sizes_hw = np.array([PORTRAIT if i < 3000 else LANDSCAPE for i in range(10_000)])
    order = group_by_shape(epoch_order(10_000, 0, 0), sizes_hw, 10)
    portraits = (order < 3000).reshape(10, 1000).mean(axis=1)
    # Of 1000 draws, 300 +- 14 are portraits; a step more or less of them at either end of a tenth adds 10.
    np.testing.assert_allclose(portraits, 0.3, atol=0.08)
    first_of_epochs = {
        int(group_by_shape(epoch_order(10_000, 0, epoch), sizes_hw, 10)[0]) < 3000 for epoch in range(30)
    }
    assert first_of_epochs == {True, False}


@pytest.mark.parametrize("sizes_hw", [[LANDSCAPE, SQUARE], [PORTRAIT, (1000, 100)]])
def test_images_of_one_kind_of_shape_keep_their_order(sizes_hw: list[tuple[int, int]]) -> None:
    order = epoch_order(100, 3, 7)
    assert np.array_equal(group_by_shape(order, np.array(sizes_hw * 50), 24), order[:96])


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = [epoch_order(1000, seed, epoch) for seed in range(3) for epoch in range(3)]
    assert all(sorted(order.tolist()) == list(range(1000)) for order in orders)
    for i, one in enumerate(orders):
        for other in orders[:i]:
            # Two random orders of 1000 agree in about 1 place; more than 8 happens once in a million pairs.
            assert (one == other).sum() <= 8
    assert np.array_equal(orders[0], epoch_order(1000, 0, 0))


def test_random_numbers_depend_on_purpose_seed_epoch_and_index() -> None:
    positions = [(p, s, e, i) for p in Purpose for s in (0, 1) for e in (0, 1, 2**33) for i in (0, 1)]
    assert len({random_numbers(*position).random() for position in positions}) == len(positions)
    assert (
        random_numbers(Purpose.AUGMENT, 1, 2, 3).random() == random_numbers(Purpose.AUGMENT, 1, 2, 3).random()
    )


def test_too_few_samples_for_a_step_is_a_clear_error() -> None:
    with pytest.raises(
        UsageError, match=r"takes 32 images .*batch_size 4 x 2 processes x .* 4.* has 31; lower"
    ):
        StepPlan(31, 4, 2, 4)
    assert StepPlan(32, 4, 2, 4).steps_per_epoch == 1


SIZES_HW = [(750, 1333), (800, 1066), (1333, 750), (768, 1340), (800, 800), (769, 1333), (800, 1070)] * 3


@pytest.mark.parametrize("num_processes", [1, 2, 3, 40])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_evaluation_sees_every_image_once_on_a_canvas_that_its_size_decides(
    num_processes: int, batch_size: int
) -> None:
    shares = [
        evaluation_batches(SIZES_HW, batch_size, num_processes=num_processes, process_index=index)
        for index in range(num_processes)
    ]
    batches = list(chain.from_iterable(shares))
    assert sorted(i for batch in batches for i in batch.indices) == list(range(len(SIZES_HW)))
    for canvas_hw, indices in batches:
        assert 0 < len(indices) <= batch_size
        for index in indices:
            assert canvas_hw == tuple(-(-side // 32) * 32 for side in SIZES_HW[index])
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_evaluation_starts_with_the_largest_batches() -> None:
    batches = evaluation_batches(SIZES_HW, 2, num_processes=1, process_index=0)
    areas = [len(b.indices) * b.canvas_hw[0] * b.canvas_hw[1] for b in batches]
    assert all(one >= next_one for one, next_one in pairwise(areas))


def test_evaluation_of_no_images_is_no_batches() -> None:
    assert evaluation_batches([], 2, num_processes=1, process_index=0) == []
