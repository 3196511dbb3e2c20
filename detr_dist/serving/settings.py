"""What is saved with a model so that it predicts as `detr-dist predict` does, in `serving.json`."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

from .grid import Grid

ExifRule = Literal["auto", "ignore", "apply"]
ResizeMode = Literal["shortest_edge", "square", "rectangle"]
ClassKind = Literal["softmax", "sigmoid"]
"""Meaning of class logits: a softmax with "no object" last, or a sigmoid for each class."""
Precision = Literal["auto", "no", "fp16", "bf16"]

SETTINGS_NAME = "serving.json"
DEFAULT_THRESHOLD = 0.5
"""Threshold of a class for which none is saved with the model."""


@dataclass(frozen=True, kw_only=True)
class ServingSettings:
    """The settings by which a saved network is run."""

    class_names: tuple[str, ...]
    """Name of each class, in the order of the network's outputs."""
    thresholds: tuple[float, ...]
    """Minimum score of a detection of each class."""
    class_kind: ClassKind
    exif: ExifRule
    resize: ResizeMode
    shortest_edge: int
    longest_edge: int
    tiles: Grid | None
    """The windows of an image that are searched for objects; None: only the image."""
    mean: tuple[float, ...]
    """Mean of red, green and blue, for values from 0 to 1; `std` likewise."""
    std: tuple[float, ...]
    batch_size: int
    mixed_precision: Precision
    tf32: bool
    deterministic: bool
    channels_last: bool
    thaw_batch_norm: bool
    """Whether the backbone's batch norm was trained: the frozen kind rounds differently."""
    float32_modules: tuple[str, ...]
    """Names of modules that compute in float32 whatever the precision."""
    float32_outputs: tuple[str, ...]
    """Names of modules whose outputs are converted to float32."""

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the settings from a model's folder; lists become tuples."""
        content: dict[str, Any] = json.loads((folder / SETTINGS_NAME).read_text(encoding="utf-8"))
        content |= {key: tuple(value) for key, value in content.items() if isinstance(value, list)}
        tiles = content["tiles"]
        if tiles is not None:
            tiles = Grid(**{**tiles, "window_hw": tuple(tiles["window_hw"])})
        return cls(**{**content, "tiles": tiles})

    def write(self, folder: Path) -> None:
        """Write the settings into a model's folder."""
        (folder / SETTINGS_NAME).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


def thresholds_of(class_names: Sequence[str], known: Mapping[str, float | None]) -> tuple[float, ...]:
    """Return the known threshold of each class, else the default."""
    found = (known.get(name) for name in class_names)
    return tuple(DEFAULT_THRESHOLD if value is None else value for value in found)
