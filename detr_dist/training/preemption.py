"""Requests to stop: a signal sets a flag and does nothing else, until the loop reads it."""

import os
import signal
import time
from types import FrameType, TracebackType
from typing import Any, Self

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

# Ctrl-C reaches a process twice within milliseconds: from the terminal and from its launcher.
_SAME_INTERRUPT_S = 0.5


class StopSignals:
    """While entered, SIGTERM, SIGINT and SIGUSR1 ask the run to stop; a second SIGINT ends the process at
    once.

    Main thread only.
    """

    def __init__(self) -> None:
        self.received = ""
        self._interrupted_at: float | None = None
        self._before: dict[signal.Signals, Any] = {}

    @property
    def is_requested(self) -> bool:
        return bool(self.received)

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number).name
        if number != signal.SIGINT:
            return
        now = time.monotonic()
        if self._interrupted_at is None:
            self._interrupted_at = now
        elif now - self._interrupted_at > _SAME_INTERRUPT_S:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
