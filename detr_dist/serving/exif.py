"""The orientation in a photograph's EXIF data, and whether an image is turned by it."""

from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image
from PIL.Image import Transpose
from PIL.TiffImagePlugin import TiffImageFile
from torch import Tensor

from .settings import ExifRule

_TURNS: dict[Any, Transpose] = {  # by the value of the EXIF orientation; 1 is upright
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}

_SWAP_SIDES = {Transpose.TRANSPOSE, Transpose.ROTATE_270, Transpose.TRANSVERSE, Transpose.ROTATE_90}

_UNDONE_BY = {Transpose.ROTATE_90: Transpose.ROTATE_270, Transpose.ROTATE_270: Transpose.ROTATE_90}
"""The other turns undo themselves."""


def turn_to_upright(image: Image.Image) -> Transpose | None:
    """Return how Pillow's pixels of an image have to be turned so that it is as a person sees it.

    None if it is upright, or its EXIF data are missing, damaged or, in a PNG, after the pixels.
    """
    if isinstance(image, TiffImageFile):  # Pillow turns its pixels, and has turned its size already
        return None
    return _turn_in_exif(image)


def turn_of(
    image: Image.Image, exif: ExifRule, annotated_hw: tuple[int, int] | None = None
) -> Transpose | None:
    """Return how Pillow's pixels of an opened image are turned by the rule `data.exif`; None: not at all.

    Without an annotated size the rule `auto` turns every image upright.
    """
    pillows_hw = image.height, image.width
    if exif == "ignore" or (exif == "auto" and annotated_hw == pillows_hw):
        return None
    if exif == "apply" or annotated_hw is None:
        return turn_to_upright(image)
    turn = _turn_in_exif(image) if annotated_hw == pillows_hw[::-1] else None
    if turn not in _SWAP_SIDES:
        return None
    return _UNDONE_BY.get(turn, turn) if isinstance(image, TiffImageFile) else turn


def turned_size(size_hw: tuple[int, int], turn: Transpose | None) -> tuple[int, int]:
    """Return height and width after the turn, or before it: they are swapped or not."""
    return size_hw[::-1] if turn in _SWAP_SIDES else size_hw


def turned(image: Tensor, turn: Transpose | None) -> Tensor:
    """Return an image uint8 [3, H, W] after the turn, interleaved as decoders leave it."""
    if turn is None:
        return image
    pixels = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).transpose(turn)
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)


def _turn_in_exif(image: Image.Image) -> Transpose | None:
    try:
        # The method of Pillow's base class: that of PNG decodes the pixels to look for EXIF data after them.
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
        return _TURNS.get(orientation)
    except Exception:  # damaged EXIF data raise many types; the pixels are intact
        return None
