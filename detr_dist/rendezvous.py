"""Start-up checks and failure reports of the processes of a run: which are missing, stuck or unable to run.

The launcher and the time-outs of collectives form the group, notice dead processes and kill the rest. This
module names the processes that did not start or do not answer, and reports what the others were doing.
"""

import faulthandler
import json
import os
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, Self

from torch._C import _distributed_c10d
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore  # where torch.distributed has them

from detr_dist.environment import find_device_problem, uses_cpu
from detr_dist.errors import TrainingError, UsageError, as_one_line, report_error

_POLL_EVERY_S = 0.2
_ANSWER_WITHIN_S = 5.0
_MAX_NAMES = 8


class Rendezvous:
    """The processes of a run, and the store through which they report to each other.

    The store lives in the launcher where it has one, so that it outlives a process that is killed.

    Attributes:
        rank: Index of this process.
        size: Number of processes.
        stacks_dir: Where stacks are written when the run fails, if anywhere.
        watch: Ends this process when it is stuck, if others wait for it.
        before_exit: Called with the reason before the watch ends the process.
    """

    def __init__(self, rank: int, size: int, stacks_dir: Path | None) -> None:
        self.rank, self.size, self.stacks_dir = rank, size, stacks_dir
        self._host = socket.gethostname()
        self._hosts: list[str] = []
        self._position: dict[str, Any] = {}
        self._store: Store | None = None
        self.watch = StallWatch(self._end_stalled)
        self.before_exit: Callable[[str], None] = lambda reason: None

    @classmethod
    def of_environment(cls, stacks_dir: Path | None) -> Self:
        """Create it from the variables that a launcher has put into the environment."""
        is_launched = "MASTER_ADDR" in os.environ
        size = int(os.environ.get("WORLD_SIZE", "1")) if is_launched else 1
        return cls(int(os.environ.get("RANK", "0")), size, stacks_dir)

    def check_in(self, within_s: float) -> None:
        """Wait until every process is there and able to take part.

        Collective.

        Raises:
            UsageError: this process or another one cannot take part; the message has the reason.
            TrainingError: processes are missing; the message names them.
        """
        problem = find_device_problem()
        is_alone = self.size == 1
        if problem is not None and (is_alone or not _has_launcher_store()):
            raise UsageError(problem)  # raised only now, as the store of this process ends with it
        if is_alone:
            return
        self._store = _open_store(self.rank, within_s)
        facts = {"host": self._host, "device": "cpu" if uses_cpu() else "gpu", "problem": problem}
        self._post("start", facts)
        if problem is not None:
            raise UsageError(problem)
        try:
            arrived = self._collect("start", within_s)
        except RuntimeError as error:  # the store is gone with process 0
            raise TrainingError(
                "process 0 stopped waiting for the others; its own output names those that are missing"
            ) from error
        if len(arrived) < self.size:
            raise TrainingError(self._describe_missing(arrived, within_s))
        self._hosts = [arrived[rank]["host"] for rank in range(self.size)]
        _check_devices(arrived)

    def _describe_missing(self, arrived: dict[int, Any], within_s: float) -> str:
        missing = [rank for rank in range(self.size) if rank not in arrived]
        ranks_by_host: dict[str, list[str]] = {}
        for rank, facts in sorted(arrived.items()):
            ranks_by_host.setdefault(facts["host"], []).append(str(rank))
        here = "; ".join(f"{', '.join(ranks)} on {host}" for host, ranks in ranks_by_host.items())
        return (
            f"{len(missing)} of {self.size} processes are missing after {within_s:.0f} s: "
            f"{_join(map(str, missing))} (here: {here}); see the output of their hosts, or raise "
            "DETR_DIST_FORM_LIMIT_S if they are slow to start"
        )

    @contextmanager
    def watched(self, limit_s: float) -> Iterator[None]:
        """End this process if it makes no progress for `limit_s` within the block and others wait for it."""
        if self.size > 1:
            self.watch.start(limit_s)
        try:
            yield
        finally:
            self.watch.close()

    def close(self) -> None:
        """Close the connection to the store, which would otherwise last until garbage is collected."""
        self._store = None

    def note(self, **position: Any) -> None:
        """Record where this process is (`step`, `image_ids`), and that it makes progress."""
        self._position = position
        self.watch.progress()

    def report(self, error: BaseException) -> None:
        """Post why this process stops, so that the others can report it when it does not answer."""
        self.watch.pause()
        self._post("end", {"reason": as_one_line(error), "is_cause": True})

    def explain(self, error: RuntimeError, *, is_lost_contact: bool) -> str:
        """Return one line that explains why this process cannot continue and names silent processes.

        Args:
            error: The exception of a collective, or of anything else, in this process.
            is_lost_contact: Whether it is certain that a collective raised it.
        """
        self.watch.pause()
        if self._store is None:
            return as_one_line(error)
        self._post("end", {"reason": as_one_line(error), "is_cause": False})
        ends = self._collect_ends()
        silent = self._silent(ends)
        causes = [f"{self._name(rank)}: {end['reason']}" for rank, end in ends.items() if end["is_cause"]]
        if causes:
            others = f"another process stopped with an error, {_join(causes)}"
        elif silent:
            perhaps = "it was killed, or hangs" if is_lost_contact else "it was killed, hangs, or waits"
            others = f"{silent} does not answer: {perhaps}"
        else:
            others = "all other processes stopped for the same reason"
        here = f"this is {self._describe()}{self.write_stacks(others, error)}"
        self._write_collectives()
        return (
            f"{others}; {here} ({as_one_line(error)})"
            if is_lost_contact
            else f"{as_one_line(error)}; {others}; {here}"
        )

    def write_stacks(self, why: str, error: BaseException | None = None) -> str:
        """Write the stacks of all threads, and the traceback of `error`, to a file.

        Returns:
            The path of the file, worded as the end of a message.
        """
        if self.stacks_dir is None:
            return ""
        path = self.stacks_dir / f"rank_{self.rank}.txt"
        try:
            self.stacks_dir.mkdir(parents=True, exist_ok=True)
            with path.open("w", encoding="utf-8") as file:
                header = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {self._describe()}: {why}\n"
                print(header, file=file, flush=True)
                if error is not None:
                    traceback.print_exception(error, file=file)
                    file.flush()
                faulthandler.dump_traceback(file)
        except OSError as error:
            return f"; no stacks, as {path} cannot be written ({error.strerror})"
        return f"; stacks of all threads in {path}"

    def _write_collectives(self) -> None:
        """Write NCCL's last collectives beside the stacks; NCCL's watchdog would do it later, if at all."""
        dump = getattr(_distributed_c10d, "_dump_nccl_trace", None)  # torch for the CPU has none
        if self.stacks_dir is not None and dump is not None and not uses_cpu():
            with suppress(OSError, RuntimeError):
                (self.stacks_dir / f"nccl_rank_{self.rank}").write_bytes(dump())

    def _end_stalled(self, limit_s: float) -> None:
        """End this process: its main thread is inside a call that does not return."""
        reason = f"no progress for {limit_s:.0f} s"
        stacks = self.write_stacks(reason)
        self._post("end", {"reason": f"{reason}{self._step()}", "is_cause": True})
        silent = self._silent(self._collect_ends())
        others = f"; {silent} does not answer: it was killed, or hangs" if silent else ""
        line = f"{self._describe()} made {reason}{others}{stacks}"
        with suppress(Exception):  # the process must end
            self.before_exit(line)
        report_error(line)
        self._write_collectives()  # last, because it queries the GPU
        os._exit(1)

    def _collect_ends(self) -> dict[int, Any]:
        with suppress(RuntimeError):  # the host of the store is gone
            return self._collect("end", _ANSWER_WITHIN_S)
        return {}

    def _silent(self, ends: dict[int, Any]) -> str:
        return _join(self._name(rank) for rank in range(self.size) if rank not in {*ends, self.rank})

    def _post(self, phase: str, facts: dict[str, Any]) -> None:
        if self._store is not None:
            with suppress(RuntimeError):  # the host of the store is gone
                self._store.set(f"{phase}/{self.rank}", json.dumps(facts))

    def _collect(self, phase: str, within_s: float) -> dict[int, Any]:
        """Return the facts that processes have posted, by rank, once all have or the time is over."""
        assert self._store is not None
        deadline = time.monotonic() + within_s
        posted: dict[int, Any] = {}
        while True:
            for rank in range(self.size):
                if rank not in posted and self._store.check([f"{phase}/{rank}"]):
                    posted[rank] = json.loads(self._store.get(f"{phase}/{rank}"))
            if len(posted) == self.size or time.monotonic() > deadline:
                return posted
            time.sleep(_POLL_EVERY_S)

    def _name(self, rank: int) -> str:
        return f"process {rank} ({self._hosts[rank]})" if self._hosts else f"process {rank}"

    def _describe(self) -> str:
        image_ids = self._position.get("image_ids")
        images = f", image ids {image_ids}" if image_ids else ""
        return f"process {self.rank} ({self._host}){self._step()}{images}"

    def _step(self) -> str:
        return f" at step {self._position['step']}" if "step" in self._position else ""


class StallWatch:
    """A thread that acts when the process makes no progress.

    While the main thread waits for a GPU that hangs, no time-out and no signal handler reaches it. Seconds in
    which the process was suspended (a paused container, a sleeping laptop) do not count.
    """

    def __init__(self, on_stall: Callable[[float], None]) -> None:
        self.limit_s = float("inf")
        self._on_stall = on_stall
        self._quiet_s = 0.0
        self._is_paused = True
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, limit_s: float) -> None:
        """Act after `limit_s` without progress, from the first progress on."""
        self.limit_s = limit_s
        self._thread = threading.Thread(target=self._run, name="stall-watch", daemon=True)
        self._thread.start()

    def progress(self) -> None:
        """Restart the count."""
        self._quiet_s, self._is_paused = 0.0, False

    def pause(self) -> None:
        """Do not count until the next progress."""
        self._is_paused = True

    def hurry(self) -> None:
        """Allow 20 more seconds for the current step.

        The launcher has asked this process to end, and kills it after 30 seconds.
        """
        self.limit_s = min(self.limit_s, self._quiet_s + 20.0)

    def close(self) -> None:
        """End the thread, if it was started."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while not self._closing.wait(1.0):
            self._quiet_s += 1.0
            if not self._is_paused and self._quiet_s > self.limit_s:
                self._on_stall(self.limit_s)


def _has_launcher_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _open_store(rank: int, within_s: float) -> Store:
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        store = TCPStore(
            address,
            port,
            is_master=rank == 0 and not _has_launcher_store(),
            timeout=timedelta(seconds=within_s),
            wait_for_workers=False,
            multi_tenant=True,  # torch opens it once more to form the group
        )
    except RuntimeError as error:
        raise TrainingError(
            f"process 0 is missing: no process of this run answers at {address}:{port} within "
            f"{within_s:.0f} s; see the output of its host, and whether this one can reach it "
            f"({as_one_line(error)})"
        ) from error
    return PrefixStore(f"detr_dist/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _check_devices(arrived: dict[int, Any]) -> None:
    """Raise UsageError unless every process can take part, on the same kind of device."""
    for rank, facts in sorted(arrived.items()):
        if facts["problem"]:
            raise UsageError(f"process {rank} ({facts['host']}) cannot take part: {facts['problem']}")
    hosts = {facts["device"]: facts["host"] for facts in arrived.values()}
    if len(hosts) > 1:
        raise UsageError(
            f"there are GPUs on {hosts['gpu']} but none on {hosts['cpu']}: all processes must compute on the "
            f"same kind of device; look at nvidia-smi on {hosts['cpu']}"
        )


def _join(names: Iterable[str]) -> str:
    shown = list(names)
    return ", ".join(shown[:_MAX_NAMES]) + (", ..." if len(shown) > _MAX_NAMES else "")
