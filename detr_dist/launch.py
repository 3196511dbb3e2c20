"""`python -m detr_dist.launch`: `accelerate launch`, that of several machines with a roll call before it.

Takes the options of `accelerate launch`. That one meets a wrong --machine_rank, a machine that does not come
or a port in use with minutes of silence and pages of traceback. Here all machines learn in one line what is
wrong, and the exit code is that of the first process that failed: 75 is still 75.
"""

import json
import os
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from subprocess import CalledProcessError
from typing import Any, Self

from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from detr_dist.console import make_robust
from detr_dist.errors import DetrDistError, TrainingError, UsageError, report_error
from detr_dist.forming import launch_numbers, limit_s
from detr_dist.guard import listen

_TRY_EVERY_S = 0.5
_LONGEST_LINE = 4096


@dataclass(frozen=True)
class Machines:
    """What this machine was told of all of them."""

    num_machines: int
    rank: int
    address: str
    port: int

    @classmethod
    def of(cls, options: Any) -> Self:
        """From the command line, and Accelerate's file where that says nothing."""
        told = load_config_from_file(options.config_file) if options.config_file else None

        def value(name: str, default: Any) -> Any:
            given = getattr(options, name)
            return given if given is not None else getattr(told, name, None) or default

        return cls(
            num_machines=int(value("num_machines", 1)),
            rank=int(value("machine_rank", 0)),
            address=str(value("main_process_ip", "127.0.0.1")),
            port=int(value("main_process_port", 29500)),
        )


def main(arguments: Sequence[str]) -> int:
    """Launch, and return the exit code."""
    make_robust()
    options = launch_command_parser().parse_args(arguments)
    try:
        launch_numbers("OMP_NUM_THREADS")  # which Accelerate reads
        machines = Machines.of(options)
        if machines.num_machines > 1:
            within_s = limit_s("DETR_DIST_FORM_LIMIT_S", 60.0)
            call_machines(machines, within_s)
            options.rdzv_conf = options.rdzv_conf or f"timeout={within_s:.0f}"
        launch_command(options)
    except DetrDistError as error:
        report_error(str(error))
        return error.exit_code
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            report_error(f"process {rank} on {socket.gethostname()} was ended by {failure.signal_name()}")
        return int(failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode)
    except CalledProcessError as error:
        return error.returncode if error.returncode > 0 else 128 - error.returncode
    except SignalException as signal:
        return 128 + int(signal.sigval)
    return 0


def call_machines(machines: Machines, within_s: float) -> None:
    """Wait until every machine is there, each with a rank of its own.

    Raises:
        UsageError: ranks or numbers contradict each other, the port is in use, or a machine is missing.
        TrainingError: machine 0 is missing.
    """
    deadline = time.monotonic() + within_s
    if machines.rank == 0:
        _collect(machines, within_s, deadline)
    else:
        _report(machines, within_s, deadline)


def _collect(machines: Machines, within_s: float, deadline: float) -> None:
    hosts, connections = {0: socket.gethostname()}, []
    problem = ""
    with _listen(machines) as listener:
        while len(hosts) < machines.num_machines and not problem:
            if time.monotonic() > deadline:
                problem = _missing(machines, hosts, within_s)
                break
            listener.settimeout(_TRY_EVERY_S)
            with suppress(TimeoutError):
                connection, _ = listener.accept()
                caller = _read(connection, 5.0)
                if caller is None or "machine_rank" not in caller:
                    connection.close()  # somebody else's
                    continue
                connections.append(connection)
                problem = _contradiction(machines, hosts, caller)
                hosts.setdefault(caller["machine_rank"], caller["host"])
    for connection in connections:  # the port is free again for the launcher
        with connection, suppress(OSError):
            connection.sendall(json.dumps({"problem": problem}).encode() + b"\n")
            connection.recv(1)  # its end: who closes first keeps the port busy
    if problem:
        raise UsageError(problem)


def _listen(machines: Machines) -> socket.socket:
    try:
        return listen(machines.port)
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise UsageError(
            f"port {machines.port} cannot be used on {socket.gethostname()} ({reason}): something else has "
            "it, or --machine_rank 0 was given twice; give all machines another --main_process_port"
        ) from error


def _contradiction(machines: Machines, hosts: dict[int, str], caller: dict[str, Any]) -> str:
    rank, host = caller["machine_rank"], caller["host"]
    if caller["num_machines"] != machines.num_machines:
        return (
            f"--num_machines is {machines.num_machines} on {hosts[0]} and {caller['num_machines']} on "
            f"{host}; give all the same"
        )
    if not 0 < rank < machines.num_machines:
        last = machines.num_machines - 1
        return f"--machine_rank {rank} on {host}: with {machines.num_machines} machines it is 0 to {last}"
    if rank in hosts:
        return f"--machine_rank {rank} was given twice, on {hosts[rank]} and on {host}; give each its own"
    return ""


def _missing(machines: Machines, hosts: dict[int, str], within_s: float) -> str:
    missing = [str(rank) for rank in range(machines.num_machines) if rank not in hosts]
    here = ", ".join(f"{rank} is {host}" for rank, host in sorted(hosts.items()))
    return (
        f"of {machines.num_machines} machines these did not come within {within_s:.0f} s: "
        f"{', '.join(missing)} ({here}); look whether they were started, with that --machine_rank, and can "
        f"reach {machines.address}:{machines.port}"
    )


def _report(machines: Machines, within_s: float, deadline: float) -> None:
    own = {
        "machine_rank": machines.rank,
        "num_machines": machines.num_machines,
        "host": socket.gethostname(),
    }
    reason = ""
    while (left_s := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection(
                (machines.address, machines.port), timeout=min(left_s, 10.0)
            ) as link:
                link.sendall(json.dumps(own).encode() + b"\n")
                reason = ""
                answer = _read(link, left_s + 5.0)  # machine 0 names the missing in the end
        except OSError as error:
            answer, reason = None, error.strerror or str(error)
        if answer is not None and "problem" in answer:
            if answer["problem"]:
                raise UsageError(answer["problem"])
            return
        time.sleep(_TRY_EVERY_S)
    raise TrainingError(
        f"machine 0 did not answer at {machines.address}:{machines.port} within {within_s:.0f} s "
        f"({reason or 'what is there is something else'}); look whether it was started, with --machine_rank "
        "0, and whether --main_process_ip and --main_process_port are right"
    )


def _read(connection: socket.socket, within_s: float) -> dict[str, Any] | None:
    """The one line that the other side sends, if it is one of ours."""
    connection.settimeout(within_s)
    try:
        with connection.makefile("rb") as file:
            message = json.loads(file.readline(_LONGEST_LINE))
    except (OSError, ValueError):
        return None
    return message if isinstance(message, dict) else None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
