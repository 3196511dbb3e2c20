"""What happens around the loop: losses and memory are logged, epochs evaluated and saved."""

import shutil
import time
from pathlib import Path

import torch

from detr_dist.config import Config
from detr_dist.distributed import HostGroup
from detr_dist.errors import TrainingError
from detr_dist.evaluation.evaluate import Evaluator
from detr_dist.models.detector import Detector, plain_network
from detr_dist.tracking.memory import memory_metrics
from detr_dist.tracking.mlflow import MLflowTracker
from detr_dist.tracking.packaging import write_model
from detr_dist.training.checkpoint import new_folder, save_checkpoint
from detr_dist.training.groups import GroupStream
from detr_dist.training.loop import StepDone, Training
from detr_dist.training.progress import Progress
from detr_dist.training.state import TrainState

TOLERATED_UNREADABLE, TOLERATED_UNREADABLE_SHARE = 10, 0.05
"""A run ends when more training images than these, in number and of all it asked for, could not be read."""


class RunObserver:
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
        tracker: MLflowTracker | None,
        output_dir: Path,
        progress: Progress,
    ) -> None:
        self.results: dict[str, float] = {}
        self._training = training
        self._detector = detector
        self._config = config
        self._host = host
        self._groups = groups
        self._evaluator = evaluator
        self._tracker = tracker
        self._output_dir = output_dir
        self._progress = progress
        self._logged_at = time.perf_counter()
        self._logged_images = 0
        self._logged_waited_s = 0.0
        self._paused_s = 0.0  # by evaluation and saving since then

    def after_step(self, state: TrainState, done: StepDone) -> None:
        self._progress.step()
        every, is_last = self._config.logging, state.step == self._training.total_steps
        if state.step % every.log_every_steps == 0 or is_last:
            self._log_losses(state, done)
        if state.step % every.memory_every_steps == 0 or is_last:
            self._log_memory(state)

    def after_epoch(self, state: TrainState) -> None:
        """Evaluate and save what is due; at the end of training everything is."""
        began_at = time.perf_counter()
        is_last = state.step == self._training.total_steps
        num_epochs = -(-state.step // self._training.plan.steps_per_epoch)
        self._host.synchronise_buffers(self._detector)
        is_best = was_evaluated = False
        if is_last or num_epochs % self._config.evaluation.every_epochs == 0:
            is_best, was_evaluated = self._evaluate(state), True
        val_map = self.results.get("val_map") if was_evaluated else None
        # Whatever goes wrong while saving is raised on every process: none waits for one that has stopped.
        self._host.on_main_process(
            lambda: self._save(state, num_epochs, val_map, is_best=is_best, is_last=is_last)
        )
        self._paused_s += time.perf_counter() - began_at

    def _log_losses(self, state: TrainState, done: StepDone) -> None:
        """Log the step's losses, summed over all processes. Waits for the device."""
        total = self._training.accelerator.reduce(done.shares, reduction="sum").tolist()
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
        metrics = {
            "train_loss": total[0],
            "train_loss_ce": total[1],
            "train_loss_bbox": total[2],
            "train_loss_giou": total[3],
            "learning_rate": done.learning_rate,
            "epoch": state.step / self._training.plan.steps_per_epoch,
            "train_images_per_s": (sum(images) - self._logged_images) / elapsed_s,
            "train_data_wait_share": (max(waits) - self._logged_waited_s) / elapsed_s,
        }
        self._logged_at, self._logged_images, self._logged_waited_s = now, sum(images), max(waits)
        self._paused_s = 0.0
        self._training.accelerator.log(metrics, step=state.step)
        self._progress.metrics(state.step, metrics)

    def _log_memory(self, state: TrainState) -> None:
        metrics = memory_metrics()
        highest = torch.tensor(self._host.gather_rows(list(metrics.values()))).amax(0).tolist()
        self._training.accelerator.log(dict(zip(metrics, highest, strict=True)), step=state.step)

    def _evaluate(self, state: TrainState) -> bool:
        """Evaluate, log and remember; says whether this is the best so far."""
        began_at = time.perf_counter()
        metrics = self._evaluator.evaluate(self._detector)
        self.results = {f"val_{name}": value for name, value in metrics.items()}
        took_s = time.perf_counter() - began_at
        self._training.accelerator.log(self.results | {"val_seconds": took_s}, step=state.step)
        shown = "  ".join(f"{name} {value:.4f}" for name, value in self.results.items())
        self._progress.say(f"evaluation after step {state.step} in {took_s:.1f} s: {shown}")
        val_map = metrics.get("map", 0.0)
        is_best = state.best_map is None or val_map > state.best_map
        if is_best:
            state.best_map, state.best_step = val_map, state.step
        return is_best

    def _save(
        self, state: TrainState, num_epochs: int, val_map: float | None, *, is_best: bool, is_last: bool
    ) -> None:
        checkpoints = self._output_dir / "checkpoints"
        names = ["best"] if is_best else []
        if is_last or num_epochs % self._config.checkpoint.every_epochs == 0:
            names.append(f"epoch_{num_epochs}")
        for name in names:
            save_checkpoint(
                checkpoints / name,
                detector=self._detector,
                training=self._training,
                state=state,
                config=self._config,
                facts={"epoch": num_epochs, "class_names": list(self._detector.class_names)},
            )
            if self._tracker is not None:
                self._tracker.log_folder(checkpoints / name, f"checkpoints/{name}")
        self._save_model(num_epochs, val_map, is_best=is_best)

    def _save_model(self, num_epochs: int, val_map: float | None, *, is_best: bool) -> None:
        """The model of every epoch goes to MLflow, the best one stays in the output folder as well."""
        if self._tracker is None and not is_best:
            return
        folder = (
            self._output_dir / "model" if is_best else self._output_dir / "models" / f"epoch_{num_epochs}"
        )
        metadata = {
            "epoch": num_epochs,
            "val_map": val_map,
            "is_best": is_best,
            "config": self._config.model_dump(mode="json"),
        }
        with new_folder(folder) as partial:
            write_model(plain_network(self._detector), partial, data=self._config.data, metadata=metadata)
        if self._tracker is not None:
            self._tracker.log_folder(folder, f"models/epoch_{num_epochs}")
            if is_best:
                self._tracker.log_folder(folder, "model")
            else:
                shutil.rmtree(folder)
