"""YOLO: a data.yaml with the class names, and a text file of labels for each image."""

import os
from functools import partial
from itertools import chain
from pathlib import Path
from posixpath import basename, commonpath, dirname, normpath, splitext
from posixpath import split as split_path
from typing import Any

import numpy as np

from detr_dist.config_types import ExifRule
from detr_dist.data.columns import Faults, Finding, found
from detr_dist.data.formats.annotations import Annotations, Splits, path_of_split
from detr_dist.data.formats.folders import names_in, read_lines, read_sizes_hw
from detr_dist.data.formats.yolo_labels import RULES as LABEL_RULES
from detr_dist.data.formats.yolo_labels import LabelReader, Labels
from detr_dist.data.formats.yolo_yaml import YoloYaml, find_yaml, read_yaml
from detr_dist.data.images import find_images
from detr_dist.data.records import RULES as RECORD_RULES
from detr_dist.errors import DataError
from detr_dist.serving.decoding import UnreadableImageError

_RULES = LABEL_RULES | {
    "unreadable_image": RECORD_RULES["unreadable_image"],
    "missing_image": ("image", "of the list missing; restore the files or correct their lines"),
    "duplicate_stem": ("image", "with the label file of an earlier one; rename one of them and its labels"),
    "no_labels": (
        "split",
        "without any label file; put a .txt for each image into labels/ beside images/, or beside it",
    ),
}

_ROUNDING = 1e-5
"""A box reaches outside by less than this fraction of the image because its numbers were rounded."""


def yolo_splits(path: Path) -> Splits:
    """Return the splits of a data.yaml.

    A split `test` that does not exist, or is empty, is left out: exporters list one whether there is any or
    not.
    """
    document = read_yaml(path)
    if not document.splits:
        raise DataError(f"{path}: names no images; give 'train' and 'val' the folders of their images")
    splits: Splits = {split: partial(_read_split, document, split) for split in document.splits}
    if "test" in splits:
        try:
            if all(place.is_dir() and not names_in(place) for place in document.places("test")):
                del splits["test"]
        except DataError:
            del splits["test"]
    return splits


def yolo_folder(folder: Path) -> Splits | None:
    """Return the splits of a folder with a data.yaml, or the folder itself if one above it has that.

    Returns None if the folder has no labels in YOLO's layout.

    Raises:
        DataError: it has, but no data.yaml.
    """
    path = find_yaml(folder)
    if path is not None:
        return yolo_splits(path)
    images_dir = folder / "images" if (folder / "labels").is_dir() else folder.absolute()
    labels_dir = _labels_dir(str(images_dir.absolute()))
    if not (images_dir.is_dir() and Path(labels_dir).is_dir() and labels_dir != str(images_dir)):
        return None
    for above in images_dir.absolute().parents[:3]:
        path = find_yaml(above)
        if path is not None:
            split = basename(normpath(images_dir.absolute()).removesuffix("/images"))  # as in `train/images`
            return {"": partial(_read_places, read_yaml(path), [images_dir], split)}
    raise DataError(
        f"{folder}: has labels of YOLO, but there is no data.yaml in it or above it; add one with "
        "'names: [player, ball]', the names of the classes in the order of their numbers"
    )


def _read_split(document: YoloYaml, split: str, exif: ExifRule) -> Annotations:
    return _read_places(document, document.places(split), split, exif)


def _read_places(document: YoloYaml, places: list[Path], split: str, exif: ExifRule) -> Annotations:
    """Read the images in some folders and lists, and their labels."""
    faults = Faults(_RULES)
    images_of = {place: _images_of(document, place, faults) for place in places}
    paths = list(dict.fromkeys(chain.from_iterable(images_of.values())))
    # What is named, so that folders below it are in the names of the images even if there is only one.
    folders = {str(place.absolute()) for place in places if place.is_dir()}
    listed = {dirname(path) for place in places if not place.is_dir() for path in images_of[place]}
    root = normpath(document.root.absolute())
    folders |= {root} if listed and commonpath({root, *listed}) == root else listed
    images_dir = Path(commonpath(folders)) if folders else places[0]
    sizes_hw = read_sizes_hw(paths, exif)
    label_paths, warnings = _find_labels(paths, faults)
    reader, above = LabelReader(document.names, faults), f"{document.path.absolute().parent}/"
    images: list[dict[str, Any]] = []
    for row, (path, size_hw, label_path) in enumerate(zip(paths, sizes_hw, label_paths, strict=True)):
        if isinstance(size_hw, UnreadableImageError):
            faults.add("unreadable_image", examples=[str(size_hw)])
            continue
        name = path.removeprefix(f"{images_dir}/")
        images.append({"id": row + 1, "file_name": name, "height": size_hw[0], "width": size_hw[1]})
        if label_path:
            reader.read(row, Path(label_path), label_path.removeprefix(above))
    boxes = _boxes(reader.labels, [path.removeprefix(above) for path in label_paths], sizes_hw)
    categories = [{"id": number, "name": name} for number, name in document.names.items()]
    lists = {"images": images, "annotations": boxes, "categories": categories}
    return Annotations(
        path_of_split(document.path, split),
        images_dir,
        lists,
        (*faults.findings(), *warnings),
        has_own_folder=all(place.is_dir() for place in places),
    )


def _images_of(document: YoloYaml, place: Path, faults: Faults) -> list[str]:
    """Return the absolute paths of the images in a folder, or in the lines of a .txt list."""
    if place.is_dir():
        folder = place.absolute()
        return [f"{folder}/{name}" for name in find_images(folder).names]
    if place.suffix.lower() != ".txt":
        raise DataError(f"{document.path}: {place} is neither a folder nor a .txt list of images")
    paths = []
    for line, text in enumerate(read_lines(place), start=1):
        name = text.strip().replace("\\", "/")
        bases = (place.parent, document.root, document.path.parent)
        tried = (normpath(base.absolute() / name) for base in bases)
        path = next(filter(os.path.isfile, tried), None)
        if path is not None:
            paths.append(path)
        elif name:
            faults.add("missing_image", examples=[f"{place.name}:{line}: {name}"])
    return paths


def _find_labels(paths: list[str], faults: Faults) -> tuple[list[str], list[Finding]]:
    """Return the label file of each image, "" if it has none, and the warnings about the other label files.

    It is in the folder where `labels` replaces the last `images` of the path, or beside the image.
    """
    labels_of: dict[str, dict[str, str]] = {}  # the label files of each folder of images, by stem
    owners: dict[str, str] = {}
    found_paths = []
    for path in paths:
        folder, name = split_path(path)
        if folder not in labels_of:
            labels_of[folder] = _text_files(folder) | _text_files(_labels_dir(folder))
        label_path = labels_of[folder].get(splitext(name)[0], "")
        owner = owners.setdefault(label_path, path)
        if label_path and owner != path:
            faults.add("duplicate_stem", examples=[f"{path} and {basename(owner)}"])
        found_paths.append(label_path)
    if paths and not any(found_paths):
        looked = dict.fromkeys(each for folder in labels_of for each in (_labels_dir(folder), folder))
        faults.add("no_labels", examples=[f"looked in {each}" for each in looked])
    there = (path for labels in labels_of.values() for path in labels.values())
    unused = [path for path in there if path not in owners and "/labels/" in path]
    what = "of no image of the split; they are not used"
    others = (path for path in unused if basename(path) != "classes.txt")
    return found_paths, found("label_without_image", "label file", what, others, level="warning")


def _labels_dir(folder: str) -> str:
    """Return the folder of the labels of a folder of images; the same if its path has no `images`."""
    before, images, after = f"{folder}/".rpartition("/images/")
    return f"{before}/labels/{after}".rstrip("/") if images else folder


def _text_files(folder: str) -> dict[str, str]:
    """Return the paths of the .txt files in a folder by their stems; none if it does not exist."""
    return {splitext(name)[0]: f"{folder}/{name}" for name in names_in(folder, ".txt")}


def _boxes(labels: Labels, label_paths: list[str], sizes_hw: list[Any]) -> list[dict[str, Any]]:
    """Return the annotations of all labels, in pixels."""
    rows = labels.images
    widths_heights = np.array([sizes_hw[row][::-1] for row in rows], dtype=np.float64).reshape(-1, 2)
    corners = np.array(labels.corners, dtype=np.float64).reshape(-1, 4)
    corners = np.where((corners < 0) & (corners > -_ROUNDING), 0, corners)
    corners = np.where((corners > 1) & (corners < 1 + _ROUNDING), 1, corners)
    starts_px, ends_px = corners[:, :2] * widths_heights, corners[:, 2:] * widths_heights
    xywh_px = np.hstack([starts_px, ends_px - starts_px]).tolist()
    columns = zip(rows, labels.classes, xywh_px, labels.lines, strict=True)
    return [
        {
            "id": id_,
            "image_id": row + 1,
            "category_id": number,
            "bbox": box,
            "origin": f"{label_paths[row]}:{line}",
        }
        for id_, (row, number, box, line) in enumerate(columns, start=1)
    ]
