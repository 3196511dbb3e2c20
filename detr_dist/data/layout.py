"""Where a data set keeps its annotations and its images."""

import os
import posixpath
import unicodedata
from contextlib import suppress
from pathlib import Path, PurePosixPath, PureWindowsPath
from posixpath import join

from detr_dist.data.images import image_suffixes
from detr_dist.errors import DataError
from detr_dist.text import list_names


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
        difference = difference_in_name(images_dir, missing)
        raise DataError(
            f"{source}: {len(missing)} of {len(file_names)} images are missing in {images_dir}, first "
            f"{missing[0]!r}{f' ({difference})' if difference else ''}; restore the files or "
            f"{'correct' if difference else 'remove'} their entries"
        )


def missing_images(images_dir: Path, file_names: list[str]) -> list[str]:
    """Those of the files that are not there, by one listing per folder; a stat per image would be slow."""
    listings: dict[str, set[str]] = {}
    missing: list[str] = []
    for file_name in file_names:
        parent, name = posixpath.split(file_name)
        if parent not in listings:
            listings[parent] = _listing(images_dir, parent)
        if name not in listings[parent]:
            missing.append(file_name)
    return missing


def unlisted_pictures(images_dir: Path, file_names: list[str]) -> list[str]:
    """Pictures in the folders of the listed files that are not listed themselves."""
    real = {name: _real(images_dir, name) for name in {"", *map(posixpath.dirname, file_names)}}
    listed = {join(real[posixpath.dirname(name)], posixpath.basename(name)) for name in file_names}
    there = (join(folder, name) for folder in set(real.values()) for name in _listing(images_dir, folder))
    unlisted = (path for path in there if path not in listed and _is_picture(PurePosixPath(path)))
    return sorted(path.removeprefix(join(real[""], "")) for path in unlisted)


def difference_in_name(images_dir: Path, missing: list[str]) -> str:
    """Why the first of the missing files is not found, if its name alone shows it.

    It may be there under a name that looks the same: in another Unicode normal form (macOS decomposes), in
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
    """Equal for names that look the same but for upper and lower case."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", name).casefold())


def encoded_name(file_name: str) -> bytes:
    """A file's name as Linux keeps it, in UTF-8 whatever the locale.

    Raises:
        UnicodeEncodeError: no file can have such a name.
    """
    return file_name.encode("utf-8", "surrogateescape")


def decoded_name(encoded: bytes) -> str:
    """The name that `encoded_name` encodes."""
    return encoded.decode("utf-8", "surrogateescape")


def path_of(folder: Path, file_name: str) -> Path:
    """The path of a file that a JSON names relative to `folder`, or absolutely.

    Raises:
        UnicodeEncodeError: no file can have such a name.
    """
    return folder / os.fsdecode(encoded_name(file_name))


def _is_picture(path: PurePosixPath) -> bool:
    return path.suffix.lower() in image_suffixes() and not path.name.startswith(".")


def _real(images_dir: Path, folder: str) -> str:
    """The folder's absolute path without links; its name alone where no folder can have that."""
    with suppress(ValueError):
        return decoded_name(os.path.realpath(os.fsencode(path_of(images_dir, folder))))
    return folder


def _listing(images_dir: Path, folder: str) -> set[str]:
    """The names in a folder that a JSON names; none where there is no such folder."""
    try:
        with os.scandir(path_of(images_dir, folder)) as entries:
            return {decoded_name(os.fsencode(entry.name)) for entry in entries}
    except (OSError, ValueError):  # ValueError: a name that no file can have
        return set()


def _json_files(folder: Path) -> list[Path]:
    """Hidden files are left out: macOS leaves `._name.json` beside files that it copied."""
    return sorted(p for p in folder.glob("*.json") if p.is_file() and not p.name.startswith("."))


def _only(json_paths: list[Path], folder: Path) -> Path:
    if len(json_paths) > 1:
        raise DataError(
            f"{folder}: {len(json_paths)} JSON files, so it is not clear which holds the annotations: "
            f"{list_names(p.name for p in json_paths)}; keep one there and move the others away"
        )
    return json_paths[0]
