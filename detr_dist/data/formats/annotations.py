"""What a reader of any format returns."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detr_dist.config_types import ExifRule
from detr_dist.data.columns import Finding


@dataclass(frozen=True, slots=True)
class Annotations:
    """The annotations of one split, in the terms of COCO whatever the format of their files."""

    path: Path
    """The file or folder that messages name."""
    images_dir: Path
    """The folder that every `file_name` is relative to."""
    document: Mapping[str, Sequence[Any]]
    """COCO's lists `images`, `annotations` and `categories`. An image or annotation of another format also
    has an `origin`, the file and line that messages name."""
    findings: tuple[Finding, ...] = ()
    """Faults that only this format can have."""
    lists_classes: bool = True
    """False if the format has no list of classes, so that a split may lack some of them."""
    has_own_folder: bool = True
    """False if `images_dir` may hold images of other splits as well."""


def path_of_split(path: Path, split: str) -> Path:
    """Return the path by which messages name a split of a file that holds several."""
    return path.with_name(f"{path.name} ({split})") if split else path


Reader = Callable[[ExifRule], Annotations]
"""Reads one split when it is called; sizes that are read from image files follow the EXIF rule."""

Splits = dict[str, Reader]
"""The splits of a data set by name: `train`, `val`, `test`, or any other; `""` if it is not split."""

SPLIT_OF_NAME = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
"""Names of splits in folders and files, in lower case."""
