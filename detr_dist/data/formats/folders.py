"""What the readers of several formats ask of folders: names, lines of lists, and the sizes of images."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from detr_dist.config_types import ExifRule
from detr_dist.data.images import read_size_hw
from detr_dist.errors import DataError
from detr_dist.serving.decoding import UnreadableImageError

_NUM_THREADS = 8  # the headers come from a disk, or from another host

_FILES_AT_A_TIME = 64


def names_in(folder: str | Path, *suffixes: str) -> list[str]:
    """Return the names in a folder, sorted and without hidden ones; none if there is no such folder.

    With `suffixes`, in lower case, it returns only names that end in one of them, in any case.

    Raises:
        DataError: the folder cannot be listed.
    """
    try:
        with os.scandir(folder) as entries:
            names = (entry.name for entry in entries if entry.name[0] != ".")
            return sorted(name for name in names if not suffixes or name.lower().endswith(suffixes))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed: {error.strerror}; check its permissions") from None


def read_lines(path: Path) -> list[str]:
    """Return the lines of a text file.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text in UTF-8"
        raise DataError(f"{path}: cannot be read: {reason}; save it again") from None


def read_sizes_hw(paths: Sequence[str], exif: ExifRule) -> list[tuple[int, int] | UnreadableImageError]:
    """Return height and width of each image file, or why it cannot be read."""
    with ThreadPoolExecutor(_NUM_THREADS) as threads:
        parts = [paths[i : i + _FILES_AT_A_TIME] for i in range(0, len(paths), _FILES_AT_A_TIME)]
        return [size for sizes in threads.map(partial(_read_some, exif), parts) for size in sizes]


def _read_some(exif: ExifRule, paths: Sequence[str]) -> list[tuple[int, int] | UnreadableImageError]:
    sizes: list[tuple[int, int] | UnreadableImageError] = []
    for path in paths:
        try:
            sizes.append(read_size_hw(Path(path), exif))
        except UnreadableImageError as error:
            sizes.append(error)
    return sizes
