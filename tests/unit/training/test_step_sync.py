"""What stops a run at an optimizer step."""

from collections.abc import Sequence

import pytest
import torch
from accelerate import Accelerator

from detr_dist.boxes import IgnoredRegions
from detr_dist.data.dataset import Batch
from detr_dist.data.sampling import CanvasRule
from detr_dist.distributed import HostGroup
from detr_dist.errors import DataError, StopRequested, TrainingError
from detr_dist.training.signals import StopSignals
from detr_dist.training.step_sync import StepSync


@pytest.fixture
def step_sync() -> StepSync:
    return StepSync(HostGroup(Accelerator(cpu=True)), StopSignals(), num_queries=100)


def batch(height: int, width: int, num_boxes: list[int], image_ids: list[int]) -> Batch:
    return Batch(
        images=torch.zeros(len(image_ids), 3, height, width, dtype=torch.uint8),
        sizes_hw=torch.tensor([[height, width]] * len(image_ids)),
        labels=torch.zeros(sum(num_boxes), dtype=torch.int64),
        boxes_cxcywh=torch.zeros(sum(num_boxes), 4),
        num_boxes=num_boxes,
        image_ids=image_ids,
        original_sizes_hw=[(height, width)] * len(image_ids),
        unreadable=[],
        is_padded=False,
    )


def test_the_progress_watchdog_detects_a_gpu_hang_at_the_end_of_an_epoch() -> None:
    calls = []

    class Host(HostGroup):
        def gather_rows(self, values: Sequence[float]) -> list[list[float]]:
            calls.append("exchanged")
            return super().gather_rows(values)

    host = Host(Accelerator(cpu=True))
    host.rendezvous.watch.pause = lambda: calls.append("paused")
    StepSync(host, StopSignals(), num_queries=100).check(3, torch.nn.Linear(2, 2))
    assert calls == ["exchanged", "paused"]  # before the exchange the host has waited for its device


def test_counts_and_canvas_cover_all_micro_batches(step_sync: StepSync) -> None:
    group = [batch(40, 60, [2, 0], [1, 2]), batch(50, 30, [1], [3])]
    agreed = step_sync.next_step(0, iter([group]))
    assert agreed.group is group
    assert (agreed.counts.num_boxes, agreed.counts.num_images) == (3, 3)
    assert agreed.canvas_hw == (50, 60)


def test_boxes_beyond_the_queries_do_not_count() -> None:
    step_sync = StepSync(HostGroup(Accelerator(cpu=True)), StopSignals(), num_queries=4)
    group = [batch(40, 60, [7, 2], [1, 2]), batch(40, 60, [5], [3])]
    assert step_sync.next_step(0, iter([group])).counts.num_boxes == 4 + 2 + 4


def test_queries_of_ignored_regions_are_counted_as_far_as_boxes_leave_some() -> None:
    step_sync = StepSync(HostGroup(Accelerator(cpu=True)), StopSignals(), num_queries=4)
    group = [batch(40, 60, [1, 3, 7], [1, 2, 3]), batch(40, 60, [0], [4])]
    group[0].ignored = IgnoredRegions(torch.zeros(5, dtype=torch.int64), torch.zeros(5, 4), [2, 2, 1])
    counts = step_sync.next_step(0, iter([group])).counts
    assert (counts.num_boxes, counts.num_images, counts.num_ignored) == (1 + 3 + 4, 4, 2 + 1)


def test_class_weights_are_summed_over_all_micro_batches() -> None:
    host = HostGroup(Accelerator(cpu=True))
    step_sync = StepSync(host, StopSignals(), num_queries=4, class_weights=(1.0, 5.0))
    group = [batch(40, 60, [2, 0], [1, 2]), batch(40, 60, [1], [3])]
    group[0].labels = torch.tensor([1, 0])
    assert step_sync.next_step(0, iter([group])).counts.class_weight == 5 + 1 + 1


@pytest.mark.parametrize("rule", [CanvasRule(32), CanvasRule(32, keep_one_size=False)])
def test_the_canvas_depends_on_the_images_and_not_on_their_split(rule: CanvasRule) -> None:
    step_sync = StepSync(HostGroup(Accelerator(cpu=True)), StopSignals(), rule, num_queries=100)
    together = batch(40, 60, [1, 1, 1], [1, 2, 3])
    together.sizes_hw = torch.tensor([[40, 60], [40, 50], [30, 60]])
    parts = [batch(40, 60, [1], [1]), batch(40, 50, [1], [2]), batch(30, 60, [1], [3])]
    canvases = {step_sync.next_step(0, iter([group])).canvas_hw for group in ([together], parts)}
    assert canvases == {(64, 64)}
    of_one_size = [batch(40, 60, [1], [1]), batch(40, 60, [1, 1], [2, 3])]
    expected = (40, 60) if rule.keep_one_size else (64, 64)
    assert step_sync.next_step(1, iter([of_one_size])).canvas_hw == expected


def test_a_step_that_was_not_finite_stops_the_next_with_its_own_images(step_sync: StepSync) -> None:
    groups = iter([[batch(8, 8, [0], [17])], [batch(8, 8, [0], [18])]])
    step_sync.next_step(4, groups)
    step_sync.report(finite=False)
    with pytest.raises(
        TrainingError, match=r"step 5: process 0 \(.+\): the loss is not finite, image ids \[17\]"
    ):
        step_sync.next_step(5, groups)


def test_weights_that_are_not_finite_are_found_before_anything_is_saved(step_sync: StepSync) -> None:
    layer = torch.nn.Linear(2, 2)
    step_sync.check(1, layer)
    with torch.no_grad():
        layer.bias[1] = torch.inf
    with pytest.raises(TrainingError, match=r"step 1: process 0 \(.+\): the weights are not finite"):
        step_sync.check(1, layer)


def test_a_term_that_fp16_skips_for_ever_is_named_at_the_end_of_an_epoch(step_sync: StepSync) -> None:
    layer = torch.nn.Linear(2, 2)
    with pytest.raises(TrainingError, match=r"step 3: process 0 \(.+\): the term own of the loss was NaN"):
        step_sync.check(3, layer, ("own",))


def test_a_data_error_stops_the_step_with_its_own_message(step_sync: StepSync) -> None:
    def broken():
        raise DataError("the disk is gone")
        yield

    with pytest.raises(TrainingError, match=r"step 0: process 0 \(.+\): the disk is gone$"):
        step_sync.next_step(0, broken())


def test_a_stop_request_takes_effect_before_the_next_step() -> None:
    signals = StopSignals()
    step_sync = StepSync(HostGroup(Accelerator(cpu=True)), signals, num_queries=100)
    groups = iter([[batch(8, 8, [0], [17])], [batch(8, 8, [0], [18])]])
    step_sync.next_step(4, groups)
    signals.received = "SIGTERM"
    with pytest.raises(StopRequested, match=r"asked to stop \(SIGTERM\) at step 5"):
        step_sync.next_step(5, groups)
