"""The windows of an image that are searched for objects. Imports nothing that is slow to import.

An object of eight pixels is lost when a large image is shrunk to what a network takes. In windows it is not.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Grid:
    """How an image is divided into windows."""

    window_hw: tuple[int, int]
    """Height and width of a window in pixels of the image; along a shorter side of the image, that side."""
    overlap: float
    """Least overlap of neighbours, as a fraction of a window's side, from 0 to 0.9."""
    full_image: bool
    """Whether the full image is a window too, for objects that are larger than a window."""

    def windows(self, height: int, width: int) -> list[tuple[int, int, int, int]]:
        """Return left, top, right and bottom of each window of an image; the full image is the last.

        All others have one size, are spread evenly, and cover every pixel. Without others the full image is
        the only one.
        """
        tops, lefts = self._starts(height, self.window_hw[0]), self._starts(width, self.window_hw[1])
        own_height, own_width = min(self.window_hw[0], height), min(self.window_hw[1], width)
        windows = [(left, top, left + own_width, top + own_height) for top in tops for left in lefts]
        return [*windows, (0, 0, width, height)] if self.full_image and len(windows) > 1 else windows

    def num_windows(self, height: int, width: int) -> int:
        """Return the number of windows of an image, with the full image if it is one."""
        number = len(self._starts(height, self.window_hw[0])) * len(self._starts(width, self.window_hw[1]))
        return number + (self.full_image and number > 1)

    def _starts(self, side: int, window: int) -> list[int]:
        """Return the first pixel of each window along a side: as few as overlap enough, evenly spread."""
        last = max(0, side - window)
        num_gaps = math.ceil(last / max(1, math.floor(window * (1 - self.overlap))))
        return [last * index // max(1, num_gaps) for index in range(num_gaps + 1)]
