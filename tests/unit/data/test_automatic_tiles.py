"""`data.tiles=auto`: the largest windows in which the model can see most boxes of every class."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detr_dist.config import load_config
from detr_dist.config_tiles import Tiles
from detr_dist.data.automatic_tiles import resolve_tiles
from detr_dist.data.box_sizes import CheckSettings, resized_sides, small_classes
from detr_dist.data.coco import CocoData
from detr_dist.errors import UsageError
from detr_dist.resize import Resize

SHORTEST_EDGE = ("data.resize=shortest_edge", "data.shortest_edge=800", "data.longest_edge=1333")
SQUARE = ("data.resize=square", "data.shortest_edge=640")
RECTANGLE = ("data.resize=rectangle", "data.shortest_edge=576", "data.longest_edge=1024")


def data_of(*sides: list[float], size_hw: tuple[int, int] = (2160, 3840), **columns: Any) -> CocoData:
    """Return one image with square boxes of classes by their sides."""
    every = np.array([side for each in sides for side in each])
    classes = np.repeat(np.arange(len(sides)), [len(each) for each in sides])
    known: dict[str, Any] = {
        "annotations_path": Path("a.json"),
        "images_dir": Path(),
        "class_names": tuple("abcdef"[: len(sides)]),
        "category_ids": tuple(range(len(sides))),
        "notices": [],
        "image_ids": np.array([1]),
        "sizes_hw": np.array([size_hw]),
        "file_names": np.array([b"1.jpg"]),
        "box_offsets": np.array([0, len(every)]),
        "boxes_xywh_px": np.stack([np.zeros_like(every), np.zeros_like(every), every, every], axis=1),
        "box_classes": classes,
        "iscrowd": np.zeros(len(every), dtype=bool),
        "areas": every**2,
        "annotation_ids": np.arange(len(every)),
    }
    return CocoData(**known | columns)


def tiles_of(data: CocoData, *overrides: str, stride: int | None = 32) -> tuple[Tiles | None, str]:
    config, reason = resolve_tiles(load_config(None, [*overrides, "data.tiles=auto"]), data, stride)
    assert config.data.tiles != "auto"
    assert reason is not None
    return config.data.tiles, reason


@pytest.mark.parametrize("resize", [SHORTEST_EDGE, SQUARE, RECTANGLE], ids=lambda resize: resize[0])
@pytest.mark.parametrize("sides", [[10.0], [9, 10, 11, 40], [12.3, 7.1, 9.9], [8.0, 8, 8]])
def test_the_windows_are_the_largest_in_which_no_class_is_too_small(
    resize: tuple[str, ...], sides: list[float]
) -> None:
    data = data_of([100, 120], sides)
    tiles, reason = tiles_of(data, *resize)
    assert tiles is not None
    assert "half of the boxes of b, the smallest class" in reason
    settings = CheckSettings(Resize.of(load_config(None, resize).data), finest_stride=32)
    assert small_classes(data, settings) != []
    seen_in = CheckSettings(settings.resize, finest_stride=32, tiles=tiles)
    assert small_classes(data, seen_in) == []
    assert seen_in.resized_to.endswith(f" of windows of {tiles.size_hw[0]}x{tiles.size_hw[1]}")
    height, width = tiles.size_hw
    larger = Tiles(size=(height + 2, width + 2))
    median = np.median(resized_sides(data, CheckSettings(settings.resize, tiles=larger))[2:])
    assert median < 8
    if resize is RECTANGLE:
        assert width / height == pytest.approx(1024 / 576, abs=0.01)
    else:
        assert height == width


def test_no_windows_are_chosen_if_the_full_image_suffices() -> None:
    data = data_of([30, 30], [200])
    tiles, reason = tiles_of(data, *SHORTEST_EDGE)
    assert tiles is None
    assert reason == (
        "data.tiles auto: no windows, because half of the boxes of a, the smallest class, have 10.4 pixels a "
        "side or more after the resize to 800/1333; the model needs 8"
    )
    assert tiles_of(data_of([10.0]), *SHORTEST_EDGE, stride=8)[0] is None
    assert tiles_of(data_of([], []))[0] is None


def test_a_line_reports_the_windows_and_the_reason() -> None:
    tiles, reason = tiles_of(
        data_of([100.0], [10.0], [5.0, 5], iscrowd=np.array([0, 0, 1, 1], bool)), *SQUARE
    )
    assert tiles is not None
    assert tiles.size == 799
    assert reason == (
        "data.tiles auto: windows of 799x799 pixels: half of the boxes of b, the smallest class, have 10.0 "
        "pixels a side or more in the image, and the model needs 8 after the resize to 640x640"
    )


def test_other_settings_are_kept_and_an_unknown_stride_is_an_error() -> None:
    for given in ("null", "{size: 640}"):
        config = load_config(None, [f"data.tiles={given}"])
        assert resolve_tiles(config, data_of([1.0]), None) == (config, None)
    with pytest.raises(UsageError, match=r"^data\.tiles=auto: .*set data\.tiles\.size$"):
        tiles_of(data_of([1.0]), stride=None)
