"""How the processes that were launched together find each other: who is there, missing, or cannot."""

import json
import math
import os
import socket
import time
from datetime import timedelta
from typing import Protocol

import torch
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore  # where torch.distributed has them

from detr_dist.errors import TrainingError, UsageError

# What torch and Accelerate read as whole numbers, and what a run of several processes needs.
_LAUNCHED = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
_NEEDED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_SIZES_OF_MPI = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_LAUNCHED_BY_MPI = (
    *(*_SIZES_OF_MPI, "PMI_RANK", "MPI_LOCALNRANKS", "MPI_LOCALRANKID"),
    *(f"OMPI_COMM_WORLD_{what}" for what in ("RANK", "LOCAL_SIZE", "LOCAL_RANK")),
    *(f"MV2_COMM_WORLD_{what}" for what in ("RANK", "LOCAL_SIZE", "LOCAL_RANK")),
)
_FLAGS = ("ACCELERATE_USE_CPU", "ACCELERATE_DEBUG_MODE", "ACCELERATE_CPU_AFFINITY", "FORK_LAUNCHED")
_YES, _NO = {"1", "on", "t", "true", "y", "yes"}, {"0", "f", "false", "n", "no", "off"}
_WAY_OUT = "unset it if it is left over, or start with accelerate launch"

_LOOK_EVERY_S = 0.2
_MOST_NAMES = 8


class Board(Protocol):
    """Where processes leave notes for each other: what we use of a torch Store."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...
    def check(self, keys: list[str]) -> bool: ...


def limit_s(name: str, default: float) -> float:
    """A limit in seconds from the environment.

    Raises:
        UsageError: it is no number above 0.
    """
    text = os.environ.get(name, str(default))
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise UsageError(f"the environment variable {name} is {text!r}; give a number of seconds above 0")
    return value


def launch_numbers(*others: str) -> dict[str, int]:
    """What launchers and MPI have put into the environment, and `others`, as far as it is set.

    What is set to nothing, or to -1, is unset: torch and Accelerate would read a number there.

    Raises:
        UsageError: naming a variable that is no whole number.
    """
    values = {}
    for name in (*_LAUNCHED, *_LAUNCHED_BY_MPI, *others):
        text = os.environ.get(name, "").strip()
        if text in ("", "-1"):
            os.environ.pop(name, None)
            continue
        try:
            values[name] = int(text)
        except ValueError:
            raise UsageError(
                f"the environment variable {name} is {text!r}, which is no whole number; {_WAY_OUT}"
            ) from None
    return values


def check_environment() -> None:
    """Refuse what a launcher has left over in the environment, before torch and Accelerate stumble on it.

    Raises:
        UsageError: naming the variable that is wrong, or that contradicts the others.
    """
    for name in _FLAGS:
        if not os.environ.get(name, "no").strip():
            del os.environ[name]
        if os.environ.get(name, "no").lower() not in _YES | _NO:
            raise UsageError(f"the environment variable {name} is {os.environ[name]!r}; set it to 1 or 0")
    values = launch_numbers()
    size = values.get("WORLD_SIZE", 1)
    if size < 1:
        raise UsageError(f"WORLD_SIZE is {size} in the environment; {_WAY_OUT}")
    for name in ("RANK", "LOCAL_RANK"):
        if not 0 <= values.get(name, 0) < size:
            known = f"WORLD_SIZE is {size}" if "WORLD_SIZE" in values else "WORLD_SIZE is not set"
            raise UsageError(f"{name} is {values[name]} in the environment, but {known}; {_WAY_OUT}")
    lacking = [name for name in _NEEDED if not os.environ.get(name)]
    if size > 1 and lacking:
        raise UsageError(
            f"WORLD_SIZE is {size} in the environment, but {', '.join(lacking)} not set; {_WAY_OUT}"
        )
    if lacking or "WORLD_SIZE" not in values:  # nobody has launched several processes, or one in their way
        os.environ.pop("LOCAL_RANK", None)  # by which Accelerate would form a group
        for name in _SIZES_OF_MPI:
            if values.get(name, 1) > 1:
                raise UsageError(
                    f"{name} is {values[name]} in the environment, as under mpirun or srun, which cannot "
                    "start a run of several processes; unset it, or start with accelerate launch"
                )


def uses_cpu() -> bool:
    """Whether this process computes on the CPU: there is nothing else, or Accelerate was told so."""
    return _was_told_to_use_cpu() or not torch.accelerator.is_available()


def _was_told_to_use_cpu() -> bool:
    return os.environ.get("ACCELERATE_USE_CPU", "").lower() in _YES


def device_problem() -> str | None:
    """What is wrong with the GPUs of this machine, in words: each of its processes needs one of its own."""
    if _was_told_to_use_cpu():
        return None
    named = _named_gpus()
    found = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    if named and len(named) > found:
        return (
            f"CUDA_VISIBLE_DEVICES names {len(named)} GPUs ({','.join(named)}), but torch finds {found} of "
            f"them on {socket.gethostname()}; name those that nvidia-smi shows, or set "
            "ACCELERATE_USE_CPU=true"
        )
    num_local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if 0 < found < num_local:
        return (
            f"{num_local} processes were launched on {socket.gethostname()}, but torch finds {found} GPUs "
            "there; give accelerate launch a smaller --num_processes, or more GPUs"
        )
    return None


def fell_back_to_cpu() -> bool:
    """Whether nobody asked for the CPU, but there is nothing else."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") is not None  # so do the YAML files for the CPU
    return not _was_told_to_use_cpu() and not hidden and not torch.accelerator.is_available()


def _named_gpus() -> list[str]:
    """CUDA sees the ids before the first that there cannot be."""
    named: list[str] = []
    for each in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(","):
        if not each.strip() or each.strip().startswith("-"):
            break
        named.append(each.strip())
    return named


def call_roll(problem: str | None, within_s: float) -> Board | None:
    """Wait until all processes are there; returns a store they share, or None in one process.

    Collective. `problem` is what keeps this process from taking part, if anything does.

    Raises:
        UsageError: what keeps this process or another one from taking part.
        TrainingError: names the processes that are missing.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if size == 1 or "MASTER_ADDR" not in os.environ:
        if problem is not None:
            raise UsageError(problem)
        return None
    deadline = time.monotonic() + within_s
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if problem is not None and not _launcher_has_store():
        raise UsageError(problem)  # and the others miss this one, as its store would go with it
    host = socket.gethostname()
    store: Board = PrefixStore(f"detr_dist/{attempt}", _open_store(rank, within_s))
    if problem is not None:
        store.set("problem", json.dumps([rank, host, problem]))
    store.set("on cpu" if uses_cpu() else "on gpu", host)
    store.set(str(rank), host)
    if problem is not None:
        raise UsageError(problem)
    try:
        while not store.check([str(each) for each in range(size)]):
            if time.monotonic() > deadline:
                raise TrainingError(_missing(store, size, within_s))
            time.sleep(_LOOK_EVERY_S)
        _look_for_problems(store)
    except RuntimeError as error:  # the store has gone with process 0
        raise TrainingError(
            "process 0 has given up waiting for others; it says itself which are missing"
        ) from error
    return store


def _look_for_problems(store: Board) -> None:
    if store.check(["problem"]):
        where, host, theirs = json.loads(store.get("problem"))
        raise UsageError(f"process {where} ({host}) cannot take part: {theirs}")
    if store.check(["on cpu", "on gpu"]):
        without, with_gpus = (store.get(kind).decode() for kind in ("on cpu", "on gpu"))
        raise UsageError(
            f"there are GPUs on {with_gpus} but none on {without}: all processes must compute on the same "
            f"kind of device; look at nvidia-smi on {without}"
        )


def _launcher_has_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _open_store(rank: int, within_s: float) -> Store:
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        return TCPStore(
            address,
            port,
            is_master=rank == 0 and not _launcher_has_store(),
            timeout=timedelta(seconds=within_s),
            wait_for_workers=False,
            multi_tenant=True,  # torch opens it once more to form the group
        )
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise TrainingError(
            f"process 0 is missing: nothing of this run answers at {address}:{port} within {within_s:.0f} s; "
            f"see what its machine says, and whether this one can reach it ({reason})"
        ) from error


def _missing(store: Board, size: int, within_s: float) -> str:
    here: dict[str, list[str]] = {}
    missing = []
    for rank in map(str, range(size)):
        if store.check([rank]):
            here.setdefault(store.get(rank).decode(), []).append(rank)
        else:
            missing.append(rank)
    there = "; ".join(f"{', '.join(ranks)} on {host}" for host, ranks in here.items())
    shown = ", ".join(missing[:_MOST_NAMES]) + (", ..." if len(missing) > _MOST_NAMES else "")
    return (
        f"{len(missing)} of {size} processes are missing after {within_s:.0f} s: {shown} (here: {there}); "
        "see what their machines say, or raise DETR_DIST_FORM_LIMIT_S if they are slow to start"
    )
