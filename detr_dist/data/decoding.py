"""Pictures from files to uint8 RGB tensors."""

import io
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.io import decode_image
from torchvision.transforms.v2 import functional as F


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
