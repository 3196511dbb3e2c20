from collections.abc import Iterator, Sequence
from itertools import chain, islice, pairwise, product

import numpy as np
import pytest
from numpy.typing import NDArray

from detr_dist.data.sampling import (
    SAMPLE,
    WINDOW_STEPS,
    CanvasRule,
    EpochSamples,
    MicroBatchSampler,
    Purpose,
    SampleKey,
    SizeOf,
    StepPlan,
    edge_of_step,
    epoch_order,
    evaluation_batches,
    group_by_shape,
    random_numbers,
    samples_by_weight,
)
from detr_dist.data.transforms import build_transform
from detr_dist.errors import UsageError
from detr_dist.resize import Resize

SHAPES = [(480, 640), (500, 500), (640, 480)]
SPLITS_OF_24 = [(24, 1, 1), (12, 2, 1), (6, 4, 1), (6, 2, 2), (3, 8, 1), (1, 1, 24), (4, 3, 2)]
NUM_SAMPLES, NUM_STEPS = 100, 11  # 4 steps an epoch, 4 samples left out
ORDER_0, ORDER_1 = [2, 1, 5, 8, 0, 9, 7, 4, 6, 3], [3, 8, 4, 1, 2, 9, 5, 7, 6, 0]
"""Orders of 10 samples in epochs 0 and 1 with the seed 5, as in the first version."""


def steps(
    plan: StepPlan,
    *,
    seed: int = 5,
    start_step: int = 0,
    size_hw: SizeOf | None = None,
    edges: Sequence[int] = (),
) -> Iterator[list[list[SampleKey]]]:
    """Yield for every optimizer step the keys of each process, in the order of its micro-batches."""
    num_steps = NUM_STEPS - start_step
    streams = []
    for process_index in range(plan.num_processes):
        sampler = MicroBatchSampler(plan, seed, process_index, start_step, num_steps, size_hw, edges)
        micro_batches = list(sampler)
        assert len(micro_batches) == len(sampler) == num_steps * plan.accumulation
        assert {len(keys) for keys in micro_batches} == {plan.batch_size}
        streams.append(micro_batches)
    for step in range(num_steps):
        rows = slice(step * plan.accumulation, (step + 1) * plan.accumulation)
        yield [list(chain.from_iterable(stream[rows])) for stream in streams]


@pytest.mark.parametrize(("batch_size", "num_processes", "accumulation"), SPLITS_OF_24)
def test_every_split_of_a_global_batch_has_the_same_samples(
    batch_size: int, num_processes: int, accumulation: int
) -> None:
    complete = StepPlan(NUM_SAMPLES, 24, 1, 1)
    split = StepPlan(NUM_SAMPLES, batch_size, num_processes, accumulation)
    assert split.steps_per_epoch == 4
    assert split.num_dropped == 4
    for size_hw in (None, size_of):
        streams = steps(complete, size_hw=size_hw), steps(split, size_hw=size_hw)
        for one, several in zip(*streams, strict=True):
            assert list(chain.from_iterable(several)) == one[0], (
                "process by process, in the order of the whole"
            )


@pytest.mark.parametrize("start_step", [0, 1, 4, 7, 10])
def test_a_resumed_stream_is_the_tail_of_the_uninterrupted_one(start_step: int) -> None:
    plan = StepPlan(NUM_SAMPLES, 6, 2, 2)
    for size_hw in (None, size_of):
        complete = list(steps(plan, size_hw=size_hw))
        assert list(steps(plan, start_step=start_step, size_hw=size_hw)) == complete[start_step:]


def test_no_sample_appears_twice_in_an_epoch() -> None:
    plan = StepPlan(NUM_SAMPLES, 3, 4, 2)
    keys = [key for step in steps(plan) for process in step for key in process]
    assert len(set(keys)) == len(keys) == NUM_STEPS * 24
    assert {epoch for epoch, _ in keys} == {0, 1, 2}


def size_of(key: SampleKey) -> tuple[int, int]:
    """Return one of three shapes, random in each epoch like an augmentation."""
    return SHAPES[random_numbers(Purpose.AUGMENT, 0, *key).integers(3)]


def test_grouping_keeps_the_samples_and_gives_most_steps_one_shape() -> None:
    plan = StepPlan(1000, 6, 1, 1)
    for epoch in range(3):
        sampler = MicroBatchSampler(plan, 5, 0, epoch * 166, 166, size_of)
        of_steps = [[index for _, index in keys] for keys in sampler]
        ungrouped = epoch_order(1000, 5, epoch)[:996].tolist()
        for first in range(0, 166, WINDOW_STEPS):
            window = list(chain.from_iterable(of_steps[first : first + WINDOW_STEPS]))
            assert sorted(window) == sorted(ungrouped[6 * first : 6 * first + len(window)])
        is_mixed = [len({size_of((epoch, index)) for index in indices}) > 1 for indices in of_steps]
        assert sum(is_mixed) <= 2 * 6  # of each of the 6 windows two, where shapes meet
        firsts = [ungrouped.index(indices[0]) for indices in of_steps]
        assert firsts[:WINDOW_STEPS] == sorted(firsts[:WINDOW_STEPS])


def test_halving_groups_similar_sizes() -> None:
    # By hand: heights differ most, 5 times; then, in both halves, widths.
    sizes_hw = np.array([(10, 30), (50, 20), (11, 10), (50, 40), (50, 41), (10, 31), (10, 11), (50, 21)])
    assert group_by_shape(sizes_hw, 2).tolist() == [[0, 5], [1, 7], [2, 6], [3, 4]]


def test_steps_of_similar_sizes_need_far_less_padding() -> None:
    sizes_hw = np.array(list(product(range(400, 800, 50), range(400, 1300, 50))) * 4)
    sizes_hw = np.random.default_rng(0).permutation(sizes_hw)

    def padded_share(steps: NDArray[np.int64]) -> float:
        canvas_px = steps.max(axis=1).prod(axis=1).sum() * steps.shape[1]
        return 1 - steps.prod(axis=2).sum() / canvas_px

    mixed = padded_share(sizes_hw.reshape(-1, 16, 2))
    assert padded_share(sizes_hw[group_by_shape(sizes_hw, 16)]) < 0.3 * mixed


def test_football_footage_needs_few_canvases_with_little_more_padding() -> None:
    transform = build_transform("detr", Resize(800, 1333), train=True)

    def size_hw(key: SampleKey) -> tuple[int, int]:
        return transform.plan((720, 1280), random_numbers(Purpose.AUGMENT, 0, *key)).size_hw

    sampler = MicroBatchSampler(StepPlan(8000, 8, 1, 1), 0, 0, 0, 1000, size_hw)
    sizes_hw = np.array([[size_hw(key) for key in keys] for keys in sampler])
    extremes = [each.tolist() for each in (sizes_hw.min(axis=1), sizes_hw.max(axis=1))]

    def canvases(rule: CanvasRule) -> list[tuple[int, int]]:
        return [rule.canvas_hw(tuple(low), tuple(high)) for low, high in zip(*extremes, strict=True)]

    def padded_share(rule: CanvasRule) -> float:
        return 1 - float(sizes_hw.prod(axis=2).sum() / (8 * np.prod(canvases(rule), axis=1).sum()))

    exact, rounded = CanvasRule(), CanvasRule(32, keep_one_size=False)
    assert len(set(canvases(rounded))) <= 200 < len(set(canvases(exact)))
    assert padded_share(exact) < padded_share(rounded) < padded_share(exact) + 0.03


@pytest.mark.parametrize(
    ("rule", "mixed", "of_one_size"),
    [
        (CanvasRule(), (480, 853), (480, 640)),
        (CanvasRule(32), (480, 864), (480, 640)),
        (CanvasRule(100), (500, 900), (480, 640)),
        (CanvasRule(100, keep_one_size=False), (500, 900), (500, 700)),
    ],
)
def test_a_canvas_is_rounded_up_unless_all_images_have_one_size(
    rule: CanvasRule, mixed: tuple[int, int], of_one_size: tuple[int, int]
) -> None:
    assert rule.canvas_hw((400, 700), (480, 853)) == mixed
    assert rule.canvas_hw((480, 640), (480, 640)) == of_one_size


def test_all_images_of_a_step_get_the_same_edge_in_every_split_and_when_resumed() -> None:
    edges = [480, 512, 544]
    drawn = [edge_of_step(edges, 5, step) for step in range(NUM_STEPS)]
    for split in SPLITS_OF_24:
        for start_step in (0, 7):
            keys_of_steps = steps(StepPlan(NUM_SAMPLES, *split), start_step=start_step, edges=edges)
            found = [{edge for _, _, edge in chain(*of_processes)} for of_processes in keys_of_steps]
            assert found == [{edge} for edge in drawn[start_step:]]
    repeated = [edge_of_step([480, 512, 512, 512, 544], 5, step) for step in range(400)]
    shares = [repeated.count(edge) / 400 for edge in edges]
    assert shares == pytest.approx([0.2, 0.6, 0.2], abs=0.1)  # four standard deviations


def test_edges_leave_the_samples_of_a_step_as_they_are() -> None:
    plan = StepPlan(NUM_SAMPLES, 6, 2, 2)
    for process in (0, 1):
        without, drawn = (
            MicroBatchSampler(plan, 5, process, 0, 9, size_of, edges) for edges in ((), (64, 96))
        )
        assert [[key[:2] for key in keys] for keys in drawn] == list(without)


def test_sizes_are_computed_step_by_step_and_once() -> None:
    asked: list[SampleKey] = []

    def note(key: SampleKey) -> tuple[int, int]:
        asked.append(key)
        return size_of(key)

    plan = StepPlan(1000, 6, 1, 1)  # 166 steps an epoch
    counts = []
    for _ in MicroBatchSampler(plan, 5, 0, 0, 300, note):
        counts.append(len(asked))
    assert counts[0] == WINDOW_STEPS * 6
    # Six for each step, but where an epoch ends with a window of 6 steps, whose next one comes the sooner.
    in_between = [later - earlier for earlier, later in pairwise(counts)]
    assert sorted(in_between, reverse=True)[1] <= 6
    assert len(asked) == len(set(asked)) == (166 + 5 * WINDOW_STEPS) * 6


def test_images_of_one_size_keep_their_order() -> None:
    plan = StepPlan(NUM_SAMPLES, 6, 2, 2)
    assert list(steps(plan, size_hw=lambda key: (720, 1280))) == list(steps(plan))


def test_epochs_and_seeds_have_different_orders() -> None:
    orders = [epoch_order(1000, seed, epoch) for seed in range(3) for epoch in range(3)]
    assert all(sorted(order.tolist()) == list(range(1000)) for order in orders)
    for i, one in enumerate(orders):
        for other in orders[:i]:
            # Two random orders of 1000 agree in about 1 place; more than 8 happens once in a million pairs.
            assert (one == other).sum() <= 8
    assert np.array_equal(orders[0], epoch_order(1000, 0, 0))


def test_the_order_of_earlier_versions_is_unchanged() -> None:
    """A run that was saved by any version continues with the samples of its epoch."""
    assert epoch_order(10, 5, 0).tolist() == ORDER_0
    assert epoch_order(10, 5, 1).tolist() == ORDER_1
    plan = StepPlan(10, 2, 2, 1)
    keys = [list(chain.from_iterable(step)) for step in islice(steps(plan), 3)]
    assert keys == [
        [(0, index) for index in ORDER_0[:4]],
        [(0, index) for index in ORDER_0[4:8]],
        [(1, index) for index in ORDER_1[:4]],
    ]


def samples_of_two_sources() -> EpochSamples:
    """Return 20 samples of 50 images, and 101 samples of 7 images."""
    rng = np.random.default_rng(0)
    return EpochSamples.of([1 + 3 * rng.random(50), 1 + rng.random(7)], [20, 101], seed=5)


def test_every_image_is_there_as_often_as_expected_and_every_source_exactly() -> None:
    samples = samples_of_two_sources()
    expected = np.diff(samples.ends, prepend=0) / SAMPLE
    assert len(samples) == 121
    total = np.zeros(57)
    for epoch in range(200):
        rows = [samples.row(epoch, place) for place in range(len(samples))]
        counts = np.bincount(rows, minlength=57)
        assert np.array_equal(samples.counts(epoch), counts)
        assert counts[:50].sum() == 20
        assert ((counts >= np.floor(expected)) & (counts <= np.ceil(expected))).all()
        total += counts
    # Rounding evens out: independent draws would be off by about 7.
    assert np.abs(total - 200 * expected).max() < 3


def test_samples_depend_on_seed_and_epoch_alone() -> None:
    first, again = samples_of_two_sources(), samples_of_two_sources()
    other = EpochSamples.of([np.ones(50)], [20], seed=6)
    assert [first.counts(epoch).tolist() for epoch in (3, 0, 7)] == [
        again.counts(epoch).tolist() for epoch in (3, 0, 7)
    ]
    assert other.first_offset != first.first_offset
    assert len({tuple(other.counts(epoch)) for epoch in range(10)}) > 1


def test_samples_of_images_that_count_once_are_their_rows() -> None:
    samples = EpochSamples.of([np.ones(NUM_SAMPLES)], [NUM_SAMPLES], seed=1)
    for epoch in range(5):
        assert [samples.row(epoch, place) for place in range(NUM_SAMPLES)] == list(range(NUM_SAMPLES))


@pytest.mark.parametrize(
    ("num_samples", "weights", "expected"),
    [
        (10, [1.0, 1.0], [5, 5]),
        (10, [1.0, 1.0, 1.0], [4, 3, 3]),
        (100, [0.1, 0.3], [25, 75]),
        (7, [1e-9, 1.0], [0, 7]),
        (4, [3.0], [4]),
    ],
)
def test_samples_are_divided_by_weight_to_the_last(
    num_samples: int, weights: list[float], expected: list[int]
) -> None:
    assert samples_by_weight(num_samples, weights) == expected


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
def test_evaluation_groups_by_size_and_has_every_image_once(num_processes: int, batch_size: int) -> None:
    parts = [
        evaluation_batches(SIZES_HW, batch_size, num_processes=num_processes, process_index=index)
        for index in range(num_processes)
    ]
    batches = list(chain.from_iterable(parts))
    assert sorted(i for batch in batches for i in batch.indices) == list(range(len(SIZES_HW)))
    for size_hw, indices in batches:
        assert 0 < len(indices) <= batch_size
        for index in indices:
            assert size_hw == SIZES_HW[index]
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_evaluation_starts_with_the_largest_batches() -> None:
    batches = evaluation_batches(SIZES_HW, 2, num_processes=1, process_index=0)
    areas = [len(b.indices) * b.size_hw[0] * b.size_hw[1] for b in batches]
    assert all(one >= next_one for one, next_one in pairwise(areas))


def test_evaluation_without_images_has_no_batches() -> None:
    assert evaluation_batches([], 2, num_processes=1, process_index=0) == []
