"""Writing a data set, or some of its images, as a COCO folder."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from posixpath import dirname, isabs, normpath

import numpy as np

from detr_dist.data.coco import CocoData
from detr_dist.data.images import decoded_name, path_of
from detr_dist.storage import link_or_copy, write_text

ANNOTATIONS_NAME = "_annotations.coco.json"


def write_coco(
    data: CocoData, rows: Sequence[int], folder: Path, category_ids: Mapping[str, int] | None = None
) -> None:
    """Write the images of these rows and their annotations into `folder`, which must be empty or absent.

    Images are hard links where the file system allows them, else copies. They keep their names and
    sub-folders, and all ids, areas and crowd flags stay. Boxes are written as read, so clipped to the image.
    `category_ids` has the id of each class, if it should not be that of the data.
    """
    names = target_names(data)
    if category_ids is None:
        listed = zip(data.class_names, data.category_ids, strict=True)
        category_ids = {name: id_ for name, id_ in listed if id_ is not None}
    folder.mkdir(parents=True, exist_ok=True)
    for parent in {dirname(names[row]) for row in rows}:
        path_of(folder, parent).mkdir(parents=True, exist_ok=True)
    for row in rows:
        put_image(data, row, path_of(folder, names[row]))
    document = {
        "images": [_image(data, row, names[row]) for row in rows],
        "annotations": [annotation for row in rows for annotation in _annotations(data, row, category_ids)],
        "categories": [{"id": id_, "name": name} for name, id_ in category_ids.items()],
    }
    write_text(folder / ANNOTATIONS_NAME, json.dumps(document))


def put_image(data: CocoData, row: int, target: Path) -> None:
    """Make `target` a hard link to the file of an image, or a copy of it."""
    # A link to a relative link would lead nowhere.
    link_or_copy(os.path.realpath(data.image_path(row)), target)


def target_names(data: CocoData) -> list[str]:
    """Return the name of each image in a COCO folder.

    It is the name in the source, without detours. Where some name leads out of its folder, or several files
    have one name, names are relative to the folder that all images have in common.
    """
    names = [normpath(decoded_name(name)) for name in data.file_names]
    paths = [os.path.normpath(data.image_path(row).absolute()) for row in range(len(data))]
    leads_out = any(isabs(name) or name.startswith("../") for name in names)
    if not leads_out and len(set(zip(names, paths, strict=True))) == len(set(names)):
        return names
    common = os.path.commonpath([dirname(path) for path in paths])
    return [os.path.relpath(path, common) for path in paths]


def _image(data: CocoData, row: int, name: str) -> dict[str, object]:
    height, width = data.size_hw(row)
    return {"id": int(data.image_ids[row]), "file_name": name, "width": width, "height": height}


def _annotations(data: CocoData, row: int, category_ids: Mapping[str, int]) -> list[dict[str, object]]:
    boxes = data.box_rows(row)
    columns = (data.annotation_ids, data.box_classes, data.boxes_xywh_px, data.areas, data.iscrowd)
    return [
        {
            "id": id_,
            "image_id": int(data.image_ids[row]),
            "category_id": category_ids[data.class_names[class_]],
            "bbox": box,
            "area": area,
            "iscrowd": int(iscrowd),
        }
        for id_, class_, box, area, iscrowd in zip(
            *(np.asarray(column[boxes]).tolist() for column in columns), strict=True
        )
    ]
