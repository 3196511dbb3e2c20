"""Image files and images in memory as uint8 RGB tensors."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, TiffImageFile
from torch import Tensor
from torchvision.io import decode_image

from .exif import turn_of, turned
from .settings import ExifRule

MAX_PIXELS = 2**30
"""Largest image in pixels: 3 GiB as RGB. A file of a few kilobytes may claim more than any memory holds."""

_DECODED_BY_TORCHVISION = {"JPEG", "MPO", "PNG", "WEBP"}
"""Formats that torchvision decodes to the same pixels as Pillow, but faster, and PNG with all 16 bits."""

_WHITE_IN_16_BITS = 65535

_INTEGERS_OF_16_BITS = {"PNG", "PPM"}
"""Formats whose values in Pillow's mode I range from 0 to 65535, whatever the file declares as white."""


class UnreadableImageError(Exception):
    """The file does not exist or holds no image that can be decoded."""


@contextmanager
def open_image(path: str | Path, content: IO[bytes] | None = None) -> Iterator[Image.Image]:
    """Open an image file, or its `content` under any name, and read its header; pixels are decoded on demand.

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
    return decode_content(encoded, path, exif, annotated_hw)


def decode_content(
    encoded: NDArray[np.uint8],
    name: str | Path,
    exif: ExifRule = "ignore",
    annotated_hw: tuple[int, int] | None = None,
) -> Tensor:
    """Return the image in the content of a file, like `decode_rgb`; errors contain `name`."""
    with open_image(name, io.BytesIO(encoded.tobytes())) as image:
        turn = turn_of(image, exif, annotated_hw)
        if image.format in _DECODED_BY_TORCHVISION:
            try:
                return turned(_decode_with_torchvision(encoded), turn)
            except RuntimeError:  # a damaged file, or a kind that torchvision does not know
                pass
        return turned(rgb_of(image), turn)


def pixels_of(image: object, exif: ExifRule) -> Tensor | None:
    """Return an image in memory as uint8 [3, H, W], transparency dropped; None if it is of another kind.

    Args:
        image: A Pillow image, an array uint8 [H, W] or [H, W, 3 or 4] in RGB, or a tensor uint8 [3, H, W].
        exif: Whether a Pillow image is rotated by its EXIF data.

    Raises:
        UnreadableImageError: a Pillow image has no defined white; or OSError, its file is damaged.
    """
    if isinstance(image, Image.Image):
        return turned(rgb_of(image), turn_of(image, exif))
    if not isinstance(image, np.ndarray | Tensor) or 0 in image.shape:
        return None
    shape = tuple(image.shape)
    if isinstance(image, np.ndarray) and image.dtype == np.uint8:
        pixels = torch.from_numpy(np.require(image, requirements=["C", "W"]))
        if len(shape) == 2:
            return pixels.repeat(3, 1, 1)
        if len(shape) == 3 and shape[2] in (3, 4):
            return pixels[..., :3].permute(2, 0, 1)
    if isinstance(image, Tensor) and image.dtype == torch.uint8 and len(shape) == 3 and shape[0] == 3:
        return image.cpu()
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
