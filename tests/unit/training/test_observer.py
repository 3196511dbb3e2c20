"""The files saved at the end of an epoch, and the notifications of the user's callbacks."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from detr_dist.config import CheckpointConfig, EvaluationConfig, LoggingConfig
from detr_dist.console import log_to_file
from detr_dist.data.coco import load_data
from detr_dist.distributed import HostGroup
from detr_dist.errors import UsageError
from detr_dist.evaluation.detections import DetectionRecords
from detr_dist.evaluation.evaluator import Details, Scores
from detr_dist.extensions import instantiate
from detr_dist.models.detector import Detector
from detr_dist.tracking.tracker import Tracker
from detr_dist.training.callback import (
    Callback,
    Callbacks,
    CheckpointEvent,
    EndEvent,
    EvaluationEvent,
    StepEvent,
)
from detr_dist.training.checkpoint import RunFacts
from detr_dist.training.loop import StepDone, Training, TrainState
from detr_dist.training.observer import RunObserver
from detr_dist.training.output import RunTrackers
from detr_dist.training.saver import ModelPacker
from detr_dist.training.signals import StopSignals


class CountingOptimizer:
    """Optimizer that counts the requests for its state."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self.num_copies = 0

    def state_dict(self) -> Any:
        self.num_copies += 1
        return self._optimizer.state_dict()


class Logged(Tracker):
    """Tracker that keeps the metrics."""

    def __init__(self) -> None:
        self.metrics: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        self.metrics.append((step, dict(metrics)))


class Recorder(Callback):
    def __init__(self) -> None:
        self.events: list[Any] = []

    def on_step(self, event: StepEvent) -> None:
        self.events.append(event)

    def on_evaluation(self, event: EvaluationEvent) -> None:
        self.events.append(event)
        event.log_metrics({"num_detections": len(event.detections.scores)})

    def on_checkpoint(self, event: CheckpointEvent) -> None:
        self.events.append((event, (event.folder / "state.json").exists()))


class Broken(Callback):
    """Callback that fails in each method."""

    def on_step(self, event: StepEvent) -> None:
        raise ZeroDivisionError("by zero")

    on_evaluation = on_checkpoint = on_end = on_step


@pytest.fixture
def optimizer(training: Training) -> CountingOptimizer:
    return CountingOptimizer(training.optimizer)


@pytest.fixture
def observe(
    training: Training,
    detector: Detector,
    facts: RunFacts,
    tmp_path: Path,
    tiny_data: Path,
    optimizer: CountingOptimizer,
) -> Iterator[Callable[..., RunObserver]]:
    """Observe a run in `tmp_path` whose epochs have 10 steps; a checkpoint is due after every second."""
    config = facts.config.model_copy(
        update={
            "checkpoint": CheckpointConfig(every_epochs=2),
            "evaluation": EvaluationConfig(every_epochs=1, pictures=False),
            "logging": LoggingConfig(log_every_steps=2, memory_every_steps=100),
        }
    )
    observers = []

    def make(*callbacks: Callback, tracker: Tracker | None = None) -> RunObserver:
        trackers = RunTrackers()
        if tracker is not None:
            trackers.add(tracker)
        setup = SimpleNamespace(
            config=config,
            output_dir=tmp_path,
            val_data=load_data(tiny_data / "val"),
            accelerator=training.accelerator,
            host=HostGroup(training.accelerator),
            facts=facts,
            detector=detector,
        )
        groups = SimpleNamespace(num_images=8, num_unreadable=0, waited_s=0.0)
        observers.append(
            RunObserver(
                setup,
                replace(training, optimizer=optimizer, total_steps=100),
                groups,
                TrainState(),
                StopSignals(),
                trackers=trackers,
                callbacks=Callbacks(callbacks),
            )
        )
        return observers[-1]

    yield make
    for each in observers:
        each.close()


@pytest.fixture
def no_detections(monkeypatch: pytest.MonkeyPatch, tiny_data: Path) -> None:
    """Replace evaluations by ones that find nothing, without delay."""
    details = Details(load_data(tiny_data / "val"), DetectionRecords.none(), None, None)
    monkeypatch.setattr(
        "detr_dist.training.observer.Evaluator.evaluate", lambda self, _: Scores({"map": 0.25}, details)
    )


def test_an_epoch_that_saves_only_the_model_does_not_copy_the_optimizer(
    observe: Callable[..., RunObserver],
    training: Training,
    optimizer: CountingOptimizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    packed: list[tuple[int, Mapping[str, Tensor]]] = []
    monkeypatch.setattr(ModelPacker, "pack", lambda self, weights, card: packed.append((card.epoch, weights)))
    observer = observe()
    observer.after_epoch(TrainState(step=10, closed_step=10))
    observer.finish()
    assert optimizer.num_copies == 0
    ((epoch, weights),) = packed
    assert epoch == 1
    expected = dict(training.average.detector.network.state_dict())
    torch.testing.assert_close(weights, expected, rtol=0, atol=0)
    assert not (tmp_path / "checkpoints").exists()
    observer.after_epoch(TrainState(step=20, closed_step=20))
    observer.finish()
    assert optimizer.num_copies == 1
    assert [epoch for epoch, _ in packed] == [1, 2]
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"epoch_2", "last"}


@pytest.mark.usefixtures("no_detections")
def test_callbacks_are_notified_of_steps_evaluations_and_checkpoints(
    observe: Callable[..., RunObserver], tmp_path: Path
) -> None:
    recorder, logged = Recorder(), Logged()
    observer = observe(recorder, tracker=logged)
    losses = StepDone({"loss": torch.tensor(0.5)}, 1e-4)
    state = TrainState()
    for state.step in (1, 2):
        observer.after_step(state, losses)
    state.step = 20
    observer.evaluate(state)
    state.closed_step = state.step
    observer.after_epoch(state)
    observer.finish()
    observer.close()
    first, second, evaluation, (checkpoint, was_complete) = recorder.events
    assert first == StepEvent(1, 0.1, 1e-4, {})
    assert (second.step, second.epoch, second.metrics["train_loss"]) == (2, 0.2, 0.5)
    assert (evaluation.step, evaluation.metrics) == (20, {"val_map": 0.25})
    assert evaluation.class_names == ("player", "ball")
    assert len(evaluation.details) == len(evaluation.data) == 7
    assert evaluation.detections is evaluation.details.records
    assert checkpoint == CheckpointEvent(
        tmp_path / "checkpoints" / "epoch_2", ("epoch_2", "best", "last"), 20
    )
    assert was_complete
    assert state.metrics == {"val_map": 0.25, "val_num_detections": 0.0}
    assert (20, {"val_num_detections": 0.0}) in logged.metrics
    with pytest.raises(UsageError, match="val_map already"):
        evaluation.log_metrics({"map": 1.0})


@pytest.mark.usefixtures("no_detections")
def test_a_failing_callback_gives_one_warning_for_each_of_its_methods(
    observe: Callable[..., RunObserver], messages: list[str]
) -> None:
    recorder = Recorder()
    observer = observe(Broken(), recorder)
    state = TrainState()
    for state.step in (1, 3, 5):
        observer.after_step(state, StepDone({"loss": torch.tensor(0.5)}, 1e-4))
    observer.evaluate(state)
    observer.finish()
    warnings = [line for line in messages if "Broken" in line]
    assert len(warnings) == 2
    assert "Broken.on_step failed (ZeroDivisionError: by zero, " in warnings[0]
    assert f"{Path(__file__).name}:" in warnings[0]
    assert "Broken.on_evaluation" in warnings[1]
    assert len(recorder.events) == 4


def test_the_traceback_of_a_callback_is_in_the_log_file_but_not_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = log_to_file(tmp_path / "train.log")
    Callbacks([Broken()]).notify(StepEvent(1, 0.1, 1e-4, {}))
    file.close()
    printed, logged = capsys.readouterr().out.splitlines(), (tmp_path / "train.log").read_text().splitlines()
    assert len(printed) == 1
    assert logged[0].endswith(printed[0])
    assert logged[1].startswith("Traceback")
    assert logged[-1] == "ZeroDivisionError: by zero"


def test_ctrl_c_in_a_callback_is_not_treated_as_its_failure() -> None:
    class Interrupted(Callback):
        def on_end(self, event: EndEvent) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Callbacks([Interrupted()]).notify(EndEvent("FINISHED", None, None))


def test_a_class_instead_of_a_callback_is_refused() -> None:
    with pytest.raises(UsageError, match="Recorder"):
        Callbacks([Recorder])


def test_a_misspelt_hook_is_refused_with_the_nearest_one() -> None:
    class Misspelt(Recorder):
        on_checkpoints = 3  # not a method

        def on_stp(self, event: StepEvent) -> None: ...

    with pytest.raises(UsageError, match=r"Misspelt\.on_stp .*on_step\?"):
        Callbacks([Misspelt()])


def test_configured_callbacks_are_created_without_arguments(tmp_path: Path) -> None:
    path = tmp_path / "own_callbacks.py"
    path.write_text("class Fine: ...\nclass NeedsOne:\n    def __init__(self, value): ...\n")
    made = instantiate(f"{path}:Fine", "training.callbacks")
    assert type(made).__name__ == "Fine"
    with pytest.raises(UsageError, match=r"training\.callbacks: .*NeedsOne\(\) failed \(TypeError"):
        instantiate(f"{path}:NeedsOne", "training.callbacks")
