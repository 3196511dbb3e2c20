"""Images without annotations as a data set, for predictions."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from detr_dist.config_types import ExifRule
from detr_dist.data.coco import CocoData
from detr_dist.data.images import read_size_hw
from detr_dist.serving.decoding import UnreadableImageError


def read_unannotated(
    folder: Path, names: Sequence[str], class_names: Sequence[str], exif: ExifRule
) -> tuple[CocoData, list[str]]:
    """Return a data set without boxes of the images whose header can be read, and the reasons for the others.

    Image ids count from 1.
    """
    readable, sizes_hw, unreadable = [], [], []
    for name in names:
        try:
            sizes_hw.append(read_size_hw(folder / name, exif))
            readable.append(name)
        except UnreadableImageError as error:
            unreadable.append(str(error))
    return unannotated(folder, readable, sizes_hw, class_names, exif), unreadable


def unannotated(
    folder: Path,
    names: Sequence[str],
    sizes_hw: Sequence[tuple[int, int]],
    class_names: Sequence[str],
    exif: ExifRule,
) -> CocoData:
    """Return a data set without boxes, of images of these sizes; image ids count from 1."""
    return CocoData(
        annotations_path=folder,
        images_dir=folder,
        class_names=tuple(class_names),
        category_ids=tuple(range(len(class_names))),
        notices=[],
        image_ids=np.arange(1, 1 + len(names)),
        sizes_hw=np.array(sizes_hw, dtype=np.int64).reshape(-1, 2),
        file_names=np.array([os.fsencode(name) for name in names], dtype=np.bytes_),
        box_offsets=np.zeros(len(names) + 1, dtype=np.int64),
        boxes_xywh_px=np.zeros((0, 4)),
        box_classes=np.zeros(0, dtype=np.int64),
        iscrowd=np.zeros(0, dtype=np.bool_),
        areas=np.zeros(0),
        annotation_ids=np.zeros(0, dtype=np.int64),
        exif="apply" if exif == "auto" else exif,  # there is no annotated size to fit
    )
