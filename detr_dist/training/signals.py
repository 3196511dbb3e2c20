"""Stop signals: a handler only sets a flag, which the loop reads."""

import faulthandler
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from detr_dist.errors import TrainingError

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

# Ctrl-C reaches a process twice within milliseconds: from the terminal and from its launcher.
_SAME_INTERRUPT_S = 0.5

_STANDARD_ERROR = 2


def leave_note(text: str) -> None:
    """Write to the scheduler's file, if it names one, that the run was stopped and has saved.

    The exit code cannot report that, because `accelerate launch` turns it into 1.

    Raises:
        TrainingError: it cannot be written.
    """
    path = os.environ.get("DETR_DIST_STOPPED_FILE")
    if path:
        try:
            Path(path).write_text(f"{text}\n", encoding="utf-8")
        except OSError as error:
            raise TrainingError(
                f"DETR_DIST_STOPPED_FILE {path}: cannot be written ({error.strerror})"
            ) from error


class StopSignals:
    """Handles signals within the block; for the main thread only.

    SIGTERM, SIGINT and SIGUSR1 ask the run to stop; a second SIGINT ends the process immediately with exit
    code 130. After a run that was stopped or has failed, SIGTERM and SIGUSR1 stay ignored. SIGUSR2 prints the
    stacks of all threads.

    Args:
        on_terminate: Called on SIGTERM, from another thread, even while the main thread hangs.
    """

    def __init__(self, on_terminate: Callable[[], None] = lambda: None) -> None:
        self.received = ""
        self._on_terminate = on_terminate
        self._before: dict[signal.Signals, Any] = {}

    @property
    def is_requested(self) -> bool:
        """Whether a signal has asked the run to stop."""
        return bool(self.received)

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        faulthandler.register(signal.SIGUSR2, file=_STANDARD_ERROR)
        # Python's own handlers wait for the main thread, which may hang in a collective, so a thread reads
        # the signals that arrive.
        self._arrivals, self._written = socket.socketpair()
        self._written.setblocking(False)
        signal.set_wakeup_fd(self._written.fileno(), warn_on_full_buffer=False)
        self._watcher = threading.Thread(target=self._watch, name="second-interrupt", daemon=True)
        self._watcher.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        faulthandler.unregister(signal.SIGUSR2)
        signal.set_wakeup_fd(-1)
        # Closing does not wake the watcher, because forked loader processes hold this end as well.
        self._written.shutdown(socket.SHUT_WR)
        self._watcher.join()
        self._written.close()
        self._arrivals.close()
        for number, handler in self._before.items():
            # A launcher sends the signal again when another of its processes has ended. A process that is
            # about to end by itself must be able to report why, and to exit with its own code.
            is_in_the_way = kind is not None and number != signal.SIGINT
            signal.signal(number, signal.SIG_IGN if is_in_the_way else handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number).name

    def _watch(self) -> None:
        interrupted_at: float | None = None
        while arrived := self._arrivals.recv(1):
            if arrived[0] == signal.SIGTERM:
                self._on_terminate()
            if arrived[0] != signal.SIGINT:
                continue
            if interrupted_at is not None and time.monotonic() - interrupted_at > _SAME_INTERRUPT_S:
                os._exit(130)
            interrupted_at = interrupted_at or time.monotonic()
