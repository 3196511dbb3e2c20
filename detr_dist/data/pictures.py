"""Pictures without annotations, as a data set to find objects in."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from detr_dist.data.coco import CocoData
from detr_dist.data.images import UnreadableImageError, image_suffixes, read_size_hw
from detr_dist.errors import DataError


class FoundPictures(NamedTuple):
    """The pictures in a folder and its sub-folders, by the suffixes that Pillow reads."""

    folder: Path
    names: list[str]
    """Relative to the folder, sorted."""
    left_out: list[str]
    """What else is there, sorted: files of other suffixes, hidden files and folders, folders that cannot be
    listed, and links to a folder that they lie in."""


def find_pictures(source: Path) -> FoundPictures:
    """The pictures in a folder, or of a file, whatever its suffix, itself. Links to folders are followed.

    Raises:
        DataError: there is no such thing, or no picture in it.
    """
    if source.is_file():
        return FoundPictures(source.parent, [source.name], [])
    if not source.is_dir():
        raise DataError(f"{source}: does not exist; name a picture or a folder of pictures")
    names: list[str] = []
    left_out: list[str] = []
    for parent, folders, files in os.walk(
        source, followlinks=True, onerror=lambda error: left_out.append(_relative(error.filename, source))
    ):
        for name in folders.copy():
            path = Path(parent, name)
            if name.startswith(".") or (path.is_symlink() and _leads_back(path, source)):
                folders.remove(name)
                left_out.append(_relative(path, source))
        for name in files:
            path = Path(parent, name)
            is_picture = path.suffix.lower() in image_suffixes() and not name.startswith(".")
            # A link to nothing is not passed over in silence, and a pipe would be waited for.
            is_taken = is_picture and (path.is_file() or not path.exists())
            (names if is_taken else left_out).append(_relative(path, source))
    if not names:
        raise DataError(
            f"{source}: holds no picture of a suffix that Pillow reads, as .jpg or .png, "
            f"and {len(left_out)} other files; name a picture or a folder of pictures"
        )
    return FoundPictures(source, sorted(names), sorted(left_out))


def _relative(path: str | Path, source: Path) -> str:
    return str(Path(path).relative_to(source))


def _leads_back(link: Path, source: Path) -> bool:
    """Whether a link leads to one of the folders between it and `source`, or to one that these lie in."""
    target, above = link.resolve(), link.parent
    while not above.resolve().is_relative_to(target):
        if above == source:
            return False
        above = above.parent
    return True


def read_pictures(
    folder: Path, names: Sequence[str], class_names: Sequence[str]
) -> tuple[CocoData, list[str]]:
    """A data set of the pictures whose header can be read, numbered from 1, without any box; and of each
    other one a line that says why not."""
    readable, sizes_hw, unreadable = [], [], []
    for name in names:
        try:
            sizes_hw.append(read_size_hw(folder / name))
            readable.append(name)
        except UnreadableImageError as error:
            unreadable.append(str(error))
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
