"""The size to which images are resized for the network, by the section `data` of the configuration."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from detr_dist.config import DataConfig
from detr_dist.config_types import ResizeMode

RECTANGLE_MULTIPLE = 32
"""Pixels of which the longer side of a rectangle is a multiple at the edges of `data.multi_scale`."""

_SIZE_KEYS = ("height", "width", "shortest_edge", "longest_edge")


@dataclass(frozen=True, slots=True)
class Resize:
    """The rule by which images are resized."""

    shortest_edge: int
    longest_edge: int
    mode: ResizeMode = "shortest_edge"

    @classmethod
    def of(cls, config: DataConfig) -> Self:
        """Return the rule for evaluation and prediction, and for training without `data.multi_scale`."""
        return cls(config.shortest_edge, config.longest_edge, config.resize)

    def __str__(self) -> str:
        """Return the edges for a message: 800/1333 for limits, 640x640 or 576x1024 for a fixed size."""
        if self.mode == "shortest_edge":
            return f"{self.shortest_edge}/{self.longest_edge}"
        return "x".join(map(str, self.size_hw(1, 2)))

    @property
    def keeps_aspect_ratio(self) -> bool:
        """Whether sizes depend on the aspect ratio of an image; otherwise they are one or two fixed ones."""
        return self.mode == "shortest_edge"

    def at(self, shortest_edge: int) -> Self:
        """Return the rule at another edge, with the longer edge in proportion."""
        if shortest_edge == self.shortest_edge:
            return self
        longest_edge = round(self.longest_edge * shortest_edge / self.shortest_edge)
        if self.mode == "rectangle":
            longest_edge = max(1, round(longest_edge / RECTANGLE_MULTIPLE)) * RECTANGLE_MULTIPLE
        return replace(self, shortest_edge=shortest_edge, longest_edge=longest_edge)

    def size_hw(self, height: int, width: int) -> tuple[int, int]:
        """Return the size of an image after the resize.

        With `shortest_edge` its shorter side is as configured, less if the longer is over its limit.

        Source: DETR. Departure: integer arithmetic, so that the limit holds to the pixel.
        """
        if self.mode == "square":
            return self.shortest_edge, self.shortest_edge
        short, long = self.shortest_edge, self.longest_edge
        if self.keeps_aspect_ratio:
            own_short, own_long = sorted((height, width))
            if short * own_long <= long * own_short:
                long = short * own_long // own_short
            else:
                short = max(1, round(long * own_short / own_long))
        return (short, long) if height <= width else (long, short)

    def scales(self, sizes_hw: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the geometric mean of each image's two factors, not rounded to pixels, for sizes [N, 2]."""
        scales: NDArray[np.float64]
        if self.keeps_aspect_ratio:
            short, long = sizes_hw.min(axis=1), sizes_hw.max(axis=1)
            scales = np.minimum(self.shortest_edge / short, self.longest_edge / long)
        else:
            scales = np.sqrt(np.prod(self.size_hw(1, 2)) / sizes_hw.prod(axis=1))
        return scales


def training_resizes(config: DataConfig) -> list[Resize]:
    """Return the rules of all training steps: one for each edge of `data.multi_scale`, or only one."""
    return [Resize.of(config).at(edge) for edge in config.multi_scale or [config.shortest_edge]]


def processor_size(config: DataConfig) -> dict[str, int]:
    """Return the `size` of a transformers image processor that resizes images as for evaluation.

    It cannot tell portraits from landscapes: a rectangle has the size of landscapes.
    """
    if config.resize == "shortest_edge":
        return {"shortest_edge": config.shortest_edge, "longest_edge": config.longest_edge}
    height, width = Resize.of(config).size_hw(1, 2)
    return {"height": height, "width": width}


def settings_of(size: Mapping[str, int | None]) -> dict[str, Any]:
    """Return the settings of the section `data` that resize like an image processor of this `size`.

    Raises:
        ValueError: there are none.
    """
    given = {key: value for key in _SIZE_KEYS if (value := size.get(key)) is not None}
    match given:
        case {"height": height, "width": width} if height == width:
            return {"resize": "square", "shortest_edge": height}
        case {"height": height, "width": width}:
            return {"resize": "rectangle", "shortest_edge": height, "longest_edge": width}
        case {"shortest_edge": _, "longest_edge": _}:
            return {"resize": "shortest_edge", **given}
    raise ValueError(f"size is {given}")
