"""The base class of trackers, the tracker for TensorBoard, and all trackers of a run as one."""

import logging
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from detr_dist.console import log_to_file
from detr_dist.errors import StopRequested, UsageError, as_one_line
from detr_dist.extensions import instantiate
from detr_dist.text import one_line

Status = Literal["FINISHED", "FAILED", "KILLED"]

# A scheduler that has asked a run to stop gives it some tens of seconds.
PATIENCE_S = 20.0

# The launcher kills the other processes of a run some 30 s after a process has died.
PATIENCE_AFTER_LOSS_S = 6.0

_logger = logging.getLogger(__name__)


class Tracker:
    """Base class for recording a run elsewhere. Override the methods you need; none has to call `super`.

    They are called on the main process only. Training waits for them, so do slow work in your own thread.
    The first exception of a tracker is a warning, and training continues.
    """

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Record the settings: at the start, and again when the run is resumed."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record values after optimizer step `step`: losses, memory, and after an evaluation `val_...`.

        A run that is resumed may repeat steps.
        """

    def log_file(self, path: Path, artifact_path: str = "") -> None:
        """Store a small file in the folder `artifact_path`: `config.yaml` at the start, the log at the end.

        The file may change after the call.
        """

    def log_folder(self, folder: Path, artifact_path: str) -> None:
        """Store the files of `folder` as `artifact_path`: `checkpoints/...`, `model`, `pictures/...`.

        Called when a folder has been written, mostly from the thread that saves. The folder may be deleted
        after the call. Models and checkpoints are prepared for trackers only if one overrides this method.
        """

    def log_image(self, path: Path, key: str, step: int) -> None:
        """Store an image, PNG or JPEG, as the image `key` of a step: `val_confusion_matrix`, `train_batch`.

        The file may be deleted after the call.
        """

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        """Store a table of the last evaluation: `per_class`, with a row for each class."""

    def close(self, status: Status, error: str | None = None) -> None:
        """End the record; called once: FINISHED, FAILED with the error, or KILLED if the run was stopped."""


class OwnTracker(Tracker):
    """A tracker of this package: its exceptions are raised. No call but `close` may wait for a server."""

    def log_folder(self, folder: Path, artifact_path: str, *, last: str | None = None) -> None:
        """Store the files of `folder`, which no longer change, the one named `last` after all others."""

    def log_evaluation(self, metrics: Mapping[str, float], step: int, epoch: int) -> None:
        """Record metrics of the model of an epoch on the validation data."""
        self.log_metrics(metrics, step)

    def complete_model(self, epoch: int, step: int) -> None:
        """Record that all files of an evaluated epoch's model are stored."""

    def keep_newest(self, parent: str, newest: int, keep: int) -> None:
        """Delete all but the newest `keep` folders `parent`/epoch_<N>, N <= `newest`."""

    def close(self, status: Status, error: str | None = None, *, patience_s: float = PATIENCE_S) -> None:
        """End the record as `Tracker.close` does; wait `patience_s` seconds at most."""


class TensorBoard(OwnTracker):
    """Writes event files; steps after `first_step` in earlier files are hidden."""

    def __init__(self, folder: Path, *, first_step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and not always wanted

        self._writer = SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else None)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Write the params as hyperparameters."""
        self._writer.add_hparams(dict(params), {})
        self._writer.flush()

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Write the metrics as scalars."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def log_image(self, path: Path, key: str, step: int) -> None:
        """Write the image."""
        with Image.open(path) as image:
            self._writer.add_image(key, np.asarray(image.convert("RGB")), step, dataformats="HWC")
        self._writer.flush()

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        """Write the table as Markdown."""
        lines = [columns, ["---"] * len(columns), *rows]
        text = "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)
        self._writer.add_text(name, text, step)
        self._writer.flush()

    def close(self, status: Status, error: str | None = None, *, patience_s: float = PATIENCE_S) -> None:
        """Close the event file; TensorBoard has no status."""
        self._writer.close()


def _cell(value: object) -> str:
    """Return a cell of a Markdown table."""
    if value is None:
        return ""
    return f"{value:.4f}" if isinstance(value, float) else str(value).replace("|", "\\|")


class Trackers:
    """All trackers of a run as one; without trackers its methods do nothing."""

    def __init__(self) -> None:
        self._trackers: list[Tracker] = []
        self._failed: set[int] = set()  # ids of users' trackers that have failed
        self._log: logging.Handler | None = None
        self._log_path = Path()
        self._closing = threading.Lock()

    def add(self, *trackers: str | Tracker) -> None:
        """Add trackers, or instances of users' classes, by path as in `logging.trackers`.

        Raises:
            UsageError: a class cannot be imported, needs arguments, or is not a `Tracker`.
        """
        for each in trackers:
            tracker = instantiate(each, "logging.trackers") if isinstance(each, str) else each
            if not isinstance(tracker, Tracker):
                raise UsageError(f"logging.trackers: {each} is no tracker; derive it from detr_dist.Tracker")
            self._trackers.append(tracker)

    def write_log(self, path: Path) -> None:
        """Append the package's messages to `path` until `close`, which stores that file in `logs`."""
        self._log, self._log_path = log_to_file(path), path

    @property
    def keeps_files(self) -> bool:
        """Return whether any tracker stores folders, and needs checkpoints and models to be prepared."""
        ignoring = (Tracker.log_folder, OwnTracker.log_folder)
        return any(type(each).log_folder not in ignoring for each in self._trackers)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log params to all trackers."""
        self._tell_all(lambda each: each.log_params(params))

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Log metrics to all trackers."""
        self._tell_all(lambda each: each.log_metrics(metrics, step))

    def log_evaluation(self, metrics: Mapping[str, float], step: int, epoch: int) -> None:
        """Log metrics of the model of an epoch to all trackers."""

        def log(each: Tracker) -> None:
            if isinstance(each, OwnTracker):
                each.log_evaluation(metrics, step, epoch)
            else:
                each.log_metrics(metrics, step)

        self._tell_all(log)

    def log_image(self, path: Path, key: str, step: int) -> None:
        """Log an image of a step to all trackers."""
        self._tell_all(lambda each: each.log_image(path, key, step))

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        """Log a table of the last evaluation to all trackers."""
        self._tell_all(lambda each: each.log_table(name, columns, rows, step))

    def log_file(self, path: Path, artifact_path: str = "") -> None:
        """Pass a file to all trackers."""
        self._tell_all(lambda each: each.log_file(path, artifact_path))

    def log_folder(self, folder: Path, artifact_path: str, *, last: str | None = None) -> None:
        """Pass the files of `folder`, which no longer change, to all trackers, `last` after the others."""

        def hand_over(each: Tracker) -> None:
            with_last = {"last": last} if isinstance(each, OwnTracker) else {}
            each.log_folder(folder, artifact_path, **with_last)

        self._tell_all(hand_over)

    def complete_model(self, epoch: int, step: int) -> None:
        """Tell the package's own trackers that all files of an evaluated epoch's model are stored."""
        for each in self._trackers:
            if isinstance(each, OwnTracker):
                each.complete_model(epoch, step)

    def keep_newest(self, parent: str, newest: int, keep: int) -> None:
        """Delete older folders from the package's own trackers; users' trackers keep all."""
        for each in self._trackers:
            if isinstance(each, OwnTracker):
                each.keep_newest(parent, newest, keep)

    def close(self, status: Status, error: str | None = None, *, patience_s: float = PATIENCE_S) -> None:
        """Close all trackers. Only the first call has an effect: it may come from another thread."""
        if not self._closing.acquire(blocking=False):
            return
        self._close_log(error)

        def close(each: Tracker) -> None:
            if isinstance(each, OwnTracker):
                each.close(status, error, patience_s=patience_s)
            else:
                each.close(status, error)

        with ExitStack() as closing_all:  # closes each, even if another one raises
            for each in reversed(self._trackers):
                closing_all.callback(self._tell, each, close)

    def close_after_loss(self, reason: str) -> None:
        """Close within seconds, because the main thread waits for a lost process."""
        self.close("FAILED", reason, patience_s=PATIENCE_AFTER_LOSS_S)

    def _tell_all(self, call: Callable[[Tracker], None]) -> None:
        for each in self._trackers:
            self._tell(each, call)

    def _tell(self, tracker: Tracker, call: Callable[[Tracker], None]) -> None:
        """Call `call` with a tracker; the first exception of a user's tracker is a warning."""
        try:
            call(tracker)
        except Exception as error:
            name = type(tracker).__name__
            if isinstance(tracker, OwnTracker):
                raise
            if id(tracker) not in self._failed:
                self._failed.add(id(tracker))
                _logger.warning(
                    f"the tracker {name} failed ({as_one_line(error)}); training continues, and this is "
                    "not reported again",
                    exc_info=error,
                )

    def _close_log(self, error: str | None) -> None:
        if self._log is None:
            return
        cause = sys.exc_info()  # the exception that ended the run, if any
        reason = as_one_line(cause[1]) if error is None and cause[1] is not None else error
        if reason is not None:  # only into the file: commands print errors themselves
            level = logging.INFO if error is None else logging.ERROR
            traceback = cause if error is not None and cause[1] is not None else None
            self._log.handle(_logger.makeRecord(__name__, level, __file__, 0, reason, (), traceback))
        self._log.close()
        try:
            self.log_file(self._log_path, "logs")
        except OSError as trouble:
            _logger.warning(f"{self._log_path}: not uploaded ({one_line(trouble)})")


@contextmanager
def tracked(trackers: Trackers) -> Iterator[None]:
    """Close the trackers of a run with its final status."""
    try:
        yield
    except BaseException as error:
        try:
            if isinstance(error, KeyboardInterrupt | StopRequested):
                trackers.close("KILLED")
            else:
                trackers.close("FAILED", f"{type(error).__name__}: {error}")
        except Exception as trouble:  # must not hide the first error
            _logger.warning(f"the tracked run could not be closed: {one_line(trouble)}")
        raise
    trackers.close("FINISHED")
