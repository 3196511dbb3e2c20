"""The size to which images are resized for the network."""

from dataclasses import dataclass, replace
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from .settings import ResizeMode

RECTANGLE_MULTIPLE = 32
"""Pixels of which the longer side of a rectangle is a multiple at the edges of `data.multi_scale`."""


class ResizeSettings(Protocol):
    """What determines the rule: the section `data` of the configuration, or the settings of a saved model."""

    @property
    def shortest_edge(self) -> int: ...  # noqa: D102
    @property
    def longest_edge(self) -> int: ...  # noqa: D102
    @property
    def resize(self) -> ResizeMode: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class Resize:
    """The rule by which images are resized."""

    shortest_edge: int
    longest_edge: int
    mode: ResizeMode = "shortest_edge"

    @classmethod
    def of(cls, settings: ResizeSettings) -> Self:
        """Return the rule for evaluation and prediction, and for training without `data.multi_scale`."""
        return cls(settings.shortest_edge, settings.longest_edge, settings.resize)

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
