"""`data.tiles=auto`: the largest windows in which the model can see most boxes of every class."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detr_dist.config import load_config
from detr_dist.config_tiles import Tiles
from detr_dist.data.automatic_tiles import resolve_tiles
from detr_dist.data.box_sizes import CheckSettings, resized_sides
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
@pytest.mark.parametrize("sides", [[10.0], [9, 10, 11, 40], [12.3, 6.1, 9.9], [15.0, 15, 15]])
def test_the_windows_are_the_largest_in_which_the_smallest_class_has_the_stride(
    resize: tuple[str, ...], sides: list[float]
) -> None:
    data = data_of([100, 120], sides)
    tiles, reason = tiles_of(data, *resize, stride=16)
    assert tiles is not None
    assert "half of the boxes of b, the smallest class" in reason
    rule, (height, width) = Resize.of(load_config(None, resize).data), tiles.size_hw

    def median_in(size_hw: tuple[int, int]) -> float:
        settings = CheckSettings(rule, finest_stride=16, tiles=Tiles(size=size_hw))
        return float(np.median(resized_sides(data, settings)[2:]))

    assert median_in((height, width)) >= 16 - 1e-9
    assert median_in((height + 2, width + 2)) < 16
    if resize is RECTANGLE:
        assert width / height == pytest.approx(1024 / 576, abs=0.01)
    else:
        assert height == width


def test_windows_are_enlarged_at_most_twice() -> None:
    tiles, reason = tiles_of(data_of([100.0], [5.0]), *SQUARE, stride=16)
    assert tiles == Tiles(size=320)
    assert "have 10.0 after the resize" in reason


def test_no_windows_are_chosen_if_the_full_image_suffices() -> None:
    tiles, reason = tiles_of(data_of([30, 30], [200]), *SHORTEST_EDGE, stride=8)
    assert tiles is None
    assert reason == (
        "data.tiles auto: no windows, because half of the boxes of a, the smallest class, have 10.4 pixels a "
        "side or more after the resize to 800/1333; the model needs 8, the stride of its finest feature map"
    )
    assert tiles_of(data_of([], []))[0] is None
    assert tiles_of(data_of([4.0], size_hw=(300, 300)), *SQUARE, stride=16)[0] is None


def test_a_line_reports_the_windows_and_the_reason() -> None:
    tiles, reason = tiles_of(
        data_of([100.0], [10.0], [5.0, 5], iscrowd=np.array([0, 0, 1, 1], bool)), *SQUARE, stride=8
    )
    assert tiles == Tiles(size=800)
    assert reason == (
        "data.tiles auto: windows of 800x800 pixels, 25 for an image of 2160x3840: half of the boxes of b, "
        "the smallest class, have 10.0 pixels a side or more, and so they have 8.0 after the resize to "
        "640x640; the model needs 8, the stride of its finest feature map"
    )


def test_other_settings_are_kept_and_an_unknown_stride_is_an_error() -> None:
    for given in ("null", "{size: 640}"):
        config = load_config(None, [f"data.tiles={given}"])
        assert resolve_tiles(config, data_of([1.0]), None) == (config, None)
    with pytest.raises(UsageError, match=r"^data\.tiles=auto: .*set data\.tiles\.size$"):
        tiles_of(data_of([1.0]), stride=None)
