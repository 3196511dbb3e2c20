"""What a reader of any format returns."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
