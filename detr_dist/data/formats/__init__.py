"""Readers of annotations, one module for each format."""

import gc
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from detr_dist.config_types import ExifRule
from detr_dist.data.formats.annotations import Annotations, Reader
from detr_dist.data.formats.layouts import open_splits
from detr_dist.errors import DataError, UsageError
from detr_dist.text import list_names


def read_annotations(source: str | Path, split: str | None = None, *, exif: ExifRule = "auto") -> Annotations:
    """Read the annotations of a data set, whatever their format.

    Args:
        source: A data set in one of the formats.
        split: The split to read, `train`, `val` or `test`, if the data set is split.
        exif: `data.exif`, for sizes that are read from image files.

    Raises:
        DataError: there is no such data set or split, it is not clear which files hold the annotations, or
            they cannot be read.
    """
    splits = open_splits(Path(source))
    if "" in splits:
        return _read(splits[""], exif)
    if split is None and len(splits) == 1:
        (split,) = splits
    if split is None:
        raise DataError(f"{source}: is split into {list_names(splits)}; name the folder of one")
    if split not in splits:
        raise DataError(
            f"{source}: has no split {split!r}, only {list_names(splits)}; name the data set to use"
        )
    return _read(splits[split], exif)


def _read(reader: Reader, exif: ExifRule) -> Annotations:
    collecting = gc.isenabled()
    gc.disable()  # the collector would repeatedly scan a million new objects, none of them garbage
    try:
        return reader(exif)
    finally:
        if collecting:
            gc.enable()


class Split(NamedTuple):
    """One split of a data set."""

    source: str | Path
    name: str | None = None
    """None if the data set is not split."""

    def __str__(self) -> str:
        return str(self.source) if self.name is None else f"{self.source} ({self.name})"


def splits_of(source: str | Path) -> list[Split]:
    """Return the splits of a data set, or the data set itself if it is not split."""
    return [Split(str(source), name) for name in split_names(source) or (None,)]


def split_of(source: str | Path, *wanted: str) -> Split:
    """Return the first of the wanted splits that a data set has, or the data set itself if it is not split.

    Raises:
        DataError: it is split, but has none of them.
    """
    names = split_names(source)
    for name in wanted:
        if name in names:
            return Split(str(source), name)
    if names:
        raise _no_split(source, wanted[0], names)
    return Split(str(source))


def split_to_validate_on(train_dirs: Sequence[Path], val_dir: Path | None) -> Split:
    """Return the split that `--val-dir` gives, or without it the training data, if they are one data set.

    Raises:
        UsageError: neither gives one.
    """
    if val_dir is not None:
        return split_of(val_dir, "val")
    if len(train_dirs) > 1:
        raise UsageError("--val-dir is missing; with several --train-dir it has to be given")
    if "val" not in split_names(train_dirs[0]):
        raise UsageError(
            f"--val-dir is missing, and {train_dirs[0]} has no split 'val'; give a data set for it"
        )
    return split_of(train_dirs[0], "val")


def split_names(source: str | Path) -> tuple[str, ...]:
    """Return the names of the splits of a data set, `train`, `val` and `test` first; none if it is not split.

    Raises:
        DataError: there is no such data set, or it is not clear which files hold the annotations.
    """
    splits = open_splits(Path(source))
    usual = [name for name in ("train", "val", "test") if name in splits]
    return tuple(usual + [name for name in splits if name and name not in usual])


def _no_split(source: str | Path, wanted: str, names: Iterable[str]) -> DataError:
    return DataError(f"{source}: has no split {wanted!r}, only {list_names(names)}; name another data set")
