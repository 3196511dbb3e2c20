"""The augmentations of the package that follow a recipe: mosaic, mixup, photometric, zoom_out, iou_crop."""

import colorsys
import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from harness.data import write_coco
from torch import Tensor
from torchvision.ops import box_iou
from torchvision.transforms.v2 import functional as F

from detr_dist.config import load_config
from detr_dist.data import augmentations
from detr_dist.data.augmentations import (
    IouCrop,
    Mixup,
    Mosaic,
    ZoomOut,
    distort_colours,
    photometric,
)
from detr_dist.data.coco import CocoData, load_data
from detr_dist.data.dataset import CocoDetectionDataset, training_dataset
from detr_dist.data.example import Example, example_of
from detr_dist.data.loading import BatchLoader, shared_memory_need
from detr_dist.data.sampling import MicroBatchSampler, StepPlan
from detr_dist.data.transforms import NamedTransform
from detr_dist.errors import UsageError

NAMES = ["mosaic", "mixup", "photometric", "zoom_out", "iou_crop"]
FUNCTIONS = dict(zip(NAMES, (Mosaic(), Mixup(), photometric, ZoomOut(), IouCrop()), strict=True))
SETTINGS = ["data.shortest_edge=64", "data.longest_edge=96", "training.num_epochs=4", "data.num_workers=0"]

COLOURS = torch.tensor([[220, 20, 20], [20, 220, 20], [20, 20, 220], [220, 220, 20]], dtype=torch.uint8)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> CocoData:
    folder = tmp_path_factory.mktemp("data") / "train"
    write_coco(folder, num_images=8, with_boxes=lambda i: i % 3, mixed_sizes=True)
    return load_data(folder)


def dataset(data: CocoData, names: Sequence[str], *overrides: str) -> CocoDetectionDataset:
    augmentation = f"data.augmentation=[{', '.join(names)}]"
    return training_dataset(data, load_config(None, [*SETTINGS, augmentation, *overrides]))


HasColour = Callable[[Tensor, int], Tensor]
Bytes = tuple[bytes, bytes, bytes]


def content(samples: CocoDetectionDataset, epoch: int) -> list[Bytes]:
    """Return the bytes of all samples of an epoch."""
    made = [samples[epoch, row] for row in range(len(samples))]
    return [
        (each.image.numpy().tobytes(), each.boxes_cxcywh.numpy().tobytes(), each.labels.numpy().tobytes())
        for each in made
    ]


def digest(made: list[Bytes]) -> str:
    return hashlib.sha256(b"".join(b"".join(each) for each in made)).hexdigest()


def filled(height: int, width: int, box: list[int], label: int) -> Example:
    """Return a dark image with one box that is filled with the colour of its label."""
    image = torch.full((3, height, width), 20, dtype=torch.uint8)
    image[:, box[1] : box[3], box[0] : box[2]] = COLOURS[label][:, None, None]
    return example_of(image, torch.tensor([box]).float(), torch.tensor([label]), (height, width))


def has_colour(image: Tensor, label: int) -> Tensor:
    """Return which pixels have about the colour of a label, [H, W]."""
    return ((image > 120) == (COLOURS[label] > 120)[:, None, None]).all(dim=0)


def extent(is_coloured: Tensor) -> list[int]:
    """Return the smallest box, as xyxy, around pixels."""
    rows, columns = torch.nonzero(is_coloured, as_tuple=True)
    return [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]


def assert_boxes_bound_their_colours(example: Example, has_colour: HasColour = has_colour) -> None:
    for box, label in zip(example.boxes, example.labels.tolist(), strict=True):
        if (box[2:] - box[:2]).min() > 4:  # the blur of the resize can leave no colour in less
            # One pixel for the blur of the resize at an edge, one for its rounding.
            np.testing.assert_allclose(extent(has_colour(example.image, label)), box.numpy(), atol=2)


def applied(name: str, example: Example, seed: int, partners: Sequence[Example] = ()) -> Example:
    """Apply a transform as the data set does, with the check of its result."""
    return NamedTransform(name, FUNCTIONS[name])(example, np.random.default_rng(seed), partners, len(COLOURS))


def test_a_mosaic_keeps_boxes_around_their_objects() -> None:
    sizes = [(120, 200), (200, 120), (90, 300), (400, 380)]
    sources = [filled(*size, [30, 20, 90, 80], label) for label, size in enumerate(sizes)]
    seen = set()
    for seed in range(60):
        example = applied("mosaic", sources[0], seed, sources[1:])
        seen |= set(example.labels.tolist())
        assert_boxes_bound_their_colours(example)
    assert seen == {0, 1, 2, 3}


@pytest.mark.parametrize("partner_hw", [(120, 200), (200, 120), (300, 700)])
def test_a_mixup_blends_two_images_and_has_the_boxes_of_both(partner_hw: tuple[int, int]) -> None:
    one, other = filled(120, 200, [10, 10, 60, 50], 0), filled(*partner_hw, [70, 60, 110, 110], 2)
    num_blended = 0
    for seed in range(40):
        example = applied("mixup", one, seed, [other])
        if torch.equal(example.image, one.image):
            assert example.labels.tolist() == [0]
            continue
        num_blended += 1
        # A colour of 220 has 0.45 to 0.55 of its distance to the grey of 20.
        assert 20 + 0.44 * 200 < float(example.image[0, 30, 30]) < 20 + 0.56 * 200
        assert example.labels[0] == 0
        assert example.boxes[0].tolist() == [10, 10, 60, 50]
        assert len(example.labels) <= 2
        if partner_hw == (120, 200):
            assert example.boxes[1].tolist() == [70, 60, 110, 110], "used as it is"
        assert_boxes_bound_their_colours(example, lambda image, label: image[label] > 70)
    assert 8 < num_blended < 32, "four standard deviations of a fair coin"


def test_zooming_out_keeps_boxes_around_their_objects() -> None:
    source = filled(120, 200, [30, 20, 130, 80], 1)
    factors = []
    for seed in range(80):
        example = applied("zoom_out", source, seed)
        assert_boxes_bound_their_colours(example)
        factors.append(100 / float(example.boxes[0, 2] - example.boxes[0, 0]))
    assert sum(factor == 1 for factor in factors) in range(22, 59), "four standard deviations of a fair coin"
    assert max(factors) == pytest.approx(4, abs=0.3)
    assert min(factor for factor in factors if factor > 1) < 1.4


def four_boxes() -> Example:
    image, boxes = torch.full((3, 150, 200), 20, dtype=torch.uint8), []
    for label, (left, top) in enumerate([(10, 10), (130, 20), (20, 90), (120, 100)]):
        parts = filled(150, 200, [left, top, left + 50, top + 30], label)
        image = torch.maximum(image, parts.image)
        boxes.append(parts.boxes.as_subclass(Tensor))
    return example_of(image, torch.cat(boxes), torch.arange(4), (150, 200))


def test_a_crop_keeps_the_boxes_whose_centres_it_holds_with_their_labels() -> None:
    source, numbers, num_unchanged = four_boxes(), set(), 0
    for seed in range(80):
        example = applied("iou_crop", source, seed)
        assert_boxes_bound_their_colours(example)
        labels = example.labels.tolist()
        assert labels == sorted(set(labels))
        numbers.add(len(labels))
        num_unchanged += torch.equal(example.image, source.image)
    assert numbers == {1, 2, 3, 4}
    # One in five is left alone, and of the others one in seven: 0.31.
    assert 8 < num_unchanged < 42, "four standard deviations"


@pytest.mark.parametrize("least_iou", [0.1, 0.5, 0.9])
def test_a_crop_reaches_the_least_iou_with_a_box_whose_centre_it_holds(
    least_iou: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(augmentations, "LEAST_IOUS", (least_iou,))
    boxes, sizes = torch.tensor([[20.0, 10, 150, 90], [2, 2, 6, 6]]), []
    for seed in range(40):
        window = augmentations._window_with_box(boxes, (100, 200), np.random.default_rng(seed))
        assert window is not None
        size, center = window[2:] - window[:2], (boxes[0, :2] + boxes[0, 2:]) / 2
        assert float(box_iou(window[None], boxes)[0].max()) >= least_iou
        assert bool(((window[:2] < center) & (center < window[2:])).all())
        assert 0.5 <= float(size[0] / size[1]) <= 2
        sizes.append(float(size[0]) / 200)
    assert 0.3 <= min(sizes) < max(sizes) <= 1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("height", "width"), [(1, 33), (40, 2), (64, 64)])
def test_small_and_thin_images_without_boxes_are_accepted(name: str, height: int, width: int) -> None:
    image, no_boxes = torch.zeros(3, height, width, dtype=torch.uint8), torch.zeros(0, 4)
    empty = example_of(image, no_boxes, torch.zeros(0, dtype=torch.int64), (height, width))
    whole = example_of(image, torch.tensor([[0.0, 0, width, height]]), torch.tensor([0]), (height, width))
    for seed in range(20):
        assert applied(name, empty, seed, [empty] * 3).image.shape == image.shape
        assert applied(name, whole, seed, [whole] * 3).image.shape == image.shape


def test_photometric_changes_colours_and_no_box() -> None:
    source = filled(120, 200, [30, 20, 90, 80], 0)
    images = set()
    for seed in range(60):
        example = applied("photometric", source, seed)
        assert torch.equal(example.boxes, source.boxes)
        images.add(example.image.numpy().tobytes())
    assert len(images) > 50, "one in sixteen is left alone"


GREY_COLOURS = torch.randint(100, 150, (3, 40, 60), generator=torch.Generator().manual_seed(0)).byte()


@pytest.mark.parametrize(
    ("factors", "change"),
    [
        ((1.1, 1, 1, 0), lambda image: F.adjust_brightness(image, 1.1)),
        ((1, 0.5, 1, 0), lambda image: F.adjust_contrast(image, 0.5)),
        ((1, 1.5, 1, 0), lambda image: F.adjust_contrast(image, 1.5)),
        ((1, 1, 0.5, 0), lambda image: F.adjust_saturation(image, 0.5)),
        ((1, 1, 1.5, 0), lambda image: F.adjust_saturation(image, 1.5)),
        ((1, 1, 1, 0), lambda image: image),
    ],
)
def test_colours_change_as_in_torchvision(
    factors: tuple[float, ...], change: Callable[[Tensor], Tensor]
) -> None:
    # torchvision rounds down where we round to the nearest, and in contrast the mean of all pixels, not of
    # one in 16, is the centre.
    difference = distort_colours(GREY_COLOURS, *factors).int() - change(GREY_COLOURS).int()
    assert int(difference.abs().max()) <= 2


@pytest.mark.parametrize("turns", [-0.05, 0.02, 0.05])
@pytest.mark.parametrize("rgb", [(200, 60, 60), (60, 200, 60), (60, 60, 200), (190, 150, 70), (80, 90, 190)])
def test_the_hue_turns_by_a_part_of_the_colour_circle(turns: float, rgb: tuple[int, int, int]) -> None:
    image = torch.tensor(rgb, dtype=torch.uint8)[:, None, None].expand(3, 8, 8)
    turned = distort_colours(image, 1, 1, 1, turns)[:, 0, 0].tolist()
    hue, before = colorsys.rgb_to_hsv(*turned)[0], colorsys.rgb_to_hsv(*rgb)[0]
    # Hue in HSV's hexagon is off by up to 0.0031 turns from that in a circle, before and after; colours are
    # rounded by half a level of 100 or more.
    assert (hue - before + 0.5) % 1 - 0.5 == pytest.approx(turns, abs=0.008)


def test_grey_stays_grey() -> None:
    grey = torch.full((3, 8, 8), 77, dtype=torch.uint8)
    assert torch.equal(distort_colours(grey, 1, 1.5, 1.5, 0.05), grey)


@pytest.mark.parametrize("name", NAMES)
def test_an_augmentation_keeps_sizes_and_differs_between_epochs(data: CocoData, name: str) -> None:
    samples, plain = dataset(data, ["light", name]), dataset(data, ["light"])
    for row in range(len(data)):
        assert samples[0, row].image.shape == plain[0, row].image.shape
    assert len({samples[epoch, 5].image.numpy().tobytes() for epoch in range(4)}) > 2


def test_a_mosaic_is_neither_zoomed_out_nor_cropped(data: CocoData) -> None:
    names = ["none", "mosaic", "zoom_out", "iou_crop"]
    plain, mosaics, samples = (dataset(data, names[:number]) for number in (1, 2, 4))
    num_mosaics = num_others = 0
    for epoch, row in product(range(4), range(len(data))):
        without, with_all = mosaics[epoch, row].image, samples[epoch, row].image
        if torch.equal(without, plain[epoch, row].image):
            num_others += not torch.equal(without, with_all)
        else:
            num_mosaics += 1
            assert torch.equal(without, with_all)
    assert num_mosaics > 3
    assert num_others > 3, "changed by the other two"


IN_ANOTHER_PROCESS = """
import runpy, sys
tests = runpy.run_path(sys.argv[1])
data = tests["load_data"](sys.argv[2])
print(tests["digest"](tests["content"](tests["dataset"](data, ["light", *tests["NAMES"]]), epoch=1)))
"""


def test_a_sample_depends_on_seed_epoch_and_row_alone(data: CocoData) -> None:
    names = ["light", *NAMES]
    samples = dataset(data, names)
    here = content(samples, epoch=1)
    assert content(samples, epoch=1) == here
    arguments = [__file__, str(data.annotations_path.parent)]
    tests_folder = str(Path(__file__).parents[2])
    elsewhere = subprocess.run(
        [sys.executable, "-c", IN_ANOTHER_PROCESS, *arguments],
        env=os.environ | {"PYTHONPATH": tests_folder, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert elsewhere.stdout.strip() == digest(here)
    for other in (content(samples, epoch=2), content(dataset(data, names, "training.seed=1"), epoch=1)):
        assert sum(one == another for one, another in zip(here, other, strict=True)) < 2


def test_the_last_epochs_apply_the_recipe_alone(data: CocoData) -> None:
    names, plain = ["light", *NAMES], dataset(data, ["light"])
    augmented, off = dataset(data, names), "data.augmentation_off_epochs=2"
    for samples in (dataset(data, names, off), dataset(data, names, off, "training.max_steps=1")):
        for epoch in (0, 1):
            assert content(samples, epoch) == content(augmented, epoch) != content(plain, epoch)
        for epoch in (2, 3):
            assert content(samples, epoch) == content(plain, epoch) != content(augmented, epoch)
    always_off = dataset(data, names, "data.augmentation_off_epochs=4")
    assert content(always_off, 0) == content(plain, 0)


def batches(data: CocoData, num_workers: int, start_step: int) -> Iterator[bytes]:
    """Yield the images of the remaining steps of two epochs, the last of which applies the recipe alone."""
    overrides = ["training.num_epochs=2", "data.augmentation_off_epochs=1", f"data.num_workers={num_workers}"]
    config = load_config(None, [*SETTINGS, *overrides])
    samples = dataset(data, ["light", *NAMES], *overrides)
    sampler = MicroBatchSampler(StepPlan(len(data), 2, 1, 1), 42, 0, start_step, 8 - start_step)
    need = shared_memory_need(config, data, train=True)
    for batch in BatchLoader(samples, sampler, config.data, pin_memory=False, need=need):
        yield batch.images.numpy().tobytes()


def test_a_resume_in_the_last_epochs_and_any_number_of_workers_give_the_same_batches(data: CocoData) -> None:
    uninterrupted = list(batches(data, num_workers=2, start_step=0))
    assert len(uninterrupted) == 8
    for start_step in (3, 4, 6):
        assert list(batches(data, num_workers=0, start_step=start_step)) == uninterrupted[start_step:]


def test_switching_off_for_more_epochs_than_the_run_has_is_an_error() -> None:
    load_config(None, ["training.num_epochs=3", "data.augmentation_off_epochs=3"])
    with pytest.raises(UsageError) as raised:
        load_config(None, ["training.num_epochs=3", "data.augmentation_off_epochs=4"])
    assert str(raised.value) == "data.augmentation_off_epochs 4 is more than training.num_epochs 3"
