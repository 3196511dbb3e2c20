"""The windows that `data.tiles=auto` stands for, by the sizes of boxes and of the model's feature maps."""

import math

import numpy as np
from numpy.typing import NDArray

from detr_dist.config import Config
from detr_dist.config_tiles import LEAST_WINDOW_PX, Tiles
from detr_dist.data.box_sizes import SMALLEST_FRACTION_OF_STRIDE, CheckSettings, resized_sides, sides_px
from detr_dist.data.coco import CocoData
from detr_dist.errors import UsageError
from detr_dist.resize import Resize
from detr_dist.text import printable


def resolve_tiles(config: Config, data: CocoData, finest_stride: int | None) -> tuple[Config, str | None]:
    """Return the configuration with specific windows instead of `auto`, and a line that says why these.

    They are the largest in which no class is too small for the model by the rule of `small_classes`. Other
    configurations are returned as they are, without a line.

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
    limit = finest_stride * SMALLEST_FRACTION_OF_STRIDE
    resized = _medians(data, resized_sides(data, CheckSettings(resize)))
    if not resized:
        return None, "no windows, because there are no boxes"
    side, name = min((side, name) for name, side in resized.items())
    if side >= limit:
        return None, (
            f"no windows, because half of the boxes of {printable(name)}, the smallest class, have "
            f"{side:.1f} pixels a side or more after the resize to {resize}; the model needs {limit:g}"
        )
    side, name = min((side, name) for name, side in _medians(data, sides_px(data)).items())
    # A window of `unit` times some factor is enlarged by its inverse.
    unit = resize.size_hw(1, 2) if resize.mode == "rectangle" else (resize.shortest_edge,) * 2
    height, width = (max(LEAST_WINDOW_PX, math.ceil(edge * side / limit) - 1) for edge in unit)
    return Tiles(size=height if height == width else (height, width)), (
        f"windows of {height}x{width} pixels: half of the boxes of {printable(name)}, the smallest class, "
        f"have {side:.1f} pixels a side or more in the image, and the model needs {limit:g} after the resize "
        f"to {resize}"
    )


def _medians(data: CocoData, sides: NDArray[np.float64]) -> dict[str, float]:
    """Return the median of the sides [M] of each class that has boxes."""
    rows = np.flatnonzero(~data.iscrowd)
    rows = rows[np.argsort(data.box_classes[rows], kind="stable")]
    ends = np.searchsorted(data.box_classes[rows], np.arange(1, data.num_classes))
    by_class = zip(data.class_names, np.split(sides[rows], ends), strict=True)
    return {name: float(np.median(each)) for name, each in by_class if len(each)}
