"""Samples of epochs in which some images appear several times."""

from pathlib import Path

import numpy as np
import pytest
import torch
from harness.data import write_coco

from detr_dist.config import load_config
from detr_dist.data.coco import CocoData
from detr_dist.data.concatenation import concatenate, load_sources, train_sources
from detr_dist.data.dataset import CocoDetectionDataset, Sample, training_dataset
from detr_dist.data.sampling import EpochSamples

NUM_IMAGES = 6
COUNTS = [1, 1, 12, 1, 1, 4]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> CocoData:
    """Write two sources with the same ids and file names."""
    folder = tmp_path_factory.mktemp("sources")
    for seed, name in enumerate(("first", "second")):
        write_coco(folder / name, num_images=3, with_boxes=lambda i: i % 3, mixed_sizes=True, seed=seed)
    return load_sources(train_sources([folder / "first", folder / "second"]))


def samples_of(counts: list[int]) -> EpochSamples:
    return EpochSamples.of([np.array(counts, dtype=np.float64)], [sum(counts)], seed=0)


def dataset(
    data: CocoData, samples: EpochSamples | None, augmentation: str = "[detr, mosaic]"
) -> CocoDetectionDataset:
    settings = load_config(
        None,
        [f"data.augmentation={augmentation}", "data.shortest_edge=64", "data.longest_edge=96"],
    )
    return training_dataset(data, settings, samples)


def assert_same(one: Sample, other: Sample) -> None:
    assert torch.equal(one.image, other.image)
    assert torch.equal(one.boxes_cxcywh, other.boxes_cxcywh)
    assert torch.equal(one.labels, other.labels)
    assert one.image_id == other.image_id


def test_samples_that_are_each_image_once_are_those_without(data: CocoData) -> None:
    plain, once = dataset(data, None), dataset(data, samples_of([1] * NUM_IMAGES))
    assert len(plain) == len(once) == NUM_IMAGES
    for epoch in range(2):
        for index in range(NUM_IMAGES):
            assert_same(once[epoch, index], plain[epoch, index])
            assert once.size_hw((epoch, index)) == plain.size_hw((epoch, index))


def test_copies_of_an_image_are_augmented_differently_and_the_same_each_time(data: CocoData) -> None:
    repeated = dataset(data, samples_of(COUNTS), "detr")
    assert len(repeated) == sum(COUNTS)
    rows = [repeated.row(0, place) for place in range(len(repeated))]
    assert rows == np.repeat(np.arange(NUM_IMAGES), COUNTS).tolist()
    places = [place for place, row in enumerate(rows) if row == 2]
    copies = [repeated[0, place] for place in places]
    assert {copy.image_id for copy in copies} == {12}
    assert len({copy.image.numpy().tobytes() for copy in copies}) == len(copies) == 12
    assert_same(repeated[0, places[3]], copies[3])
    assert all(
        repeated.size_hw((0, place)) == copy.image.shape[1:]
        for place, copy in zip(places, copies, strict=True)
    )


def test_the_next_image_takes_the_place_of_an_unreadable_one_and_of_all_its_copies(
    data: CocoData, tmp_path: Path
) -> None:
    folder = tmp_path / "damaged"
    write_coco(folder, num_images=3, with_boxes=lambda i: i, mixed_sizes=False)
    (folder / "000.jpg").write_bytes(b"not an image")
    parts = [data, load_sources(train_sources(folder))]
    both = concatenate(parts)
    repeated = dataset(both, samples_of([1] * NUM_IMAGES + [12, 1, 1]), "none")
    for place in range(NUM_IMAGES, NUM_IMAGES + 12):
        sample = repeated[0, place]
        ((row, reason),) = sample.unreadable
        assert (row, sample.image_id) == (NUM_IMAGES, 11)
        assert reason.startswith(f"{folder / '000.jpg'}: ")


def test_partners_are_samples_of_the_epoch(data: CocoData) -> None:
    """An image that is most of an epoch is in most mosaics."""
    single = samples_of([1, 1, 1, 1, 1, 200])
    repeated = dataset(data, single, "[none, mosaic]")
    read: list[int] = []
    original = repeated._read_image
    repeated._read_image = lambda row, plan: read.append(row) or original(row, plan)  # type: ignore
    for place in range(5):
        for epoch in range(4):
            repeated[epoch, place]
    partners = len(read) - 20
    assert partners > 0
    assert read.count(5) > 0.9 * partners  # 200 of 205 samples
