"""The moving average of a detector's weights."""

import copy
import math

import pytest
import torch
from torch import Tensor

from detr_dist.models.average import WeightAverage
from detr_dist.models.detector import Detector


@pytest.fixture
def detector(tiny_detector) -> Detector:
    """Return a detector whose decoder layers share their heads."""
    return tiny_detector("deformable_detr").train()


@torch.no_grad()
def train(detector: Detector, step: int) -> None:
    """Change every weight and the batch norm statistics, as an optimizer step does."""
    generator = torch.Generator().manual_seed(step)
    for parameter in detector.parameters():
        parameter += torch.randn(parameter.shape, generator=generator)
    images = torch.randint(0, 255, (1, 3, 128, 128), dtype=torch.uint8, generator=generator)
    detector(images, torch.tensor([[128, 128]]))


def floats(detector: Detector) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in detector.state_dict().items() if tensor.is_floating_point()}


def counters(detector: Detector) -> dict[str, int]:
    return {
        name: int(tensor) for name, tensor in detector.named_buffers() if name.endswith("num_batches_tracked")
    }


def copied(detector: Detector) -> dict[str, Tensor]:
    return copy.deepcopy(floats(detector))


def test_without_a_decay_the_average_is_the_trained_detector_itself(detector: Detector) -> None:
    average = WeightAverage(detector, decay=0.0)
    assert average.detector is detector
    train(detector, 0)
    before = copied(detector)
    average.update(0)
    torch.testing.assert_close(floats(detector), before, rtol=0, atol=0)
    assert all(parameter.requires_grad for parameter in detector.parameters())


def test_each_update_weights_the_new_value_by_warm_up_and_decay(detector: Detector) -> None:
    average = WeightAverage(detector, decay=0.6)
    expected = {name: tensor.double() for name, tensor in copied(detector).items()}
    decays = [1 - 2 ** (-2 / 3), 1 - 3 ** (-2 / 3), 0.6, 0.6]  # from the third on the warm-up allows more
    for step, decay in enumerate(decays):
        train(detector, step)
        average.update(step)
        for name, tensor in floats(detector).items():
            expected[name] = decay * expected[name] + (1 - decay) * tensor.double()
    # Four updates in float32, of numbers up to about 10.
    torch.testing.assert_close(
        floats(average.detector),
        {name: tensor.float() for name, tensor in expected.items()},
        rtol=1e-5,
        atol=1e-5,
    )
    with pytest.raises(AssertionError):
        torch.testing.assert_close(floats(average.detector), floats(detector), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("step", [0, 4, 1999])
def test_warm_up_steps_delay_the_decay_as_published(step: int, detector: Detector) -> None:
    average = WeightAverage(detector, decay=0.99, warmup_steps=2000)
    name = "network.class_embed.0.weight"
    before = copied(detector)[name]
    train(detector, step)
    average.update(step)
    decay = 0.99 * (1 - math.exp(-(step + 1) / 2000))  # a function of the step alone: a resumed run agrees
    expected = decay * before + (1 - decay) * floats(detector)[name]
    # One float32 multiplication and addition of numbers up to about 5.
    torch.testing.assert_close(floats(average.detector)[name], expected, rtol=1e-5, atol=1e-5)


def test_a_resumed_average_continues_at_its_step_without_a_new_warm_up(detector: Detector) -> None:
    average = WeightAverage(detector, decay=0.9)
    before = copied(detector)
    train(detector, 0)
    average.update(1000)
    name = "network.class_embed.0.weight"
    expected = 0.9 * before[name] + 0.1 * floats(detector)[name]
    torch.testing.assert_close(floats(average.detector)[name], expected)


def test_shared_weights_are_averaged_once_and_stay_shared(detector: Detector) -> None:
    heads = [f"network.class_embed.{layer}.weight" for layer in range(3)]
    assert len({floats(detector)[name].data_ptr() for name in heads}) == 1  # or this test shows nothing
    average = WeightAverage(detector, decay=0.9)
    before = copied(detector)
    train(detector, 0)
    average.update(0)
    decay = 1 - 2 ** (-2 / 3)
    for name in heads:
        expected = decay * before[name] + (1 - decay) * floats(detector)[name]
        # One float32 multiplication and addition; averaged three times it would be off by tenths.
        torch.testing.assert_close(floats(average.detector)[name], expected, rtol=1e-5, atol=1e-5)
    assert len({floats(average.detector)[name].data_ptr() for name in heads}) == 1


def test_counters_are_copied_from_the_trained_detector(detector: Detector) -> None:
    average = WeightAverage(detector, decay=0.9)
    for step in range(3):
        train(detector, step)
    assert set(counters(average.detector).values()) == {0}
    average.update(2)
    assert set(counters(average.detector).values()) == {3}
    assert counters(average.detector) == counters(detector)


@pytest.mark.parametrize("which", ["trained", "averaged"])
def test_buffers_replaced_by_a_move_before_the_first_update_are_used(which: str, detector: Detector) -> None:
    average = WeightAverage(detector, decay=0.9)
    moved = detector if which == "trained" else average.detector
    before = copied(detector)
    old = dict(moved.named_buffers())
    moved._apply(torch.clone)  # what `to` does when the device is another one
    assert all(tensor is not old[name] for name, tensor in moved.named_buffers())
    for step in range(2):
        train(detector, step)
        average.update(step)
    assert set(counters(average.detector).values()) == {2}
    statistics = [name for name in before if name.endswith("running_mean")]
    assert statistics
    for name in statistics:
        assert not torch.equal(floats(average.detector)[name], before[name])


def test_training_does_not_change_the_average(detector: Detector) -> None:
    average = WeightAverage(detector, decay=0.9)
    before = copied(average.detector)
    train(detector, 0)
    torch.testing.assert_close(floats(average.detector), before, rtol=0, atol=0)
    assert not any(parameter.requires_grad for parameter in average.detector.parameters())
    assert all(parameter.requires_grad for parameter in detector.parameters())
