"""Pictures from files to uint8 RGB tensors."""

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from PIL.JpegImagePlugin import get_sampling
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, TiffImageFile
from torch import Tensor
from torchvision.io import decode_image

from detr_dist.data.image_files import UnreadableImageError, open_image

_DECODED_BY_TORCHVISION = {"JPEG", "MPO", "PNG", "WEBP"}
"""To the pixels that Pillow gives, but faster, and of PNG with all 16 bits."""

_WHITE_IN_16_BITS = 65535

_INTEGERS_OF_16_BITS = {"PNG", "PPM"}
"""Formats whose values in Pillow's mode I reach from 0 to 65535, whatever the file calls white."""

_EVENLY_SAMPLED = (0, 2)
"""Colours as fine as the brightness (4:4:4) or half as fine both ways (4:2:0), by Pillow's numbers. At a
reduced scale of 4:2:2 they would be blurred, by three levels on average."""


def decode_rgb(path: Path) -> Tensor:
    """The picture as uint8 [3, H, W], in the orientation that it is stored in.

    An EXIF rotation is not applied: annotations are in the pixels of the file. Transparency is dropped; of an
    animation the first picture is taken. Of 16 bits per colour 65535 is white, as in PNG. The tensor may be
    a view of interleaved colours.

    Raises:
        UnreadableImageError: says why.
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


def rgb_of(image: Image.Image) -> Tensor:
    """The pixels of an image of Pillow's, of any mode, as uint8 [3, H, W]; transparency is dropped.

    Raises:
        UnreadableImageError: names the mode, whose values have no defined white.
    """
    if image.mode[0] in "IF":
        return torch.from_numpy(_grey_levels(image)).repeat(3, 1, 1)
    if image.mode == "La":  # premultiplied; Pillow knows one way out of it
        image = image.convert("LA")
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def decode_reduced(path: Path, size_hw: tuple[int, int], needed_hw: tuple[int, int]) -> Tensor | None:
    """A colour JPEG of this size as `decode_rgb` gives it, but at 1/2, 1/4 or 1/8 of the scale: the smallest
    at which both sides are still as long as needed.

    JPEG's own transform gives it so, at a part of the cost. None if no such scale is small enough, the file
    is anything else, or something is wrong with it: `decode_rgb` then knows what.
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


def _decode_with_torchvision(encoded: NDArray[np.uint8]) -> Tensor:
    # torchvision 0.29 announces that its decoders will go; torchcodec's, named instead, always apply the EXIF
    # rotation.
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        image: Tensor = decode_image(torch.from_numpy(encoded), mode="RGB")
    return image if image.dtype == torch.uint8 else torch.from_numpy(_eight_bits(image.numpy()))


def _grey_levels(image: Image.Image) -> NDArray[np.uint8]:
    """[H, W], of Pillow's modes with more than 8 bits, which it would cut off at 255 by itself."""
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
        if image.tag_v2.get(PHOTOMETRIC_INTERPRETATION) == 0:  # 0 is white; Pillow knows that of 8 bits only
            values = white - values
    return _eight_bits(values, white)


def _eight_bits(values: NDArray[Any], white: int = _WHITE_IN_16_BITS) -> NDArray[np.uint8]:
    """Rounded to the nearest level."""
    return ((values.astype(np.uint32) * 255 + white // 2) // white).astype(np.uint8)
