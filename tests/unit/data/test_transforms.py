import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision import tv_tensors

from detr_dist.config_types import ResizeMode
from detr_dist.data.transforms import (
    Augmentation,
    DetectionTransform,
    Example,
    adjust_colours,
    apply,
    build_transform,
)
from detr_dist.resize import Resize


def scene(boxes: list[list[float]], height: int = 120, width: int = 200) -> Example:
    """Return a dark image in which each box is filled with its own light colour."""
    image = torch.full((3, height, width), 20, dtype=torch.uint8)
    for left, top, right, bottom in boxes:
        image[:, int(top) : int(bottom), int(left) : int(right)] = 220
    corners = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    tv_boxes = tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=(height, width))
    return Example(tv_tensors.Image(image), tv_boxes, torch.arange(len(boxes)))


def transformed(transform: DetectionTransform, example: Example, rng: np.random.Generator) -> Example:
    height, width = example.image.shape[-2:]
    return apply(transform.plan((height, width), rng), example)


def light_extent(image: Tensor) -> list[int]:
    """Return the smallest box, as xyxy, around the light pixels."""
    rows, columns = torch.nonzero(image.float().mean(0) > 0.5 * float(image.max()), as_tuple=True)
    return [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]


def interleaved(image: Tensor) -> Tensor:
    """Return the same image in the memory layout of a decoder."""
    return image.permute(1, 2, 0).contiguous().permute(2, 0, 1)


@pytest.mark.parametrize("augmentation", ["none", "light", "detr"])
def test_a_box_stays_around_its_object(augmentation: Augmentation) -> None:
    transform = build_transform(augmentation, Resize(160, 300), train=True)
    num_cut = 0
    for seed in range(60):
        image, boxes, labels = transformed(transform, scene([[60, 30, 130, 80]]), np.random.default_rng(seed))
        height, width = image.shape[-2:]
        if len(boxes) == 0:
            assert float(image.max()) < 100, "an object that is left has its box"
            continue
        assert labels.tolist() == [0]
        # One pixel for the blur of the resize at an edge, one for its rounding.
        np.testing.assert_allclose(light_extent(image), boxes[0].numpy(), atol=2)
        num_cut += bool(boxes[0, 0] == 0 or boxes[0, 1] == 0 or boxes[0, 2] == width or boxes[0, 3] == height)
    assert (num_cut > 5) == (augmentation == "detr"), "only crops cut objects"


def test_none_and_evaluation_only_resize() -> None:
    example = scene([[60, 30, 130, 80]])
    for transform in (
        build_transform("none", Resize(60, 300), True),
        build_transform("detr", Resize(60, 300), False),
    ):
        image, boxes, _ = transformed(transform, example, np.random.default_rng(0))
        assert image.shape == (3, 60, 100)
        assert boxes.tolist() == [[30, 15, 65, 40]]


def test_light_flips_half_of_the_images_and_keeps_their_size() -> None:
    transform = build_transform("light", Resize(120, 300), train=True)
    flipped = 0
    for seed in range(200):
        image, boxes, _ = transformed(transform, scene([[0, 30, 50, 80]]), np.random.default_rng(seed))
        assert image.shape == (3, 120, 200)
        flipped += boxes.tolist() == [[150, 30, 200, 80]]
    assert 70 < flipped < 130, "four standard deviations of a fair coin"


def test_detr_uses_its_eleven_scales_of_the_configured_edge() -> None:
    transform = build_transform("detr", Resize(400, 10_000), train=True)
    seen = {
        min(transformed(transform, scene([]), np.random.default_rng(seed)).image.shape[-2:])
        for seed in range(150)
    }
    assert seen == {round(400 * edge / 800) for edge in range(480, 801, 32)}


def test_detr_respects_the_longest_edge() -> None:
    transform = build_transform("detr", Resize(400, 420), train=True)
    assert (
        max(max(transformed(transform, scene([]), np.random.default_rng(s)).image.shape) for s in range(60))
        <= 420
    )


@pytest.mark.parametrize(
    ("mode", "of_landscape", "of_portrait"),
    [("square", (64, 64), (64, 64)), ("rectangle", (64, 96), (96, 64))],
)
def test_crops_get_the_fixed_size_of_their_image(
    mode: ResizeMode, of_landscape: tuple[int, int], of_portrait: tuple[int, int]
) -> None:
    transform = build_transform("detr", Resize(64, 96, mode), True)
    num_cut = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        assert transform.plan((200, 120), rng).size_hw == of_portrait
        image, boxes, _ = transformed(transform, scene([[60, 30, 130, 80]]), rng)
        assert image.shape == (3, *of_landscape)
        if len(boxes):
            # One pixel for the blur of the resize at an edge, one for its rounding.
            np.testing.assert_allclose(light_extent(image), boxes[0].numpy(), atol=2)
        scaled = torch.tensor([70 / 200, 50 / 120]) * torch.tensor(of_landscape[::-1])
        num_cut += len(boxes) == 0 or not torch.allclose(boxes[0, 2:] - boxes[0, :2], scaled)
    assert 10 < num_cut < 30, "half of the images are cropped"


def test_boxes_outside_a_crop_are_removed_with_their_labels() -> None:
    corners = [[0, 0, 4, 4], [196, 0, 200, 4], [0, 116, 4, 120], [196, 116, 200, 120], [90, 50, 110, 70]]
    counts = set()
    for seed in range(60):
        image, boxes, labels = transformed(
            build_transform("detr", Resize(160, 300), True), scene(corners), np.random.default_rng(seed)
        )
        assert len(boxes) == len(labels)
        assert labels.tolist() == sorted(set(labels.tolist()))
        sizes = boxes[:, 2:] - boxes[:, :2]
        assert bool((sizes > 0).all())
        assert bool((boxes >= 0).all())
        # Corners are scaled in float32, which near 200 pixels has steps of 2e-5.
        assert bool((boxes[:, 2:] <= torch.tensor([image.shape[2], image.shape[1]]) + 1e-4).all())
        counts.add(len(boxes))
    assert len(counts) > 1


@pytest.mark.parametrize("augmentation", ["none", "light", "detr"])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 500), (300, 2)])
def test_tiny_and_thin_images_without_boxes_are_accepted(
    augmentation: Augmentation, height: int, width: int
) -> None:
    for seed in range(20):
        example = scene([], height, width)
        image, boxes, labels = transformed(
            build_transform(augmentation, Resize(64, 96), True), example, np.random.default_rng(seed)
        )
        assert min(image.shape) >= 1
        assert boxes.shape == (0, 4)
        assert labels.shape == (0,)


def test_a_sample_depends_only_on_its_generator() -> None:
    transform = DetectionTransform("detr", Resize(160, 300))
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    one, other, third = (
        transformed(transform, scene([[9, 9, 99, 99]]), np.random.default_rng(s)) for s in (1, 1, 2)
    )
    assert torch.equal(one.image, other.image)
    assert torch.equal(one.boxes, other.boxes)
    assert one.image.shape != third.image.shape or not torch.equal(one.image, third.image)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002


def test_neutral_factors_change_no_colour() -> None:
    image = interleaved(torch.arange(256, dtype=torch.uint8).repeat(3, 2, 1))
    assert torch.equal(adjust_colours(image, 1.0, (1.0, 1.0, 1.0)), image)


@pytest.mark.parametrize("contrast", [0.8, 1.2])
@pytest.mark.parametrize("gains", [(0.72, 1.0, 1.32), (1.32, 1.32, 1.32), (0.72, 0.72, 0.72)])
def test_integer_colours_equal_the_formula_in_floats(
    contrast: float, gains: tuple[float, float, float]
) -> None:
    image = interleaved(torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8))
    mean_grey = image[:, ::16, ::16].float().mean()
    expected = torch.tensor(gains)[:, None, None] * (contrast * image + (1 - contrast) * mean_grey)
    adjusted = adjust_colours(image, contrast, gains)
    # A factor is a multiple of 1/64, off by at most 1/128 of up to 255 levels; the sum is rounded once more.
    tolerance = 255 / 128 + 1
    assert float((adjusted - expected.clamp(0, 255)).abs().max()) <= tolerance
    assert adjusted.stride() == image.stride(), "pixels stay interleaved"
