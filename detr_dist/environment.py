"""The environment variables that launchers set: read, checked and completed."""

import math
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from detr_dist.errors import UsageError

# Torch and Accelerate read these as whole numbers, and a run of several processes needs them.
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
# The first is torch's current name; torch still reads the others.
_ALLOCATOR_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
_WAY_OUT = "unset it if it is left over, or start with accelerate launch"


def seconds_from_environment(name: str, default: float) -> float:
    """Return a duration in seconds from an environment variable.

    Raises:
        UsageError: it is not a number above 0.
    """
    text = os.environ.get(name, str(default))
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise UsageError(f"the environment variable {name} is {text!r}; give a number of seconds above 0")
    return value


def launch_numbers() -> dict[str, int]:
    """Return the numbers that launchers and MPI have put into the environment, by variable.

    Variables that are empty or -1 are unset, because torch and Accelerate would fail to read them or misread
    them.

    Raises:
        UsageError: naming a variable that is not a whole number.
    """
    values = {}
    for name in (*_LAUNCHED, *_LAUNCHED_BY_MPI):
        text = os.environ.get(name, "").strip()
        try:
            if text in ("", "-1"):
                os.environ.pop(name, None)
            else:
                values[name] = int(text)
        except ValueError:
            raise UsageError(
                f"the environment variable {name} is {text!r}, which is no whole number; {_WAY_OUT}"
            ) from None
    return values


def check_single_process(command: str) -> None:
    """Refuse a launch of several processes.

    Raises:
        UsageError: naming the command, which works in one.
    """
    if launch_numbers().get("WORLD_SIZE", 1) > 1:
        raise UsageError(f"{command} works in one process; start it without accelerate launch")


def check_environment() -> None:
    """Refuse variables left over from another launcher, before torch and Accelerate fail because of them.

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
    if "WORLD_SIZE" not in values:  # no launcher was used
        os.environ.pop("LOCAL_WORLD_SIZE", None)
    elif not 1 <= values.get("LOCAL_WORLD_SIZE", 1) <= size:
        raise UsageError(
            f"LOCAL_WORLD_SIZE is {values['LOCAL_WORLD_SIZE']} in the environment, but WORLD_SIZE is {size}; "
            f"{_WAY_OUT}"
        )
    if size > 1 and lacking:
        raise UsageError(
            f"WORLD_SIZE is {size} in the environment, but {', '.join(lacking)} not set; {_WAY_OUT}"
        )
    if lacking or "WORLD_SIZE" not in values:  # there is no process group to join
        os.environ.pop("LOCAL_RANK", None)  # Accelerate would form a group because of it
        for name in _SIZES_OF_MPI:
            if values.get(name, 1) > 1:
                raise UsageError(
                    f"{name} is {values[name]} in the environment, as under mpirun or srun, which cannot "
                    "start a run of several processes; unset it, or start with accelerate launch"
                )


def set_environment(stacks_dir: Path | None) -> None:
    """Set variables for torch, NCCL and DeepSpeed that the user has not set.

    Torch's GPU memory segments become expandable, because images of many sizes would fragment them; this has
    an effect only before the first allocation. When a collective times out, NCCL writes its last collectives
    beside the stacks.
    """
    if sys.platform == "linux" and not any(name in os.environ for name in _ALLOCATOR_SETTINGS):
        os.environ[_ALLOCATOR_SETTINGS[0]] = "expandable_segments:True"
    defaults = {}
    if uses_cpu():
        defaults["DS_ACCELERATOR"] = "cpu"  # otherwise DeepSpeed warns that it found no accelerator
    if stacks_dir is not None:
        defaults |= {"TORCH_FR_BUFFER_SIZE": "2000", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}
        defaults["TORCH_FR_DUMP_TEMP_FILE"] = str(stacks_dir.absolute() / "nccl_rank_")
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


@contextmanager
def restored_environment() -> Iterator[None]:
    """Restore the environment variables after the block; torch, Accelerate and MLflow are set up by them."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def uses_deepspeed() -> bool:
    """Return whether `accelerate launch` is configured to train with DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true"


def uses_cpu() -> bool:
    """Return whether this process computes on the CPU, on request or because there is nothing else."""
    return _is_cpu_requested() or not torch.accelerator.is_available()


def _is_cpu_requested() -> bool:
    return os.environ.get("ACCELERATE_USE_CPU", "").lower() in _YES


def find_device_problem() -> str | None:
    """Return what is wrong with the GPUs of this host, where each local process needs one of its own."""
    if _is_cpu_requested():
        return None
    named = _visible_gpus()
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


def is_cpu_fallback() -> bool:
    """Return whether this process computes on the CPU only because no accelerator was found."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") is not None  # the YAML files for the CPU set it too
    return not _is_cpu_requested() and not hidden and not torch.accelerator.is_available()


def _visible_gpus() -> list[str]:
    """Return the ids in CUDA_VISIBLE_DEVICES; CUDA ignores all from the first invalid one on."""
    named: list[str] = []
    for each in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(","):
        if not each.strip() or each.strip().startswith("-"):
            break
        named.append(each.strip())
    return named
