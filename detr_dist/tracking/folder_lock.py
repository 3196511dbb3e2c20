"""Keeps other processes out of an output folder while one is at work there."""

import errno
import fcntl
import functools
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from detr_dist.errors import DataError

# What a file system says that has no locks, such as Lustre mounted without `flock`.
_WITHOUT_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}


@contextmanager
def locked(output_dir: Path) -> Iterator[None]:
    """Hold the output folder, which must exist. The lock ends with its process, however that ends.

    Where the file system has no locks it warns and goes on without.

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
        file = path.open("a+", encoding="utf-8")
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
        except OSError as error:
            if error.errno not in _WITHOUT_LOCKS:
                file.close()
                raise
            _warn_of_no_locks(path.parent, error.strerror)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()  # whoever had it has just removed it


@functools.cache  # a run takes its lock twice
def _warn_of_no_locks(output_dir: Path, reason: str) -> None:
    print(
        f"warning: {output_dir}: cannot be locked on this file system ({reason}); nothing keeps a second "
        "run out of it: see to it that there is none",
        flush=True,
    )
