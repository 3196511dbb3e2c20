"""Readers of annotations, one module for each format."""

from pathlib import Path

from detr_dist.data.formats.annotations import Annotations
from detr_dist.data.formats.coco_json import read_coco


def read_annotations(source: str | Path) -> Annotations:
    """Read the annotations of a data set, whatever their format.

    Raises:
        DataError: there is no such data set, it is not clear which files hold the annotations, or they cannot
            be read.
    """
    return read_coco(Path(source))
