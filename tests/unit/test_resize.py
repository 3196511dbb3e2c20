"""The size of an image after the resize, and its form in an image processor of transformers."""

import numpy as np
import pytest
from transformers.image_utils import SizeDict

from detr_dist.config import DataConfig, load_config
from detr_dist.errors import UsageError
from detr_dist.resize import Resize, processor_size, settings_of, training_resizes

SQUARE = Resize(560, 1333, "square")
RECTANGLE = Resize(576, 1024, "rectangle")


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (720, 1280, (750, 1333)),  # the longer side decides
        (1280, 720, (1333, 750)),
        (480, 640, (800, 1066)),  # the shorter side decides; DETR rounds the longer one down
        (640, 480, (1066, 800)),
        (800, 1333, (800, 1333)),
        (500, 500, (800, 800)),
        (100, 1000, (133, 1333)),
        (1, 5000, (1, 1333)),
    ],
)
def test_the_resize_rule_gives_the_expected_sizes(height: int, width: int, expected: tuple[int, int]) -> None:
    assert Resize(800, 1333).size_hw(height, width) == expected


def test_no_size_exceeds_the_limits() -> None:
    for height in range(1, 3000, 97):
        for width in range(1, 3000, 89):
            short, long = sorted(Resize(800, 1333).size_hw(height, width))
            assert 1 <= short <= 800
            assert long <= 1333
            assert short == 800 or long == 1333


@pytest.mark.parametrize(
    ("height", "width", "of_rectangle"),
    [(720, 1280, (576, 1024)), (1280, 720, (1024, 576)), (9, 9, (576, 1024)), (1, 5000, (576, 1024))],
)
def test_squares_and_rectangles_have_fixed_sizes(
    height: int, width: int, of_rectangle: tuple[int, int]
) -> None:
    assert SQUARE.size_hw(height, width) == (560, 560)
    assert RECTANGLE.size_hw(height, width) == of_rectangle


def test_the_longer_edge_follows_the_drawn_one_in_proportion() -> None:
    assert Resize(800, 1333).at(480) == Resize(480, 800)
    assert RECTANGLE.at(480) == Resize(480, 864, "rectangle")  # 853 to a multiple of 32
    assert RECTANGLE.at(576) is RECTANGLE
    assert SQUARE.at(616).size_hw(720, 1280) == (616, 616)
    config = DataConfig(shortest_edge=64, longest_edge=96, multi_scale=[32, 64, 64])
    assert training_resizes(config) == [Resize(32, 48), Resize(64, 96), Resize(64, 96)]
    assert training_resizes(DataConfig()) == [Resize(800, 1333)]


@pytest.mark.parametrize("resize", [Resize(800, 1333), SQUARE, RECTANGLE], ids=str)
def test_scales_are_those_of_the_sizes(resize: Resize) -> None:
    sizes_hw = np.array([(720, 1280), (1280, 720), (500, 500), (480, 640)])
    resized_hw = np.array([resize.size_hw(*size) for size in sizes_hw.tolist()])
    expected = np.sqrt(resized_hw.prod(axis=1) / sizes_hw.prod(axis=1))
    np.testing.assert_allclose(resize.scales(sizes_hw), expected, rtol=1e-3)  # a pixel of 800 is rounded


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        ({"resize": "shortest_edge", "shortest_edge": 64, "longest_edge": 96}, (64, 96)),
        ({"resize": "square", "shortest_edge": 64}, (64, 64)),
        ({"resize": "rectangle", "shortest_edge": 64, "longest_edge": 96}, (64, 96)),
    ],
)
def test_an_image_processor_gets_and_gives_the_settings(
    settings: dict[str, object], size: tuple[int, int]
) -> None:
    written = processor_size(DataConfig.model_validate(settings))
    assert tuple(written.values()) == size
    assert settings_of(written) == settings_of(SizeDict(**written)) == settings


def test_an_image_processor_with_another_size_is_refused() -> None:
    for size in ({"longest_edge": 64}, {"height": 64}, {"max_height": 64, "max_width": 64}, {}):
        with pytest.raises(ValueError, match="size is"):
            settings_of(size)


def test_settings_of_sizes_are_checked() -> None:
    assert load_config(None, ["data.multi_scale=480"]).data.multi_scale == [480]
    square = load_config(None, ["data.resize=square", "data.shortest_edge=1600"])
    assert square.data.longest_edge == 1333  # no effect
    for overrides, part in (
        (["data.resize=round"], "data.resize"),
        (["data.multi_scale=[480, 16]"], "data.multi_scale"),
        (["data.resize=rectangle", "data.shortest_edge=1600"], "longest_edge 1333 is below"),
    ):
        with pytest.raises(UsageError, match=part):
            load_config(None, overrides)
