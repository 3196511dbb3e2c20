"""Callbacks: users' code at the steps, evaluations, checkpoints and the end of a run."""

import difflib
import logging
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from detr_dist.data.coco import CocoData
from detr_dist.errors import UsageError, as_one_line
from detr_dist.evaluation.detections import DetectionRecords
from detr_dist.evaluation.evaluator import Details
from detr_dist.tracking.tracker import Status

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunResult:
    """The result of a training run and its location; the same on every process."""

    metrics: dict[str, float]
    """Metrics of the last evaluation, by their names in MLflow."""
    run_id: str | None
    """The run in MLflow, if it is tracked there."""
    output_dir: Path

    @property
    def model_dir(self) -> Path:
        """Return the folder of the best model."""
        return self.output_dir / "model"


@dataclass(frozen=True)
class StepEvent:
    """An optimizer step is done."""

    step: int
    """Optimizer steps done so far."""
    epoch: float
    """Passes over the training images so far."""
    learning_rate: float
    metrics: Mapping[str, float]
    """Metrics that were logged at this step, such as `train_loss`; empty at steps without logging."""


@dataclass(frozen=True)
class EvaluationEvent:
    """The validation images have been evaluated."""

    step: int
    epoch: float
    metrics: Mapping[str, float]
    """Metrics by their names in MLflow, such as `val_map`."""
    details: Details
    """Detections and annotations of each image: `for row in range(len(details))`,
    `details.detections(row)` and `details.truth(row)`."""
    _log: Callable[[Mapping[str, float]], None]

    @property
    def detections(self) -> DetectionRecords:
        """Return all detections as columns: `image_rows`, `boxes_xyxy_px`, `scores`, `labels`."""
        return self.details.records

    @property
    def data(self) -> CocoData:
        """Return the ground truth; `image_rows` of the detections are rows of its images."""
        return self.details.data

    @property
    def class_names(self) -> tuple[str, ...]:
        """Return the name of each label."""
        return self.data.class_names

    def log_metrics(self, metrics: Mapping[str, float]) -> None:
        """Add your own metrics to those of this evaluation, each under the name `val_<name>`.

        Raises:
            UsageError: the evaluation has a metric of that name.
        """
        self._log(metrics)


@dataclass(frozen=True)
class CheckpointEvent:
    """A checkpoint is complete on disk."""

    folder: Path
    names: tuple[str, ...]
    """All names under which it was saved, such as `epoch_10`, `best` and `last`; `folder` has the first."""
    step: int


@dataclass(frozen=True)
class EndEvent:
    """The run has ended."""

    status: Status
    """FINISHED, FAILED, or KILLED if the run was asked to stop."""
    error: BaseException | None
    """The reason why it failed or stopped; None if it finished."""
    result: RunResult | None
    """The result, if the run has finished."""


class Callback:
    """Base class for code that is called during a run; override the methods that you need.

    They are called on the main process only. The first exception of a method is a warning, and training
    continues.

    With several processes the others wait for `on_step`, within the collective limit (90 s by default), and
    for `on_evaluation`, an hour at most. `detr_dist.evaluate` and `train` are refused while the run lasts;
    `predict` of a model works.
    """

    def on_step(self, event: StepEvent) -> None:
        """Act after each optimizer step; must return quickly."""

    def on_evaluation(self, event: EvaluationEvent) -> None:
        """Act after each evaluation, before its model and checkpoint are saved."""

    def on_checkpoint(self, event: CheckpointEvent) -> None:
        """Act after a checkpoint was written, in a thread of its own while training continues.

        No later checkpoint waits for this: one that takes long may find the folder replaced or deleted.
        """

    def on_end(self, event: EndEvent) -> None:
        """Act once when the run has ended, for any reason, and its trackers and threads are closed.

        After a failure of one of several processes, the launcher may end this one some 30 s later.
        """


_METHODS: dict[type, str] = {
    StepEvent: "on_step",
    EvaluationEvent: "on_evaluation",
    CheckpointEvent: "on_checkpoint",
    EndEvent: "on_end",
}


class Callbacks:
    """All callbacks of a run.

    Raises:
        UsageError: one of them is no `Callback`, or has a method `on_...` that would never be called.
    """

    def __init__(self, callbacks: Iterable[object] = ()) -> None:
        self._callbacks: list[Callback] = []
        self._failed: set[tuple[int, str]] = set()
        for each in callbacks:
            if not isinstance(each, Callback):
                is_class = isinstance(each, type)
                remedy = "pass an instance of the class" if is_class else "derive its class from dd.Callback"
                raise UsageError(f"callbacks: {each!r} is no callback; {remedy}")
            _check_hooks(type(each))
            self._callbacks.append(each)

    def notify(self, event: StepEvent | EvaluationEvent | CheckpointEvent | EndEvent) -> None:
        """Call each callback; the first exception of each of its methods is a warning."""
        method = _METHODS[type(event)]
        for index, callback in enumerate(self._callbacks):
            try:
                getattr(callback, method)(event)
            except Exception as error:  # users' code may raise anything
                if (index, method) not in self._failed:
                    self._failed.add((index, method))
                    where = traceback.extract_tb(error.__traceback__)[-1]
                    _logger.warning(
                        f"callback {type(callback).__name__}.{method} failed ({as_one_line(error)}, "
                        f"{where.filename}:{where.lineno}); training continues, and this is "
                        "not reported again",
                        exc_info=error,
                    )


def _check_hooks(callback: type[Callback]) -> None:
    """Refuse a misspelt hook, which would never be called.

    Raises:
        UsageError: naming the nearest hook.
    """
    hooks = [*_METHODS.values()]
    for name in dir(callback):
        if name.startswith("on_") and name not in hooks and callable(getattr(callback, name)):
            (nearest,) = difflib.get_close_matches(name, hooks, n=1, cutoff=0)
            raise UsageError(
                f"callbacks: {callback.__name__}.{name} would never be called; did you mean {nearest}? A "
                "method of your own must not begin with on_"
            )
