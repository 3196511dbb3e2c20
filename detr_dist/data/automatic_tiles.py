"""The windows that `data.tiles=auto` stands for, by the sizes of boxes and of the model's feature maps."""

import math

import numpy as np
from numpy.typing import NDArray

from detr_dist.config import Config
from detr_dist.config_tiles import LEAST_WINDOW_PX, Tiles
from detr_dist.data.box_sizes import CheckSettings, resized_sides, sides_px
from detr_dist.data.coco import CocoData
from detr_dist.errors import UsageError
from detr_dist.resize import Resize
from detr_dist.text import printable

LARGEST_ENLARGEMENT = 2
"""Windows are enlarged at most so much, because enlarging more adds windows but no detail."""


def resolve_tiles(config: Config, data: CocoData, finest_stride: int | None) -> tuple[Config, str | None]:
    """Return the configuration with specific windows instead of `auto`, and a line that says why these.

    They are the largest in which half of the boxes of each class are at least as large as the stride of the
    model's finest feature map, after an enlargement of at most `LARGEST_ENLARGEMENT`. Other configurations
    are returned as they are, without a line.

    Raises:
        UsageError: the model's finest stride is unknown.
    """
    if config.data.tiles != "auto":
        return config, None
    if finest_stride is None:
        raise UsageError(
            "data.tiles=auto: the stride of the model's finest feature map is unknown; set data.tiles.size"
        )
    tiles, reason = _largest_tiles(data, Resize.of(config.data), finest_stride)
    resolved = config.data.model_copy(update={"tiles": tiles})
    return config.model_copy(update={"data": resolved}), f"data.tiles auto: {reason}"


def _largest_tiles(data: CocoData, resize: Resize, finest_stride: int) -> tuple[Tiles | None, str]:
    """Return windows in the proportions of the network's input, None if images suffice, and the reason."""
    of_resized = _medians(data, resized_sides(data, CheckSettings(resize)))
    if not of_resized:
        return None, "no windows, because there are no boxes"
    side, name = min((side, name) for name, side in of_resized.items())
    needed = f"the model needs {finest_stride}, the stride of its finest feature map"
    if side >= finest_stride:
        return None, (
            f"no windows, because half of the boxes of {printable(name)}, the smallest class, have "
            f"{side:.1f} pixels a side or more after the resize to {resize}; {needed}"
        )
    side, name = min((side, name) for name, side in _medians(data, sides_px(data)).items())
    enlargement = min(finest_stride / side, LARGEST_ENLARGEMENT)
    unit = resize.size_hw(1, 2) if resize.mode == "rectangle" else (resize.shortest_edge,) * 2
    height, width = (max(LEAST_WINDOW_PX, math.floor(edge / enlargement)) for edge in unit)
    tiles = Tiles(size=height if height == width else (height, width))
    number, size_hw = max(
        (tiles.grid.num_windows(*each), each) for each in map(tuple, data.sizes_hw.tolist())
    )
    if number == 1:
        return None, f"no windows, because those of {height}x{width} pixels are as large as the images"
    return tiles, (
        f"windows of {height}x{width} pixels, {number} for an image of {size_hw[0]}x{size_hw[1]}: half of "
        f"the boxes of {printable(name)}, the smallest class, have {side:.1f} pixels a side or more, and so "
        f"they have {side * enlargement:.1f} after the resize to {resize}; {needed}"
    )


def _medians(data: CocoData, sides: NDArray[np.float64]) -> dict[str, float]:
    """Return the median of the sides [M] of each class that has boxes."""
    rows = np.flatnonzero(~data.iscrowd)
    rows = rows[np.argsort(data.box_classes[rows], kind="stable")]
    ends = np.searchsorted(data.box_classes[rows], np.arange(1, data.num_classes))
    by_class = zip(data.class_names, np.split(sides[rows], ends), strict=True)
    return {name: float(np.median(each)) for name, each in by_class if len(each)}
