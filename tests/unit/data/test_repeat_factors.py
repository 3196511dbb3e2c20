"""How often images with rare classes appear, compared with a loop over images."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detr_dist.config import Config, load_config
from detr_dist.data import repeat_factors as module
from detr_dist.data.coco import CocoData, load_data
from detr_dist.data.concatenation import concatenate
from detr_dist.data.repeat_factors import (
    class_factors,
    describe_samples,
    epoch_samples,
    repeat_factors,
    samples_of_parts,
)
from detr_dist.errors import UsageError

Document = dict[str, Any]
WriteCoco = Callable[..., Path]
CLASSES = ["player", "ball", "referee", "unused"]


@pytest.fixture
def write_data(write_coco: WriteCoco) -> Callable[..., CocoData]:
    """Return a function that writes images with the classes of each; a crowd's index is negative."""

    def write(classes_of_images: list[list[int]], name: str = "train") -> CocoData:
        boxes = [
            {"image_id": image, "category_id": abs(index), "bbox": [1, 1, 9, 9], "iscrowd": int(index < 0)}
            for image, indices in enumerate(classes_of_images)
            for index in indices
        ]
        document = {
            "images": [
                {"id": image, "file_name": f"{image}.jpg", "width": 60, "height": 40}
                for image in range(len(classes_of_images))
            ],
            "annotations": [box | {"id": number} for number, box in enumerate(boxes)],
            "categories": [{"id": index, "name": each} for index, each in enumerate(CLASSES)],
        }
        return load_data(write_coco(document, name, with_images=False), check_files=False)

    return write


FOOTAGE = [[0, 0, 0], [0, 0, 1], [0], [], [0, 2, 2, -1], [0], [0, -2], [0], [0, 0], [0, 1, 2]] + [[0]] * 10


def slow_factors(data: CocoData, weights: list[float], threshold: float) -> list[float]:
    """Compute the factor of each image from the weights of all images."""
    classes_of = [set(data.training_targets(row)[1].tolist()) for row in range(len(data))]
    of_class = {}
    for label in range(len(CLASSES)):
        having = sum(weight for weight, own in zip(weights, classes_of, strict=True) if label in own)
        of_class[label] = max(1.0, math.sqrt(threshold * sum(weights) / having)) if having else 1.0
    return [max([1.0, *(of_class[label] for label in own)]) for own in classes_of]


@pytest.mark.parametrize("at_a_time", [1, 3, 20, 1000])
def test_factors_equal_a_loop_over_images(write_data, monkeypatch, at_a_time: int) -> None:
    monkeypatch.setattr(module, "_IMAGES_AT_A_TIME", at_a_time)
    data = write_data(FOOTAGE)
    found = repeat_factors(data, 0.4)
    assert found.tolist() == pytest.approx(slow_factors(data, [1.0] * 20, 0.4))
    # By hand: balls and referees are each in 2 of 20 images, without crowds.
    assert class_factors(data, 0.4).tolist() == pytest.approx([1, 2, 2, 1])
    assert found.max() == 2


def test_the_frequency_is_that_of_the_weighted_sources(write_data) -> None:
    parts = [write_data(FOOTAGE), write_data([[0, 1]] * 5, "balls")]
    data = concatenate(parts, (3.0, 1.0))
    found = repeat_factors(data, 0.5)
    assert found.tolist() == pytest.approx(slow_factors(data, [3 / 20] * 20 + [1 / 5] * 5, 0.5))
    assert found[-1] == pytest.approx(math.sqrt(0.5 / (0.25 + 0.75 * 2 / 20)))


def config(*overrides: str) -> Config:
    return load_config(None, overrides)


def test_without_weights_and_repeats_an_epoch_is_each_image_once(write_data) -> None:
    data = write_data(FOOTAGE)
    assert epoch_samples(data, config(), 4) is None
    assert epoch_samples(concatenate([data, data]), config(), 4) is None
    assert samples_of_parts(concatenate([data, data]), None) == [20, 20]
    assert list(describe_samples(data, config(), None)) == []


def test_an_epoch_has_all_repeats_in_complete_steps(write_data) -> None:
    data, settings = write_data(FOOTAGE), config("data.repeat_rare=0.4")
    samples = epoch_samples(data, settings, 1)
    assert samples is not None
    assert len(samples) == 23  # three images count twice
    assert np.array_equal(samples.counts(0), repeat_factors(data, 0.4))
    in_steps = epoch_samples(data, settings, 4)
    assert in_steps is not None
    assert len(in_steps) == 20
    (line,) = describe_samples(data, settings, samples)
    assert line == "data.repeat_rare 0.4: ball x 2.00, referee x 2.00; 20 images are 23 samples an epoch"
    (line,) = describe_samples(data, config("data.repeat_rare=0.01"), samples)
    assert line.startswith("data.repeat_rare 0.01: no class is rarer than that, ")


@pytest.mark.parametrize("overrides", [(), ("data.repeat_rare=0.4",)])
def test_the_part_of_a_source_is_exact_in_every_epoch(write_data, overrides: tuple[str, ...]) -> None:
    parts = [write_data(FOOTAGE), write_data([[0, 1]] * 5, "balls")]
    data, settings = concatenate(parts, (1.0, 3.0)), config(*overrides)
    samples = epoch_samples(data, settings, 4)
    assert samples is not None
    assert len(samples) % 4 == 0
    of_parts = samples_of_parts(data, samples)
    assert of_parts == [len(samples) // 4, 3 * len(samples) // 4]
    for epoch in range(10):
        counts = samples.counts(epoch)
        assert [counts[:20].sum(), counts[20:].sum()] == of_parts
    lines = list(describe_samples(data, settings, samples))
    assert "20 images, 25.0% of every epoch" in lines[0]
    assert "5 images, 75.0% of every epoch" in lines[1]


def test_a_source_without_a_sample_is_refused(write_data) -> None:
    data = concatenate([write_data(FOOTAGE), write_data([[0]], "few")], (1e6, 1.0))
    with pytest.raises(UsageError, match=r"none of the 20 samples of an epoch would be from .*few/_anno"):
        epoch_samples(data, config(), 4)
