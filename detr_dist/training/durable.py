"""Folders and files that are there whole or not at all, whatever moment the machine stops at."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from detr_dist.errors import UsageError


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which takes the name `folder` (and the place of what had it) once it is whole and on
    disk.

    Whoever may read the folder may read its files: some libraries write theirs for the owner alone. An
    exception on the way leaves `folder` as it was, and no trace of the new one.
    """
    _finish(folder)
    partial, replaced = _partial(folder), _replaced(folder)
    partial.mkdir(parents=True)
    try:
        yield partial
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
    """Give the files of `source` to the new folder `folder` as well: as hard links where the file system has
    them."""
    with new_folder(folder) as partial:
        for path in source.iterdir():
            try:
                os.link(path, partial / path.name)
            except OSError:
                shutil.copyfile(path, partial / path.name)


def remove_folder(folder: Path) -> None:
    """Delete a folder, never leaving half of it under its name."""
    removed = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(removed, ignore_errors=True)
    folder.replace(removed)
    shutil.rmtree(removed, ignore_errors=True)


def finish_interrupted(parent: Path, pattern: str = "*") -> list[str]:
    """Bring to an end what `new_folder` and `remove_folder` were doing with folders of such names in `parent`
    when their process was killed.

    Returns the names of the folders of which there was only a part, now removed.
    """
    for removed in parent.glob(f".{pattern}.removed"):
        shutil.rmtree(removed, ignore_errors=True)
    leftovers = [*parent.glob(f".{pattern}.partial"), *parent.glob(f".{pattern}.replaced")]
    names = sorted({path.stem.removeprefix(".") for path in leftovers})
    return [name for name in names if _finish(parent / name)]


def _finish(folder: Path) -> bool:
    """Finish one folder; says whether there was only a part of it, now removed."""
    partial, replaced = _partial(folder), _replaced(folder)
    if replaced.exists() and not folder.exists():
        # The old folder gives up its name only when the new one is whole.
        (partial if partial.exists() else replaced).replace(folder)
    was_torn = partial.exists()
    for leftover in (partial, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    return was_torn


def check_writable(option: str, folder: Path) -> None:
    """Make the folder if need be.

    Raises:
        UsageError: naming the command line's `option`, nothing can be written there.
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
    """A folder that `option` of the command line names is not there yet, or empty.

    Raises:
        UsageError: it is there.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UsageError(f"{option} {folder}: is there already; delete it or give another")


def write_text_whole(path: Path, text: str) -> None:
    """Write a file that is there whole or as it was."""
    partial = _partial(path)
    try:
        partial.write_text(text, encoding="utf-8")
        _flush_entry(partial)
        partial.replace(path)
        _flush_entry(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def failure_on_disk(error: Exception, folder: Path) -> str:
    """What went wrong while writing to `folder`, on one line, with the space that is left: torch and
    safetensors wrap a full disk in words of their own."""
    reason = " ".join((getattr(error, "strerror", None) or str(error)).split())[:300]
    try:
        return f"{reason}; {shutil.disk_usage(folder).free / 2**20:.0f} MiB free"
    except OSError:
        return reason


def _partial(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.partial")


def _replaced(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.replaced")


def _flush(folder: Path) -> None:
    """Have the disk take all that was written below `folder`."""
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
