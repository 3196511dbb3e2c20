"""Pictures from files to uint8 RGB tensors."""

import io
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from PIL.JpegImagePlugin import get_sampling
from torch import Tensor
from torchvision.io import decode_image
from torchvision.transforms.v2 import functional as F

_EVENLY_SAMPLED = (0, 2)
"""Colours as fine as the brightness (4:4:4) or half as fine both ways (4:2:0), by Pillow's numbers. At a
reduced scale of 4:2:2 they would be blurred, by three levels on average."""


class UnreadableImageError(Exception):
    """The file is not there or holds no picture that can be decoded."""


def decode_rgb(path: Path) -> Tensor:
    """The picture as uint8 [3, H, W], in the orientation that it is stored in.

    An EXIF rotation is not applied: annotations are in the pixels of the file. Transparency is dropped; of an
    animation the first picture is taken. The tensor may be a view of interleaved colours.

    Raises:
        UnreadableImageError: says why.
    """
    try:
        encoded = np.fromfile(path, dtype=np.uint8)
    except OSError as error:
        raise UnreadableImageError(f"{path}: {error.strerror}") from None
    try:
        image = _decode_with_torchvision(encoded)
    except RuntimeError:  # a damaged file, or a format that torchvision does not know
        image = _decode_with_pillow(encoded, path)
    if image.dtype != torch.uint8:  # PNG may hold 16 bits per colour
        image = F.to_dtype(image, torch.uint8, scale=True)
    return image


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
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
            if (image.format, image.mode, image.size) != ("JPEG", "RGB", (width, height)):
                return None
            if get_sampling(image) not in _EVENLY_SAMPLED:
                return None
            image.draft("RGB", (needed_width, needed_height))
            return torch.from_numpy(np.array(image)).permute(2, 0, 1)
    except Exception:  # Pillow's plug-ins raise a wide choice of errors for damaged files
        return None


def _decode_with_torchvision(encoded: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> Tensor:
    # torchvision 0.29 announces that its decoders will go; torchcodec's, named instead, always apply the EXIF
    # rotation.
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        image: Tensor = decode_image(torch.from_numpy(encoded), mode="RGB")
    return image if image.ndim == 3 else image[0]


def _decode_with_pillow(encoded: np.ndarray[tuple[int], np.dtype[np.uint8]], path: Path) -> Tensor:
    try:
        with Image.open(io.BytesIO(encoded.tobytes())) as image:
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except UnidentifiedImageError:
        raise UnreadableImageError(f"{path}: no picture in any format that is known here") from None
    except Exception as error:  # Pillow's plug-ins raise a wide choice of errors for damaged files
        raise UnreadableImageError(f"{path}: {type(error).__name__}: {error}") from None
