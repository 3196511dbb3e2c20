"""The augmentation `footage`: what cameras and codecs do to an image."""

import math

import numpy as np
import pytest
import torch
from harness.data import write_coco
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from detr_dist.config import load_config
from detr_dist.data import footage
from detr_dist.data.coco import CocoData, load_data
from detr_dist.data.dataset import CocoDetectionDataset, training_dataset
from detr_dist.data.example import Example, example_of
from detr_dist.data.footage import ScaleOut, with_gamma, with_noise
from detr_dist.data.motion_blur import blur_along_line
from detr_dist.data.transforms import NamedTransform, build_transform, recipe_of
from detr_dist.extensions import FOOTAGE, TRANSFORMS
from detr_dist.resize import Resize


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> CocoData:
    folder = tmp_path_factory.mktemp("data") / "train"
    write_coco(folder, num_images=8, with_boxes=lambda i: i % 3, mixed_sizes=True)
    return load_data(folder)


def dataset(data: CocoData, augmentation: str, *overrides: str) -> CocoDetectionDataset:
    settings = ["data.shortest_edge=64", "data.longest_edge=96", "training.num_epochs=6"]
    return training_dataset(
        data, load_config(None, [*settings, f"data.augmentation={augmentation}", *overrides])
    )


def scene() -> Example:
    """Return a smooth image with one light box."""
    rows, columns = torch.arange(120)[:, None], torch.arange(200)[None]
    image = torch.stack([rows + 0 * columns, columns // 2 + 0 * rows, (rows + columns) // 4]).to(torch.uint8)
    image[:, 40:80, 60:130] = 220
    return example_of(image, torch.tensor([[60.0, 40, 130, 80]]), torch.tensor([1]), (120, 200))


def applied(name: str, example: Example, seed: int) -> Example:
    """Apply an effect as the data set does, with the check of its result."""
    transform = NamedTransform(name, build_transform([name], Resize(64, 96), train=True).beside[0].function)
    return transform(example, np.random.default_rng(seed), [], 2)


def test_footage_is_detr_and_the_effects_after_all_other_transforms() -> None:
    for augmentation, between in (
        ("footage", []),
        (["footage", "mosaic", "photometric"], ["mosaic", "photometric"]),
    ):
        transform = build_transform(augmentation, Resize(64, 96), train=True)
        assert transform.recipe == "detr"
        assert [each.name for each in transform.beside] == [*between, *FOOTAGE]
        assert recipe_of(augmentation) == "detr"
    assert set(FOOTAGE) <= set(TRANSFORMS.names)


@pytest.mark.parametrize("name", FOOTAGE)
def test_an_effect_changes_every_fifth_image_and_keeps_its_size_and_kind(name: str) -> None:
    source, num_changed = scene(), 0
    before = source.image.clone()
    for seed in range(200):
        example = applied(name, source, seed)
        assert example.image.dtype == torch.uint8
        assert example.image.shape == source.image.shape
        num_changed += not torch.equal(example.image, source.image)
        if name != "scale_out":
            assert torch.equal(example.boxes, source.boxes)
        assert torch.equal(example.image, applied(name, source, seed).image)
    assert torch.equal(source.image, before), "the image itself is not changed"
    assert 17 < num_changed < 63, "four standard deviations of one in five"


@pytest.mark.parametrize("name", FOOTAGE)
@pytest.mark.parametrize(("height", "width"), [(1, 33), (40, 2), (3, 3)])
def test_small_and_thin_images_without_boxes_are_accepted(
    name: str, height: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(footage, "PROBABILITY", 1)
    monkeypatch.setattr(ScaleOut, "probability", 1)
    image = torch.full((3, height, width), 90, dtype=torch.uint8)
    empty = example_of(image, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), (height, width))
    for seed in range(8):
        assert applied(name, empty, seed).image.shape == image.shape


def test_scaling_out_keeps_boxes_around_their_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ScaleOut, "probability", 1)
    factors = []
    for seed in range(40):
        image, boxes, _ = applied("scale_out", scene(), seed)
        rows, columns = torch.nonzero(image.amin(dim=0) > 160, as_tuple=True)
        found = [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]
        # One pixel for the blur of the resize at an edge, one for its rounding.
        np.testing.assert_allclose(found, boxes[0].numpy(), atol=2)
        factors.append(70 / float(boxes[0, 2] - boxes[0, 0]))
    assert 1 <= min(factors) < 1.1
    assert 1.4 < max(factors) < 1.52, "rounded to pixels"


@pytest.mark.parametrize("length", [1, 3, 9])
@pytest.mark.parametrize("degrees", [0, 30, 90, 135])
def test_a_motion_blur_is_a_convolution_with_a_line(length: int, degrees: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 31, 3), dtype=np.uint8)
    angle, half = math.radians(degrees), length // 2
    kernel = torch.zeros(length, length)
    for distance in range(-half, half + 1):
        kernel[half + round(distance * math.sin(angle)), half + round(distance * math.cos(angle))] += (
            1 / length
        )
    image = torch.from_numpy(pixels).permute(2, 0, 1)[:, None].double()
    padded = torch.nn.functional.pad(image, (half,) * 4, mode="replicate")
    wanted = torch.nn.functional.conv2d(padded, kernel[None, None].double())[:, 0].permute(1, 2, 0)
    difference = torch.from_numpy(blur_along_line(pixels, length, angle)) - wanted
    assert float(difference.abs().max()) <= 0.5 + 1e-6, "rounded to the nearest level"


def test_a_long_blur_does_not_overflow() -> None:
    white = np.full((4, 5, 3), 255, dtype=np.uint8)
    assert np.array_equal(blur_along_line(white, 999, 0.3), white)


def test_noise_has_its_standard_deviation_and_no_bias() -> None:
    grey = torch.full((3, 200, 300), 128, dtype=torch.uint8)
    for deviation in footage.NOISE_LEVELS:
        noise = with_noise(grey, deviation, np.random.default_rng(0)).double() - 128
        # 180,000 values: the mean is off by at most deviation / 100; the rounded quantiles by two percent.
        assert float(noise.mean()) == pytest.approx(0, abs=deviation / 50)
        assert float(noise.std()) == pytest.approx(deviation, rel=0.03)
        assert float(noise.flatten()[1:].mul(noise.flatten()[:-1]).mean()) < deviation**2 / 50, "independent"


def test_gamma_equals_torchvisions() -> None:
    image = torch.arange(256, dtype=torch.uint8).repeat(3, 2, 1)
    for exponent in (0.7, 1.0, 1.4):
        difference = with_gamma(image, exponent).int() - F.adjust_gamma(image, exponent).int()
        assert int(difference.abs().max()) <= 1, "torchvision rounds down"
    assert torch.equal(with_gamma(image, 1.0), image)


def test_jpeg_stays_near_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(footage, "PROBABILITY", 1)
    source = scene()
    errors = [
        float((applied("jpeg", source, seed).image.float() - source.image.float()).abs().mean())
        for seed in range(10)
    ]
    assert 0 < min(errors) < max(errors) < 8


def content(samples: CocoDetectionDataset, epoch: int) -> list[tuple[bytes, Tensor]]:
    made = [samples[epoch, row] for row in range(len(samples))]
    return [(each.image.numpy().tobytes(), each.boxes_cxcywh) for each in made]


def test_a_sample_depends_on_seed_epoch_and_row_and_its_size_is_known_before(data: CocoData) -> None:
    samples, again = dataset(data, "footage"), dataset(data, "footage")
    for epoch in (0, 1):
        for (image, boxes), (same_image, same_boxes) in zip(
            content(samples, epoch), content(again, epoch), strict=True
        ):
            assert image == same_image
            assert torch.equal(boxes, same_boxes)
        for row in range(len(data)):
            assert samples[epoch, row].image.shape[-2:] == samples.size_hw((epoch, row))
    changed = [
        one[0] != other[0] for one, other in zip(content(samples, 0), content(samples, 1), strict=True)
    ]
    assert all(changed)
    other_seed = content(dataset(data, "footage", "training.seed=1"), 0)
    assert sum(one[0] == other[0] for one, other in zip(content(samples, 0), other_seed, strict=True)) == 0


def test_the_last_epochs_apply_detr_alone(data: CocoData) -> None:
    samples, plain = dataset(data, "footage", "data.augmentation_off_epochs=2"), dataset(data, "detr")
    for epoch, is_off in ((0, False), (4, True)):
        same = [
            one[0] == other[0]
            for one, other in zip(content(samples, epoch), content(plain, epoch), strict=True)
        ]
        assert all(same) == is_off
