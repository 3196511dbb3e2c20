"""`detr-dist convert`: a data set of any format, written as COCO."""

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from posixpath import normpath
from typing import Any

from detr_dist.data.coco import CocoData, load_data
from detr_dist.data.columns import counted
from detr_dist.data.formats import splits_of
from detr_dist.data.images import decoded_name, path_of
from detr_dist.errors import DataError
from detr_dist.storage import check_new, link_or_copy, new_folder, write_text

_logger = logging.getLogger(__name__)

ANNOTATIONS_NAME = "_annotations.coco.json"

_FOLDER_OF_SPLIT = {"val": "valid"}  # as in Roboflow's exports


def convert(source: Path, output_dir: Path) -> list[str]:
    """Write a data set as COCO, a folder for each split, and return a line on each of them.

    Raises:
        UsageError: the output folder holds something.
        DataError: the data set cannot be read, training would refuse it, or the disk fails.
    """
    check_new("OUT", output_dir)
    splits = splits_of(source)
    data_of = {
        _FOLDER_OF_SPLIT.get(split.name, split.name) if split.name else "": load_data(
            split.source, split=split.name
        )
        for split in splits
    }
    ids = _category_ids(data_of.values())
    try:
        with new_folder(output_dir, flush=False) as partial:
            for name, data in data_of.items():
                for notice in data.notices:
                    _logger.info(notice)
                write_coco(data, partial / name, ids)
    except OSError as error:
        raise DataError(f"{error.filename or output_dir}: {error.strerror}; nothing was written") from None
    return [
        f"{output_dir / name}: {counted(len(data), 'image')}, {counted(len(data.box_classes), 'box')}"
        for name, data in data_of.items()
    ]


def write_coco(data: CocoData, folder: Path, category_ids: Mapping[str, int]) -> None:
    """Write a data set into a new folder, with the category of each class name.

    Images become hard links if the file system allows it, else copies.

    Raises:
        DataError: two images would have the same name.
        OSError: an image cannot be read, or the disk fails.
    """
    folder.mkdir(exist_ok=True)
    names = [_name_inside(decoded_name(name)) for name in data.file_names]
    paths: dict[str, Path] = {}
    for row, name in enumerate(names):
        path, target = data.image_path(row), path_of(folder, name)
        if paths.setdefault(name, path) != path:
            raise DataError(f"{path} and {paths[name]} would both be {name}; rename one of them")
        target.parent.mkdir(parents=True, exist_ok=True)
        link_or_copy(path.resolve(), target)
    write_text(folder / ANNOTATIONS_NAME, json.dumps(_document(data, names, category_ids)))


def _name_inside(name: str) -> str:
    """Return a file name that stays in its folder: relative and without `..`."""
    return "/".join(part for part in normpath(name).split("/") if part not in ("", ".."))


def _category_ids(splits: Iterable[CocoData]) -> dict[str, int]:
    """Return one category id for each class name of all splits.

    It is that of the files, unless different splits use one id for different names.
    """
    ids: dict[str, int] = {}
    for data in splits:
        for name, id_ in zip(data.class_names, data.category_ids, strict=True):
            assert id_ is not None  # the classes are those of the files
            ids.setdefault(name, id_)
    if len(set(ids.values())) == len(ids):
        return ids
    return {name: id_ for id_, name in enumerate(sorted(ids), start=1)}


def _document(data: CocoData, names: list[str], category_ids: Mapping[str, int]) -> dict[str, Any]:
    """Return the data set in COCO's format, with the images in their order."""
    images = zip(data.image_ids.tolist(), names, data.sizes_hw.tolist(), strict=True)
    ids_of_classes = [category_ids[name] for name in data.class_names]
    boxes = zip(
        data.annotation_ids.tolist(),
        data.image_ids[data.image_rows].tolist(),
        (ids_of_classes[index] for index in data.box_classes.tolist()),
        data.boxes_xywh_px.tolist(),
        data.areas.tolist(),
        data.iscrowd.astype(int).tolist(),
        strict=True,
    )
    keys = ("id", "image_id", "category_id", "bbox", "area", "iscrowd")
    return {
        "images": [
            {"id": id_, "file_name": name, "height": height, "width": width}
            for id_, name, (height, width) in images
        ],
        "annotations": [dict(zip(keys, box, strict=True)) for box in boxes],
        "categories": [
            {"id": id_, "name": name, "supercategory": "none"} for name, id_ in category_ids.items()
        ],
    }
