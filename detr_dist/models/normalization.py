"""How pixels are normalized for a network: as ImageNet's are, unless its image processor does otherwise."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedConfig
from transformers.utils import IMAGE_PROCESSOR_NAME


@dataclass(frozen=True)
class Normalization:
    """Mean and standard deviation of red, green and blue, where a pixel's values are from 0 to 1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


IMAGENET = Normalization(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
"""What every published backbone expects."""

_KEY = "pixel_normalization"
"""In a network's configuration, which is saved with it, where it is not ImageNet's."""


def normalization_of(config: PreTrainedConfig) -> Normalization:
    """Return what the network of this configuration expects."""
    kept = getattr(config, _KEY, None)
    return IMAGENET if kept is None else Normalization(tuple(kept["mean"]), tuple(kept["std"]))


def keep_normalization(config: PreTrainedConfig, normalization: Normalization) -> None:
    """Let the network of this configuration expect `normalization`, also once it is saved and loaded."""
    if normalization != normalization_of(config):
        setattr(config, _KEY, dataclasses.asdict(normalization))


def normalization_at(source: str, config: PreTrainedConfig) -> Normalization:
    """Return what the network with this configuration at `source`, a folder or hub id, expects.

    Raises:
        OSError: there is an image processor, or should be, and it cannot be read.
    """
    folder = Path(source)
    if folder.is_dir() and not (folder / IMAGE_PROCESSOR_NAME).exists():
        return normalization_of(config)  # a checkpoint, for example
    from transformers import AutoImageProcessor  # slow to import

    return normalization_by(AutoImageProcessor.from_pretrained(source, trust_remote_code=False))


def normalization_by(processor: Any) -> Normalization:
    """Return one step for what an image processor does in up to two: a factor, then mean and deviation."""
    scale = 255 * processor.rescale_factor if processor.do_rescale else 255.0
    mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else ([0.0], [1.0])
    red, green, blue = np.broadcast_to(np.array([mean, std]).T / scale, (3, 2)).tolist()
    mean, std = zip(red, green, blue, strict=True)
    return Normalization(mean, std)
