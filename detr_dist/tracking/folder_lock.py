"""Keeps other processes out of an output folder while one is at work there."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from detr_dist.errors import DataError


@contextmanager
def locked(output_dir: Path) -> Iterator[None]:
    """Hold the output folder, which must exist. The lock ends with its process, however that ends.

    Raises:
        DataError: another process holds it; says which.
    """
    path = output_dir / ".lock"
    with _lock(path) as file:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _lock(path: Path) -> TextIO:
    while True:
        file = path.open("a+")
        try:
            # Of this process alone: loader processes that outlive it for seconds do not inherit it.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise DataError(
                f"{path.parent}: {holder} is at work there; wait until it has ended, stop it, or "
                "give another folder"
            ) from None
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()  # whoever had it has just removed it
