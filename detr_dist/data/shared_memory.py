"""Room in /dev/shm, through which loader processes hand over their batches."""

import math
import os
import shutil
from pathlib import Path
from typing import NamedTuple

from detr_dist.errors import LoaderError

FOLDER = Path("/dev/shm")

_MIB = 2**20


class Need(NamedTuple):
    """Bytes that the loaders of one process take when they have loaded all that they may."""

    at_least: int
    """With the smallest images."""
    at_most: int
    """With the largest images."""

    def beside(self, other: "Need") -> "Need":
        """Return what both need while they are there at the same time."""
        return Need(self.at_least + other.at_least, self.at_most + other.at_most)


def num_local_processes() -> int:
    """Return the number of processes of the run on this host, as the launcher says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def is_full(num_bytes: int) -> bool:
    """Return whether /dev/shm has no room for `num_bytes`."""
    room = _room()
    return room is not None and room[1] < num_bytes


def check_room(need: Need) -> None:
    """Print a warning if /dev/shm may be too small for the loaders of all processes on this host.

    Raises:
        LoaderError: it is too small in any case. Loaders that are ahead of training, as they should be, would
            fill it.
    """
    room = _room()
    if room is None:
        return
    total, free = room
    if total < num_local_processes() * need.at_least:
        raise LoaderError(f"shared memory is too small: {describe(need)}")
    if free < num_local_processes() * need.at_most:
        print(f"warning: shared memory may run out: {describe(need)}", flush=True)


def describe(need: Need) -> str:
    """Return in words how large /dev/shm is, what is needed, and how to get it."""
    room = _room()
    size = f"has {_mib(room[0])}, {_mib(room[1])} of them free" if room is not None else "is missing"
    needed = num_local_processes() * need.at_most
    enough_gib = max(1, math.ceil(1.25 * needed / 2**30))  # others use it as well
    return (
        f"{FOLDER} {size}, and the loaders need up to {_mib(needed)}; enlarge it (docker run "
        f"--shm-size={enough_gib}g), or lower data.num_workers, data.prefetch_factor or training.batch_size "
        "(data.num_workers=0 needs none)"
    )


def _room() -> tuple[int, int] | None:
    """Bytes in all and free; None where there is no /dev/shm, or one without a limit."""
    try:
        usage = shutil.disk_usage(FOLDER)
    except OSError:
        return None
    return (usage.total, usage.free) if usage.total else None


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / _MIB:,.0f} MiB"
