"""Pictures without annotations, as a data set to find objects in."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from detr_dist.data.coco import CocoData
from detr_dist.data.layout import PICTURE_SUFFIXES
from detr_dist.errors import DataError


def find_pictures(source: Path) -> tuple[Path, list[str]]:
    """A folder, and the pictures in it and its sub-folders as names relative to it, sorted. Of a file, its
    folder and itself.

    Raises:
        DataError: there is no such thing, or no picture in it.
    """
    if source.is_file():
        return source.parent, [source.name]
    if not source.is_dir():
        raise DataError(f"{source}: does not exist; name a picture or a folder of pictures")
    files = (
        path.relative_to(source)
        for path in source.rglob("*")
        if path.suffix.lower() in PICTURE_SUFFIXES and path.is_file()
    )
    names = sorted(str(path) for path in files if not any(part.startswith(".") for part in path.parts))
    if not names:
        known = ", ".join(sorted(PICTURE_SUFFIXES))
        raise DataError(f"{source}: holds no picture ({known}); name a picture or a folder of pictures")
    return source, names


def read_pictures(
    folder: Path, names: Sequence[str], class_names: Sequence[str]
) -> tuple[CocoData, list[str]]:
    """A data set of the pictures whose header can be read, numbered from 1, without any box; and of each
    other one a line that says why not."""
    readable, sizes_hw, unreadable = [], [], []
    for name in names:
        try:
            with Image.open(folder / name) as picture:
                sizes_hw.append((picture.height, picture.width))
                readable.append(name)
        except UnidentifiedImageError:
            unreadable.append(f"{folder / name}: no picture in any format that is known here")
        except Exception as error:  # Pillow's plug-ins raise a wide choice of errors for damaged files
            reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
            unreadable.append(f"{folder / name}: {' '.join(reason.split())}")
    data = CocoData(
        annotations_path=folder,
        images_dir=folder,
        class_names=tuple(class_names),
        category_ids=tuple(range(len(class_names))),
        notices=[],
        image_ids=np.arange(1, 1 + len(readable)),
        sizes_hw=np.array(sizes_hw, dtype=np.int64).reshape(-1, 2),
        file_names=np.array([os.fsencode(name) for name in readable], dtype=np.bytes_),
        box_offsets=np.zeros(len(readable) + 1, dtype=np.int64),
        boxes_xywh_px=np.zeros((0, 4)),
        box_classes=np.zeros(0, dtype=np.int64),
        iscrowd=np.zeros(0, dtype=np.bool_),
        areas=np.zeros(0),
        annotation_ids=np.zeros(0, dtype=np.int64),
    )
    return data, unreadable
