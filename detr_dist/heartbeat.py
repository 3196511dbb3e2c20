"""The sign of life of one process of several, and what it does when another one is lost.

A time-out of the collectives cannot tell a process that hangs from one that scores, saves or downloads while
the others wait. So each process says every two seconds that it lives, from a thread, to a guard beside it
(`guard.py`), and learns from it who is lost.
"""

import faulthandler
import json
import os
import secrets
import selectors
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from detr_dist import guard
from detr_dist.errors import report_error
from detr_dist.forming import Board

# So long the main thread may take to end by itself with an error, after somebody was lost.
_GRACE_S = 10.0

# What a guard needs to say who is missing, once a collective has failed.
_VERDICT_WITHIN_S = 5.0


class Heart:
    """Tells the guards of all processes that this one lives.

    When another one is lost the stacks of all threads are written, and the main thread may end with an error.
    It may as well wait in a collective for ever: then this says why in one line, and ends the process with
    exit code 1.
    """

    def __init__(self, rank: int, *, board: Board, address: str, silence_limit_s: float) -> None:
        """Start the guard, and the beats. Collective: the others learn from process 0 where its guard is.

        `address` is that of process 0's machine.
        """
        self.stacks_dir: Path | None = None
        self._rank = rank
        self._host = socket.gethostname()
        self._facts: dict[str, Any] = {}
        self._last_words: list[Callable[[str], None]] = []
        self._loss = ""
        self._is_lost, self._closing = threading.Event(), threading.Event()
        settings: guard.Message = {
            "rank": rank,
            "host": self._host,
            "pid": os.getpid(),
            "silence_limit_s": silence_limit_s,
            "token": secrets.token_hex(16),
            "address": address,
        }
        if rank > 0:
            settings |= json.loads(board.get("guard"))
        own, theirs = socket.socketpair()
        with theirs:
            self._guard = subprocess.Popen(
                [sys.executable, "-I", "-S", guard.__file__],
                stdin=theirs.fileno(),
                start_new_session=True,  # Ctrl-C is not for it
            )
        self._channel = guard.Channel(own)
        self._channel.send(settings)  # and not as an argument, which everybody on the machine may read
        if rank == 0:
            own.settimeout(30.0)  # a machine may be slow to start it
            (first,) = self._channel.receive() or [{}]
            hub = {"port": first.get("port"), "token": settings["token"], "hub_host": self._host}
            board.set("guard", json.dumps(hub))
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()

    def note(self, **facts: Any) -> None:
        """Note what this process is about, for whoever has to say where it was lost: `step`, `image_ids`."""
        self._facts = facts

    @contextmanager
    def last_words(self, action: Callable[[str], None]) -> Iterator[None]:
        """While entered, `action` is called with the reason before this process ends because of a loss."""
        self._last_words.append(action)
        try:
            yield
        finally:
            self._last_words.remove(action)

    def explain(self, error: Exception, limit_s: float) -> str:
        """Why a collective has failed, in one line; waits some seconds for the guards to say who is lost."""
        self._channel.send({"misses": True})
        if not self._is_lost.wait(_VERDICT_WITHIN_S) and "imed out" in str(error):
            stuck = (
                f"{self._describe()} has waited {limit_s:.0f} s in vain for another, though all of them live"
            )
            self._channel.send({"stuck": stuck})
            self._is_lost.wait(_VERDICT_WITHIN_S)
        reason = " ".join(str(error).split())[:200]
        if self._loss:
            return f"{self._loss} ({reason})"
        return (
            "lost contact with another process, which has ended or cannot be reached; the cause is what it "
            f"says itself, or how the launcher says it ended ({reason})"
        )

    def close(self, *, failed: bool) -> None:
        """End the beats and the guard. One whose process has failed may stay for some seconds, to tell the
        others."""
        self._closing.set()
        self._channel.send({"bye": failed})
        with suppress(OSError):
            self._channel.socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._channel.socket.close()
        if not failed:
            try:
                self._guard.wait(5.0)
            except subprocess.TimeoutExpired:
                self._guard.kill()
                self._guard.wait()

    def _describe(self) -> str:
        step = f" at step {self._facts['step']}" if "step" in self._facts else ""
        image_ids = f", image ids {self._facts['image_ids']}" if self._facts.get("image_ids") else ""
        return f"process {self._rank} ({self._host}){step}{image_ids}"

    def _beat(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._channel.socket, selectors.EVENT_READ)
            while not self._closing.is_set():
                self._channel.send({"step": self._facts["step"]} if "step" in self._facts else {})
                if not selector.select(guard.BEAT_EVERY_S):
                    continue
                messages = self._channel.receive()
                if messages is None:  # its guard is gone, for which the others take this process as well
                    return
                for message in messages:
                    self._hear(message)

    def _hear(self, message: guard.Message) -> None:
        if "unwatched" in message:
            print(
                f"warning: process {self._rank} cannot be watched by the others ({message['unwatched']}): "
                "should it hang, they notice that by the time-out of the collectives only",
                flush=True,
            )
        elif "loss" in message and not self._is_lost.is_set():
            self._loss = f"{message['loss']}; this is {self._describe()}{self._write_stacks(message['loss'])}"
            self._is_lost.set()
            if not self._closing.wait(_GRACE_S):
                self._end()

    def _end(self) -> None:
        """The main thread does not come back."""
        for action in reversed(self._last_words):
            with suppress(Exception):  # it must not keep the process from ending
                action(self._loss)
        if not self._closing.is_set():
            report_error(self._loss)
            os._exit(1)

    def _write_stacks(self, why: str) -> str:
        """Where all threads are, into a file; returns a remark on where that is."""
        if self.stacks_dir is None:
            return ""
        path = self.stacks_dir / f"rank_{self._rank}.txt"
        try:
            self.stacks_dir.mkdir(parents=True, exist_ok=True)
            with path.open("w", encoding="utf-8") as file:
                print(
                    f"{time.strftime('%Y-%m-%d %H:%M:%S')} {self._describe()}: {why}\n", file=file, flush=True
                )
                faulthandler.dump_traceback(file)
        except OSError as error:
            return f"; no stacks, as {path} cannot be written ({error.strerror})"
        return f"; stacks of all threads in {path}"
