"""Saving of checkpoints and models in the background: training waits only for a copy to the host."""

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from detr_dist.config import Config
from detr_dist.errors import TrainingError
from detr_dist.models.detector import Detector, load_plain_weights, plain_network
from detr_dist.storage import describe_disk_error, finish_interrupted, new_folder, remove_folder
from detr_dist.tracking.packaging import write_model
from detr_dist.tracking.tracker import Trackers
from detr_dist.training.callback import Callbacks, CheckpointEvent
from detr_dist.training.checkpoint import MANIFEST, Snapshot, outdated_checkpoints, write_checkpoint

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelCard:
    """The metadata of a model."""

    epoch: int
    """Epochs started, from 1."""
    step: int
    """Optimizer steps done."""
    is_best: bool
    metrics: Mapping[str, float]
    """Metrics of the evaluation at this epoch's end; empty if there was none."""
    thresholds: Mapping[str, float]
    """Lowest score of a detection that counts, by class name, from the last evaluation."""


class ModelPacker:
    """Writes the model of every epoch for the trackers, and the best one into the output folder as well."""

    def __init__(
        self, detector: Detector, config: Config, output_dir: Path, tracker: Trackers | None
    ) -> None:
        self._network = plain_network(detector)  # a copy on the host, which gets each epoch's weights
        self._config = config
        self._output_dir = output_dir
        self._tracker = tracker

    def pack(self, weights: Mapping[str, Tensor], card: ModelCard) -> None:
        """Write the model atomically, and pass it to the tracker.

        Raises:
            Exception: each library reports a full disk by its own type.
        """
        if self._tracker is None and not card.is_best:
            return
        of_epoch = f"models/epoch_{card.epoch}"
        folder = self._output_dir / ("model" if card.is_best else of_epoch)
        load_plain_weights(self._network, weights)
        metadata = {
            "epoch": card.epoch,
            "step": card.step,
            "val_map": card.metrics.get("val_map"),
            "is_best": card.is_best,
            "metrics": dict(card.metrics),
            "thresholds": dict(card.thresholds),
            "config": self._config.model_dump(mode="json"),
        }
        with new_folder(folder) as partial:
            write_model(self._network, partial, config=self._config, metadata=metadata)
        if self._tracker is None:
            return
        self._tracker.log_folder(folder, of_epoch)
        if self._config.checkpoint.keep_last is not None:
            self._tracker.keep_newest("models", card.epoch, self._config.checkpoint.keep_last)
        if card.is_best:
            self._tracker.log_folder(folder, "model")
        else:
            shutil.rmtree(folder)
            finish_interrupted(folder.parent, "epoch_*")  # removes leftovers of a killed run
            with suppress(OSError):  # the folder has files of the user
                folder.parent.rmdir()


class Saver:
    """Writes checkpoints and models, from one copy of the run at a time. Main process only.

    If something cannot be written or uploaded, that is a warning, and training continues; earlier files stay
    unchanged. `finish` raises if the checkpoints `best` or `last` or the best model are missing in the end.
    """

    def __init__(
        self,
        checkpoints_dir: Path,
        *,
        keep_last: int | None,
        tracker: Trackers | None,
        pack_model: Callable[[Mapping[str, Tensor], ModelCard], None],
        callbacks: Callbacks,
    ) -> None:
        self._checkpoints_dir = checkpoints_dir
        self._keep_last = keep_last
        self._tracker = tracker
        self._pack_model = pack_model
        self._callbacks = callbacks
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="saver")
        self._callback_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="callbacks")
        self._is_finished = False
        self._pending: Future[None] | None = None
        self._failures: dict[str, str] = {}  # by name, of files that every run must have at its end
        finish_interrupted(checkpoints_dir)

    def save(
        self, take: Callable[[], Snapshot], names: Sequence[str], model: ModelCard | None = None
    ) -> None:
        """Write the snapshot that `take` returns as a checkpoint under each of `names`, in the background.

        With a card, its model is written first, because a run that resumes from the checkpoint does not write
        it again. Waits until earlier ones are written, so that at most one copy is in memory.
        """
        self.wait()
        self._pending = self._thread.submit(self._save, take(), names, model)

    def save_model(self, take: Callable[[], Mapping[str, Tensor]], card: ModelCard) -> None:
        """Write the model whose weights `take` returns, without a checkpoint. Waits like `save`."""
        self.wait()
        self._pending = self._thread.submit(self._save_model, take(), card)

    def wait(self) -> None:
        """Wait until nothing is being written."""
        if self._pending is not None:
            self._pending.result()

    def finish(self) -> None:
        """Wait until everything is written.

        Raises:
            TrainingError: `best`, `last` or the best model could not be written.
        """
        self.wait()
        for failure in self._failures.values():
            raise TrainingError(failure)
        self._is_finished = True

    def close(self) -> None:
        """End the threads, once all is written and, after `finish`, once the callbacks have returned."""
        self._thread.shutdown()
        self._callback_thread.shutdown(wait=self._is_finished, cancel_futures=not self._is_finished)

    def _save(self, snapshot: Snapshot, names: Sequence[str], model: ModelCard | None) -> None:
        if model is not None:
            self._save_model(snapshot.model, model)
        self._save_checkpoint(snapshot, names)

    def _save_model(self, weights: Mapping[str, Tensor], card: ModelCard) -> None:
        try:
            self._pack_model(weights, card)
            if card.is_best:
                self._failures.pop("model", None)
        except Exception as error:  # each library reports a full disk by its own type
            folder = self._checkpoints_dir.parent
            failure = (
                f"{folder}: the model of step {card.step} could not be saved "
                f"({describe_disk_error(error, folder)})"
            )
            _logger.warning(f"{failure}; training continues")
            if card.is_best:
                self._failures["model"] = failure

    def _save_checkpoint(self, snapshot: Snapshot, names: Sequence[str]) -> None:
        folders = ", ".join(str(self._checkpoints_dir / name) for name in names)
        try:
            write_checkpoint(self._checkpoints_dir, names, snapshot)
            for name in names:
                self._failures.pop(name, None)
        except Exception as error:  # mostly OSError, but safetensors and torch wrap it in their own types
            failure = (
                f"{folders}: the checkpoint of step {snapshot.document['step']} could not be written "
                f"({describe_disk_error(error, self._checkpoints_dir)}); the earlier ones are intact"
            )
            self._failures |= {name: failure for name in names if name in ("best", "last")}
            _logger.warning(f"{failure}, and training continues; free space for the next one")
            return
        try:
            self._prune()
        except OSError as error:
            _logger.warning(f"{self._checkpoints_dir}: an old checkpoint cannot be deleted ({error})")
        if self._tracker is not None:
            try:
                self._upload(self._tracker, names)
            except OSError as error:
                _logger.warning(
                    f"{folders}: not uploaded ({describe_disk_error(error, self._checkpoints_dir)})"
                )
        event = CheckpointEvent(self._checkpoints_dir / names[0], tuple(names), snapshot.document["step"])
        self._callback_thread.submit(self._callbacks.notify, event)  # no save waits for the user's code

    def _upload(self, tracker: Trackers, names: Sequence[str]) -> None:
        """Upload all names but step_<N>, of which there may be thousands."""
        names = [name for name in names if not name.startswith("step_")]
        if names == ["last"]:  # an interrupted upload must not damage the only copy
            tracker.log_folder(self._checkpoints_dir / "last", "checkpoints/last_copy", last=MANIFEST)
        for name in names:
            tracker.log_folder(self._checkpoints_dir / name, f"checkpoints/{name}", last=MANIFEST)
            if name.startswith("epoch_") and self._keep_last is not None:
                tracker.keep_newest("checkpoints", int(name.removeprefix("epoch_")), self._keep_last)

    def _prune(self) -> None:
        if self._keep_last is not None:
            for folder in outdated_checkpoints(self._checkpoints_dir, self._keep_last):
                remove_folder(folder)
