"""Image files: their names, their headers, and their pixels as uint8 RGB tensors."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL.JpegImagePlugin import get_sampling
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, TiffImageFile
from torch import Tensor
from torchvision.io import decode_image

MAX_PIXELS = 2**30
"""Of one image: 3 GiB as RGB. A file of a few kilobytes may claim more than any memory holds."""

_ONLY_IDENTIFIED = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF"}
"""Formats whose names Pillow knows, but which it cannot decode by itself."""

_DECODED_BY_TORCHVISION = {"JPEG", "MPO", "PNG", "WEBP"}
"""To the same pixels as by Pillow, but faster, and PNG with all 16 bits."""

_WHITE_IN_16_BITS = 65535

_INTEGERS_OF_16_BITS = {"PNG", "PPM"}
"""Formats whose values in Pillow's mode I reach from 0 to 65535, whatever the file calls white."""

_EVENLY_SAMPLED = (0, 2)
"""Colours as fine as the brightness (4:4:4) or half as fine both ways (4:2:0), by Pillow's numbers. At a
reduced scale 4:2:2 would be blurred, by three levels on average."""


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
        UnreadableImageError: naming the file and the reason, here or in the body of the `with`.
    """
    # Pillow refuses what is twice as large, by default 179 megapixels; torchvision has no limit.
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


def read_size_hw(path: Path) -> tuple[int, int]:
    """Return height and width by the header of an image file.

    Raises:
        UnreadableImageError: with the reason.
    """
    with open_image(path) as image:
        return image.height, image.width


def decode_rgb(path: Path) -> Tensor:
    """Return an image as uint8 [3, H, W], in the orientation in which it is stored.

    An EXIF rotation is not applied: annotations are in the pixels of the file. Transparency is dropped; of an
    animation the first frame is taken. Of 16 bits per colour 65535 is white, as in PNG. The tensor may be a
    view of interleaved colours.

    Raises:
        UnreadableImageError: with the reason.
    """
    try:
        encoded = np.fromfile(path, dtype=np.uint8)
    except OSError as error:
        raise UnreadableImageError(f"{path}: {error.strerror}") from None
    with open_image(path, io.BytesIO(encoded.tobytes())) as image:
        if image.format in _DECODED_BY_TORCHVISION:
            try:
                return _decode_with_torchvision(encoded)
            except RuntimeError:  # a damaged file, or a kind that torchvision does not know
                pass
        return rgb_of(image)


def decode_reduced(path: Path, size_hw: tuple[int, int], needed_hw: tuple[int, int]) -> Tensor | None:
    """Return a colour JPEG of this size as `decode_rgb` does, but at 1/2, 1/4 or 1/8 of the scale: the
    smallest at which both sides are still as long as needed.

    JPEG's own transform does this for a fraction of the cost. None if no such scale is small enough, the file
    is anything else, or something is wrong with it, which `decode_rgb` then reports.
    """
    (height, width), (needed_height, needed_width) = size_hw, needed_hw
    if height < 2 * needed_height or width < 2 * needed_width:
        return None
    try:
        with open_image(path) as image:
            if (image.format, image.mode, image.size) != ("JPEG", "RGB", (width, height)):
                return None
            if get_sampling(image) not in _EVENLY_SAMPLED:
                return None
            image.draft("RGB", (needed_width, needed_height))
            return torch.from_numpy(np.array(image)).permute(2, 0, 1)
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
    # torchvision 0.29 announces that its decoders will go; torchcodec's, named instead, always apply the EXIF
    # rotation.
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        image: Tensor = decode_image(torch.from_numpy(encoded), mode="RGB")
    return image if image.dtype == torch.uint8 else torch.from_numpy(_eight_bits(image.numpy()))


def _grey_levels(image: Image.Image) -> NDArray[np.uint8]:
    """Return [H, W] of Pillow's modes with more than 8 bits, which it would cut off at 255 itself."""
    values, white = np.asarray(image), _WHITE_IN_16_BITS
    if image.mode == "F" or (image.mode == "I" and image.format not in _INTEGERS_OF_16_BITS):
        lowest, highest = values.min().item(), values.max().item()
        # With 8 bits in use white may be 255 as well as 65535.
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
    """Round to the nearest level."""
    return ((values.astype(np.uint32) * 255 + white // 2) // white).astype(np.uint8)
