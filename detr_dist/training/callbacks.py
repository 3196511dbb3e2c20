"""What happens around the loop: losses and memory are logged, epochs evaluated and saved."""

import logging
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from detr_dist.config import Config
from detr_dist.data.coco import CocoData
from detr_dist.distributed import HostGroup
from detr_dist.errors import TrainingError
from detr_dist.evaluation.evaluator import Details, Evaluator
from detr_dist.evaluation.thresholds import known_thresholds
from detr_dist.models.detector import Detector
from detr_dist.models.optimizations import num_compiled_graphs
from detr_dist.storage import describe_disk_error
from detr_dist.tracking.system_metrics import DeviceMonitor
from detr_dist.tracking.tracker import Trackers
from detr_dist.training.checkpoint import copy_model, take_snapshot
from detr_dist.training.groups import GroupStream
from detr_dist.training.loop import StepDone, Training
from detr_dist.training.progress import Progress
from detr_dist.training.saver import ModelCard, Saver
from detr_dist.training.state import RunFacts, TrainState

TOLERATED_UNREADABLE, TOLERATED_UNREADABLE_SHARE = 10, 0.05
"""A run ends when more training images than these, in number and of all it asked for, could not be read."""

_logger = logging.getLogger(__name__)

HEADLINES = {"val_map_50", "val_precision", "val_recall", "val_f1"}
"""Metrics shown in the line after an evaluation, beside the AP of all and of each class."""


class PlotWriter:
    """Draws each evaluation of a run on `data`, for the output folder and MLflow. Main process only.

    What cannot be drawn or uploaded is one warning, and training continues.
    """

    def __init__(self, data: CocoData, plots_dir: Path, tracker: Trackers | None) -> None:
        self._data = data
        self._plots_dir = plots_dir
        self._tracker = tracker
        self._has_warned = False

    def write(self, details: Details, name: str) -> None:
        """Draw into the folder `name` of the run's plots."""
        from detr_dist.evaluation.plots import write_plots  # matplotlib: training starts without it

        folder = self._plots_dir / name
        failures = write_plots(folder, self._data, details)
        if self._tracker is not None and folder.exists():
            try:
                self._tracker.log_folder(folder, f"pictures/{name}")
            except Exception as error:  # no reason to lose a run
                failures.append(f"{folder}: {describe_disk_error(error, self._plots_dir.parent)}")
        if failures and not self._has_warned:
            self._has_warned = True
            more = f", and {len(failures) - 1} more" if len(failures) > 1 else ""
            _logger.warning(
                f"plots could not be drawn ({failures[0]}{more}); training continues and does not repeat this"
            )


class RunCallbacks:
    """Logs, evaluates and saves, when the configuration says so. Every method is collective."""

    def __init__(
        self,
        training: Training,
        detector: Detector,
        config: Config,
        *,
        host: HostGroup,
        groups: GroupStream,
        evaluator: Evaluator,
        progress: Progress | None,
        trackers: Trackers,
        saver: Saver | None,
        plots: PlotWriter | None,
        facts: RunFacts,
    ) -> None:
        self._training = training
        self._detector = detector
        self._config = config
        self._host = host
        self._groups = groups
        self._evaluator = evaluator
        self._trackers = trackers
        # On the main process only; the last one only if it is wanted.
        self._progress, self._saver, self._plots = progress, saver, plots
        self._details: Details | None = None  # of the evaluation at this epoch's end
        self._facts = facts
        self._monitor = DeviceMonitor(training.accelerator.device, host)
        if self._monitor.notice and host.is_main_process:
            _logger.info(self._monitor.notice)
        self._is_best = self._was_evaluated = False  # at the end of this epoch
        self._logged_at = time.perf_counter()
        self._logged_images = 0
        self._logged_waited_s = 0.0
        self._paused_s = 0.0  # by evaluation and saving since then

    def after_step(self, state: TrainState, done: StepDone) -> None:
        if self._progress is not None:
            self._progress.step()
        every, is_last = self._config.logging, state.step == self._training.total_steps
        if state.step % every.log_every_steps == 0 or is_last:
            self._log_losses(state, done)
        if state.step % every.memory_every_steps == 0 or is_last:
            self._log_memory(state)

        every_steps = self._config.checkpoint.every_steps
        if every_steps is not None and state.step % every_steps == 0:
            self._training.step_sync.check(state.step, self._training.model)
            self._save(state, [f"step_{state.step}", "last"])

    def evaluate(self, state: TrainState) -> None:
        """Evaluate and log if an evaluation is due; at the end of training it is."""
        is_last = state.step >= self._training.total_steps
        self._was_evaluated = is_last or self._num_epochs(state) % self._config.evaluation.every_epochs == 0
        self._is_best = False
        if not self._was_evaluated:
            return
        began_at = time.perf_counter()
        with self._training.average.current() as detector:
            self._host.synchronise_buffers(detector)
            scores = self._evaluator.evaluate(detector)
        self._is_best = state.evaluated({f"val_{name}": value for name, value in scores.metrics.items()})
        took_s = time.perf_counter() - began_at
        self._trackers.log_metrics(state.metrics | {"val_seconds": took_s}, step=state.step)
        headlines = "  ".join(
            f"{name} {value:.4f}"
            for name, value in state.metrics.items()
            if name in HEADLINES or name.endswith("_map")
        )
        if self._host.is_main_process:
            _logger.info(f"evaluation after step {state.step} in {took_s:.1f} s: {headlines}")
        self._details = scores.details
        self._paused_s += took_s

    def after_epoch(self, state: TrainState) -> None:
        """Save what is due: the model of every epoch for MLflow, the best one in any case, checkpoints."""
        began_at = time.perf_counter()
        is_over, num_epochs = self._training.is_over(state), self._num_epochs(state)
        if is_over and state.step < self._training.total_steps and self._host.is_main_process:
            _logger.info(
                f"ending early: {state.evaluations_since_best} evaluations in a row without a better val_map "
                f"than {state.best_map:.4f} (training.early_stopping_patience)"
            )
        names = ["best"] if self._is_best else []
        if is_over or num_epochs % self._config.checkpoint.every_epochs == 0:
            names.insert(0, f"epoch_{num_epochs}")
        if names:
            names.append("last")
        model = None
        if self._is_best or self._config.logging.mlflow:
            metrics = dict(state.metrics) if self._was_evaluated else {}
            thresholds = known_thresholds(state.metrics, self._detector.class_names)
            model = ModelCard(num_epochs, state.step, self._is_best, metrics, thresholds)
        if names or model is not None:
            self._save(state, names, model)  # the loop has checked the weights
        details, self._details = self._details, None
        if self._was_evaluated and self._config.evaluation.pictures:
            with self._host.failing_together():
                if self._plots is not None and details is not None:
                    self._plots.write(details, f"epoch_{num_epochs}")
        self._paused_s += time.perf_counter() - began_at

    def save_last(self, state: TrainState) -> None:
        """Save at once, at any step, because the run is about to stop."""
        self._training.step_sync.check(state.step, self._training.model)
        self._save(state, ["last"])

    def finish(self) -> None:
        """Wait until everything is saved.

        Raises:
            TrainingError: the last checkpoint or the best model could not be.
        """
        with self._host.failing_together():
            if self._saver is not None:
                self._saver.finish()

    def close(self) -> None:
        """End the progress bar and the threads. Local."""
        if self._progress is not None:
            self._progress.close()
        self._monitor.close()
        if self._saver is not None:
            self._saver.close()

    def _num_epochs(self, state: TrainState) -> int:
        """Epochs begun so far, from 1."""
        return -(-state.step // self._training.plan.steps_per_epoch)

    def _log_losses(self, state: TrainState, done: StepDone) -> None:
        """Log the step's losses, summed over all processes. Waits for the device."""
        parts = torch.stack([*done.losses.values()])
        sums = self._training.accelerator.reduce(parts, reduction="sum").tolist()
        seen = self._host.gather_rows(
            [self._groups.num_images, self._groups.num_unreadable, self._groups.waited_s]
        )
        images, unreadable, waits = (list(column) for column in zip(*seen, strict=True))
        if sum(unreadable) > max(TOLERATED_UNREADABLE, TOLERATED_UNREADABLE_SHARE * sum(images)):
            raise TrainingError(
                f"{sum(unreadable):.0f} of {sum(images):.0f} training images could not be read; "
                "the warnings above name them: mend the files or the disk"
            )
        now = time.perf_counter()
        elapsed_s = now - self._logged_at - self._paused_s
        losses = {f"train_{name}": loss for name, loss in zip(done.losses, sums, strict=True)}
        metrics = losses | {
            "learning_rate": done.learning_rate,
            "epoch": state.step / self._training.plan.steps_per_epoch,
            "train_images_per_s": (sum(images) - self._logged_images) / elapsed_s,
            "train_data_wait_share": (max(waits) - self._logged_waited_s) / elapsed_s,
        }
        if self._config.training.compile_model:
            metrics["compiled_graphs"] = float(num_compiled_graphs())
        self._logged_at, self._logged_images, self._logged_waited_s = now, sum(images), max(waits)
        self._paused_s = 0.0
        self._trackers.log_metrics(metrics, step=state.step)
        if self._progress is not None:
            self._progress.metrics(state.step, metrics)

    def _log_memory(self, state: TrainState) -> None:
        self._trackers.log_metrics(self._monitor.read(), step=state.step)

    def _save(self, state: TrainState, names: Sequence[str], model: ModelCard | None = None) -> None:
        """Take a copy of the weights, which have been checked, and continue. What fails until then is raised
        on every process: none waits for one that has stopped."""
        with self._host.failing_together():
            if self._saver is not None:
                self._saver.wait()
        if names:
            with self._training.strategy.whole() as memory, self._host.failing_together():
                if self._saver is not None:
                    take = partial(take_snapshot, self._training, self._detector, state, self._facts, memory)
                    self._saver.save(take, names, model)
        elif model is not None:
            with self._training.average.current(), self._host.failing_together():
                if self._saver is not None:
                    self._saver.save_model(partial(copy_model, self._training), model)
