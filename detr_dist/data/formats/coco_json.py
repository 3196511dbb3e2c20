"""COCO: one JSON with lists of images, annotations and categories."""

import gc
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from detr_dist.config_types import ExifRule
from detr_dist.data.formats.annotations import Annotations
from detr_dist.errors import DataError
from detr_dist.text import list_names, value_of

LARGE_BYTES = 10_000_000
"""From this size on an annotation file is read block by block, and what training needs of it is kept in an
index."""


def read_coco(folder: Path, _: ExifRule) -> Annotations:
    """Read the COCO JSON of a data folder."""
    path, images_dir = find_annotations(folder)
    is_large = path.stat().st_size >= LARGE_BYTES
    return Annotations(path, images_dir, LargeDocument(path) if is_large else read_document(path))


class LargeDocument(Mapping[str, Sequence[Any]]):
    """The lists of a large COCO JSON, which is read when the first of them is needed.

    Raises:
        DataError: then, as `read_document`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def _lists(self) -> Mapping[str, Sequence[Any]]:
        from detr_dist.data.formats.json_stream import stream_document  # imports Arrow

        return stream_document(self.path) or read_document(self.path)

    def __getitem__(self, name: str) -> Sequence[Any]:
        return self._lists[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._lists)

    def __len__(self) -> int:
        return len(self._lists)


def find_annotations(folder: str | Path) -> tuple[Path, Path]:
    """Return the COCO JSON of a data folder, and the folder that its `file_name` entries are relative to.

    Either one `*.json` of any name is next to the images, usually `_annotations.coco.json` or
    `annotations.json`, or the folder has COCO's own layout: `annotations/` with one JSON, and `images/`.

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
            f"{folder}: has annotations/ but no images/ beside it; put the images in {folder / 'images'}"
        )
    return _only(apart, folder / "annotations"), folder / "images"


def read_document(path: Path) -> dict[str, list[Any]]:
    """Read the images, annotations and categories of a COCO JSON.

    Raises:
        DataError: the file cannot be read, is not JSON, or does not have the form of a COCO file.
    """
    document = _read_json(path)
    if not isinstance(document, dict):
        raise DataError(
            f"{path}: holds a {type(document).__name__}, but a COCO file is an object with 'images'"
        )
    for name in ("images", "annotations", "categories"):
        if name not in document:
            raise DataError(
                f"{path}: has no {name!r}; a COCO file holds 'images', 'annotations' and 'categories'"
            )
        if not isinstance(document[name], list):
            raise DataError(f"{path}: {name!r} is {value_of(document[name])}; it must be a list")
    return document


def _read_json(path: Path) -> Any:
    """Read a JSON file without the outlines: in COCO's own files they take most of the memory."""
    collecting = gc.isenabled()
    gc.disable()  # the collector would repeatedly scan a million new objects, none of them garbage
    try:
        return json.loads(path.read_bytes(), object_pairs_hook=without_outline)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}: broken JSON at line {error.lineno}, column {error.colno}: {error.msg}; "
            "repair the file or export it again"
        ) from None
    except RepeatedKeyError as error:
        raise DataError(f"{path}: one object has several values for {error}; keep one of them") from None
    except (UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{path}: not a JSON file: {error}; export it again") from None
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read: {error.strerror}; check the file and its permissions"
        ) from None
    finally:
        if collecting:
            gc.enable()


class RepeatedKeyError(Exception):
    """One object of a JSON has several values for a key, which is the text of the error."""


def without_outline(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of a JSON without its outline: in COCO's own files these take most of the memory.

    Raises:
        RepeatedKeyError: a key has several values.
    """
    record = dict(pairs)
    if len(record) < len(pairs):
        for key, value in pairs:
            if value != record[key]:
                raise RepeatedKeyError(repr(key))
    record.pop("segmentation", None)
    return record


def _json_files(folder: Path) -> list[Path]:
    """Return all JSON files but hidden ones: macOS writes `._name.json` next to files that it copies."""
    return sorted(p for p in folder.glob("*.json") if p.is_file() and not p.name.startswith("."))


def _only(json_paths: list[Path], folder: Path) -> Path:
    if len(json_paths) > 1:
        raise DataError(
            f"{folder}: {len(json_paths)} JSON files, so it is not clear which holds the annotations: "
            f"{list_names(p.name for p in json_paths)}; keep one there and move the others away"
        )
    return json_paths[0]
