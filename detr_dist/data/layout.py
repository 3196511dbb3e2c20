"""Where annotations and images are on disk, and the names of files."""

import os
import posixpath
import unicodedata
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from posixpath import join
from typing import NamedTuple

from detr_dist.data.images import image_suffixes
from detr_dist.errors import DataError
from detr_dist.text import list_names


def find_annotations(folder: str | Path) -> tuple[Path, Path]:
    """Return the COCO JSON of a data folder and the folder that its `file_name` entries start from.

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
            f"{folder}: has annotations/ but no images/ beside it; put the images in {folder / 'images'}"
        )
    return _only(apart, folder / "annotations"), folder / "images"


class FoundImages(NamedTuple):
    """The images in a folder and its sub-folders, by the suffixes that Pillow reads."""

    folder: Path
    names: list[str]
    """Relative to the folder, sorted."""
    left_out: list[str]
    """What else is there, sorted: files of other suffixes, hidden files and folders, folders that cannot be
    listed, and links to a folder that they lie in."""


def find_images(source: Path) -> FoundImages:
    """Return the images in a folder, or a file itself, whatever its suffix. Links to folders are followed.

    Raises:
        DataError: the path does not exist, or holds no image.
    """
    if source.is_file():
        return FoundImages(source.parent, [source.name], [])
    if not source.is_dir():
        raise DataError(f"{source}: does not exist; give an image or a folder of images")
    names: list[str] = []
    left_out: list[str] = []
    for parent, folders, files in os.walk(
        source, followlinks=True, onerror=lambda error: left_out.append(_relative(error.filename, source))
    ):
        for name in folders.copy():
            path = Path(parent, name)
            if name.startswith(".") or (path.is_symlink() and _leads_back(path, source)):
                folders.remove(name)
                left_out.append(_relative(path, source))
        for name in files:
            path = Path(parent, name)
            # A broken link is not skipped silently, and reading a pipe would wait.
            is_taken = _is_image(path) and (path.is_file() or not path.exists())
            (names if is_taken else left_out).append(_relative(path, source))
    if not names:
        raise DataError(
            f"{source}: holds no image of a suffix that Pillow reads, as .jpg or .png, "
            f"and {len(left_out)} other files; give an image or a folder of images"
        )
    return FoundImages(source, sorted(names), sorted(left_out))


def missing_images(images_dir: Path, file_names: Iterable[str]) -> set[str]:
    """Return the files that do not exist, by one listing per folder; a stat per image would be slow."""
    listings: dict[str, set[str]] = {}
    missing = set()
    for file_name in file_names:
        parent, name = posixpath.split(file_name)
        if parent not in listings:
            listings[parent] = _listing(images_dir, parent)
        if name not in listings[parent]:
            missing.add(file_name)
    return missing


def unlisted_images(images_dir: Path, file_names: list[str]) -> list[str]:
    """Return the images in the folders of the listed files that are not listed themselves."""
    real = {name: _real(images_dir, name) for name in {"", *map(posixpath.dirname, file_names)}}
    listed = {join(real[posixpath.dirname(name)], posixpath.basename(name)) for name in file_names}
    there = (join(folder, name) for folder in set(real.values()) for name in _listing(images_dir, folder))
    unlisted = (path for path in there if path not in listed and _is_image(PurePosixPath(path)))
    return sorted(path.removeprefix(join(real[""], "")) for path in unlisted)


def difference_in_name(images_dir: Path, missing: list[str]) -> str:
    """Return why the first of the missing files is not found, if its name alone shows it.

    It may exist under a name that looks the same: in another Unicode normal form (macOS decomposes), in
    upper or lower case, or without the backslashes of Windows.
    """
    if not missing:
        return ""
    wanted = PurePosixPath(missing[0].replace("\\", "/")).parts
    there: tuple[str, ...] = ()
    for part in wanted:
        names = _listing(images_dir, join("", *there))
        alike = part if part in names or part == "/" else _first_alike(part, names)
        if alike is None:
            is_absolute = wanted[0] == "/" or PureWindowsPath(missing[0]).drive
            return "an absolute path, which is not there: make it relative" if is_absolute else ""
        there = (*there, alike)
    kind = "case"
    if "\\" in missing[0]:
        kind = "backslashes, which must be /"
    elif unicodedata.normalize("NFC", join(*there)) == unicodedata.normalize("NFC", join(*wanted)):
        kind = "the Unicode normal form"
    return f"there is {join(*there)!a}, but not {missing[0]!a}: they differ in {kind}"


def _first_alike(name: str, names: set[str]) -> str | None:
    return min((each for each in names if folded(each) == folded(name)), default=None)


def folded(name: str) -> str:
    """Return the same text for names that look the same but for upper and lower case."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", name).casefold())


def encoded_name(file_name: str) -> bytes | None:
    """Return a file's name as Linux keeps it, in UTF-8 whatever the locale; None if no file can have it."""
    try:
        return file_name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return None


def decoded_name(encoded: bytes) -> str:
    """Return the name that `encoded_name` encodes."""
    return encoded.decode("utf-8", "surrogateescape")


def path_of(folder: Path, file_name: str) -> Path:
    """Return the path of a file that a JSON names relative to `folder`, or absolutely.

    Raises:
        UnicodeEncodeError: no file can have such a name.
    """
    return folder / os.fsdecode(file_name.encode("utf-8", "surrogateescape"))


def _relative(path: str | Path, source: Path) -> str:
    return str(Path(path).relative_to(source))


def _leads_back(link: Path, source: Path) -> bool:
    """Return whether a link leads to a folder between it and `source`, or to one that contains these."""
    target, above = link.resolve(), link.parent
    while not above.resolve().is_relative_to(target):
        if above == source:
            return False
        above = above.parent
    return True


def _is_image(path: PurePath) -> bool:
    return path.suffix.lower() in image_suffixes() and not path.name.startswith(".")


def _real(images_dir: Path, folder: str) -> str:
    """Return the folder's absolute path without links; its name alone where no folder can have that."""
    with suppress(ValueError):
        return decoded_name(os.path.realpath(os.fsencode(path_of(images_dir, folder))))
    return folder


def _listing(images_dir: Path, folder: str) -> set[str]:
    """Return the names in a folder that a JSON names; none where it does not exist."""
    try:
        with os.scandir(path_of(images_dir, folder)) as entries:
            return {decoded_name(os.fsencode(entry.name)) for entry in entries}
    except (OSError, ValueError):  # ValueError: a name that no file can have
        return set()


def _json_files(folder: Path) -> list[Path]:
    """Return all but hidden files: macOS leaves `._name.json` beside files that it copied."""
    return sorted(p for p in folder.glob("*.json") if p.is_file() and not p.name.startswith("."))


def _only(json_paths: list[Path], folder: Path) -> Path:
    if len(json_paths) > 1:
        raise DataError(
            f"{folder}: {len(json_paths)} JSON files, so it is not clear which holds the annotations: "
            f"{list_names(p.name for p in json_paths)}; keep one there and move the others away"
        )
    return json_paths[0]
