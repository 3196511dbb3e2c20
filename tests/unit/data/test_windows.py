"""Windows of training images (`data.tiles`): which part a sample shows, and the boxes in it."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness.data import write_coco
from torchvision.transforms.v2 import functional as F

from detr_dist.boxes import cxcywh_to_xyxy
from detr_dist.config import Config, load_config
from detr_dist.config_tiles import Tiles
from detr_dist.data.coco import CocoData, load_data
from detr_dist.data.dataset import CocoDetectionDataset, collate, training_dataset
from detr_dist.data.sampling import EpochSamples
from detr_dist.data.windows import Window, WindowRule, inside
from detr_dist.serving.decoding import decode_rgb

Document = dict[str, Any]
NO_BOXES = np.empty((0, 4)), np.empty(0, np.int64)


def rule(num_classes: int = 2, **settings: Any) -> WindowRule:
    return WindowRule(Tiles(**{"size": 64, **settings}), np.ones(num_classes))


def drawn(rule: WindowRule, size_hw: tuple[int, int], *boxes: Any, times: int = 400) -> list[Window | None]:
    boxes_xyxy, classes = boxes or NO_BOXES
    return [rule.draw(size_hw, boxes_xyxy, classes, np.random.default_rng(seed)) for seed in range(times)]


def test_an_image_that_is_not_larger_than_a_window_is_shown_in_full() -> None:
    assert set(drawn(rule(full_image=False), (64, 50))) == {None}
    for window in drawn(rule(full_image=False), (50, 100)):
        assert window is not None
        assert (window.top, window.height, window.width) == (0, 50, 64)
        assert 0 <= window.left <= 36


def test_a_window_may_have_two_sides() -> None:
    windows = drawn(rule(size=[40, 90], full_image=False), (100, 100))
    assert {window.size_hw for window in windows if window} == {(40, 90)}
    assert 0 <= min(window.top for window in windows if window) < 5
    assert 55 < max(window.top for window in windows if window) <= 60
    assert {window.left for window in windows if window} == set(range(11))


def test_the_full_image_is_as_frequent_as_a_window_of_its_grid() -> None:
    size_hw = (100, 200)
    assert rule().tiles.grid.num_windows(*size_hw) == 2 * 4 + 1
    windows = drawn(rule(), size_hw, times=3000)
    # One in nine: 333 of 3000, with a standard deviation of 17.
    assert 265 < windows.count(None) < 400
    assert None not in drawn(rule(full_image=False), size_hw)


def test_a_part_of_the_windows_holds_a_box_of_a_class_drawn_by_its_rarity() -> None:
    boxes = np.array([[3.5, 4.2, 12.7, 15.1], [20, 30, 44, 50], [150, 80, 190, 96], [180.5, 1, 189.5, 9]])
    classes = np.array([0, 0, 0, 1])
    sought = WindowRule(Tiles(size=64, full_image=False, rare_share=1), 1 / np.array([300, 100]))
    held: Counter[int] = Counter()
    for window in drawn(sought, (100, 200), boxes, classes, times=2000):
        assert window is not None
        first = np.array([window.left, window.top])
        is_held = (boxes[:, :2] >= first).all(1) & (boxes[:, 2:] <= first + 64).all(1)
        assert is_held.any()
        held.update(np.flatnonzero(is_held).tolist())
    # Class 1 is drawn three times as often: 1500 of 2000 hold its box, each other is chosen 167 times.
    assert held[3] > 1400
    assert 100 < held[0] < 400
    anywhere = drawn(rule(full_image=False, rare_share=0), (100, 200), boxes, classes, times=2000)
    # Of 137 possible lefts 10 hold it, of 37 tops 2: 8 of 2000, with a standard deviation of 3.
    assert sum(window is not None and window.left > 125 and window.top < 2 for window in anywhere) < 20


@pytest.mark.parametrize(
    "box", [[10.5, 5, 160.2, 90], [-0.0, 0, 64, 64], [136, 36, 200, 100], [0.4, 0, 64.3, 64]]
)
def test_a_box_that_fills_a_window_is_in_all_of_it(box: list[float]) -> None:
    for window in drawn(rule(full_image=False, rare_share=1), (100, 200), np.array([box]), np.array([0])):
        assert window is not None
        visible, _ = inside(window, np.array([box]), np.array([0]), 0)
        # To whole pixels.
        assert (visible[:, 2:] - visible[:, :2] >= np.minimum(np.subtract(box[2:], box[:2]), 64) - 1).all()
        assert 0 <= window.top <= 36
        assert 0 <= window.left <= 136


def test_boxes_are_clipped_ignored_or_left_out_by_their_visible_area() -> None:
    window = Window(10, 20, 50, 60)
    boxes = np.array(
        [
            [30.5, 20, 40, 30.25],  # inside
            [10, 20, 30, 30],  # half of it
            [10.1, 20, 30, 30],  # a little more than half of it
            [0, 0, 25, 20],  # a tenth
            [0, 0, 20, 20],  # touches
            [100, 100, 120, 120],  # elsewhere
            [0, 0, 100, 100],  # covers the window, which shows three tenths of it
        ]
    )
    visible, labels = inside(window, boxes, np.array([0, 1, 2, 3, 4, 5, 6]), 0.501)
    assert labels.tolist() == [0, -2, 2, -4, -7]
    assert visible.tolist() == [
        [10.5, 10, 20, 20.25],
        [0, 10, 10, 20],
        [0, 10, 10, 20],
        [0, 0, 5, 10],
        [0, 0, 60, 50],
    ]
    assert (inside(window, boxes, np.arange(7), 0)[1] >= 0).all()
    assert (inside(window, boxes, np.arange(7), 1)[1] >= 0).tolist() == [True, False, False, False, False]


def test_a_complete_box_is_never_ignored() -> None:
    rng = np.random.default_rng(0)
    first = np.array([10, 20]) + 30 * rng.random((2000, 2))
    boxes = np.hstack([first, first + 0.1 + 20 * rng.random((2000, 2))])
    assert (inside(Window(20, 10, 60, 60), boxes, np.zeros(2000, np.int64), 1)[1] == 0).all()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> CocoData:
    folder = tmp_path_factory.mktemp("data") / "train"
    write_coco(folder, num_images=6, with_boxes=lambda i: i, mixed_sizes=True)
    return load_data(folder)


def config(*overrides: str) -> Config:
    settings = ("data.shortest_edge=64", "data.longest_edge=96", "data.tiles.size=40", "training.seed=3")
    return load_config(None, [*settings, "data.augmentation=none", *overrides])


def tiled(data: CocoData, *overrides: str, samples: EpochSamples | None = None) -> CocoDetectionDataset:
    return training_dataset(data, config(*overrides), samples)


KEYS = [(epoch, index) for epoch in range(12) for index in range(6)]


def test_a_sample_is_the_window_of_the_image_with_its_boxes_resized(data: CocoData) -> None:
    dataset, num_ignored, num_full = tiled(data), 0, 0
    for epoch, row in KEYS:
        shown, sample = dataset._plan(epoch, row, row).shown, dataset[epoch, row]
        image = decode_rgb(data.image_path(row))
        boxes, labels = data.training_corners(row)
        if shown is None:
            num_full += 1
            assert sample.image.shape[-2:] == dataset.transform.resize.size_hw(*data.size_hw(row))
            continue
        expected = F.resize(F.crop(image, *shown), [64, 64], antialias=True)
        assert torch.equal(sample.image, expected)
        visible, labels = inside(shown, boxes, labels, 0.4)
        is_target = labels >= 0
        num_ignored += int((~is_target).sum())
        assert sample.labels.tolist() == labels[is_target].tolist()
        found = cxcywh_to_xyxy(sample.boxes_cxcywh) * 40
        torch.testing.assert_close(found, torch.from_numpy(visible[is_target]).float(), atol=1e-4, rtol=0)
        if sample.ignored is None:
            assert is_target.all()
            continue
        assert sample.ignored[0].tolist() == (-1 - labels[~is_target]).tolist()
        found = cxcywh_to_xyxy(sample.ignored[1]) * 40
        torch.testing.assert_close(found, torch.from_numpy(visible[~is_target]).float(), atol=1e-4, rtol=0)
    assert num_ignored > 10
    assert 2 < num_full < 30


def test_windows_depend_on_seed_epoch_and_sample_alone(data: CocoData) -> None:
    one, other = tiled(data), tiled(data, "data.augmentation=detr")
    windows = [one._plan(epoch, row, row).shown for epoch, row in KEYS]
    assert windows == [other._plan(epoch, row, row).shown for epoch, row in reversed(KEYS)][::-1]
    assert len(set(windows)) > 40
    assert windows != [tiled(data, "training.seed=4")._plan(*key, key[1]).shown for key in KEYS]
    # Copies of an image in one epoch show different parts.
    samples = EpochSamples.of([np.array([1.0, 1, 1, 1, 1, 3])], [8], seed=3)
    copies = tiled(data, samples=samples)
    places = [place for place in range(8) if samples.row(0, place) == 5]
    assert len({copies._plan(0, place, 5).shown for place in places}) == len(places) == 3


@pytest.mark.parametrize(
    "augmentation", ["none", "light", "detr", "[detr, mosaic, zoom_out, iou_crop, mixup]"]
)
@pytest.mark.parametrize("resize", ["shortest_edge", "square"])
def test_the_size_of_a_window_is_known_before_loading(data: CocoData, augmentation: str, resize: str) -> None:
    dataset = tiled(data, f"data.augmentation={augmentation}", f"data.resize={resize}")
    num_ignored = 0
    for key in KEYS:
        sample = dataset[key]
        assert dataset.size_hw(key) == tuple(sample.image.shape[-2:])
        assert (sample.labels >= 0).all()
        if sample.ignored is not None:
            labels, boxes_cxcywh = sample.ignored
            num_ignored += len(labels)
            assert len(labels) == len(boxes_cxcywh) > 0
            assert ((labels >= 0) & (labels < data.num_classes)).all()
    assert num_ignored > 5


def test_a_window_keeps_the_resolution_of_the_file(tmp_path: Path) -> None:
    """A small network input would let the full image be decoded at a reduced scale."""
    write_coco(tmp_path / "train", num_images=1, with_boxes=lambda i: 1, mixed_sizes=False)
    data = load_data(tmp_path / "train")
    overrides = ("data.shortest_edge=32", "data.resize=square", "data.tiles.full_image=false")
    dataset = tiled(data, *overrides)
    sample, shown = dataset[0, 0], dataset._plan(0, 0, 0).shown
    assert shown is not None
    expected = F.resize(F.crop(decode_rgb(data.image_path(0)), *shown), [32, 32], antialias=True)
    assert torch.equal(sample.image, expected)


def test_a_batch_holds_the_ignored_regions_of_its_images(data: CocoData) -> None:
    dataset = tiled(data)
    samples = [dataset[key] for key in KEYS]
    having = [sample for sample in samples if sample.ignored is not None][:2]
    without = next(sample for sample in samples if sample.ignored is None)
    assert collate([without, without]).ignored is None
    for batch in (
        collate([having[0], without, having[1]]),
        collate([having[0], without, having[1]]).to("cpu"),
    ):
        assert batch.ignored is not None
        first, second = (sample.ignored for sample in having)
        assert first is not None
        assert second is not None
        assert batch.ignored.num_boxes == [len(first[0]), 0, len(second[0])]
        assert torch.equal(batch.ignored.labels, torch.cat((first[0], second[0])))
        assert torch.equal(batch.ignored.boxes_cxcywh, torch.cat((first[1], second[1])))
        assert batch.num_boxes == [len(sample.labels) for sample in (having[0], without, having[1])]
    moved = batch.to("meta").ignored
    assert moved is not None
    assert moved.labels.device.type == moved.boxes_cxcywh.device.type == "meta"
