"""The format of a data set, recognized by the files in it, and its splits."""

from functools import partial
from pathlib import Path

from detr_dist.config_types import ExifRule
from detr_dist.data.formats.annotations import SPLIT_OF_NAME, Annotations, Splits
from detr_dist.data.formats.archives import unpacked
from detr_dist.data.formats.coco_json import read_coco
from detr_dist.data.formats.cvat import ROOT_TAG as CVAT_ROOT
from detr_dist.data.formats.cvat import cvat_splits
from detr_dist.data.formats.folders import names_in
from detr_dist.data.formats.voc import ROOT_TAG as VOC_ROOT
from detr_dist.data.formats.voc import voc_folder, xml_stems
from detr_dist.data.formats.xml_elements import root_tag
from detr_dist.data.formats.yolo import yolo_folder, yolo_splits
from detr_dist.data.formats.yolo_yaml import find_yaml
from detr_dist.errors import DataError
from detr_dist.text import list_names

KINDS_OF_SOURCE = (
    "a folder with images and their COCO JSON, YOLO's data.yaml or its folder, a Pascal VOC folder, CVAT's "
    "XML, or a .zip of any of them"
)


class NoAnnotationsError(DataError):
    """A folder has no annotations in any format."""


def open_splits(source: Path) -> Splits:
    """Return the readers of the splits of a data set.

    Raises:
        NoAnnotationsError: a folder has no annotations.
        DataError: there is no data set, or it is not clear which format it has.
    """
    path = _without_archive(source)
    if path.is_dir():
        return _splits_of_folder(path)
    suffix = path.suffix.lower()
    if path.is_file() and suffix in (".yaml", ".yml"):
        return yolo_splits(path)
    if path.is_file() and suffix == ".xml":
        if root_tag(path) != CVAT_ROOT:
            raise DataError(
                f"{path}: is not CVAT's XML for images; for Pascal VOC name the folder of its XML files"
            )
        return cvat_splits(path)
    problem = "is a file" if path.exists() else "does not exist"
    raise DataError(f"{path}: {problem}; name {KINDS_OF_SOURCE}")


def _without_archive(source: Path) -> Path:
    """Return the path with a .zip in it, as in `data.zip/test`, replaced by the folder of its contents."""
    for path in (source, *source.parents):
        if path.suffix.lower() == ".zip" and path.is_file():
            return unpacked(path) / source.relative_to(path)
    return source


def _splits_of_folder(folder: Path) -> Splits:
    """Return the splits of a folder in one of the formats, or of its sub-folders named for one."""
    kinds = _kinds_of_folder(folder)
    if len(kinds) > 1:
        both = " and ".join(f"{name} ({shown})" for name, shown in kinds.items())
        raise DataError(
            f"{folder}: holds the annotations of {both}, so it is not clear which to read; keep one "
            "there and move the others away"
        )
    if "COCO" in kinds:
        return {"": partial(read_coco, folder)}
    if "CVAT" in kinds:
        return cvat_splits(folder / kinds["CVAT"])
    splits = yolo_folder(folder) or voc_folder(folder) or _splits_of_parts(folder)
    if not splits:
        raise NoAnnotationsError(
            f"{folder}: no JSON file (COCO), no data.yaml (YOLO), no XML file (Pascal VOC, CVAT), and no "
            f"sub-folder train or valid; name {KINDS_OF_SOURCE}"
        )
    return splits


def _kinds_of_folder(folder: Path) -> dict[str, str]:
    """Return the formats whose annotations are in a folder, and a file or folder that shows each."""
    kinds = {}
    names = names_in(folder, ".json", ".xml")
    jsons = [name for name in names if name.endswith(".json")]
    jsons += [f"annotations/{name}" for name in names_in(folder / "annotations", ".json")]
    if jsons:
        kinds["COCO"] = jsons[0]
    if (yaml_path := find_yaml(folder)) is not None:
        kinds["YOLO"] = yaml_path.name
    xmls = [name for name in names if name.lower().endswith(".xml")]
    tag = _tag_or_none(folder / xmls[0]) if xmls else None
    if tag == CVAT_ROOT:
        kinds["CVAT"] = xmls[0]
        if len(xmls) > 1:
            kinds["another XML file"] = xmls[1]
    elif tag == VOC_ROOT:
        kinds["Pascal VOC"] = xmls[0]
    elif xml_stems(folder / "Annotations"):
        kinds["Pascal VOC"] = "Annotations"
    return kinds


def _tag_or_none(path: Path) -> str | None:
    try:
        return root_tag(path)
    except DataError:  # which its reader reports, if this turns out to be the format
        return None


def _splits_of_parts(folder: Path) -> Splits:
    """Return the splits of the sub-folders that are named for one; none if there is no such sub-folder."""
    splits: Splits = {}
    for path in sorted(folder.iterdir()):
        split = SPLIT_OF_NAME.get(path.name.lower())
        if split is not None and path.is_dir():
            if split in splits:
                raise DataError(f"{folder}: has several folders for the split {split!r}, one is {path.name}/")
            splits[split] = partial(_read_part, path)
    return splits


def _read_part(folder: Path, exif: ExifRule) -> Annotations:
    parts = _splits_of_folder(folder)
    if list(parts) != [""]:
        raise DataError(f"{folder}: is itself split, into {list_names(parts)}; name one folder of these")
    return parts[""](exif)
