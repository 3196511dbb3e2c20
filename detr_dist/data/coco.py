"""A COCO data set in numpy columns: nothing in it grows when a forked loader process reads it."""

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detr_dist.config_types import ExifRule
from detr_dist.data.columns import Finding, found
from detr_dist.data.formats import Split, read_annotations
from detr_dist.data.formats.annotations import Annotations
from detr_dist.data.formats.coco_json import LargeDocument
from detr_dist.data.images import folded
from detr_dist.data.index import Entry, Index, entry_of
from detr_dist.data.records import Category, Records, check_records
from detr_dist.errors import DataError
from detr_dist.text import list_names


@dataclass(frozen=True, slots=True, eq=False)
class CocoData:
    """N images and their M boxes; those of image `row` are `box_rows(row)` of the columns of boxes.

    Boxes lie inside their image and have an extent. They include crowd boxes, which evaluation uses.
    """

    annotations_path: Path
    images_dir: Path
    class_names: tuple[str, ...]
    category_ids: tuple[
        int | None, ...
    ]  # of each class, in the JSON; None if the JSON does not list the class
    notices: list[str]  # what was repaired or left out while reading, one line each
    image_ids: NDArray[np.int64]  # [N]
    sizes_hw: NDArray[np.int64]  # [N, 2]
    file_names: NDArray[np.bytes_]  # [N] of one width, see `encoded_name`
    box_offsets: NDArray[np.int64]  # [N + 1]
    boxes_xywh_px: NDArray[np.float64]  # [M, 4]
    box_classes: NDArray[np.int64]  # [M]
    iscrowd: NDArray[np.bool_]  # [M]
    areas: NDArray[np.float64]  # [M] as annotated (of the outline, if there is one), else of the box
    annotation_ids: NDArray[np.int64]  # [M]
    exif: ExifRule = "auto"  # which images are rotated by their EXIF data, see `decode_rgb`
    index: Index | None = None  # where columns are mapped from

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def num_classes(self) -> int:
        """Number of classes, without background."""
        return len(self.class_names)

    @property
    def num_boxes(self) -> NDArray[np.int64]:
        """Count the boxes of each image that training uses (all but crowds), shape [N]."""
        if self.index is not None and self.index.holds(self.box_offsets, self.iscrowd):
            return self.index.columns["num_boxes"]
        return np.bincount(self.image_rows[~self.iscrowd], minlength=len(self))

    @property
    def max_boxes_per_image(self) -> int:
        """Largest number of boxes in one image, without crowds; 0 without images."""
        return int(self.num_boxes.max(initial=0))

    @property
    def image_rows(self) -> NDArray[np.int64]:
        """Return the row of the image of each box, shape [M]."""
        return np.repeat(np.arange(len(self)), np.diff(self.box_offsets))

    @property
    def image_ranks(self) -> NDArray[np.int64]:
        """Return the place of each image in the order of their ids, shape [N]."""
        return np.argsort(np.argsort(self.image_ids))

    def image_path(self, row: int) -> Path:
        """Return the path of the image file of a row."""
        return self.images_dir / os.fsdecode(self.file_names[row])

    def size_hw(self, row: int) -> tuple[int, int]:
        """Return the annotated height and width of the image of a row, in pixels."""
        return int(self.sizes_hw[row, 0]), int(self.sizes_hw[row, 1])

    def box_rows(self, row: int) -> slice:
        """Return where the boxes of an image are in the columns of boxes, crowds included."""
        return slice(int(self.box_offsets[row]), int(self.box_offsets[row + 1]))

    @property
    def boxes_per_class(self) -> NDArray[np.int64]:
        """Number of boxes of each class, [C], without crowds."""
        return np.bincount(self.box_classes[~self.iscrowd], minlength=self.num_classes)

    def training_targets(self, row: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Return boxes in xywh pixels and classes of one image, without its crowd boxes."""
        rows = self.box_rows(row)
        single = ~self.iscrowd[rows]
        return self.boxes_xywh_px[rows][single], self.box_classes[rows][single]

    def training_corners(self, row: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Return `training_targets` with boxes in xyxy pixels."""
        boxes, classes = self.training_targets(row)
        return np.hstack([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]]), classes

    def fingerprint(self) -> str:
        """Return the SHA-256 of all that training uses except pixels: images, boxes and classes, in order."""
        boxes = self.box_offsets, self.boxes_xywh_px, self.box_classes, self.iscrowd
        columns = self.file_names, self.sizes_hw, *boxes
        if self.index is not None and self.index.holds(*columns):
            return self.index.fingerprint
        digest = hashlib.sha256()
        for column in columns:
            digest.update(np.ascontiguousarray(column).reshape(-1).view(np.uint8).data)
        return digest.hexdigest()

    def computed_once(self, name: str, compute: Callable[[], list[Finding]]) -> list[Finding]:
        """Return findings that depend on the data set and `name` alone; an index keeps them."""
        own = (self.boxes_xywh_px, self.box_classes, self.box_offsets, self.sizes_hw, self.iscrowd)
        if self.index is None or not self.index.holds(*own, self.file_names, self.annotation_ids):
            return compute()
        return self.index.computed_once(f"{name} {self.class_names}", compute)

    def __getstate__(self) -> dict[str, Any]:
        """Return the fields, with names instead of the columns that the receiver maps from the index."""
        state = {field.name: getattr(self, field.name) for field in fields(self)}
        if self.index is not None:
            of_index = {id(column): name for name, column in self.index.columns.items()}
            names = {name: of_index[id(value)] for name, value in state.items() if id(value) in of_index}
            state |= {name: _OfIndex(column) for name, column in names.items()}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            column = state["index"].columns[value] if isinstance(value, _OfIndex) else value
            object.__setattr__(self, name, column)


class _OfIndex(str):
    """The name of a column of the index."""


def load_data(
    source: str | Path | Split,
    *,
    classes: Sequence[str] | None = None,
    classes_source: str = "the training data",
    may_lack_classes: bool = False,
    check_files: bool = True,
    exif: ExifRule = "auto",
) -> CocoData:
    """Read and check a data set of any format.

    A data set that has several splits is named by one of them. With `classes`, the class indices follow
    their order, matched by name, whatever their ids in the files; with `may_lack_classes`, or if the format
    has no list of classes, the files may list only some of them. Errors call the origin of `classes` by the
    text `classes_source`. Without `check_files` no image file needs to exist.

    Raises:
        DataError: names the file, the first record at fault, and what to do about it.
    """
    annotations = read_annotations(*(source if isinstance(source, Split) else (source,)), exif=exif)
    checked = _checked(annotations, check_files=check_files, needs_classes=classes is None, exif=exif)
    findings = list(checked.findings)
    if classes is not None:
        own = classes_of(checked.categories, classes)
        may_lack = may_lack_classes or not annotations.lists_classes
        wanted = [name for name in classes if name in own] if may_lack else classes
        findings += differing_classes(wanted, own, classes_source, "here")
    for finding in findings:
        if finding.level == "error":
            raise DataError(f"{annotations.path}: {finding}")
    if isinstance(checked, Records):
        return to_columns(checked, annotations, classes, exif=exif)
    return _of_index(checked, annotations, classes, exif)


def to_columns(
    records: Records,
    annotations: Annotations,
    class_names: Sequence[str] | None = None,
    *,
    exif: ExifRule = "auto",
) -> CocoData:
    """Return the data set of checked records.

    Without `class_names` its classes are in the order of their category ids.
    """
    own = classes_of(records.categories, class_names or ())
    names = tuple(own if class_names is None else class_names)
    listed = sorted((own[name].id, index) for index, name in enumerate(names) if name in own)
    ids, indices = np.array(listed, dtype=np.int64).reshape(-1, 2).T
    num_boxes = np.bincount(records.image_rows, minlength=len(records.image_ids))
    return CocoData(
        annotations_path=annotations.path,
        images_dir=annotations.images_dir,
        class_names=names,
        category_ids=_ids_of(names, own),
        notices=_notices(annotations, records, own, records.iscrowd, num_boxes),
        image_ids=records.image_ids,
        sizes_hw=records.sizes_hw,
        file_names=records.file_names,
        box_offsets=np.concatenate([[0], np.cumsum(num_boxes)]),
        boxes_xywh_px=records.boxes_xywh_px,
        box_classes=indices[np.searchsorted(ids, records.category_ids)],
        iscrowd=records.iscrowd,
        areas=records.areas,
        annotation_ids=records.annotation_ids,
        exif=exif,
    )


def _checked(
    annotations: Annotations, *, check_files: bool, needs_classes: bool, exif: ExifRule
) -> Records | Index:
    """Return the checked records; of a large annotation file their index, which is made the first time."""

    def check() -> Records:
        return check_records(annotations, check_files=check_files, needs_classes=needs_classes, exif=exif)

    if not isinstance(annotations.document, LargeDocument):
        return check()
    with entry_of(annotations.document.path) as entry:
        if entry.index is not None and (not check_files or entry.has_images(annotations.images_dir)):
            return entry.index
        records = check()
        is_sound = all(each.level == "warning" and each.kind != "no_size" for each in records.findings)
        if entry.index is not None or not is_sound or not classes_of(records.categories):
            return records
        return _store(entry, records, annotations, images_were_there=check_files) or records


def _store(
    entry: Entry, records: Records, annotations: Annotations, *, images_were_there: bool
) -> Index | None:
    data = to_columns(records, annotations)
    images = {"image_ids": data.image_ids, "sizes_hw": data.sizes_hw, "file_names": data.file_names}
    boxes = {
        name: getattr(data, name)
        for name in ("boxes_xywh_px", "box_classes", "iscrowd", "areas", "annotation_ids")
    }
    return entry.store(
        [images | {"num_boxes": data.num_boxes}, {"box_offsets": data.box_offsets}, boxes],
        images_were_there=images_were_there,
        findings=records.findings,
        class_names=data.class_names,
        categories=records.categories,
        fingerprint=data.fingerprint(),
    )


def _of_index(
    index: Index, annotations: Annotations, class_names: Sequence[str] | None, exif: ExifRule
) -> CocoData:
    """Return the data set of an index; with its classes in another order, their column is a copy."""
    own = classes_of(index.categories, class_names or ())
    names = tuple(own if class_names is None else class_names)
    columns = {name: column for name, column in index.columns.items() if name != "num_boxes"}
    indices = [names.index(name) for name in index.class_names]
    if indices != list(range(len(indices))):
        columns["box_classes"] = np.array(indices)[columns["box_classes"]]
    num_boxes = np.diff(columns["box_offsets"])
    return CocoData(
        annotations_path=annotations.path,
        images_dir=annotations.images_dir,
        class_names=names,
        category_ids=_ids_of(names, own),
        notices=_notices(annotations, index, own, columns["iscrowd"], num_boxes),
        exif=exif,
        index=index,
        **columns,
    )


def _ids_of(names: Sequence[str], own: dict[str, Category]) -> tuple[int | None, ...]:
    return tuple(own[name].id if name in own else None for name in names)


def classes_of(categories: Iterable[Category], class_names: Sequence[str] = ()) -> dict[str, Category]:
    """Return the categories that are classes, by name in the order of their ids.

    Categories that only group others, such as Roboflow's id 0, are no classes unless `class_names` has them.
    """
    own = {category.name: category for category in categories if not category.only_groups}
    groups = {category.name: category for category in categories if category.only_groups}
    return own | {name: groups[name] for name in class_names if name in groups and name not in own}


def differing_classes(names: Sequence[str], own: Iterable[str], there: str, here: str) -> list[Finding]:
    """Return a finding if the classes `names` of `there` differ from the classes `own` of `here`."""
    expected, listed = set(names), set(own)
    lacking, foreign = [n for n in names if n not in listed], [n for n in own if n not in expected]
    looks_equal = {folded(name) for name in lacking} & {folded(name) for name in foreign}
    show = ascii if looks_equal else str
    examples = [f"{show(name)} only in {there}" for name in lacking]
    examples += [f"{show(name)} only {here}" for name in foreign]
    return found("classes_differ", "class", f"not shared with {there}; classes must agree by name", examples)


def _notices(
    annotations: Annotations,
    checked: Records | Index,
    own: dict[str, Category],
    iscrowd: NDArray[np.bool_],
    num_boxes: NDArray[np.int64],
) -> list[str]:
    dropped = [category.name for category in checked.categories if category not in own.values()]
    notices = [str(finding) for finding in checked.findings if finding.level == "warning"]
    if dropped:
        notices.append(f"category {list_names(dropped)} only groups others and was left out")
    if iscrowd.any():
        notices.append(f"{int(iscrowd.sum())} crowd boxes serve evaluation only")
    if (num_boxes == 0).any():
        notices.append(f"{int((num_boxes == 0).sum())} of {len(num_boxes)} images have no boxes and are kept")
    return [f"{annotations.path}: {notice}" for notice in notices]
