"""Pascal VOC: one XML file for each image."""

import re
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from math import isfinite
from pathlib import Path
from posixpath import join, splitext
from typing import Any

from detr_dist.config_types import ExifRule
from detr_dist.data.columns import Faults
from detr_dist.data.formats.annotations import SPLIT_OF_NAME, Annotations, Splits
from detr_dist.data.formats.folders import names_in, read_lines, read_sizes_hw
from detr_dist.data.formats.xml_elements import Element, read_elements
from detr_dist.data.images import image_suffixes
from detr_dist.data.records import RULES as RECORD_RULES
from detr_dist.serving.decoding import UnreadableImageError

ROOT_TAG = "annotation"

_LAYOUTS = (("Annotations", "JPEGImages"), ("Annotations", "images"), ("annotations", "images"))
"""Folders of the XML files and of the images, if these are not side by side."""

_RULES = {
    "unreadable_image": RECORD_RULES["unreadable_image"],
    "unknown_image": ("XML file", "without its image; restore the image, or remove the file"),
    "unknown_xml": ("line", "that names an image without an XML file; correct or remove them"),
    "duplicate_stem": ("XML file", "with several images of its name; rename all but one"),
    "malformed_object": ("object", "without the form of Pascal VOC; correct or remove them"),
    "negative_box": ("box", "of negative width or height; correct or remove them"),
}

_FROM_PASCAL = re.compile(r"The VOC\d{4} Database")


def voc_folder(folder: Path) -> Splits | None:
    """Return the splits of a folder in Pascal VOC's layout, or with each XML file beside its image.

    Returns None if it has no XML file in these places.
    """
    for xml_name, images_name in _LAYOUTS:
        xml_dir, images_dir = folder / xml_name, folder / images_name
        if images_dir.is_dir() and (stems := xml_stems(xml_dir)):
            lists = _split_lists(folder / "ImageSets" / "Main")
            if not lists:
                return {"": partial(_read_voc, folder, xml_dir, images_dir, stems)}
            return {
                split: partial(_read_list, path, xml_dir, images_dir, set(stems))
                for split, path in lists.items()
            }
    stems = xml_stems(folder)
    return {"": partial(_read_voc, folder, folder, folder, stems)} if stems else None


def xml_stems(folder: Path) -> list[str]:
    """Return the names of the XML files in a folder, sorted and without `.xml`; none if it does not exist."""
    return [name[: -len(".xml")] for name in names_in(folder, ".xml")]


def _split_lists(folder: Path) -> dict[str, Path]:
    """Return the list of each split; `trainval` is the training split if there is no other."""
    paths = {path.stem.lower(): path for path in sorted(folder.glob("*.txt"))}
    lists = {SPLIT_OF_NAME[stem]: path for stem, path in paths.items() if stem in SPLIT_OF_NAME}
    if "train" not in lists and "trainval" in paths:
        lists["train"] = paths["trainval"]
    return lists


def _read_list(path: Path, xml_dir: Path, images_dir: Path, stems: set[str], exif: ExifRule) -> Annotations:
    """Read the images that a file of ImageSets/Main lists."""
    faults, listed = Faults(_RULES), dict[str, None]()
    for line, text in enumerate(read_lines(path), start=1):
        name = text.strip()
        if name not in stems:
            name = re.sub(r"\s+-?[01]$", "", name)  # lists of one class have a mark after the name
        if name in stems:
            listed[name] = None
        elif name:
            faults.add("unknown_xml", examples=[f"{path.name}:{line}: {name}"])
    return _read_voc(path, xml_dir, images_dir, list(listed), exif, faults)


def _read_voc(
    path: Path,
    xml_dir: Path,
    images_dir: Path,
    stems: Sequence[str],
    exif: ExifRule,
    faults: Faults | None = None,
) -> Annotations:
    """Read the XML files of these names, and the sizes that they lack from the images."""
    faults = faults or Faults(_RULES)
    files_of = _images_by_stem(images_dir)
    images: list[dict[str, Any]] = []
    objects: list[tuple[str, dict[str, Any]]] = []
    for stem in stems:
        xml_path = xml_dir / f"{stem}.xml"
        if not xml_path.exists():
            xml_path = next(each for each in xml_dir.iterdir() if each.stem == stem)  # .XML
        shown = xml_path.name if xml_dir == path else f"{xml_dir.name}/{xml_path.name}"
        (root,) = read_elements(xml_path, depth=0)
        name = _image_name(root, stem, files_of, shown, faults)
        if name is None:
            continue
        image = {"id": len(images) + 1, "file_name": name, **_size(root), "origin": shown}
        images.append(image)
        is_original = bool(_FROM_PASCAL.fullmatch(root.text_of("source", "database")))
        for element in root.all("object"):
            try:
                class_name, box = _object(element, is_original)
            except _WrongObjectError as error:
                faults.add(error.kind, examples=[f"{shown}:{error.line}: {error}"])
                continue
            origin = f"{shown}:{element.line}"
            objects.append((class_name, {"image_id": image["id"], "bbox": box, "origin": origin}))
    names = sorted({class_name for class_name, _ in objects})
    ids = {name: id_ for id_, name in enumerate(names, start=1)}
    lists = {
        "images": _with_sizes(images, images_dir, exif, faults),
        "annotations": [
            {"id": id_, "category_id": ids[class_name], **box}
            for id_, (class_name, box) in enumerate(objects, start=1)
        ],
        "categories": [{"id": id_, "name": name} for name, id_ in ids.items()],
    }
    return Annotations(
        path,
        images_dir,
        lists,
        tuple(faults.findings()),
        lists_classes=False,
        has_own_folder=path.is_dir(),
    )


def _images_by_stem(folder: Path) -> dict[str, list[str]]:
    files_of = defaultdict(list)
    for name in names_in(folder):
        stem, suffix = splitext(name)
        if suffix.lower() in image_suffixes():
            files_of[stem].append(name)
    return files_of


def _image_name(
    root: Element, stem: str, files_of: dict[str, list[str]], shown: str, faults: Faults
) -> str | None:
    """Return the image of an XML file: that of the same name, else the one that it names."""
    written = root.text_of("filename").replace("\\", "/").rpartition("/")[2]
    files = files_of.get(stem, [])
    if len(files) > 1 and written not in files:
        faults.add("duplicate_stem", examples=[f"{shown}: {' and '.join(files)}"])
        return None
    if files:
        return written if written in files else files[0]
    if written in files_of.get(splitext(written)[0], []):
        return written
    faults.add("unknown_image", examples=[f"{shown}: {written or stem}"])
    return None


def _size(root: Element) -> dict[str, int]:
    """Return width and height; nothing if the file lacks them, or gives 0 as some tools do."""
    sides = {side: root.text_of("size", side) for side in ("height", "width")}
    is_known = all(re.fullmatch(r"0*[1-9]\d{0,9}", text) for text in sides.values())
    return {side: int(text) for side, text in sides.items()} if is_known else {}


def _with_sizes(
    images: list[dict[str, Any]], images_dir: Path, exif: ExifRule, faults: Faults
) -> list[dict[str, Any]]:
    """Return the images, with sizes from their files if they have none."""
    unsized = [image for image in images if "width" not in image]
    sizes_hw = read_sizes_hw([join(images_dir, image["file_name"]) for image in unsized], exif)
    for image, size_hw in zip(unsized, sizes_hw, strict=True):
        if isinstance(size_hw, UnreadableImageError):
            faults.add("unreadable_image", examples=[f"{image['origin']}: {size_hw}"])
        else:
            image["height"], image["width"] = size_hw
    return [image for image in images if "width" in image]


class _WrongObjectError(Exception):
    def __init__(self, kind: str, line: int, problem: str) -> None:
        super().__init__(problem)
        self.kind = kind
        self.line = line


def _object(element: Element, is_original: bool) -> tuple[str, list[float]]:
    """Return the class name and the box [x, y, width, height] of an object.

    Coordinates are edges in pixels from 0, as nearly all tools write them. PASCAL's own files count pixels
    from 1 and include the last one, so their left and upper edges are one less.

    Raises:
        _WrongObjectError: with the kind of fault and its line.
    """
    name, box = element.text_of("name"), element.first("bndbox")
    if not name:
        raise _WrongObjectError("malformed_object", element.line, "has no 'name'")
    if box is None:
        raise _WrongObjectError("malformed_object", element.line, f"{name!r} has no 'bndbox'")
    left, upper, right, lower = (_coordinate(box, tag) for tag in ("xmin", "ymin", "xmax", "ymax"))
    if is_original:
        left, upper = left - 1, upper - 1
    if right < left or lower < upper:
        edges = f"xmin {left:g}, ymin {upper:g}, xmax {right:g}, ymax {lower:g}"
        raise _WrongObjectError("negative_box", box.line, edges)
    return name, [left, upper, right - left, lower - upper]


def _coordinate(box: Element, tag: str) -> float:
    found = box.first(tag)
    if found is None:
        raise _WrongObjectError("malformed_object", box.line, f"has no {tag!r}")
    try:
        value = float(found.text)
    except ValueError:
        value = float("nan")
    if not isfinite(value):
        raise _WrongObjectError("malformed_object", found.line, f"{tag} {found.text.strip()!r} is no number")
    return value
