"""What a check of a data set can find, and the words for it."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Literal, NamedTuple

from detr_dist.text import MAX_NAMES, printable

MAX_EXAMPLES = 10

Level = Literal["error", "warning"]
"""`error`: training or evaluation refuses the data, loses some of them, or gives figures that cannot be
trusted. `warning`: repaired by itself, or odd."""


class _Kind(NamedTuple):
    level: Level
    one: str
    many: str
    what: str


KINDS = {
    "missing_image": _Kind(
        "error", "image", "images", "not in the folder; restore the files or remove their entries"
    ),
    "unreadable_image": _Kind("error", "image", "images", "that cannot be decoded; restore or remove them"),
    "wrong_size": _Kind(
        "error",
        "image",
        "images",
        "of another size than the JSON says; correct the JSON or save them in that size",
    ),
    "no_images": _Kind("error", "split", "splits", "without a usable image; check that it is the right file"),
    "no_classes": _Kind(
        "error", "split", "splits", "without a usable category; list the classes to be found"
    ),
    "malformed_record": _Kind(
        "error", "record", "records", "unlike what COCO asks for; correct or remove them"
    ),
    "malformed_box": _Kind(
        "error",
        "box",
        "boxes",
        "not four finite numbers [x, y, width, height] in pixels; correct or remove them",
    ),
    "negative_box": _Kind(
        "error", "box", "boxes", "of negative width or height; boxes are [x, y, width, height] in pixels"
    ),
    "boxes_in_fractions": _Kind(
        "error",
        "box",
        "boxes",
        "inside the first pixel of their image, as all are; give pixels, not shares of the image",
    ),
    "boxes_as_corners": _Kind(
        "error",
        "box",
        "boxes",
        "reaching outside their image, so many that they will be corners [x1, y1, x2, y2]; boxes are [x, y, "
        "width, height]",
    ),
    "no_boxes": _Kind("warning", "split", "splits", "without a box; check that it is the right file"),
    "unknown_image": _Kind(
        "error",
        "annotation",
        "annotations",
        "of images that 'images' does not list; remove them or add the images",
    ),
    "unknown_category": _Kind(
        "error",
        "annotation",
        "annotations",
        "of categories that 'categories' does not list; add these or remove them",
    ),
    "duplicate_image_id": _Kind(
        "error", "image", "images", "with the id of an earlier one; give each image its own"
    ),
    "duplicate_category_id": _Kind(
        "error", "category", "categories", "with the id of an earlier one; give each its own"
    ),
    "duplicate_category_name": _Kind(
        "error", "category", "categories", "with the name of an earlier one; merge or rename them"
    ),
    "classes_differ": _Kind(
        "error", "class", "classes", "not in both this split and the first; they must agree by name"
    ),
    "file_listed_twice": _Kind(
        "error",
        "image",
        "images",
        "with the file of an earlier one; merge the entries and their annotations",
    ),
    "picture_in_two_splits": _Kind(
        "error",
        "picture",
        "pictures",
        "of an earlier split, pixel for pixel; keep each in one split, or the figures flatter",
    ),
    "too_many_boxes": _Kind(
        "warning", "image", "images", "with more boxes than the model has queries; raise model.num_queries"
    ),
    "box_outside": _Kind(
        "warning", "box", "boxes", "reaching outside the image; clipped. Boxes are [x, y, width, height]"
    ),
    "box_without_extent": _Kind("warning", "box", "boxes", "without extent inside the image; dropped"),
    "duplicate_box": _Kind(
        "warning", "box", "boxes", "on another of the same image and class; remove all but one"
    ),
    "tiny_box": _Kind(
        "warning", "box", "boxes", "too small to be found after the resize; raise data.shortest_edge"
    ),
    "duplicate_annotation_id": _Kind(
        "warning", "annotation", "annotations", "with the id of an earlier one; give each its own"
    ),
    "class_without_boxes": _Kind(
        "warning", "class", "classes", "without a box; it cannot be learnt from or measured on this split"
    ),
    "mostly_empty": _Kind(
        "warning", "image", "images", "without a box, more than half; check that nothing was lost"
    ),
    "no_size": _Kind(
        "warning",
        "image",
        "images",
        "without width and height in the JSON; add them, or each start reads them from the files",
    ),
    "duplicate_picture": _Kind(
        "warning", "picture", "pictures", "that another file of the split holds, pixel for pixel"
    ),
    "unlisted_picture": _Kind(
        "warning", "picture", "pictures", "in the folder that the JSON does not list; they are not used"
    ),
    "lookalike_in_two_splits": _Kind(
        "warning",
        "picture",
        "pictures",
        "looking like one of an earlier split; frames of one shot, or copies, make the figures flatter",
    ),
    "dark_picture": _Kind(
        "warning",
        "picture",
        "pictures",
        "without a pixel brighter than 16 of 255; if 10 or 12 bits are stored as 16, scale them up",
    ),
    "exif_rotation": _Kind(
        "warning",
        "picture",
        "pictures",
        "with an EXIF rotation, which training does not apply; check that their boxes are not rotated",
    ),
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One kind of fault in one split."""

    kind: str
    level: Level
    split: str
    count: int
    message: str
    examples: tuple[str, ...]  # the first few: file names, records, classes

    def __str__(self) -> str:
        names = [printable(name) for name in self.examples[:MAX_NAMES]]
        rest = self.count - len(names)
        more = f" and {rest} more" if names and rest > 0 else ""
        return ": ".join([self.message, *([", ".join(names) + more] if names else [])])


def found(
    kind: str,
    split: str,
    examples: Iterable[str],
    *,
    count: int | None = None,
    level: Level | None = None,
    detail: str = "",
) -> list[Finding]:
    """The finding, or none where the count is 0; without `count` there is one example for each.

    `level` and `detail` (in brackets behind the message) say what is so in this case only.
    """
    named = list(examples) if count is None else list(islice(examples, MAX_EXAMPLES))
    count = len(named) if count is None else count
    if count == 0:
        return []
    usual, one, many, what = KINDS[kind]
    message = f"{count} {one if count == 1 else many} {what}" + (f" ({detail})" if detail else "")
    return [Finding(kind, level or usual, split, count, message, tuple(named[:MAX_EXAMPLES]))]
