"""A COCO data set in numpy columns: nothing in it grows when a forked loader process reads it."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detr_dist.data.annotations import Section, read_sections
from detr_dist.data.box_columns import read_boxes
from detr_dist.data.classes import ClassMap, map_classes, map_classes_onto
from detr_dist.data.images import UnreadableImageError, read_size_hw
from detr_dist.data.layout import check_images_exist, encoded_name, find_annotations, path_of
from detr_dist.errors import DataError
from detr_dist.text import list_names

__all__ = ["CocoData", "find_annotations", "load_coco"]


def _no_ids() -> NDArray[np.int64]:
    return np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class CocoData:
    """N images and their M boxes; those of image `row` are `box_rows(row)` of the columns of boxes.

    Boxes lie inside their image and have an extent. Crowd boxes are among them, for evaluation.
    """

    annotations_path: Path
    images_dir: Path
    class_names: tuple[str, ...]
    category_ids: tuple[int | None, ...]  # of each class, in the JSON; None where it does not list it
    notices: list[str]  # what was repaired or left out while reading, one line each
    image_ids: NDArray[np.int64]  # [N]
    sizes_hw: NDArray[np.int64]  # [N, 2]
    file_names: NDArray[np.bytes_]  # [N] of one width, see `encoded_name`
    box_offsets: NDArray[np.int64]  # [N + 1]
    boxes_xywh_px: NDArray[np.float64]  # [M, 4]
    box_classes: NDArray[np.int64]  # [M]
    iscrowd: NDArray[np.bool_]  # [M]
    areas: NDArray[np.float64]  # [M] as annotated (of the outline, where there is one), else of the box
    annotation_ids: NDArray[np.int64]  # [M]
    clipped_ids: NDArray[np.int64] = field(default_factory=_no_ids)  # annotations that reached outside
    dropped_ids: NDArray[np.int64] = field(default_factory=_no_ids)  # annotations without extent, left out

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def max_boxes_per_image(self) -> int:
        """Of the boxes that training sees."""
        return int(np.bincount(self.image_rows[~self.iscrowd]).max(initial=0))

    @property
    def image_rows(self) -> NDArray[np.int64]:
        """The image of each box, shape [M]."""
        return np.repeat(np.arange(len(self)), np.diff(self.box_offsets))

    @property
    def image_ranks(self) -> NDArray[np.int64]:
        """The place of each image in the order of their ids, shape [N]."""
        return np.argsort(np.argsort(self.image_ids))

    def image_path(self, row: int) -> Path:
        return self.images_dir / os.fsdecode(self.file_names[row])

    def size_hw(self, row: int) -> tuple[int, int]:
        return int(self.sizes_hw[row, 0]), int(self.sizes_hw[row, 1])

    def box_rows(self, row: int) -> slice:
        return slice(int(self.box_offsets[row]), int(self.box_offsets[row + 1]))

    def training_targets(self, row: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Boxes in xywh pixels and classes of one image, without its crowd boxes."""
        rows = self.box_rows(row)
        single = ~self.iscrowd[rows]
        return self.boxes_xywh_px[rows][single], self.box_classes[rows][single]

    def fingerprint(self) -> str:
        """SHA-256 of everything that training sees but the pixels: images, boxes and classes, in their
        order."""
        digest = hashlib.sha256()
        for column in (
            self.file_names,
            self.sizes_hw,
            self.box_offsets,
            self.boxes_xywh_px,
            self.box_classes,
        ):
            digest.update(np.ascontiguousarray(column).tobytes())
        digest.update(np.ascontiguousarray(self.iscrowd).tobytes())
        return digest.hexdigest()

    def to_coco_dict(self) -> dict[str, Any]:
        """The ground truth in COCO's form, with class indices as category ids; boxes are clipped.

        Image ids are `image_ranks`: small numbers in the order of the real ids, by which COCO's evaluation
        ranks detections of equal score. Annotations are numbered from 1: pycocotools takes id 0 for "no
        match", and a JSON may repeat an id.
        """
        ranks = self.image_ranks
        columns = (
            ranks[self.image_rows].tolist(),
            self.box_classes.tolist(),
            self.boxes_xywh_px.tolist(),
            self.areas.tolist(),
            self.iscrowd.astype(int).tolist(),
        )
        keys = ("id", "image_id", "category_id", "bbox", "area", "iscrowd")
        return {
            "images": [
                {"id": rank, "height": height, "width": width}
                for rank, (height, width) in zip(ranks.tolist(), self.sizes_hw.tolist(), strict=True)
            ],
            "annotations": [
                dict(zip(keys, row, strict=True))
                for row in zip(range(1, len(self.areas) + 1), *columns, strict=True)
            ],
            "categories": [{"id": index, "name": name} for index, name in enumerate(self.class_names)],
        }


def load_coco(
    folder: str | Path,
    *,
    classes: Sequence[str] | None = None,
    classes_source: str = "the training data",
    may_lack_classes: bool = False,
    check_files: bool = True,
) -> CocoData:
    """Read and check the COCO data set in `folder`.

    With `classes` the class indices follow that order, by name, whatever ids this JSON gives them, and
    whether it lists all of them if `may_lack_classes`; `classes_source` says in an error where they come
    from. Without `check_files` no picture need be there.

    Raises:
        DataError: names the file and the record at fault and what to do about it.
    """
    path, images_dir = find_annotations(folder)
    return read_columns(
        read_sections(path),
        images_dir,
        classes=classes,
        classes_source=classes_source,
        may_lack_classes=may_lack_classes,
        check_files=check_files,
    )


def read_columns(
    sections: tuple[Section, Section, Section],
    images_dir: Path,
    *,
    classes: Sequence[str] | None = None,
    classes_source: str = "the training data",
    may_lack_classes: bool = False,
    check_files: bool = True,
) -> CocoData:
    """The data set of the images, annotations and categories that were read; as `load_coco`."""
    images, annotations, categories = sections
    path = images.path
    image_ids, file_names = _read_image_ids(images), images.texts("file_name")
    if check_files:
        check_images_exist(images_dir, file_names, path)
    sizes_hw = _read_sizes(images, images_dir, file_names)
    boxes = read_boxes(annotations, image_ids)
    if classes is None:
        class_map = map_classes(categories, boxes.category_ids)
    else:
        class_map = map_classes_onto(
            classes, categories, boxes.category_ids, classes_source, may_lack=may_lack_classes
        )
    box_classes = boxes.classes(class_map)
    kept, clipped, dropped = boxes.clip(sizes_hw[boxes.image_rows])
    clipped_ids, dropped_ids = boxes.annotation_ids[clipped], boxes.annotation_ids[dropped]
    order = kept[np.argsort(boxes.image_rows[kept], kind="stable")]
    num_boxes = np.bincount(boxes.image_rows[order], minlength=len(image_ids))
    notices = _remark(clipped_ids, "reached outside their image and were clipped")
    notices += _remark(dropped_ids, "have no extent inside their image and were dropped")
    notices += _remarks(class_map, boxes.iscrowd[order], num_boxes)
    box_areas = boxes.xywh_px[:, 2] * boxes.xywh_px[:, 3]
    return CocoData(
        annotations_path=path,
        images_dir=images_dir,
        class_names=class_map.names,
        category_ids=class_map.category_ids,
        notices=[f"{path}: {notice}" for notice in notices],
        image_ids=image_ids,
        sizes_hw=sizes_hw,
        file_names=np.array([encoded_name(name) for name in file_names]),
        box_offsets=np.concatenate([[0], np.cumsum(num_boxes)]),
        boxes_xywh_px=boxes.xywh_px[order],
        box_classes=box_classes[order],
        iscrowd=boxes.iscrowd[order],
        areas=np.where(np.isfinite(boxes.areas), boxes.areas, box_areas)[order],
        annotation_ids=boxes.annotation_ids[order],
        clipped_ids=clipped_ids,
        dropped_ids=dropped_ids,
    )


def _read_image_ids(images: Section) -> NDArray[np.int64]:
    if not images.records:
        raise DataError(f"{images.path}: lists no images; check that it is the right file")
    image_ids = images.integers("id")
    values, counts = np.unique(image_ids, return_counts=True)
    if len(values) < len(image_ids):
        twice = values[counts > 1].tolist()
        raise DataError(
            f"{images.path}: several images have the id {list_names(twice)}; give each image its own"
        )
    return image_ids


def _read_sizes(images: Section, images_dir: Path, file_names: list[str]) -> NDArray[np.int64]:
    """Where the JSON has no size, the image file's header tells it."""
    unknown = -1
    sizes_hw = np.stack([images.integers("height", unknown), images.integers("width", unknown)], axis=1)
    for row in np.flatnonzero((sizes_hw == unknown).any(axis=1)).tolist():
        try:
            sizes_hw[row] = read_size_hw(path_of(images_dir, file_names[row]))
        except UnreadableImageError as error:
            raise DataError(
                f"{images.where(row)}: has no width and height, and its file cannot be read ({error}); "
                "add them"
            ) from None
    if (sizes_hw < 1).any():
        row = int(np.flatnonzero((sizes_hw < 1).any(axis=1))[0])
        raise DataError(f"{images.where(row)}: width and height must be at least 1")
    return sizes_hw


def _remark(annotation_ids: NDArray[np.int64], what: str) -> list[str]:
    num_boxes = len(annotation_ids)
    return [f"{num_boxes} boxes {what}, first annotation {annotation_ids[0]}"] if num_boxes else []


def _remarks(class_map: ClassMap, iscrowd: NDArray[np.bool_], num_boxes: NDArray[np.int64]) -> list[str]:
    remarks = []
    if class_map.dropped:
        remarks.append(f"category {list_names(class_map.dropped)} only groups others and was left out")
    if iscrowd.any():
        remarks.append(f"{int(iscrowd.sum())} crowd boxes serve evaluation only")
    if (num_boxes == 0).any():
        remarks.append(f"{int((num_boxes == 0).sum())} of {len(num_boxes)} images have no boxes and are kept")
    return remarks
