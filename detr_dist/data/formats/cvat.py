"""CVAT's XML, "CVAT for images 1.1": one file with all images, their shapes and the labels."""

from collections import Counter, defaultdict
from functools import partial
from math import cos, isfinite, radians, sin
from pathlib import Path
from posixpath import split as split_path
from typing import Any

from detr_dist.config_types import ExifRule
from detr_dist.data.columns import Faults, found
from detr_dist.data.formats.annotations import SPLIT_OF_NAME, Annotations, Splits, path_of_split
from detr_dist.data.formats.folders import names_in
from detr_dist.data.formats.xml_elements import Element, read_elements
from detr_dist.errors import DataError

ROOT_TAG = "annotations"

_RULES = {
    "malformed_image": ("image", "without the form of CVAT; export the file again"),
    "malformed_shape": ("shape", "without the form of CVAT; correct or remove them"),
    "unknown_label": ("shape", "with a label that the task does not list; add the label or remove them"),
    "negative_box": ("box", "of negative width or height; correct or remove them"),
}

_UNUSED_SHAPES = {"points", "polyline", "mask", "skeleton", "ellipse", "cuboid"}


def cvat_splits(path: Path) -> Splits:
    """Return the splits of a CVAT XML by the subsets of its images, which are read here.

    Raises:
        DataError: it is not XML, or of another of CVAT's formats.
    """
    labels: list[str] = []
    subsets: dict[str, _Subset] = defaultdict(_Subset)
    num_tracks = 0
    for element in read_elements(path, depth=1):
        if element.tag == "meta":
            labels = _labels(element)
        elif element.tag == "image":
            subset = element.attributes.get("subset", "")
            subsets[SPLIT_OF_NAME.get(subset.lower(), subset)].add(element, labels, path.name)
        num_tracks += element.tag == "track"
    if num_tracks:
        raise DataError(
            f"{path}: is CVAT for video 1.1, with tracks; export the task as 'CVAT for images 1.1'"
        )
    if not labels:
        raise DataError(f"{path}: 'meta' lists no labels; export the task as 'CVAT for images 1.1'")
    if not subsets:
        raise DataError(f"{path}: holds no image; export the task as 'CVAT for images 1.1'")
    is_split = len(subsets) > 1 or set(subsets) & set(SPLIT_OF_NAME.values())
    named = {(name or "default") if is_split else "": subset for name, subset in subsets.items()}
    return {name: partial(subset.annotations, path, labels, name) for name, subset in named.items()}


def _labels(meta: Element) -> list[str]:
    """Return the names of the labels, without those that are parts of a skeleton."""
    for kind in ("task", "project", "job"):
        labels = meta.first(kind, "labels")
        if labels is not None:
            return [label.text_of("name") for label in labels.all("label") if label.first("parent") is None]
    return []


class _Subset:
    """The images of one subset, as the lists of COCO."""

    def __init__(self) -> None:
        self._faults = Faults(_RULES)
        self._images: list[dict[str, Any]] = []
        self._boxes: list[dict[str, Any]] = []
        self._unused: Counter[str] = Counter()

    def add(self, element: Element, labels: list[str], file_name: str) -> None:
        """Add an image and its shapes; messages call the file by `file_name`."""
        origin, attributes = f"{file_name}:{element.line}", element.attributes
        try:
            size = {side: int(attributes[side]) for side in ("height", "width")}
            name = attributes["name"].replace("\\", "/")
        except (KeyError, ValueError):
            self._faults.add(
                "malformed_image", examples=[f"{origin}: name, width or height is missing or wrong"]
            )
            return
        image_id = len(self._images) + 1
        self._images.append({"id": image_id, "file_name": name, **size, "origin": origin})
        self._images[-1]["subset"] = attributes.get("subset", "")
        for shape in element.children:
            if shape.tag in _UNUSED_SHAPES:
                self._unused[shape.tag] += 1
            if shape.tag not in ("box", "polygon"):
                continue
            where, label = f"{file_name}:{shape.line}", shape.attributes.get("label", "")
            try:
                x1, y1, x2, y2 = _corners(shape)
            except (KeyError, ValueError):
                self._faults.add("malformed_shape", examples=[f"{where}: {shape.tag} without finite numbers"])
                continue
            if label not in labels:
                self._faults.add("unknown_label", examples=[f"{where}: {label!r}"])
            elif x2 < x1 or y2 < y1:
                edges = f"xtl {x1:g}, ytl {y1:g}, xbr {x2:g}, ybr {y2:g}"
                self._faults.add("negative_box", examples=[f"{where}: {edges}"])
            else:
                ids = {"id": len(self._boxes) + 1, "image_id": image_id}
                category_id, box = labels.index(label) + 1, [x1, y1, x2 - x1, y2 - y1]
                self._boxes.append({**ids, "category_id": category_id, "bbox": box, "origin": where})

    def annotations(self, path: Path, labels: list[str], split: str, _: ExifRule) -> Annotations:
        """Return the annotations of this subset of the images of a CVAT XML."""
        listings: dict[str, set[str]] = {}
        images = [{**image, "file_name": _file_name(path.parent, image, listings)} for image in self._images]
        kinds = [f"{count} {kind}" for kind, count in sorted(self._unused.items())]
        what = "that are neither boxes nor polygons; they are not used"
        unused = found("unused_shape", "shape", what, kinds, count=self._unused.total(), level="warning")
        lists = {
            "images": images,
            "annotations": self._boxes,
            "categories": [{"id": id_, "name": name} for id_, name in enumerate(labels, start=1)],
        }
        return Annotations(
            path_of_split(path, split),
            path.parent,
            lists,
            (*self._faults.findings(), *unused),
            has_own_folder=not split,
        )


def _file_name(folder: Path, image: dict[str, Any], listings: dict[str, set[str]]) -> str:
    """Return the path of an image relative to the XML file, beside it or in `images/`."""
    name, subset = str(image["file_name"]), image["subset"]
    tried = [f"images/{name}", f"images/{subset}/{name}", name]
    for each in tried:
        parent, base = split_path(each)
        if parent not in listings:
            listings[parent] = set(names_in(folder / parent))
        if base in listings[parent]:
            return each
    return tried[0] if listings["images"] else name


def _corners(shape: Element) -> tuple[float, float, float, float]:
    """Return the corners xyxy of a box or of the box around a polygon or a rotated box.

    Raises:
        KeyError: a coordinate is missing.
        ValueError: one is no finite number.
    """
    attributes = shape.attributes
    if shape.tag == "polygon":
        points = [tuple(map(float, point.split(","))) for point in attributes["points"].split(";")]
        xs, ys = zip(*points, strict=True)
        corners = min(xs), min(ys), max(xs), max(ys)
    else:
        x1, y1, x2, y2 = (float(attributes[key]) for key in ("xtl", "ytl", "xbr", "ybr"))
        corners = x1, y1, x2, y2
        if angle := radians(float(attributes.get("rotation", 0))):
            x, y, width, height = (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1
            across = (abs(width * cos(angle)) + abs(height * sin(angle))) / 2
            along = (abs(width * sin(angle)) + abs(height * cos(angle))) / 2
            corners = x - across, y - along, x + across, y + along
    if not all(map(isfinite, corners)):
        raise ValueError
    return corners
