"""Copy-paste of small objects: what is pasted is a target, and nothing small is covered."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from detr_dist.config import load_config
from detr_dist.data.coco import CocoData, load_data
from detr_dist.data.copy_paste import LARGEST_FACTOR, MOST_COVERED
from detr_dist.data.dataset import CocoDetectionDataset, Sample, training_dataset
from detr_dist.data.sampling import EpochSamples
from detr_dist.errors import UsageError

HEIGHT, WIDTH, GRASS = 120, 160, 60
PLAYER, BALL = 0, 1
NUM_IMAGES = 6
PASTE = "data.copy_paste={classes: [ball], most: 3}"


def write_frames(
    folder: Path, num_balls: list[int], *, side: int = 10, crowd: bool = False, at: int = 20
) -> CocoData:
    """Write frames with a player and some balls, whose red tells the frame and whose green is high."""
    folder.mkdir()
    images: list[dict[str, Any]] = []
    boxes: list[dict[str, Any]] = []
    for index, count in enumerate(num_balls):
        pixels = np.full((HEIGHT, WIDTH, 3), GRASS, np.uint8)
        pixels[30:90, 100:140] = (0, 0, 250)
        found = [(1, [100, 30, 40, 60], 0)]
        for ball in range(count):
            left, top = at, at + 25 * ball
            pixels[top - 2 : top + side + 2, left - 2 : left + side + 2] = (20 * index, 250, 0)
            found.append((2, [left, top, side, side], int(crowd)))
        Image.fromarray(pixels).save(folder / f"{index}.png")
        images.append({"id": index, "file_name": f"{index}.png", "width": WIDTH, "height": HEIGHT})
        for category, box, iscrowd in found:
            boxes.append({"id": len(boxes) + 1, "image_id": index, "category_id": category, "bbox": box})
            boxes[-1] |= {"iscrowd": iscrowd, "area": box[2] * box[3]}
    categories = [{"id": 1, "name": "player"}, {"id": 2, "name": "ball"}]
    document = {"images": images, "annotations": boxes, "categories": categories}
    (folder / "_annotations.coco.json").write_text(json.dumps(document))
    return load_data(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> CocoData:
    return write_frames(tmp_path_factory.mktemp("data") / "train", [1] * NUM_IMAGES)


def dataset(
    data: CocoData, *overrides: str, samples: EpochSamples | None = None, edge: int = HEIGHT
) -> CocoDetectionDataset:
    """Return training data, by default at the size of its files without any other augmentation."""
    settings = ["data.augmentation=none", f"data.shortest_edge={edge}", "data.longest_edge=1000"]
    return training_dataset(data, load_config(None, [*settings, *overrides]), samples)


def boxes_px(sample: Sample) -> np.ndarray:
    """Return boxes as xyxy in pixels."""
    height, width = sample.image.shape[1:]
    x, y, w, h = (sample.boxes_cxcywh.double() * torch.tensor([width, height] * 2)).T
    return torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], dim=1).numpy()


def assert_same(one: Sample, other: Sample) -> None:
    assert torch.equal(one.image, other.image)
    assert torch.equal(one.boxes_cxcywh, other.boxes_cxcywh)
    assert torch.equal(one.labels, other.labels)


def covered(one: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the area of each of `others` that the box `one` covers."""
    sides = np.minimum(one[2:], others[:, 2:]) - np.maximum(one[:2], others[:, :2])
    area: np.ndarray = sides.clip(min=0).prod(axis=1)
    return area


def test_each_pasted_ball_is_a_target_around_pixels_of_one_other_frame(data: CocoData) -> None:
    samples, plain = dataset(data, PASTE), dataset(data)
    numbers = []
    for epoch in range(12):
        for row in range(NUM_IMAGES):
            sample, before = samples[epoch, row], plain[epoch, row]
            number = len(sample.labels) - 2
            numbers.append(number)
            assert sample.image.dtype == torch.uint8
            assert sample.labels.tolist() == [PLAYER, BALL] + [BALL] * number
            assert torch.equal(sample.boxes_cxcywh[:2], before.boxes_cxcywh)
            changed, sources = torch.zeros(HEIGHT, WIDTH, dtype=torch.bool), set()
            for box in boxes_px(sample)[2:]:
                left, top, right, bottom = box.round().astype(int)
                assert 10 / LARGEST_FACTOR - 1 < right - left < 10 * LARGEST_FACTOR + 1
                centre = sample.image[:, (top + bottom) // 2, (left + right) // 2]
                assert int(centre[1]) == 250
                sources.add(int(centre[0]) // 20)
                margin = int(0.25 * 10 * LARGEST_FACTOR) + 2
                changed[max(top - margin, 0) : bottom + margin, max(left - margin, 0) : right + margin] = True
            assert len(sources) == min(number, 1)
            assert row not in sources
            assert torch.equal(sample.image[:, ~changed], before.image[:, ~changed]), "nothing else changes"
    assert set(numbers) == {0, 1, 2, 3}
    # Mean 1.5 with a deviation of 1.1, 72 times: four standard deviations.
    assert np.mean(numbers) == pytest.approx(1.5, abs=0.55)


def test_no_small_object_is_covered_and_little_of_a_larger_one(data: CocoData) -> None:
    samples, over_player = dataset(data, "data.copy_paste={classes: [ball], most: 9}"), 0.0
    for epoch in range(12):
        for row in range(NUM_IMAGES):
            boxes = boxes_px(samples[epoch, row])
            for place in range(2, len(boxes)):
                assert covered(boxes[place], boxes[1:place]).sum() < 1e-3
                on_player = float(covered(boxes[place], boxes[:1])[0])
                assert on_player <= MOST_COVERED * 40 * 60 + 1e-3
                over_player = max(over_player, on_player)
    assert over_player > 0


def test_edges_fade(data: CocoData) -> None:
    samples = dataset(data, PASTE)
    sample = next(each for epoch in range(9) for each in [samples[epoch, 0]] if len(each.labels) == 3)
    left, top, right, bottom = boxes_px(sample)[2].round().astype(int)
    green = sample.image[1, (top + bottom) // 2, left - 3 : (left + right) // 2].int()
    assert green[0] < 110
    assert green[-1] == 250
    assert bool((green.diff() >= 0).all())
    assert len(set(green.tolist())) > 2, "there are levels between"


@pytest.mark.parametrize(
    "overrides", [(), ("data.augmentation=[detr, mosaic, photometric]",), ("data.augmentation=footage",)]
)
def test_a_sample_depends_on_seed_epoch_and_row_alone(data: CocoData, overrides: tuple[str, ...]) -> None:
    one, same, other = (
        dataset(data, PASTE, *overrides, *more, edge=96) for more in ((), (), ("training.seed=7",))
    )
    for row in reversed(range(NUM_IMAGES)):
        assert same.size_hw((1, row)) == one[1, row].image.shape[-2:]
        assert_same(same[1, row], one[1, row])
    assert any(not torch.equal(one[1, row].image, other[1, row].image) for row in range(NUM_IMAGES))
    assert any(not torch.equal(one[1, row].image, one[2, row].image) for row in range(NUM_IMAGES))


def test_balls_have_the_scale_of_the_image_that_gets_them(data: CocoData) -> None:
    for edge in (60, 240):
        samples = dataset(data, PASTE, edge=edge)
        sides = np.concatenate(
            [np.ptp(boxes_px(samples[epoch, 1])[2:].reshape(-1, 2, 2), axis=1) for epoch in range(12)]
        )
        wanted = 10 * edge / HEIGHT
        # A patch is scaled to whole pixels.
        assert sides.min() > wanted / LARGEST_FACTOR * 0.9
        assert sides.max() < wanted * LARGEST_FACTOR * 1.1
        assert np.median(sides) == pytest.approx(wanted, rel=0.15)


@pytest.mark.parametrize(
    "frames",
    [
        {"num_balls": [1]},
        {"num_balls": [1, 0, 0]},
        {"num_balls": [1, 1], "crowd": True},
        {"num_balls": [1, 1], "side": 34},
        {"num_balls": [1, 1], "at": 2},
    ],
    ids=["one image", "no other image", "crowds", "large", "at the border"],
)
def test_without_a_suitable_ball_elsewhere_nothing_is_pasted(tmp_path: Path, frames: dict[str, Any]) -> None:
    data = write_frames(tmp_path / "train", **frames)
    samples, plain = dataset(data, PASTE), dataset(data)
    for epoch in range(5):
        assert_same(samples[epoch, 0], plain[epoch, 0])


def test_an_unreadable_partner_is_skipped(tmp_path: Path) -> None:
    data = write_frames(tmp_path / "train", [1, 1])
    (tmp_path / "train" / "1.png").write_bytes(b"no image")
    samples, plain = dataset(data, PASTE), dataset(data)
    for epoch in range(5):
        assert_same(samples[epoch, 0], plain[epoch, 0])
        assert samples[epoch, 0].unreadable == ()


def test_partners_are_images_of_the_epoch(data: CocoData) -> None:
    factors = np.array([1.0, 1, 0.01, 0.01, 0.01, 0.01])
    epochs = EpochSamples.of([factors], [4], seed=0)
    samples, pasted = dataset(data, PASTE, samples=epochs), 0
    for epoch in range(10):
        there = set(np.flatnonzero(epochs.counts(epoch)).tolist())
        for place in range(len(samples)):
            sample = samples[epoch, place]
            for box in boxes_px(sample)[2:]:
                x, y = ((box[:2] + box[2:]) / 2).round().astype(int)
                assert int(sample.image[0, y, x]) // 20 in there
                pasted += 1
    assert pasted > 10


def test_the_last_epochs_paste_nothing(data: CocoData) -> None:
    samples = dataset(data, PASTE, "training.num_epochs=3", "data.augmentation_off_epochs=1")
    assert sum(len(samples[1, row].labels) for row in range(NUM_IMAGES)) > 2 * NUM_IMAGES
    assert sum(len(samples[2, row].labels) for row in range(NUM_IMAGES)) == 2 * NUM_IMAGES


def test_the_most_boxes_of_an_image_include_what_is_pasted(data: CocoData) -> None:
    assert dataset(data).most_boxes_per_image == 2
    assert dataset(data, PASTE).most_boxes_per_image == 5
    assert dataset(data, PASTE, "data.augmentation=[none, mosaic]").most_boxes_per_image == 11


def test_an_unknown_class_and_unknown_keys_are_refused(data: CocoData) -> None:
    with pytest.raises(UsageError, match=r"^data\.copy_paste: there is no class 'bal'; did you mean ball\?$"):
        dataset(data, "data.copy_paste={classes: bal}")
    with pytest.raises(UsageError) as raised:
        load_config(None, ["data.copy_paste={clases: [ball], most: 0}"])
    assert str(raised.value).splitlines() == [
        "data.copy_paste.classes: field required, got {'clases': ['ball'], 'most': 0}",
        "data.copy_paste.most: input should be greater than or equal to 1, got 0",
        "data.copy_paste.clases: unknown configuration key; did you mean data.copy_paste.classes?",
    ]
