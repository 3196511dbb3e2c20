"""What a run is tracked with: the protocol of a tracker, TensorBoard as one, and several as one."""

import logging
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

from detr_dist.console import log_to_file
from detr_dist.errors import StopRequested, as_one_line
from detr_dist.text import one_line

Status = Literal["FINISHED", "FAILED", "KILLED"]

# A scheduler that has asked a run to stop gives it some tens of seconds.
PATIENCE_S = 20.0

# The launcher kills the other processes of a run some 30 s after it has lost a process.
PATIENCE_AFTER_LOSS_S = 6.0

_STOPPED = (KeyboardInterrupt, StopRequested)

_logger = logging.getLogger(__name__)


class Tracker(Protocol):
    """Where a run is tracked. A subclass that keeps no files needs none of their methods.

    Called on the main process only, by training and by the thread that saves; no call but `close` may wait
    for a server.
    """

    keeps_files: bool = False
    """Whether files are kept: then the model of every epoch is written."""

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log what the run was started with. A resumed run logs it again."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Log values of one moment; `step` counts optimizer steps. A resumed run may repeat steps."""

    def log_folder(self, folder: Path, artifact_path: str, *, last: str | None = None) -> None:
        """Keep the files of `folder` below `artifact_path`; with `last` that file after all others. The files
        must not change any more; the folder may be deleted."""
        return

    def log_file(self, path: Path, artifact_path: str = "") -> None:
        """Keep a small file, as it is now, in the folder `artifact_path`."""
        return

    def keep_newest(self, parent: str, newest: int, keep: int) -> None:
        """Of the folders `parent`/epoch_<N> up to N = `newest`, delete all but the last `keep`."""
        return

    def close(self, status: Status, error: str | None = None, *, patience_s: float = PATIENCE_S) -> None:
        """Note what became of the run: KILLED was asked to stop. Wait `patience_s` seconds at most."""


class TensorBoard(Tracker):
    """Writes event files; what earlier files hold after `first_step` is hidden."""

    def __init__(self, folder: Path, *, first_step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and not always wanted

        self._writer = SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else None)

    def log_params(self, params: Mapping[str, Any]) -> None:
        self._writer.add_hparams(dict(params), {})
        self._writer.flush()

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self, status: Status, error: str | None = None, *, patience_s: float = PATIENCE_S) -> None:
        self._writer.close()


class Trackers(Tracker):
    """All trackers of a run as one; without any, nothing is tracked."""

    def __init__(self) -> None:
        self._trackers: list[Tracker] = []
        self._log: logging.Handler | None = None
        self._log_path = Path()
        self._closing = threading.Lock()

    def add(self, tracker: Tracker) -> None:
        self._trackers.append(tracker)

    def write_log(self, path: Path) -> None:
        """Append the package's messages to `path` until `close`, which makes that file an artifact in
        `logs`."""
        self._log, self._log_path = log_to_file(path), path

    @property
    def keeps_files(self) -> bool:  # type: ignore[override]
        return any(each.keeps_files for each in self._trackers)

    def log_params(self, params: Mapping[str, Any]) -> None:
        for each in self._trackers:
            each.log_params(params)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        for each in self._trackers:
            each.log_metrics(metrics, step)

    def log_folder(self, folder: Path, artifact_path: str, *, last: str | None = None) -> None:
        for each in self._trackers:
            each.log_folder(folder, artifact_path, last=last)

    def log_file(self, path: Path, artifact_path: str = "") -> None:
        for each in self._trackers:
            each.log_file(path, artifact_path)

    def keep_newest(self, parent: str, newest: int, keep: int) -> None:
        for each in self._trackers:
            each.keep_newest(parent, newest, keep)

    def close(self, status: Status, error: str | None = None, *, patience_s: float = PATIENCE_S) -> None:
        """Close all trackers. Only the first call has an effect: it may come from another thread."""
        if not self._closing.acquire(blocking=False):
            return
        self._close_log(error)
        with ExitStack() as closing_all:  # each of them, whatever another one raises
            for each in reversed(self._trackers):
                closing_all.callback(each.close, status, error, patience_s=patience_s)

    def close_after_loss(self, reason: str) -> None:
        """Close within seconds, because the main thread waits for a process that is lost."""
        self.close("FAILED", reason, patience_s=PATIENCE_AFTER_LOSS_S)

    def _close_log(self, error: str | None) -> None:
        if self._log is None:
            return
        cause = sys.exc_info()  # of the run's end, if that is an exception
        if (
            error is not None or cause[1] is not None
        ):  # into the file alone: commands report errors themselves
            level = logging.ERROR if error is not None else logging.INFO
            reason = as_one_line(cause[1]) if error is None and cause[1] is not None else error
            traceback = cause if error is not None and cause[1] is not None else None
            self._log.handle(_logger.makeRecord(__name__, level, __file__, 0, reason, (), traceback))
        self._log.close()
        try:
            self.log_file(self._log_path, "logs")
        except OSError as trouble:
            _logger.warning(f"{self._log_path}: not uploaded ({one_line(trouble)})")


@contextmanager
def tracked(trackers: Trackers) -> Iterator[None]:
    """Close the trackers of a run with what became of it."""
    try:
        yield
    except BaseException as error:
        try:
            if isinstance(error, _STOPPED):
                trackers.close("KILLED")
            else:
                trackers.close("FAILED", f"{type(error).__name__}: {error}")
        except Exception as trouble:  # must not hide what went wrong first
            _logger.warning(f"the tracked run could not be closed: {one_line(trouble)}")
        raise
    trackers.close("FINISHED")
