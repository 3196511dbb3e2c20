"""Keeps other processes out of an output folder while one is at work there."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from detr_dist.errors import DataError


@contextmanager
def locked(output_dir: Path) -> Iterator[None]:
    """Hold the output folder, which must exist. The lock ends with its process, however that ends.

    Raises:
        DataError: another process holds it; says which.
    """
    with (output_dir / ".lock").open("a+") as file:
        try:
            # Of this process alone: loader processes that outlive it for seconds do not inherit it.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            raise DataError(
                f"{output_dir}: {file.read().strip() or 'another process'} is at work there; wait until it "
                "has ended, stop it, or give another folder"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
        file.truncate(0)
