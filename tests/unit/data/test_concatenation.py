"""Several sources of training data are one data set."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detr_dist.data.coco import CocoData, load_data
from detr_dist.data.concatenation import (
    Concatenation,
    TrainSource,
    load_sources,
    parts_of,
    train_sources,
    weights_of,
)
from detr_dist.errors import DataError, UsageError

Document = dict[str, Any]
WriteCoco = Callable[..., Path]


@pytest.fixture
def two_sources(document: Document, write_coco: WriteCoco) -> list[TrainSource]:
    """Write two sources with the same ids and file names, classes in another order, and other boxes."""
    first = write_coco(document, "first")
    other = json.loads(json.dumps(document))
    other["categories"] = [{"id": 1, "name": "player"}, {"id": 2, "name": "ball"}]
    other["images"] = [each | {"width": 50} for each in other["images"][1:]]
    other["images"][0]["file_name"] = "a much longer name.jpg"
    other["annotations"] = [
        {"id": 11, "image_id": 3, "category_id": 1, "bbox": [1, 2, 3, 4]},
        {"id": 12, "image_id": 5, "category_id": 2, "bbox": [5, 6, 7, 8], "iscrowd": 1},
        {"id": 13, "image_id": 5, "category_id": 2, "bbox": [5, 6, 7, 9]},
    ]
    return train_sources([first, write_coco(other, "second")])


def test_a_concatenation_has_the_images_and_boxes_of_its_parts(two_sources: list[TrainSource]) -> None:
    first = load_data(two_sources[0].location)
    second = load_data(two_sources[1].location, classes=first.class_names)
    data = load_sources(two_sources)
    assert isinstance(data, Concatenation)
    assert len(data) == 5
    assert data.class_names == ("ball", "player")
    assert data.num_boxes.tolist() == [*first.num_boxes, *second.num_boxes]
    rows = [(part, row) for part in (first, second) for row in range(len(part))]
    for row, (part, own) in enumerate(rows):
        assert data.image_path(row) == part.image_path(own)
        assert data.image_path(row).exists()
        assert data.size_hw(row) == part.size_hw(own)
        for found, expected in zip(data.training_targets(row), part.training_targets(own), strict=True):
            assert np.array_equal(found, expected)
    with pytest.raises(IndexError):
        data.image_path(5)
    assert weights_of(data) is None


def test_the_parts_are_views_with_all_that_a_data_set_has(two_sources: list[TrainSource]) -> None:
    data = load_sources(two_sources)
    alone = [load_data(two_sources[0].location)]
    alone.append(load_data(two_sources[1].location, classes=alone[0].class_names))
    for part, expected in zip(parts_of(data), alone, strict=True):
        assert np.shares_memory(part.boxes_xywh_px, data.boxes_xywh_px)
        assert part.annotations_path == expected.annotations_path
        assert part.fingerprint() == expected.fingerprint()
        assert part.num_boxes.tolist() == expected.num_boxes.tolist()
        assert part.image_ids.tolist() == expected.image_ids.tolist()
    assert parts_of(alone[0]) == (alone[0],)


def test_the_fingerprint_depends_on_the_order_of_the_sources(two_sources: list[TrainSource]) -> None:
    prints = {load_sources(order).fingerprint() for order in (two_sources, two_sources, two_sources[::-1])}
    assert len(prints) == 2
    assert type(load_sources(two_sources[:1])) is CocoData


def test_other_classes_are_an_error_that_names_both_sources(
    document: Document, write_coco: WriteCoco
) -> None:
    first = write_coco(document, "first")
    document["categories"][0]["name"] = "goalkeeper"
    second = write_coco(document, "second")
    complaint = rf"{second}/.*: .*not shared with {first}; classes must agree by name: player only in {first}"
    with pytest.raises(DataError, match=complaint):
        load_sources(train_sources([first, second]))


def test_weights_are_given_as_text_or_as_pairs(tmp_path: Path) -> None:
    assert train_sources("a") == [TrainSource(Path("a"), None)]
    assert train_sources(tmp_path) == [TrainSource(tmp_path, None)]
    expected = [TrainSource(Path("a"), 1.0), TrainSource(Path("b"), 2.5)]
    assert train_sources(["a=1", "b=2.5"]) == expected
    assert train_sources([("a", 1), (Path("b"), 2.5)]) == expected
    assert train_sources(("a", 1)) == expected[:1]
    assert train_sources(("a", "b")) == [TrainSource(Path("a"), None), TrainSource(Path("b"), None)]


def test_a_path_that_exists_wins_over_a_weight(tmp_path: Path) -> None:
    folder = tmp_path / "run=3"
    folder.mkdir()
    assert train_sources(str(folder)) == [TrainSource(folder, None)]
    assert train_sources(f"{folder}=2") == [TrainSource(folder, 2.0)]


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf", "many", ""])
def test_a_weight_that_is_no_number_above_0_is_refused(weight: str) -> None:
    complaint = (
        rf"^--train-dir a: the weight must be .* above 0, and is '{weight}' \(there is no path a={weight}\)$"
    )
    with pytest.raises(UsageError, match=complaint):
        train_sources(["a=" + weight])
    with pytest.raises(UsageError, match="above 0"):
        train_sources([("a", True)])


@pytest.mark.parametrize(
    ("train_dir", "complaint"),
    [
        (["a=1", "b"], "--train-dir b: has no weight, but others have"),
        (["a", "b", "./a"], "--train-dir a: is given twice"),
        ([], "no data set is given"),
        ([3], "paths, or pairs of a path and a weight, are wanted, got 3"),
    ],
)
def test_sources_that_contradict_each_other_are_refused(train_dir: Any, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        train_sources(train_dir)
