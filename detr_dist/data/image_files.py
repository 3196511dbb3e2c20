"""Image files as Pillow opens them: their names, their headers, and what is wrong with them."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO

from PIL import Image, UnidentifiedImageError

MAX_PIXELS = 2**30
"""Of one image: 3 GiB as RGB. A file of a few kilobytes may claim more than any memory holds."""

_ONLY_IDENTIFIED = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF"}
"""Formats of which Pillow knows the name, but cannot decode them by itself."""


class UnreadableImageError(Exception):
    """The file is not there or holds no image that can be decoded."""


@cache
def image_suffixes() -> frozenset[str]:
    """The suffixes, in lower case with their dot, of all formats that Pillow decodes."""
    formats = Image.registered_extensions()  # loads all plug-ins: a fifth of a second
    decoded = {*Image.OPEN, "MPO"} - _ONLY_IDENTIFIED  # MPO is opened as JPEG
    return frozenset(suffix for suffix, name in formats.items() if name in decoded)


@contextmanager
def open_image(path: Path, content: IO[bytes] | None = None) -> Iterator[Image.Image]:
    """Open an image file, or its `content`, and read its header; pixels are decoded when they are asked for.

    Raises:
        UnreadableImageError: names the file and says what went wrong, here or in the body of the `with`.
    """
    # Pillow refuses what is twice as large, by default 179 megapixels; torchvision has no limit.
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(content or path) as image:
            yield image
    except UnreadableImageError as error:  # of the body
        raise UnreadableImageError(f"{path}: {error}") from None
    except UnidentifiedImageError:
        raise UnreadableImageError(f"{path}: no picture in any format that is known here") from None
    except Exception as error:  # Pillow's plug-ins raise a wide choice of errors for damaged files
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise UnreadableImageError(f"{path}: {' '.join(reason.split())}") from None


def read_size_hw(path: Path) -> tuple[int, int]:
    """Height and width by the header of an image file.

    Raises:
        UnreadableImageError: says why.
    """
    with open_image(path) as image:
        return image.height, image.width
