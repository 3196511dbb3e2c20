"""What cameras and codecs do to football footage: the effects that the augmentation `footage` adds to `detr`.

Each changes every fifth image. They are for images at the network's input size, so that a blur of nine
pixels means the same for every camera. torchvision has all but the first two, in 32-bit floats: on an image
of 1280x720 its gamma takes ten times as long as ours and its noise fifteen times, and a convolution for the
blur ten times or more.
"""

import math
import warnings
from statistics import NormalDist
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from detr_dist.data.augmentations import ZoomOut
from detr_dist.data.example import Example
from detr_dist.data.motion_blur import blur_along_line
from detr_dist.extensions import register_transform

PROBABILITY = 0.2
BLUR_LENGTHS = (3, 5, 7, 9)  # pixels
NOISE_LEVELS = (2.0, 10.0)  # standard deviation, of 255
GAMMA_OCTAVES = (-0.5, 0.5)  # exponents of 0.7 to 1.4
JPEG_QUALITIES = (40, 95)
QUANTILES = np.array([NormalDist().inv_cdf((place + 0.5) / 256) for place in range(256)])


@register_transform("scale_out")
class ScaleOut(ZoomOut):
    """Shrinks every fifth image by up to 1.5, at a random place of a black canvas.

    `zoom_out`, with which a ball of eight pixels would end at two, in a range in which it stays visible.
    """

    probability: ClassVar = PROBABILITY
    most: ClassVar = 1.5


@register_transform("motion_blur")
def motion_blur(example: Example, rng: np.random.Generator) -> Example:
    """Blur every fifth image along a line of 3 to 9 pixels, as when the camera pans. Boxes stay."""
    if rng.random() >= PROBABILITY:
        return example
    length, angle = int(rng.choice(BLUR_LENGTHS)), rng.uniform(0, math.pi)
    pixels = blur_along_line(example.image.permute(1, 2, 0).numpy(), length, angle)
    return example._replace(image=torch.from_numpy(pixels).permute(2, 0, 1))


@register_transform("sensor_noise")
def sensor_noise(example: Example, rng: np.random.Generator) -> Example:
    """Add Gaussian noise to every fifth image, for each pixel and colour on its own."""
    if rng.random() >= PROBABILITY:
        return example
    return example._replace(image=with_noise(example.image, rng.uniform(*NOISE_LEVELS), rng))


def with_noise(image: Tensor, deviation: float, rng: np.random.Generator) -> Tensor:
    """Return the image with noise of this standard deviation, which takes 256 equally likely values."""
    pixels = image.as_subclass(Tensor).permute(1, 2, 0)
    levels = np.rint(deviation * QUANTILES).astype(np.int16)
    drawn = rng.integers(2**64, size=pixels.numel() // 8 + 1, dtype=np.uint64)  # eight values at once
    noise = torch.from_numpy(levels[drawn.view(np.uint8)[: pixels.numel()]])
    return noise.view(pixels.shape).add_(pixels).clamp_(0, 255).to(torch.uint8).permute(2, 0, 1)


@register_transform("gamma")
def gamma(example: Example, rng: np.random.Generator) -> Example:
    """Brighten or darken the middle tones of every fifth image; black and white stay."""
    if rng.random() >= PROBABILITY:
        return example
    return example._replace(image=with_gamma(example.image, 2 ** rng.uniform(*GAMMA_OCTAVES)))


def with_gamma(image: Tensor, exponent: float) -> Tensor:
    """Return the image with its values, as parts of white, to the power of `exponent`."""
    table = np.rint(255 * (np.arange(256) / 255) ** exponent).astype(np.uint8)
    return torch.from_numpy(np.take(table, image.permute(1, 2, 0).numpy())).permute(2, 0, 1)


@register_transform("jpeg")
def jpeg(example: Example, rng: np.random.Generator) -> Example:
    """Compress every fifth image as JPEG, with a quality of 40 to 95."""
    if rng.random() >= PROBABILITY:
        return example
    quality = int(rng.integers(*JPEG_QUALITIES, endpoint=True))
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # see `decode_rgb`
        return example._replace(image=F.jpeg(tv_tensors.Image(example.image), quality))
