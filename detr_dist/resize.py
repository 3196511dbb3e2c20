"""The section `data` of the configuration as rules for resizing, and as the `size` of an image processor."""

from collections.abc import Mapping
from typing import Any

from detr_dist.config import DataConfig
from detr_dist.serving.resize import Resize as Resize

_SIZE_KEYS = ("height", "width", "shortest_edge", "longest_edge")


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
