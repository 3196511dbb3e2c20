"""The rules for the records of a data set; violations become findings, the other records become columns.

Each rule examines a complete column. Loading a data set raises the first error, `check-data` shows them all.
"""

from collections import Counter
from dataclasses import dataclass
from math import nan
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from detr_dist.config_types import ExifRule
from detr_dist.data.columns import Faults, Finding, Floats, Integers, Mask, Section, found
from detr_dist.data.formats.annotations import Annotations
from detr_dist.data.images import difference_in_name, encoded_name, missing_images, path_of, read_size_hw
from detr_dist.serving.decoding import UnreadableImageError

MIN_BOX_EXTENT_PX = 1e-3
"""Boxes this narrow or flat have no extent: far below a pixel, still above float32's rounding at 4000 px."""

NO_SUPERCATEGORY = {"", "-", "n/a", "nan", "none", "null", "undefined"}
"""Supercategories by which exporters mean "none"; a class with such a name groups nothing."""

# For each broken rule: the noun that is counted, and the problem or the remedy.
RULES = {
    "malformed_record": ("record", "not in the form that COCO requires; correct or remove them"),
    "malformed_box": ("box", "not of four finite numbers [x, y, width, height] in pixels; correct them"),
    "negative_box": ("box", "of negative width or height; boxes are [x, y, width, height] in pixels"),
    "unreadable_image": ("image", "that cannot be decoded; restore or remove them"),
    "no_images": ("file", "without a usable image; check that it is the right one"),
    "no_classes": ("file", "without a usable category; list the classes to be found"),
    "unknown_image": ("annotation", "of images that 'images' does not list; remove them or add the images"),
    "unknown_category": ("annotation", "of categories that 'categories' does not list; add or remove them"),
    "duplicate_image_id": ("image", "with the id of an earlier one; give each image its own"),
    "duplicate_category_id": ("category", "with the id of an earlier one; give each its own"),
    "duplicate_category_name": ("category", "with the name of an earlier one; merge or rename them"),
}

_UNKNOWN = -1  # width or height


class Category(NamedTuple):
    """A category that the JSON lists."""

    id: int
    name: str
    only_groups: bool  # no box uses it, and its name is the supercategory of another category


@dataclass(frozen=True, slots=True, eq=False)
class Records:
    """The N images without a fault, their M boxes in the order of the images, and the categories by id.

    Boxes lie inside their image and have an extent.
    """

    findings: list[Finding]
    listed_files: list[str]  # including faulty images
    missing_files: frozenset[str]
    categories: list[Category]
    image_ids: Integers  # [N]
    sizes_hw: Integers  # [N, 2]
    file_names: NDArray[np.bytes_]  # [N] of one width, see `encoded_name`
    image_rows: Integers  # [M]
    annotation_ids: Integers  # [M]
    category_ids: Integers  # [M]
    boxes_xywh_px: Floats  # [M, 4]
    iscrowd: Mask  # [M]
    areas: Floats  # [M] as annotated (of the outline, if there is one), else of the box


def check_records(
    annotations: Annotations,
    *,
    check_files: bool = True,
    needs_classes: bool = True,
    exif: ExifRule = "auto",
) -> Records:
    """Apply the rules to the images, annotations and categories of a data set.

    The boxes of a faulty record are left out with it, and are not faults themselves; categories of one name
    are merged. Without `check_files` image files need not exist; without `needs_classes` no category needs
    to.
    """
    faults, document = Faults(RULES), annotations.document
    images = Section("images", document, faults)
    files = _read_images(images, annotations.images_dir, check_files=check_files, exif=exif)
    if not images.sound.any():
        faults.add("no_images")
    categories = Section("categories", document, faults)
    names = categories.texts("name")
    categories.refuse_repeated("duplicate_category_id", names)
    boxes = Section("annotations", document, faults)
    iscrowd = boxes.integers("iscrowd", default=0).astype(bool)
    areas = boxes.numbers("area", default=nan)
    xywh_px = boxes.boxes("bbox")
    is_negative = np.any(xywh_px[:, 2:] < 0, axis=1)
    boxes.refuse("negative_box", is_negative, lambda row: f"{xywh_px[row].tolist()}")
    _, image_rows = boxes.look_up("unknown_image", "image_id", images)
    category_ids, _ = boxes.look_up("unknown_category", "category_id", categories)
    listed, category_ids = _merge_categories(categories, names, category_ids[boxes.sound])
    if needs_classes and all(category.only_groups for category in listed):
        faults.add("no_classes")

    rows = np.flatnonzero(boxes.sound)
    sizes_hw, image_rows, xywh_px = files.sizes_hw[images.sound], image_rows[rows], xywh_px[rows]
    has_extent, is_clipped = _clip(xywh_px, sizes_hw[image_rows])
    clipped = "reaching outside the image; clipped. Boxes are [x, y, width, height]"
    repairs = _repaired("box_outside", clipped, boxes, rows[is_clipped])
    without = "without extent inside the image; dropped"
    repairs += _repaired("box_without_extent", without, boxes, rows[~has_extent])
    order = np.flatnonzero(has_extent)
    order = order[np.argsort(image_rows[order], kind="stable")]
    xywh_px, areas = xywh_px[order], areas[rows[order]]
    return Records(
        findings=[*annotations.findings, *files.findings, *faults.findings(), *repairs],
        listed_files=files.listed,
        missing_files=files.missing,
        categories=listed,
        image_ids=images.ids[images.sound],
        sizes_hw=sizes_hw,
        file_names=np.array([files.encoded[row] for row in np.flatnonzero(images.sound)], dtype=np.bytes_),
        image_rows=image_rows[order],
        annotation_ids=boxes.ids[rows[order]],
        category_ids=category_ids[order],
        boxes_xywh_px=xywh_px,
        iscrowd=iscrowd[rows[order]],
        areas=np.where(np.isfinite(areas), areas, xywh_px[:, 2] * xywh_px[:, 3]),
    )


class _Files(NamedTuple):
    """The image files, one for each record of an image."""

    findings: list[Finding]
    listed: list[str]
    missing: frozenset[str]
    encoded: list[bytes | None]
    sizes_hw: Integers


def _read_images(images: Section, images_dir: Path, *, check_files: bool, exif: ExifRule) -> _Files:
    """Read names and sizes; a size that the JSON lacks is read from the header of the image file."""
    names = images.texts("file_name")
    listed = [name for name in names if name]
    sizes_hw = np.stack([images.integers(side, default=_UNKNOWN) for side in ("height", "width")], axis=1)
    has_no_size = (sizes_hw == _UNKNOWN).any(axis=1)
    images.refuse(
        "malformed_record",
        (sizes_hw < 1).any(axis=1) & ~has_no_size,
        lambda row: "width and height must be at least 1",
    )
    images.refuse_repeated("duplicate_image_id", names)
    encoded = [encoded_name(name) for name in names]
    missing = missing_images(images_dir, listed) if check_files else set()
    is_impossible = np.array([name is None for name in encoded], dtype=bool)
    is_missing = is_impossible | np.array([name in missing for name in names], dtype=bool)
    absent = [names[row] for row in np.flatnonzero(is_missing & images.sound)]
    difference = difference_in_name(images_dir, absent)
    advice = f"correct their entries ({difference})" if difference else "remove their entries"
    where = f"of {len(names)} missing in {images_dir}; restore the files or {advice}"
    unsized = [names[row] for row in np.flatnonzero(has_no_size & images.sound)]
    reread = "without width and height in the JSON; add them, or each start reads them from the files"
    findings = found("missing_image", "image", where, absent)
    findings += found("no_size", "image", reread, unsized, level="warning")
    images.sound &= ~(is_missing & (has_no_size | is_impossible))

    unreadable: dict[int, str] = {}
    for row in np.flatnonzero(has_no_size & images.sound).tolist():
        try:
            sizes_hw[row] = read_size_hw(path_of(images_dir, names[row]), exif)
        except UnreadableImageError as error:
            unreadable[row] = f"has no width and height, and {error}"
    is_unreadable = np.isin(np.arange(len(names)), list(unreadable))
    images.refuse("unreadable_image", is_unreadable, unreadable.__getitem__)
    return _Files(findings, listed, frozenset(absent), encoded, sizes_hw)


def _merge_categories(
    categories: Section, names: list[str], category_ids: Integers
) -> tuple[list[Category], Integers]:
    """Merge categories of one name; return the sound categories by id, and the category of each box."""
    groups = [_group(value) for value in categories.column("supercategory", None)]
    rows = np.flatnonzero(categories.sound)
    members, used_ids = Counter(groups[row] for row in rows), set(np.unique(category_ids).tolist())
    is_repeated = np.zeros(len(names), dtype=bool)
    first_ids: dict[str, int] = {}
    listed = []
    for row in rows[np.argsort(categories.ids[rows])].tolist():
        id_, name = int(categories.ids[row]), names[row]
        only_groups = id_ not in used_ids and members[name] > (groups[row] == name)
        first_id = id_ if only_groups else first_ids.setdefault(name, id_)
        if first_id == id_:
            listed.append(Category(id_, name, only_groups))
        else:
            is_repeated[row] = True
            category_ids = np.where(category_ids == id_, first_id, category_ids)
    categories.refuse("duplicate_category_name", is_repeated, lambda row: names[row])
    return listed, category_ids


def _group(supercategory: object) -> str | None:
    """Return the name of a supercategory; None for all ways to write that there is none."""
    is_name = isinstance(supercategory, str) and supercategory.strip().casefold() not in NO_SUPERCATEGORY
    return str(supercategory) if is_name else None


def _clip(xywh_px: Floats, sizes_hw: Integers) -> tuple[Mask, Mask]:
    """Clip boxes in place to their images, whose sizes are given per box.

    Returns which boxes have an extent afterwards, and which of these reached outside.
    """
    starts, limits = xywh_px[:, :2], sizes_hw[:, ::-1]
    outside = np.flatnonzero(((starts < 0) | (starts + xywh_px[:, 2:] > limits)).any(axis=1))
    before = xywh_px[outside]
    ends = np.minimum(before[:, :2] + before[:, 2:], limits[outside])
    starts = np.maximum(before[:, :2], 0)
    after = np.hstack([starts, np.maximum(ends - starts, 0)])
    xywh_px[outside] = after
    has_extent = np.all(xywh_px[:, 2:] > MIN_BOX_EXTENT_PX, axis=1)
    is_clipped = np.zeros(len(xywh_px), dtype=bool)
    is_clipped[outside] = np.any(np.abs(after - before) > MIN_BOX_EXTENT_PX, axis=1)
    return has_extent, is_clipped & has_extent


def _repaired(kind: str, what: str, boxes: Section, rows: NDArray[np.intp]) -> list[Finding]:
    names = (boxes.origin(row) or f"annotation {boxes.ids[row]}" for row in rows.tolist())
    return found(kind, "box", what, names, count=len(rows), level="warning")
