"""The guard of one process of several: a small process beside it that notices when one of them dies or hangs.

`heartbeat.py` starts it and tells it every two seconds that its process lives. The guard of process 0 is the
hub: all guards report to it, and it decides who is lost and says so to all. A process cannot do that for
itself: while it is stopped, so are its threads; and a thread of process 0 would be gone with it.

Runs as a script, without the package, so that it starts in no time and takes little memory. What it reads are
lines of JSON, from its process on standard input and, over TCP, from guards that know the run's token.
"""

import json
import os
import selectors
import signal
import socket
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

BEAT_EVERY_S = 2.0

Message = dict[str, Any]

_TICK_S = 0.5

# A guard that was not run for so long itself (a laptop asleep, a container paused) could have heard nobody.
_PAUSE_S = 5.0

# Those who are lost together, as with their machine, are named together.
_GATHER_S = 1.5

# So long after one process has stopped with an error the others may take to stop with theirs: to close an
# MLflow run whose server is away takes 20 s.
_ERROR_GRACE_S = 30.0

# So long after a loss a process may take to end by itself, and one that is lost itself.
_KILL_AFTER_S, _KILL_LOST_AFTER_S = 25.0, 3.0

# The hub outlives its process by this at most, and what it has said to all by this.
_STAY_S, _STAY_TOLD_S = 40.0, 2.0

_LONGEST_LINE = 1 << 16
_MOST_NAMES = 8


@dataclass
class _Member:
    heard_at: float
    host: str = ""
    step: int | None = None
    left_at: float | None = None
    """When it stopped with an error."""
    fate: str = ""
    """Why it counts as lost."""

    def describe(self, rank: int) -> str:
        step = f", last at step {self.step}" if self.step is not None else ""
        return f"process {rank} ({self.host}{step})"


@dataclass
class Watch:
    """Who was heard of when, and who is lost. All moments are of one clock, which never goes back."""

    silence_limit_s: float
    ticked_at: float
    members: dict[int, _Member] = field(default_factory=dict)
    lost_at: float | None = None
    error_grace_s: float = _ERROR_GRACE_S

    def hear(self, rank: int, message: Message, now: float) -> None:
        member = self.members.setdefault(rank, _Member(now))
        member.heard_at = now
        member.host = message.get("host", member.host)
        member.step = message.get("step", member.step)

    def leave(self, rank: int, *, failed: bool, now: float) -> None:
        """A process has said goodbye."""
        if failed and rank in self.members:
            self.members[rank].left_at = now
        else:
            self.members.pop(rank, None)

    def lose(self, rank: int, fate: str, now: float) -> None:
        member = self.members.get(rank)
        if member is not None and member.left_at is None:
            member.fate = member.fate or fate
            self.lost_at = self.lost_at or now

    def tick(self, now: float) -> Message | None:
        """Looks at the clock; returns what is to be said to all once somebody is lost."""
        missed_s = now - self.ticked_at
        self.ticked_at = now
        for rank, member in self.members.items():
            if missed_s > _PAUSE_S:  # what the others said meanwhile is still to be read
                member.heard_at += missed_s
                member.left_at = member.left_at + missed_s if member.left_at is not None else None
            elif member.left_at is None and now - member.heard_at > self.silence_limit_s:
                self.lose(rank, f"has given no sign of life for {self.silence_limit_s:.0f} s", now)
        gone = {rank: member for rank, member in self.members.items() if member.left_at is not None}
        if gone.keys() != self.members.keys() and any(
            now - (member.left_at or now) > self.error_grace_s for member in gone.values()
        ):
            self.lost_at = self.lost_at or now - _GATHER_S
        if self.lost_at is None or now - self.lost_at < _GATHER_S:
            return None
        return self._verdict()

    def _verdict(self) -> Message:
        fates: dict[str, list[int]] = {}
        for rank, member in sorted(self.members.items()):
            fate = (
                "has stopped with an error, which it says itself"
                if member.left_at is not None
                else member.fate
            )
            if fate:
                fates.setdefault(fate, []).append(rank)
        told = [f"{self._describe(ranks)} {fate}" for fate, ranks in fates.items()]
        silent = [rank for rank, member in self.members.items() if member.fate]
        return {"loss": f"lost contact: {'; '.join(told)}", "ranks": silent}

    def _describe(self, ranks: list[int]) -> str:
        names = [self.members[rank].describe(rank) for rank in ranks[:_MOST_NAMES]]
        more = f" and {len(ranks) - _MOST_NAMES} more" if len(ranks) > _MOST_NAMES else ""
        return ", ".join(names) + more


class Channel:
    """Messages over a socket, one a line."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(5.0)
        self.socket = connection
        self._unread = b""

    def send(self, message: Message) -> None:
        """Whoever cannot take it is noticed when it is read from."""
        with suppress(OSError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[Message] | None:
        """What has arrived, at least a part of a message; None at the end."""
        try:
            received = self.socket.recv(_LONGEST_LINE)
        except OSError:
            return None
        *lines, self._unread = (self._unread + received).split(b"\n")
        if not received or len(self._unread) > _LONGEST_LINE:
            return None
        try:
            return [message for message in map(json.loads, lines) if isinstance(message, dict)]
        except ValueError:
            return None


def listen(port: int) -> socket.socket:
    """A server on all addresses of this machine; 0 is any port that is free."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096)
    return socket.create_server(("", port), backlog=4096)


class Guard:
    """Watches its own process, and the others through the hub or as the hub."""

    def __init__(self, settings: Message, worker: Channel) -> None:
        self._rank: int = settings["rank"]
        self._host: str = settings["host"]
        self._token: str = settings["token"]
        self._parent = settings["pid"]
        self._worker = worker
        self._is_hub = self._rank == 0
        # The hub decides; only when nothing is heard of the hub itself the other guards do.
        limit_s = settings["silence_limit_s"] + (0 if self._is_hub else 4 * BEAT_EVERY_S)
        self._watch = Watch(limit_s, time.monotonic())
        self._selector = selectors.DefaultSelector()
        self._members: dict[Channel, int] = {}
        self._hub: Channel | None = None
        self._pulse_at = 0.0
        self._worker_is_here = True
        self._is_told = self._is_silent = self._is_over = False
        self._kill_at = self._end_at = float("inf")
        self._last_words = ""
        self._selector.register(worker.socket, selectors.EVENT_READ, self._read_worker)
        if self._is_hub:
            self._listen()
        else:
            self._join(settings["address"], settings["port"], settings["hub_host"])

    def run(self) -> None:
        while not self._is_over:
            for key, _ in self._selector.select(_TICK_S):
                key.data()
            self._look(time.monotonic())

    def _listen(self) -> None:
        listener = listen(0)
        self._selector.register(listener, selectors.EVENT_READ, partial(self._accept, listener))
        self._worker.send({"port": listener.getsockname()[1]})
        self._watch.hear(0, {"host": self._host}, time.monotonic())

    def _join(self, address: str, port: int, hub_host: str) -> None:
        try:
            self._hub = Channel(socket.create_connection((address, port), timeout=10.0))
        except OSError as error:
            self._worker.send({"unwatched": f"{address}:{port}: {error}"})
            return
        self._selector.register(self._hub.socket, selectors.EVENT_READ, self._read_hub)
        self._hub.send({"token": self._token, "rank": self._rank, "host": self._host})
        self._watch.hear(0, {"host": hub_host}, time.monotonic())

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            channel = Channel(listener.accept()[0])
            self._selector.register(channel.socket, selectors.EVENT_READ, partial(self._read_member, channel))

    def _read_worker(self) -> None:
        messages = self._worker.receive()
        if messages is None:
            self._selector.unregister(self._worker.socket)
        for message in messages or ():
            self.hear(message)

    def hear(self, message: Message) -> None:
        """What the own process says."""
        if "bye" in message:
            self._worker_is_here = False
            if not message["bye"] and self._is_hub:  # where process 0 is done, the run is over for all
                self._tell({"over": True})
                self._is_over = True
        self._pass_on(message)

    def _read_member(self, channel: Channel) -> None:
        messages = channel.receive()
        rank = self._members.get(channel)
        for message in messages or ():
            if rank is None:
                if message.get("token") != self._token:
                    messages = None
                    break
                rank = self._members[channel] = message["rank"]
            self._judge(rank, message)
        if messages is None:
            self._selector.unregister(channel.socket)
            channel.socket.close()
            if self._members.pop(channel, None) is not None and rank is not None:
                self._watch.lose(rank, "has ended or cannot be reached", time.monotonic())

    def _read_hub(self) -> None:
        assert self._hub is not None
        messages, now = self._hub.receive(), time.monotonic()
        for message in messages or ():
            self._watch.hear(0, message, now)
            if "loss" in message:
                self._take(message)
            elif "over" in message:
                self._watch.leave(0, failed=False, now=now)
        if messages is None:
            self._selector.unregister(self._hub.socket)
            self._watch.lose(0, "has ended or cannot be reached", now)
            self._hub = None

    def _pass_on(self, message: Message) -> None:
        """What concerns the own process, to where it is judged."""
        if self._is_hub:
            self._judge(0, message)
        elif self._hub is not None:
            self._hub.send(message)

    def _judge(self, rank: int, message: Message) -> None:
        now = time.monotonic()
        if "bye" in message:
            self._watch.leave(rank, failed=message["bye"], now=now)
        elif "gone" in message:
            self._watch.lose(rank, "has ended without a word", now)
        elif "stuck" in message:
            self._announce({"loss": message["stuck"], "ranks": []})
        elif "misses" in message:  # a collective has failed: who has stopped is the cause
            self._watch.error_grace_s = 0.0
        else:
            self._watch.hear(rank, message, now)

    def _look(self, now: float) -> None:
        if self._worker_is_here and os.getppid() != self._parent:
            self._worker_is_here = False
            self._pass_on({"gone": True})
        if not self._worker_is_here and not self._is_silent:
            self._is_silent = True
            for number in (1, 2):
                # Whoever reads what the process said waits for the last who may say something.
                os.dup2(os.open(os.devnull, os.O_WRONLY), number)
        verdict = self._watch.tick(now)
        if verdict is not None and not self._is_told:
            self._announce(verdict)
        if now - self._pulse_at > BEAT_EVERY_S:
            self._pulse_at = now
            beat = self._watch.members.get(0) if self._is_hub else None
            self._tell({"step": beat.step} if beat is not None else {})
        if now > self._kill_at and os.getppid() == self._parent:
            if self._last_words:
                print(f"[process {self._rank}] error: {self._last_words}", file=sys.stderr, flush=True)
            os.kill(self._parent, signal.SIGKILL)
            self._kill_at = float("inf")
        if not self._worker_is_here:
            self._end_at = min(self._end_at, now + (_STAY_TOLD_S if self._is_told else _STAY_S))
            self._is_over |= not self._is_hub or not self._members or now > self._end_at

    def _announce(self, verdict: Message) -> None:
        self._tell(verdict)
        self._take(verdict)

    def _tell(self, message: Message) -> None:
        """Only the hub has members."""
        for channel in self._members:
            channel.send(message)

    def _take(self, verdict: Message) -> None:
        """Somebody is lost: the own process is told, and killed if it does not end by then."""
        if self._is_told:
            return
        self._is_told = True
        self._worker.send(verdict)
        is_lost = self._rank in verdict["ranks"]
        self._kill_at = time.monotonic() + (_KILL_LOST_AFTER_S if is_lost else _KILL_AFTER_S)
        if is_lost:
            self._last_words = f"{verdict['loss']}; that is this process, which is killed now"


def main() -> None:
    worker = Channel(socket.socket(fileno=0))
    messages: list[Message] | None = []
    while messages == []:
        messages = worker.receive()
    if messages is None:  # the process has ended already
        return
    settings, *beats = messages
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # they are for the process; the guard ends after it
    guard = Guard(settings, worker)
    for beat in beats:
        guard.hear(beat)
    guard.run()


if __name__ == "__main__":
    main()
