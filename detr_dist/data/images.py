"""Image files: where they are, their names, their headers, and their pixels as uint8 RGB tensors."""

import os
import posixpath
import unicodedata
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from posixpath import join
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from PIL.JpegImagePlugin import get_sampling
from torch import Tensor

from detr_dist.config_types import ExifRule
from detr_dist.errors import DataError
from detr_dist.serving.decoding import UnreadableImageError, open_image
from detr_dist.serving.exif import turn_of, turned, turned_size

_ONLY_IDENTIFIED = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF"}
"""Formats whose names Pillow knows, but which it cannot decode by itself."""

_EVENLY_SAMPLED = (0, 2)
"""Pillow's numbers of the colour resolutions 4:4:4 and 4:2:0. At a reduced scale 4:2:2 would be blurred, by
three levels on average."""


@cache
def image_suffixes() -> frozenset[str]:
    """Return the suffixes, in lower case with their dot, of all formats that Pillow decodes."""
    formats = Image.registered_extensions()  # loads all plug-ins: a fifth of a second
    decoded = {*Image.OPEN, "MPO"} - _ONLY_IDENTIFIED  # MPO is opened as JPEG
    return frozenset(suffix for suffix, name in formats.items() if name in decoded)


def read_size_hw(path: Path, exif: ExifRule = "auto") -> tuple[int, int]:
    """Read height and width from the header of an image file, of the stored pixels if `exif` is `ignore`.

    The other rules give the size after the EXIF rotation, in which annotation tools display the image.

    Raises:
        UnreadableImageError: with the reason.
    """
    with open_image(path) as image:
        return turned_size((image.height, image.width), turn_of(image, exif))


def decode_reduced(
    path: Path, size_hw: tuple[int, int], needed_hw: tuple[int, int], exif: ExifRule = "ignore"
) -> Tensor | None:
    """Decode a colour JPEG of this size at the smallest of 1/2, 1/4 and 1/8 that covers `needed_hw`.

    Both sizes are those after the rotation by the rule `exif`. JPEG's own transform does this for a fraction
    of the cost. Returns None if none of these scales is large enough, or the file is of another kind or
    damaged, which `decode_rgb` then reports.
    """
    (height, width), (needed_height, needed_width) = size_hw, needed_hw
    if height < 2 * needed_height or width < 2 * needed_width:
        return None
    try:
        with open_image(path) as image:
            turn = turn_of(image, exif, size_hw)
            stored_height, stored_width = turned_size(size_hw, turn)
            if (image.format, image.mode, image.size) != ("JPEG", "RGB", (stored_width, stored_height)):
                return None
            if get_sampling(image) not in _EVENLY_SAMPLED:
                return None
            image.draft("RGB", turned_size(needed_hw, turn)[::-1])
            return turned(torch.from_numpy(np.array(image)).permute(2, 0, 1), turn)
    except UnreadableImageError:
        return None


class FoundImages(NamedTuple):
    """The images in a folder and its sub-folders, by the suffixes that Pillow reads."""

    folder: Path
    names: list[str]
    """Relative to the folder, sorted."""
    left_out: list[str]
    """Everything else, sorted: files with other suffixes, hidden files and folders, folders that cannot be
    listed, and links to a folder that contains them."""


def find_images(source: Path) -> FoundImages:
    """Return the images in a folder, or a single file whatever its suffix; links to folders are followed.

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
            # Keep broken links, so that they are reported; skip pipes, because reading one would block.
            is_taken = _is_image(path) and (path.is_file() or not path.exists())
            (names if is_taken else left_out).append(_relative(path, source))
    if not names:
        raise DataError(
            f"{source}: holds no image of a suffix that Pillow reads, as .jpg or .png, "
            f"and {len(left_out)} other files; give an image or a folder of images"
        )
    return FoundImages(source, sorted(names), sorted(left_out))


def missing_images(images_dir: Path, file_names: Iterable[str]) -> set[str]:
    """Return the files that do not exist; lists each folder once, as a stat per image would be slow."""
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
    """Return the same text for names that look the same apart from upper and lower case."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", name).casefold())


def encoded_name(file_name: str) -> bytes | None:
    """Return a file's name as Linux stores it, in UTF-8 whatever the locale; None if no file can have it."""
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
    """Return whether a link leads to a folder that contains the link itself, so that following it loops."""
    target = link.resolve()
    between = [above for above in link.parents if above.is_relative_to(source)]
    return any(above.resolve().is_relative_to(target) for above in between)


def _is_image(path: PurePath) -> bool:
    return path.suffix.lower() in image_suffixes() and not path.name.startswith(".")


def _real(images_dir: Path, folder: str) -> str:
    """Return the folder's absolute path without links; the name itself if no folder can have it."""
    with suppress(ValueError):
        return decoded_name(os.path.realpath(os.fsencode(path_of(images_dir, folder))))
    return folder


def _listing(images_dir: Path, folder: str) -> set[str]:
    """Return the names in a folder that a JSON refers to; none if the folder does not exist."""
    try:
        with os.scandir(path_of(images_dir, folder)) as entries:
            return {decoded_name(os.fsencode(entry.name)) for entry in entries}
    except (OSError, ValueError):  # ValueError: a name that no file can have
        return set()
