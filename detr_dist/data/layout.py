"""Where a data set keeps its annotations and its images."""

import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from posixpath import normpath

from detr_dist.errors import DataError

NUM_NAMES_SHOWN = 4
PICTURE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


def find_annotations(folder: str | Path) -> tuple[Path, Path]:
    """The COCO JSON of a data folder and the folder that its `file_name` entries start from.

    Either one `*.json` of any name lies beside the images, usually `_annotations.coco.json` or
    `annotations.json`, or the folder holds COCO's own `annotations/` with one JSON, and `images/`.

    Raises:
        DataError: there is no such folder, or it holds no JSON or several.
    """
    folder = Path(folder)
    if not folder.is_dir():
        problem = "is a file" if folder.exists() else "does not exist"
        raise DataError(f"{folder}: {problem}; name a folder that holds images and their COCO JSON")
    beside, apart = _json_files(folder), _json_files(folder / "annotations")
    if beside:
        return _only(beside, folder), folder
    if not apart:
        raise DataError(
            f"{folder}: no JSON file; put the COCO annotations beside the images as _annotations.coco.json "
            "or annotations.json, or use the sub-folders annotations/ and images/"
        )
    if not (folder / "images").is_dir():
        raise DataError(
            f"{folder}: has annotations/ but no images/ beside it; put the pictures in {folder / 'images'}"
        )
    return _only(apart, folder / "annotations"), folder / "images"


def check_images_exist(images_dir: Path, file_names: list[str], source: Path) -> None:
    """Refuse a data set whose files are not all there.

    Raises:
        DataError: files that `source` lists are missing; says how many and names the first.
    """
    missing = missing_images(images_dir, file_names)
    if missing:
        raise DataError(
            f"{source}: {len(missing)} of {len(file_names)} images are missing in {images_dir}, "
            f"first {missing[0]!r}; restore the files or remove their entries"
        )


def missing_images(images_dir: Path, file_names: list[str]) -> list[str]:
    """Those of the files that are not there, by one listing per folder; a stat per image would be slow."""
    listings: dict[str, set[str]] = {}
    missing: list[str] = []
    for file_name in file_names:
        parent, _, name = file_name.rpartition("/")
        if parent not in listings:
            listings[parent] = _listing(images_dir / parent)
        if name not in listings[parent]:
            missing.append(file_name)
    return missing


def unlisted_pictures(images_dir: Path, file_names: list[str]) -> list[str]:
    """Pictures in the folders of the listed files that are not listed themselves."""
    listed = set(map(normpath, file_names))
    folders = {"", *(name.rpartition("/")[0] for name in listed)}
    there = (f"{folder}/{name}".lstrip("/") for folder in folders for name in _listing(images_dir / folder))
    return sorted(path for path in there if path not in listed and _is_picture(PurePosixPath(path)))


def _is_picture(path: PurePosixPath) -> bool:
    return path.suffix.lower() in PICTURE_SUFFIXES and not path.name.startswith(".")


def _listing(folder: Path) -> set[str]:
    """The names in a folder; none where there is no such folder."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries}
    except (OSError, ValueError):  # ValueError: a name that no file can have
        return set()


def shown(names: Iterable[object]) -> str:
    """The first few names, for a message of one line."""
    quoted = [repr(name if isinstance(name, str | int) else str(name)) for name in names]
    rest = len(quoted) - NUM_NAMES_SHOWN
    return ", ".join(quoted[:NUM_NAMES_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def _json_files(folder: Path) -> list[Path]:
    """Hidden files are left out: macOS leaves `._name.json` beside files that it copied."""
    return sorted(p for p in folder.glob("*.json") if p.is_file() and not p.name.startswith("."))


def _only(json_paths: list[Path], folder: Path) -> Path:
    if len(json_paths) > 1:
        raise DataError(
            f"{folder}: {len(json_paths)} JSON files, so it is not clear which holds the annotations: "
            f"{shown(p.name for p in json_paths)}; keep one there and move the others away"
        )
    return json_paths[0]
