"""Logging of losses and memory during the loop, and evaluation and saving of epochs."""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial

import torch

from detr_dist.errors import TrainingError, UsageError
from detr_dist.evaluation.evaluator import Details, Evaluator
from detr_dist.evaluation.thresholds import known_thresholds
from detr_dist.models.optimizations import num_compiled_graphs
from detr_dist.progress_bar import ProgressBar
from detr_dist.tracking.system_metrics import DeviceMonitor
from detr_dist.training.callback import Callbacks, EvaluationEvent, StepEvent
from detr_dist.training.checkpoint import copy_model, take_snapshot
from detr_dist.training.groups import GroupStream
from detr_dist.training.loop import StepDone, Training, TrainState
from detr_dist.training.output import RunTrackers, log_results
from detr_dist.training.plot_writer import PlotWriter
from detr_dist.training.saver import ModelCard, ModelPacker, Saver
from detr_dist.training.setup import Setup
from detr_dist.training.signals import StopSignals

TOLERATED_UNREADABLE, TOLERATED_UNREADABLE_SHARE = 10, 0.05
"""A run ends if more unreadable training images than this occur, both in number and as a fraction of all."""

_logger = logging.getLogger(__name__)

# More frequent lines would fill a log file without new information.
_SECONDS_BETWEEN_LINES = 2.0

HEADLINES = {"val_map_50", "val_precision", "val_recall", "val_f1"}
"""Metrics in the line after an evaluation, besides the AP of all and of each class."""


class Progress:
    """Shows optimizer steps as they are done. Main process only."""

    def __init__(self, *, first_step: int, total_steps: int) -> None:
        self._first_step, self._total_steps = first_step, total_steps
        self._began_at = time.monotonic()
        self._last_line_at = float("-inf")
        self._bar = ProgressBar("step", total_steps, completed=first_step)

    def step(self) -> None:
        """Count one optimizer step."""
        self._bar.advance()

    def metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show the metrics that were logged at a step."""
        losses = {name: value for name, value in metrics.items() if name.startswith("train_loss")}
        parts = [
            f"{name.removeprefix('train_').replace('loss_', '')} {loss:.4f}" for name, loss in losses.items()
        ]
        parts += [
            f"lr {metrics['learning_rate']:.2e}",
            f"{metrics['train_images_per_s']:.1f} images/s",
            f"data wait {metrics['train_data_wait_share']:.0%}",
        ]
        self._bar.describe(", ".join(parts))
        now = time.monotonic()
        if step == self._total_steps or now - self._last_line_at >= _SECONDS_BETWEEN_LINES:
            left_s = (now - self._began_at) / (step - self._first_step) * (self._total_steps - step)
            parts.append(f"time left {timedelta(seconds=round(left_s))}")
            line = f"step {step}/{self._total_steps}  epoch {metrics['epoch']:.2f}  {'  '.join(parts)}"
            _logger.info(line, extra={"is_on_screen": self._bar.is_shown})
            self._last_line_at = now

    def close(self) -> None:
        """Remove the bar."""
        self._bar.close()


class RunObserver:
    """Logs, evaluates and saves according to the configuration, and notifies the user's callbacks.

    Every method is collective.
    """

    def __init__(
        self,
        setup: Setup,
        training: Training,
        groups: GroupStream,
        state: TrainState,
        signals: StopSignals,
        *,
        trackers: RunTrackers,
        callbacks: Callbacks,
    ) -> None:
        self._training, self._groups = training, groups
        self._trackers, self._callbacks = trackers, callbacks
        self._host, self._config, self._detector = setup.host, setup.config, setup.detector
        self._facts = replace(setup.facts, mlflow_run_id=trackers.run_id or setup.facts.mlflow_run_id)
        self._progress: Progress | None = None  # this and the next ones only on the main process
        self._saver: Saver | None = None
        self._plots: PlotWriter | None = None
        self._evaluator = Evaluator(
            setup.val_data,
            setup.config,
            setup.accelerator,
            setup.host,
            stop_requested=lambda: signals.is_requested,
        )
        self._monitor = DeviceMonitor(training.accelerator.device, self._host)
        if self._host.is_main_process:
            if self._monitor.notice:
                _logger.info(self._monitor.notice)
            files = trackers if trackers.keeps_files else None
            self._progress = Progress(first_step=state.step, total_steps=training.total_steps)
            if self._config.evaluation.pictures:
                self._plots = PlotWriter(setup.val_data, setup.output_dir / "pictures", trackers)
                self._plots.write_batch(groups.first_samples, state.step, setup.train_data.class_names)
            self._saver = Saver(
                setup.output_dir / "checkpoints",
                keep_last=self._config.checkpoint.keep_last,
                tracker=files,
                callbacks=callbacks,
                pack_model=ModelPacker(training.average.detector, self._config, setup.output_dir, files).pack,
            )
        self._details: Details | None = None  # of the evaluation at this epoch's end
        self._is_best = self._was_evaluated = False  # at the end of this epoch
        self._logged_at = time.perf_counter()
        self._logged_images = 0.0
        self._logged_waited_s = 0.0
        self._paused_s = 0.0  # by evaluation and saving since then

    def after_step(self, state: TrainState, done: StepDone) -> None:
        """Log losses and memory if due, notify callbacks, and save a step's checkpoint if due."""
        if self._progress is not None:
            self._progress.step()
        every, is_last = self._config.logging, state.step == self._training.total_steps
        metrics: dict[str, float] = {}
        if state.step % every.log_every_steps == 0 or is_last:
            metrics |= self._log_losses(state, done)
        if state.step % every.memory_every_steps == 0 or is_last:
            memory = self._monitor.read()
            self._trackers.log_metrics(memory, step=state.step)
            metrics |= memory
        self._callbacks.notify(StepEvent(state.step, self._epoch(state), done.learning_rate, metrics))

        every_steps = self._config.checkpoint.every_steps
        if every_steps is not None and state.step % every_steps == 0:
            self._training.check(state.step)
            self._save(state, [f"step_{state.step}", "last"])

    def evaluate(self, state: TrainState) -> None:
        """Evaluate and log if an evaluation is due, as always at the end of training."""
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
        self._trackers.log_evaluation(
            state.metrics | {"val_seconds": took_s}, step=state.step, epoch=self._num_epochs(state)
        )
        headlines = "  ".join(
            f"{name} {value:.4f}"
            for name, value in state.metrics.items()
            if name in HEADLINES or (name.endswith("_map") and not name.endswith("_center_map"))
        )
        if self._host.is_main_process:
            _logger.info(f"evaluation after step {state.step} in {took_s:.1f} s: {headlines}")
        self._details = scores.details
        with self._host.failing_together():  # the others wait for the user's metrics
            if scores.details is not None:
                self._callbacks.notify(self._evaluation_event(state, scores.details))
                log_results(self._trackers, scores.details.data, state)
        self._paused_s += time.perf_counter() - began_at

    def _evaluation_event(self, state: TrainState, details: Details) -> EvaluationEvent:
        def log(metrics: Mapping[str, float]) -> None:
            own = {f"val_{name}": float(value) for name, value in metrics.items()}
            if taken := own.keys() & {*state.metrics, "val_seconds"}:
                raise UsageError(
                    f"the evaluation has {', '.join(sorted(taken))} already; choose another name"
                )
            state.metrics |= own
            self._trackers.log_evaluation(own, step=state.step, epoch=self._num_epochs(state))

        return EvaluationEvent(state.step, self._epoch(state), dict(state.metrics), details, log)

    def after_epoch(self, state: TrainState) -> None:
        """Save what is due: the epoch's model for trackers, the best model, and checkpoints."""
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
                    self._plots.write(details, f"epoch_{num_epochs}", state.step)
        self._paused_s += time.perf_counter() - began_at

    def save_last(self, state: TrainState) -> None:
        """Save immediately, at any step, because the run is about to stop."""
        self._training.check(state.step)
        self._save(state, ["last"])

    def finish(self) -> None:
        """Wait until everything is saved.

        Raises:
            TrainingError: the last checkpoint or the best model could not be saved.
        """
        with self._host.failing_together():
            if self._saver is not None:
                self._saver.finish()

    def close(self) -> None:
        """End the progress bar and the threads. Not collective."""
        if self._progress is not None:
            self._progress.close()
        self._monitor.close()
        if self._saver is not None:
            self._saver.close()

    def _num_epochs(self, state: TrainState) -> int:
        """Return the number of epochs started so far, from 1."""
        return -(-state.step // self._training.plan.steps_per_epoch)

    def _epoch(self, state: TrainState) -> float:
        return state.step / self._training.plan.steps_per_epoch

    def _log_losses(self, state: TrainState, done: StepDone) -> dict[str, float]:
        """Log and return the step's losses, summed over all processes. Waits for the device."""
        parts = torch.stack([*done.losses.values()])
        sums = self._training.accelerator.reduce(parts, reduction="sum").tolist()
        seen = self._host.gather_rows(
            [self._groups.num_images, self._groups.num_unreadable, self._groups.waited_s]
        )
        images, unreadable, waits = (list(column) for column in zip(*seen, strict=True))
        if sum(unreadable) > max(TOLERATED_UNREADABLE, TOLERATED_UNREADABLE_SHARE * sum(images)):
            raise TrainingError(
                f"{sum(unreadable):.0f} of {sum(images):.0f} training images could not be read; "
                "the warnings above name them: repair the files or the disk"
            )
        now = time.perf_counter()
        elapsed_s = now - self._logged_at - self._paused_s
        losses = {f"train_{name}": loss for name, loss in zip(done.losses, sums, strict=True)}
        metrics = losses | {
            "learning_rate": done.learning_rate,
            "epoch": self._epoch(state),
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
        return metrics

    def _save(self, state: TrainState, names: Sequence[str], model: ModelCard | None = None) -> None:
        """Copy the weights, which have been checked, for saving in the background.

        A failure of the copy is raised on every process, so that none waits for one that has stopped.
        """
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
