"""Everything that is wrong in the records of a COCO JSON, where reading it for training stops at the first
fault."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from posixpath import normpath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detr_dist.data.annotations import (
    BOX,
    NUMBER,
    TEXT,
    WHOLE,
    Section,
    ValueKind,
    complaint,
    read_sections,
)
from detr_dist.data.classes import differing_names, look_alike, read_categories
from detr_dist.data.coco import CocoData, read_columns
from detr_dist.data.findings import Finding, found
from detr_dist.data.images import UnreadableImageError, read_size_hw
from detr_dist.data.layout import (
    decoded_name,
    difference_in_name,
    encoded_name,
    find_annotations,
    missing_images,
    path_of,
    unlisted_pictures,
)
from detr_dist.errors import DataError
from detr_dist.text import value_of

Record = dict[str, Any]
Sections = tuple[Section, Section, Section]

UNKNOWN_SIZES = (None, -1)


CORNERS_SHARE, CORNERS_LEAST = 1 / 3, 10
"""With more of the boxes than this share reaching outside, of at least so many, their last two numbers will
be a corner."""


@dataclass(frozen=True, slots=True)
class CheckedRecords:
    """A split as training would read it if the records at fault were not there."""

    categories: Section
    used_category_ids: NDArray[np.int64]
    missing: frozenset[str]  # listed files that are not there
    data: CocoData | None  # None where no image or no class is left
    findings: list[Finding]


def check_records(split: str) -> CheckedRecords:
    """The data folder `split`, without opening its pictures.

    Raises:
        DataError: there is no such folder, or no JSON of COCO's shape in it.
    """
    path, images_dir = find_annotations(split)
    sections = read_sections(path)
    names = [record["file_name"] for record in sections[0].records if _has_file_name(record)]
    missing = missing_images(images_dir, list(dict.fromkeys(names)))
    findings = found("missing_image", split, missing, detail=difference_in_name(images_dir, missing))
    findings += found("unlisted_picture", split, unlisted_pictures(images_dir, names))
    findings += found("no_size", split, (r["file_name"] for r in sections[0].records if _lacks_size(r)))
    data = None
    try:
        data = read_columns(sections, images_dir, check_files=False)
    except (DataError, UnicodeEncodeError):  # only now is each record looked at, which is slow
        faults = _Faults(images_dir, frozenset(missing))
        sections = faults.sift(sections)
        findings += faults.findings(split)
        if all(section.records for section in (sections[0], sections[2])):
            data = read_columns(sections, images_dir, check_files=False)
    if data is not None:
        num_boxes, num_clipped = len(data.box_classes), len(data.clipped_ids)
        look_like_corners = num_clipped > CORNERS_SHARE * num_boxes and num_boxes >= CORNERS_LEAST
        findings += found(
            "boxes_as_corners" if look_like_corners else "box_outside",
            split,
            map(_annotation, data.clipped_ids),
            count=num_clipped,
        )
        findings += found(
            "box_without_extent", split, map(_annotation, data.dropped_ids), count=len(data.dropped_ids)
        )
        files = (normpath(decoded_name(name)) for name in data.file_names)
        findings += found("file_listed_twice", split, _seen_before(files))
        repeated = _seen_before(sections[1].integers("id").tolist())
        findings += found("duplicate_annotation_id", split, map(_annotation, repeated))
    used_ids = np.unique(sections[1].integers("category_id"))
    return CheckedRecords(sections[2], used_ids, frozenset(missing), data, findings)


def check_classes(
    split: str, checked: CheckedRecords, first: str, class_names: tuple[str, ...]
) -> list[Finding]:
    """Whether a model that was trained on the split `first`, with its classes, can be evaluated here."""
    lacking, foreign = differing_names(class_names, checked.categories, checked.used_category_ids)
    show = ascii if look_alike(lacking, foreign) else str
    examples = [f"{show(name)} only in {first}" for name in lacking]
    examples += [f"{show(name)} only in {split}" for name in foreign]
    return found("classes_differ", split, examples)


class _Faults:
    """Takes the records at fault out of their sections, and keeps what was wrong with them."""

    def __init__(self, images_dir: Path, missing: frozenset[str]) -> None:
        self._images_dir = images_dir
        self._missing = missing
        self._examples: dict[str, list[str]] = defaultdict(list)

    def findings(self, split: str) -> list[Finding]:
        return [each for kind, examples in self._examples.items() for each in found(kind, split, examples)]

    def sift(self, sections: Sections) -> Sections:
        images, annotations, categories = sections
        image_ids, category_ids = _listed_ids(images), _listed_ids(categories)
        sound_images, sound_categories = self._sift_images(images), self._sift_categories(categories)
        boxes = self._sift_annotations(annotations, image_ids, category_ids)
        # Those of a record that was taken out go with it, and are no fault of their own.
        image_ids, category_ids = _listed_ids(sound_images), _listed_ids(sound_categories)
        kept = [r for r in boxes if r["image_id"] in image_ids and r["category_id"] in category_ids]
        sound_categories, kept = self._merge_equal_names(sound_categories, kept)
        for kind, section in (("no_images", sound_images), ("no_classes", sound_categories)):
            if not section.records:
                self._examples[kind].append(str(section.path))
        return sound_images, Section(annotations.path, annotations.name, kept), sound_categories

    def _sift_images(self, images: Section) -> Section:
        kept, ids = [], set()
        for row, record in enumerate(images.records):
            if (fault := _image_fault(record)) is not None:
                self._examples["malformed_record"].append(f"{_name(images, row)}: {fault}")
            elif record["id"] in ids:
                self._examples["duplicate_image_id"].append(f"{record['file_name']} (id {record['id']})")
            else:
                ids.add(record["id"])
                if self._can_be_read_in(record):
                    kept.append(record)
        return Section(images.path, images.name, kept)

    def _can_be_read_in(self, record: Record) -> bool:
        """Whether the file system can hold such a name, and the size is known or a picture there to tell it.
        What is not so is a missing file or becomes an unreadable one."""
        file_name = record["file_name"]
        try:
            encoded_name(file_name)
        except UnicodeEncodeError:
            return False
        if not _lacks_size(record):
            return True
        if file_name in self._missing:
            return False
        try:
            read_size_hw(path_of(self._images_dir, file_name))
        except UnreadableImageError as error:
            self._examples["unreadable_image"].append(str(error))
            return False
        return True

    def _sift_categories(self, categories: Section) -> Section:
        kept, ids = [], set()
        for row, record in enumerate(categories.records):
            fault = _fault(record, (("id", WHOLE), ("name", TEXT)))
            if fault is not None:
                self._examples["malformed_record"].append(f"{_name(categories, row)}: {fault}")
            elif record["id"] in ids:
                self._examples["duplicate_category_id"].append(f"{record['name']} (id {record['id']})")
            else:
                ids.add(record["id"])
                kept.append(record)
        return Section(categories.path, categories.name, kept)

    def _sift_annotations(
        self, annotations: Section, image_ids: set[int], category_ids: set[int]
    ) -> list[Record]:
        kept = []
        wanted = (("id", WHOLE), ("image_id", WHOLE), ("category_id", WHOLE))
        for row, record in enumerate(annotations.records):
            if (fault := _fault(record, wanted, (("iscrowd", WHOLE), ("area", NUMBER)))) is not None:
                kind = "malformed_record"
            elif (fault := _fault(record, (("bbox", BOX),))) is not None:
                kind = "malformed_box"
            elif min(record["bbox"][2:]) < 0:
                kind, fault = "negative_box", f"{record['bbox']}"
            elif record["image_id"] not in image_ids:
                kind, fault = "unknown_image", f"image_id {record['image_id']}"
            elif record["category_id"] not in category_ids:
                kind, fault = "unknown_category", f"category_id {record['category_id']}"
            else:
                kept.append(record)
                continue
            self._examples[kind].append(f"{_name(annotations, row)}: {fault}")
        return kept

    def _merge_equal_names(
        self, categories: Section, annotations: list[Record]
    ) -> tuple[Section, list[Record]]:
        """Categories of one name count as one class."""
        used_ids = np.array([record["category_id"] for record in annotations], dtype=np.int64)
        first_ids: dict[str, int] = {}
        merged: dict[int, int] = {}
        for category in read_categories(categories, used_ids):
            if category.only_groups:
                continue
            first = first_ids.setdefault(category.name, category.id)
            if first != category.id:
                merged[category.id] = first
                self._examples["duplicate_category_name"].append(f"{category.name} (id {category.id})")
        kept = [record for record in categories.records if record["id"] not in merged]
        moved = [r | {"category_id": merged.get(r["category_id"], r["category_id"])} for r in annotations]
        return Section(categories.path, categories.name, kept), moved


def _image_fault(record: Any) -> str | None:
    sizes = ("height", "width")
    fault = _fault(record, (("id", WHOLE), ("file_name", TEXT)), ((key, WHOLE) for key in sizes))
    if fault is None and any(record.get(key) not in UNKNOWN_SIZES and record[key] < 1 for key in sizes):
        return "width and height must be at least 1"
    return fault


def _fault(
    record: Any,
    required: Iterable[tuple[str, ValueKind]],
    optional: Iterable[tuple[str, ValueKind]] = (),
) -> str | None:
    """What is wrong with the first of these values that is not as it must be."""
    if not isinstance(record, dict):
        return f"{value_of(record)} is no object with keys"
    for key, kind in required:
        if key not in record:
            return f"has no {key!r}"
        if not kind.is_right(record[key]):
            return complaint(key, record[key], kind)
    for key, kind in optional:
        if record.get(key) is not None and not kind.is_right(record[key]):
            return complaint(key, record[key], kind)
    return None


def _name(section: Section, row: int) -> str:
    record = section.records[row]
    known = f" (id {value_of(record['id'])})" if isinstance(record, dict) and "id" in record else ""
    return f"{section.name}[{row}]{known}"


def _annotation(annotation_id: int) -> str:
    return f"annotation {annotation_id}"


def _listed_ids(section: Section) -> set[int]:
    return {r["id"] for r in section.records if isinstance(r, dict) and WHOLE.is_right(r.get("id"))}


def _has_file_name(record: Any) -> bool:
    return isinstance(record, dict) and TEXT.is_right(record.get("file_name"))


def _lacks_size(record: Any) -> bool:
    return _has_file_name(record) and (
        record.get("height") in UNKNOWN_SIZES or record.get("width") in UNKNOWN_SIZES
    )


def _seen_before(values: Iterable[Any]) -> list[Any]:
    """The values that an earlier one equals, once for each time that it comes again."""
    seen: set[Any] = set()
    return [value for value in values if value in seen or seen.add(value)]  # type: ignore[func-returns-value]
