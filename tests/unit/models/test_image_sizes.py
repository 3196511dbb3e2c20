"""Sizes that a family refuses, boxes on padded images, and how its images are prepared."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from detr_dist.config import Config, ModelConfig
from detr_dist.errors import UsageError
from detr_dist.extensions import FAMILIES
from detr_dist.inference.model import load_model
from detr_dist.models.build import build_detector
from detr_dist.models.detector import Detector, plain_network
from detr_dist.models.families import Family, detr
from detr_dist.models.image_sizes import check_image_sizes
from detr_dist.tracking.packaging import write_model

OF_56 = replace(detr.FAMILY, name="of_56", size_multiple=lambda config: config.d_model)
SQUARE_OF_56 = replace(OF_56, name="sq_56", square_only=True)


def check(family: Family, train: bool = True, **data: object) -> None:
    config = Config.model_validate({"data": data})
    check_image_sizes(config.data, family, detr_config(d_model=56), train=train)


def detr_config(**options: object):
    from transformers import DetrConfig

    return DetrConfig(**options)


@pytest.mark.parametrize(
    ("family", "data"),
    [
        (detr.FAMILY, {}),
        (detr.FAMILY, {"shortest_edge": 55, "multi_scale": [33]}),
        (OF_56, {"resize": "square", "shortest_edge": 560, "multi_scale": [504, 616]}),
        (OF_56, {"resize": "rectangle", "shortest_edge": 560, "longest_edge": 1008}),
        (SQUARE_OF_56, {"resize": "square", "shortest_edge": 1400}),
        (replace(detr.FAMILY, square_only=True), {"resize": "square", "shortest_edge": 55}),
    ],
)
def test_valid_sizes_are_accepted(family: Family, data: dict[str, object]) -> None:
    check(family, **data)


@pytest.mark.parametrize(
    ("family", "data", "message"),
    [
        (
            SQUARE_OF_56,
            {"multi_scale": [560, 500, 40, 500]},
            "sq_56 takes square images with sides that are multiples of 56: set data.resize=square (it is "
            "shortest_edge), data.shortest_edge=784 or 840 (it is 800), data.multi_scale=56 (it is 40), "
            "data.multi_scale=448 or 504 (it is 500)",
        ),
        (
            SQUARE_OF_56,
            {"resize": "rectangle", "shortest_edge": 560, "longest_edge": 1000},
            "sq_56 takes square images with sides that are multiples of 56: set data.resize=square (it is "
            "rectangle)",
        ),
        (
            OF_56,
            {"shortest_edge": 560},
            "of_56 takes images with sides that are multiples of 56: set data.resize=square or rectangle (it "
            "is shortest_edge)",
        ),
        (
            OF_56,
            {"resize": "rectangle", "shortest_edge": 560, "longest_edge": 1000, "multi_scale": [616]},
            "of_56 takes images with sides that are multiples of 56: set data.longest_edge=952 or 1008 (it "
            "is 1000), the longer side at data.multi_scale 616=1064 or 1120 (it is 1088)",
        ),
        (
            replace(detr.FAMILY, square_only=True),
            {},
            "detr takes square images: set data.resize=square (it is shortest_edge)",
        ),
    ],
)
def test_sizes_that_a_family_refuses_are_one_error_with_the_nearest_valid_ones(
    family: Family, data: dict[str, object], message: str
) -> None:
    with pytest.raises(UsageError) as refused:
        check(family, **data)
    assert str(refused.value) == message


def test_only_training_depends_on_multi_scale() -> None:
    check(SQUARE_OF_56, train=False, resize="square", shortest_edge=560, multi_scale=[500])


def test_boxes_on_a_canvas_become_boxes_of_the_image(
    tiny_detector: Callable[..., Detector], two_images: tuple[torch.Tensor, torch.Tensor]
) -> None:
    of_image = tiny_detector("detr").eval()
    of_canvas = Detector(plain_network(of_image), replace(of_image.family, uses_mask=False)).eval()
    with torch.no_grad():
        expected, found = of_image(*two_images)["pred_boxes"], of_canvas(*two_images)["pred_boxes"]
        unpadded = of_canvas(two_images[0], torch.tensor([[64, 96]] * 2), False)["pred_boxes"]
        assert unpadded.equal(of_image(two_images[0], torch.tensor([[64, 96]] * 2), False)["pred_boxes"])
    assert found[:, 0].equal(expected[:, 0])  # it fills the canvas
    factors = torch.tensor([96 / 70, 64 / 50, 96 / 70, 64 / 50])
    torch.testing.assert_close(found[:, 1], expected[:, 1] * factors)


def test_a_network_can_expect_values_from_0_to_1_and_its_own_image_processor(
    tiny_detector: Callable[..., Detector], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = replace(detr.FAMILY, imagenet_normalization=False, image_processor="RTDetrImageProcessor")
    monkeypatch.setitem(FAMILIES._objects, "detr", plain)
    detector = tiny_detector("detr").eval()
    assert detector.mean.unique().tolist() == [0]
    assert detector.std.unique().tolist() == [255]
    settings = Config.model_validate({"data": {"resize": "square", "shortest_edge": 64}})
    write_model(plain_network(detector), tmp_path / "model", config=settings, metadata={})
    written = json.loads((tmp_path / "model" / "preprocessor_config.json").read_text())
    assert written["image_processor_type"] == "RTDetrImageProcessor"
    assert written["do_normalize"] is False
    assert written["size"] == {"height": 64, "width": 64}
    opened = load_model(tmp_path / "model")
    assert (opened.config.data.resize, opened.config.data.shortest_edge) == ("square", 64)
    again = opened.detector(opened.settings([]), torch.device("cpu"))
    tuned = build_detector(ModelConfig(pretrained=str(tmp_path / "model")), ["player", "ball"])
    for each in (again, tuned):
        assert each.mean.equal(detector.mean)
        assert each.std.equal(detector.std)
