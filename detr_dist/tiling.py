"""The grid of equal windows that covers an image, by `data.tiles`."""

import math

from detr_dist.config_tiles import Tiles


def window_hw(tiles: Tiles, size_hw: tuple[int, int]) -> tuple[int, int]:
    """Return height and width of the windows of an image of this size, which may be smaller than a window."""
    height, width = tiles.size_hw
    return min(height, size_hw[0]), min(width, size_hw[1])


def grid_starts(side: int, window: int, overlap: float) -> list[int]:
    """Return where the windows along one side of an image start, from 0 to `side - window`.

    They are as few as reach from end to end with at least this overlap, at equal distances up to rounding.
    """
    last = side - window
    num_gaps = math.ceil(last / max(1, math.floor(window * (1 - overlap))))
    return [last * index // num_gaps for index in range(num_gaps + 1)] if num_gaps else [0]


def num_windows(tiles: Tiles, size_hw: tuple[int, int]) -> int:
    """Return the number of windows in the grid of an image of this size."""
    sides = zip(size_hw, window_hw(tiles, size_hw), strict=True)
    return math.prod(len(grid_starts(side, window, tiles.overlap)) for side, window in sides)
