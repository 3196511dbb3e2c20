"""Atomic writes of folders and files (complete or absent after a crash), and the output folder's lock."""

import errno
import fcntl
import functools
import logging
import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from detr_dist.errors import DataError, UsageError
from detr_dist.text import one_line

CACHE_VARIABLE = "DETR_DIST_CACHE"

# Errors of a file system without locks, such as Lustre mounted without `flock`.
_WITHOUT_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}

_held: set[Path] = set()  # of this process: POSIX locks do not keep its own threads apart
_held_guard = threading.Lock()

_logger = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Return the folder for what can be computed again: $DETR_DIST_CACHE, or the user's folder of caches.

    Several nodes may share it. It may not exist yet, nor be writable.
    """
    own = os.environ.get(CACHE_VARIABLE)
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(own or Path(caches, "detr_dist")).expanduser()


@contextmanager
def new_folder(folder: Path, *, flush: bool = True) -> Iterator[Path]:
    """Yield a temporary folder to fill; then flush it to disk and rename it to `folder`, replacing that.

    All files become readable to everyone who may read the folder, because some libraries write theirs for the
    owner alone. After an exception `folder` is unchanged and the temporary folder is removed. Without `flush`
    the files are neither changed nor flushed one by one: they may be links to files of others, or very many.
    """
    _finish(folder)
    partial, replaced = _partial(folder), _replaced(folder)
    partial.mkdir(parents=True)
    try:
        yield partial
        if flush:
            _flush(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if folder.exists():
        folder.replace(replaced)
    partial.replace(folder)
    _flush_entry(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def link_folder(source: Path, folder: Path) -> None:
    """Make a new folder with the files of `source`, as hard links if the file system can, else as copies."""
    with new_folder(folder) as partial:
        for path in source.iterdir():
            link_or_copy(path, partial / path.name)


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """Link a file to `target` if the file system can, else copy it.

    An existing `target` is replaced, and never written into.
    """
    partial = _partial(Path(target))
    partial.unlink(missing_ok=True)
    try:
        os.link(source, partial)
    except OSError:
        shutil.copyfile(source, partial)
    partial.replace(target)
    partial.unlink(missing_ok=True)  # renaming does nothing where both are the same file already


def remove_folder(folder: Path) -> None:
    """Delete a folder atomically: it is renamed first, so that its name is never an incomplete folder's."""
    removed = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(removed, ignore_errors=True)
    folder.replace(removed)
    shutil.rmtree(removed, ignore_errors=True)


def finish_interrupted(parent: Path, pattern: str = "*") -> list[str]:
    """Complete or undo interrupted calls of `new_folder` and `remove_folder` in `parent`.

    Args:
        parent: The folder that contains the folders.
        pattern: Names of the folders.

    Returns:
        The names of the incomplete folders that were removed.
    """
    for removed in parent.glob(f".{pattern}.removed"):
        shutil.rmtree(removed, ignore_errors=True)
    leftovers = [*parent.glob(f".{pattern}.partial"), *parent.glob(f".{pattern}.replaced")]
    names = sorted({path.stem.removeprefix(".") for path in leftovers})
    return [name for name in names if _finish(parent / name)]


def _finish(folder: Path) -> bool:
    """Complete or undo one folder; return whether an incomplete one was removed."""
    partial, replaced = _partial(folder), _replaced(folder)
    if replaced.exists() and not folder.exists():
        # The old folder loses its name only once the new one is complete.
        (partial if partial.exists() else replaced).replace(folder)
    was_incomplete = partial.exists()
    for leftover in (partial, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    return was_incomplete


def check_writable(option: str, folder: Path) -> None:
    """Create the folder if it does not exist, and write to it once.

    Raises:
        UsageError: naming the command line's `option`, if nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(
            f"{option} {folder}: {error.strerror}; give a folder that can be written to"
        ) from error


def check_new(option: str, folder: Path) -> None:
    """Check that the folder that the command line's `option` names is absent or empty.

    Raises:
        UsageError: it is neither.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UsageError(f"{option} {folder}: already exists; delete it or choose another")


def check_outside(option: str, folder: Path, source_option: str, source: Path) -> None:
    """Check that a command does not write into the folder that it reads.

    Raises:
        UsageError: `folder` lies inside `source`.
    """
    if source.is_dir() and source.resolve() in folder.resolve().parents:
        raise UsageError(
            f"{option} {folder}: lies inside {source_option} {source}, so its images would be input the next "
            "time; give another"
        )


def write_text(path: Path, text: str, *, mode: int = 0o666) -> None:
    """Write a file of UTF-8 text atomically: the old one stays until the new one is complete on disk.

    The umask narrows `mode`.
    """
    partial = _partial(path)
    try:
        partial.unlink(missing_ok=True)  # a killed process may have left it, with another mode
        partial.touch(mode)
        partial.write_text(text, encoding="utf-8")
        _flush_entry(partial)
        partial.replace(path)
        _flush_entry(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def describe_disk_error(error: Exception, folder: Path) -> str:
    """Return on one line why writing to `folder` failed, with the free space.

    Torch and safetensors wrap the error of a full disk in their own errors.
    """
    reason = getattr(error, "strerror", None) or one_line(error)
    try:
        return f"{reason}; {shutil.disk_usage(folder).free / 2**20:.0f} MiB free"
    except OSError:
        return reason


@contextmanager
def locked(output_dir: Path) -> Iterator[None]:
    """Lock the output folder, which must exist, against other processes and threads of this one.

    The lock ends with its process, however that ends. Where the file system has no locks, a warning is
    logged and the folder is used without one.

    Raises:
        DataError: it is locked; the message names the process that holds it.
    """
    path, own_name = output_dir / ".lock", f"process {os.getpid()} on {socket.gethostname()}"
    resolved = output_dir.resolve()
    with _held_guard:
        if resolved in _held:
            raise _is_in_use(output_dir, own_name)
        _held.add(resolved)
    try:
        with _lock(path) as file:
            file.truncate(0)
            file.write(f"{own_name}\n")
            file.flush()
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
    finally:
        _held.discard(resolved)


def _is_in_use(output_dir: Path, holder: str) -> DataError:
    return DataError(
        f"{output_dir}: {holder} is using this folder; wait until it has ended, stop it, or give another one"
    )


def _lock(path: Path) -> TextIO:
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            # Not inherited by loader processes, which may outlive this process for seconds.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise _is_in_use(path.parent, holder) from None
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
    _logger.warning(
        f"{output_dir}: cannot be locked on this file system ({reason}); make sure that no second run uses it"
    )


def _partial(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.partial")


def _replaced(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.replaced")


def _flush(folder: Path) -> None:
    """Flush everything below `folder` to disk."""
    mode = folder.stat().st_mode & 0o666
    for path in [*folder.rglob("*"), folder]:
        if path.is_file():
            path.chmod(mode)
        _flush_entry(path)


def _flush_entry(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
