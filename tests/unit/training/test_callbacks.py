"""What is saved at the end of an epoch."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from detr_dist.config import CheckpointConfig
from detr_dist.distributed import HostGroup
from detr_dist.models.detector import Detector
from detr_dist.tracking.tracker import Trackers
from detr_dist.training.callbacks import RunCallbacks
from detr_dist.training.loop import Training
from detr_dist.training.saver import ModelCard, Saver
from detr_dist.training.state import RunFacts, TrainState


class CountingOptimizer:
    """Counts how often what it remembers is asked for."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self.num_copies = 0

    def state_dict(self) -> Any:
        self.num_copies += 1
        return self._optimizer.state_dict()


@pytest.fixture
def packed() -> list[tuple[int, Mapping[str, Tensor]]]:
    """Epoch and weights of the models that were packed."""
    return []


@pytest.fixture
def optimizer(training: Training) -> CountingOptimizer:
    return CountingOptimizer(training.optimizer)


@pytest.fixture
def observer(
    training: Training,
    detector: Detector,
    facts: RunFacts,
    tmp_path: Path,
    packed: list[tuple[int, Mapping[str, Tensor]]],
    optimizer: CountingOptimizer,
) -> Iterator[RunCallbacks]:
    """Of a run with MLflow whose epochs have 10 steps; a checkpoint is due after every second."""

    def pack(weights: Mapping[str, Tensor], card: ModelCard) -> None:
        packed.append((card.epoch, weights))

    observer = RunCallbacks(
        replace(training, optimizer=optimizer, total_steps=100),
        detector,
        facts.config.model_copy(update={"checkpoint": CheckpointConfig(every_epochs=2)}),
        host=HostGroup(training.accelerator),
        groups=None,
        evaluator=None,
        progress=None,
        trackers=Trackers(),
        saver=Saver(tmp_path, keep_last=None, tracker=None, pack_model=pack),
        plots=None,
        facts=facts,
    )
    yield observer
    observer.close()


def test_an_epoch_that_saves_only_the_model_does_not_copy_the_optimizer(
    observer: RunCallbacks,
    training: Training,
    optimizer: CountingOptimizer,
    packed: list[tuple[int, Mapping[str, Tensor]]],
    tmp_path: Path,
) -> None:
    observer.after_epoch(TrainState(step=10, closed_step=10))
    observer.finish()
    assert optimizer.num_copies == 0
    ((epoch, weights),) = packed
    assert epoch == 1
    expected = dict(training.average.detector.network.state_dict())
    torch.testing.assert_close(weights, expected, rtol=0, atol=0)
    assert list(tmp_path.iterdir()) == []
    observer.after_epoch(TrainState(step=20, closed_step=20))
    observer.finish()
    assert optimizer.num_copies == 1
    assert [epoch for epoch, _ in packed] == [1, 2]
    assert {path.name for path in tmp_path.iterdir()} == {"epoch_2", "last"}
