"""Images that the Python API accepts: paths, Pillow images, arrays and tensors."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from detr_dist.config_types import ExifRule
from detr_dist.data.coco import CocoData
from detr_dist.data.images import read_size_hw
from detr_dist.data.unannotated import unannotated
from detr_dist.errors import DataError, UsageError
from detr_dist.serving.decoding import UnreadableImageError, pixels_of
from detr_dist.text import one_line

OneImage = str | os.PathLike[str] | Image.Image | NDArray[np.uint8] | Tensor
ONE_IMAGE = (str, os.PathLike, Image.Image, np.ndarray, Tensor)
"""The same, for `isinstance`."""

_FORMS = (
    "a path, a Pillow image, an array uint8 [H, W] or [H, W, 3 or 4] in RGB, a tensor uint8 [3, H, W], or an "
    "iterable of these"
)


def as_data_set(
    images: Iterable[OneImage], class_names: Sequence[str], exif: ExifRule
) -> tuple[CocoData, dict[int, Tensor]]:
    """Return the images as a data set without boxes, and the pixels of those not in a file, by row.

    Raises:
        DataError: a file cannot be read.
        UsageError: something is not an image.
    """
    if not isinstance(images, Iterable):
        raise UsageError(f"{type(images).__name__} is no image; give {_FORMS}")
    names, sizes_hw, pixels = list[str](), list[tuple[int, int]](), dict[int, Tensor]()
    try:
        for row, image in enumerate(images):
            if isinstance(image, str | os.PathLike):
                names.append(os.fspath(image))
                sizes_hw.append(read_size_hw(Path(image), exif))
            else:
                names.append("")
                pixels[row] = _pixels_of(image, exif)
                sizes_hw.append((pixels[row].shape[1], pixels[row].shape[2]))
    except UnreadableImageError as error:
        raise DataError(str(error)) from None
    return unannotated(Path(), names, sizes_hw, class_names, exif), pixels


def _pixels_of(image: Image.Image | NDArray[np.uint8] | Tensor, exif: ExifRule) -> Tensor:
    """Convert an image to uint8 [3, H, W] on the CPU; transparency is dropped."""
    try:
        pixels = pixels_of(image, exif)
    except (UnreadableImageError, OSError) as error:
        raise DataError(f"a Pillow image cannot be read: {one_line(error)}") from error
    if pixels is not None:
        return pixels
    kind = type(image).__name__
    if isinstance(image, np.ndarray | Tensor):
        kind = f"{kind} {image.dtype} {list(image.shape)}"
    raise UsageError(f"{kind} is no image; give {_FORMS}")
