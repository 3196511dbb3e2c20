"""Image files: where they are, their names, their headers, and their pixels as uint8 RGB tensors."""

import io
import os
import posixpath
import unicodedata
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from posixpath import join
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL.JpegImagePlugin import get_sampling
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, TiffImageFile
from torch import Tensor
from torchvision.io import decode_image

from detr_dist.config_types import ExifRule
from detr_dist.data.exif import turn_of, turned, turned_size
from detr_dist.errors import DataError

MAX_PIXELS = 2**30
"""Largest image in pixels: 3 GiB as RGB. A file of a few kilobytes may claim more than any memory holds."""

_ONLY_IDENTIFIED = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF"}
"""Formats whose names Pillow knows, but which it cannot decode by itself."""

_DECODED_BY_TORCHVISION = {"JPEG", "MPO", "PNG", "WEBP"}
"""Formats that torchvision decodes to the same pixels as Pillow, but faster, and PNG with all 16 bits."""

_WHITE_IN_16_BITS = 65535

_INTEGERS_OF_16_BITS = {"PNG", "PPM"}
"""Formats whose values in Pillow's mode I range from 0 to 65535, whatever the file declares as white."""

_EVENLY_SAMPLED = (0, 2)
"""Pillow's numbers of the colour resolutions 4:4:4 and 4:2:0. At a reduced scale 4:2:2 would be blurred, by
three levels on average."""


class UnreadableImageError(Exception):
    """The file does not exist or holds no image that can be decoded."""


@cache
def image_suffixes() -> frozenset[str]:
    """Return the suffixes, in lower case with their dot, of all formats that Pillow decodes."""
    formats = Image.registered_extensions()  # loads all plug-ins: a fifth of a second
    decoded = {*Image.OPEN, "MPO"} - _ONLY_IDENTIFIED  # MPO is opened as JPEG
    return frozenset(suffix for suffix, name in formats.items() if name in decoded)


@contextmanager
def open_image(path: Path, content: IO[bytes] | None = None) -> Iterator[Image.Image]:
    """Open an image file, or its `content`, and read its header; pixels are decoded on demand.

    Raises:
        UnreadableImageError: naming the file and the reason, on entry or in the body of the `with`.
    """
    # Pillow refuses images above twice its limit, by default 179 megapixels; torchvision has no limit.
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(content or path) as image:
            yield image
    except UnreadableImageError as error:  # of the body
        raise UnreadableImageError(f"{path}: {error}") from None
    except UnidentifiedImageError:
        raise UnreadableImageError(f"{path}: not an image in a known format") from None
    except Exception as error:  # Pillow's plug-ins raise many kinds of errors for damaged files
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise UnreadableImageError(f"{path}: {' '.join(reason.split())}") from None


def read_size_hw(path: Path, exif: ExifRule = "auto") -> tuple[int, int]:
    """Read height and width from the header of an image file, of the stored pixels if `exif` is `ignore`.

    The other rules give the size after the EXIF rotation, in which annotation tools display the image.

    Raises:
        UnreadableImageError: with the reason.
    """
    with open_image(path) as image:
        return turned_size((image.height, image.width), turn_of(image, exif))


def decode_rgb(path: Path, exif: ExifRule = "ignore", annotated_hw: tuple[int, int] | None = None) -> Tensor:
    """Return an image as uint8 [3, H, W], rotated by its EXIF data if the rule `exif` says so.

    Without an annotated size the rule `auto` rotates every image. Pillow always rotates TIFF files; `auto`
    undoes this if the annotated size fits only then. Transparency is dropped, and an animation gives its
    first frame. With 16 bits per colour 65535 is white, as in PNG. The tensor may be a view of interleaved
    colours.

    Raises:
        UnreadableImageError: with the reason.
    """
    try:
        encoded = np.fromfile(path, dtype=np.uint8)
    except OSError as error:
        raise UnreadableImageError(f"{path}: {error.strerror}") from None
    with open_image(path, io.BytesIO(encoded.tobytes())) as image:
        turn = turn_of(image, exif, annotated_hw)
        if image.format in _DECODED_BY_TORCHVISION:
            try:
                return turned(_decode_with_torchvision(encoded), turn)
            except RuntimeError:  # a damaged file, or a kind that torchvision does not know
                pass
        return turned(rgb_of(image), turn)


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


def rgb_of(image: Image.Image) -> Tensor:
    """Return the pixels of a Pillow image, of any mode, as uint8 [3, H, W]; transparency is dropped.

    Raises:
        UnreadableImageError: naming the mode, if its values have no defined white.
    """
    if image.mode[0] in "IF":
        return torch.from_numpy(_grey_levels(image)).repeat(3, 1, 1)
    if image.mode == "La":  # premultiplied; Pillow converts it to LA only
        image = image.convert("LA")
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def _decode_with_torchvision(encoded: NDArray[np.uint8]) -> Tensor:
    # torchvision 0.29 deprecates its decoders; torchcodec, the suggested replacement, always applies the EXIF
    # rotation.
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        image: Tensor = decode_image(torch.from_numpy(encoded), mode="RGB")
    return image if image.dtype == torch.uint8 else torch.from_numpy(_eight_bits(image.numpy()))


def _grey_levels(image: Image.Image) -> NDArray[np.uint8]:
    """Scale an image in a mode with more than 8 bits to uint8 [H, W]; Pillow would clip it at 255."""
    values, white = np.asarray(image), _WHITE_IN_16_BITS
    if image.mode == "F" or (image.mode == "I" and image.format not in _INTEGERS_OF_16_BITS):
        lowest, highest = values.min().item(), values.max().item()
        # If only 8 bits are in use, white may be 255 or 65535.
        if image.mode == "F" or lowest < 0 or not 255 < highest <= white:
            raise UnreadableImageError(
                f"values from {lowest:g} to {highest:g} in Pillow's mode {image.mode}, which defines no "
                "white; save the image with 8 or 16 bits per colour"
            )
    if isinstance(image, TiffImageFile):
        if image.tag_v2.get(BITSPERSAMPLE) == (12,):
            white = 4095
        if image.tag_v2.get(PHOTOMETRIC_INTERPRETATION) == 0:  # 0 is white; Pillow inverts 8 bits only
            values = white - values
    return _eight_bits(values, white)


def _eight_bits(values: NDArray[Any], white: int = _WHITE_IN_16_BITS) -> NDArray[np.uint8]:
    """Scale values, with `white` as the largest, to 0 to 255, rounded to the nearest level."""
    return ((values.astype(np.uint32) * 255 + white // 2) // white).astype(np.uint8)


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
