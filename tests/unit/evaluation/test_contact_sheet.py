"""The images with the most errors come first, and their errors are marked."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from detr_dist.data.coco import CocoData
from detr_dist.data.dataset import Sample
from detr_dist.evaluation import contact_sheet as module
from detr_dist.evaluation.contact_sheet import (
    GAP,
    TILE_WIDTH,
    contact_sheet,
    describe_errors,
    image_errors,
    sample_sheet,
    worst_first,
)
from detr_dist.evaluation.detections import DetectionRecords
from detr_dist.evaluation.drawing import class_colour
from detr_dist.evaluation.thresholds import operating_points

Scene = tuple[CocoData, DetectionRecords]

BOX, ON_BOX, ELSEWHERE = (100, 100, 120, 120), (100, 100, 220, 220), (250, 250, 350, 350)


def errors_alone(data: CocoData, records: DetectionRecords, image: int) -> int:
    """Return the errors of one image, with all boxes elsewhere as false negatives."""
    own = records.take(np.flatnonzero(records.image_rows == image))
    confusion = operating_points(data, own, 0.5).confusion
    elsewhere = int((~data.iscrowd & (data.image_rows != image)).sum())
    return int(confusion.sum() - confusion.trace()) - elsewhere


def test_images_with_the_most_errors_come_first(scene: Scene) -> None:
    data, records = scene
    errors = image_errors(data, operating_points(data, records, 0.5).matches)
    expected = [errors_alone(data, records, image) for image in range(len(data))]
    assert worst_first(errors) == sorted(range(len(data)), key=lambda image: -expected[image])
    assert sum(errors.values()).tolist() == expected


def test_error_counts_equal_those_of_the_confusion_matrix(scene: Scene) -> None:
    data, records = scene
    points = operating_points(data, records, "auto")
    errors, classes = image_errors(data, points.matches), points.confusion[:-1, :-1]
    assert errors["false negatives"].sum() == points.confusion[:-1, -1].sum()
    false_positives = errors["false positives"] + errors["duplicates"]
    assert false_positives.sum() == points.confusion[-1, :-1].sum()
    assert errors["duplicates"].sum() == points.matches.is_duplicate.sum() > 0
    assert errors["misclassified"].sum() == classes.sum() - classes.trace()


def test_errors_are_described_in_words(new_scene) -> None:
    boxes = [(0, 0, BOX, False), (1, 0, BOX, False), (1, 1, (10, 10, 30, 30), False)]
    detections = [(0, 0, 0.9, ON_BOX), (1, 1, 0.9, ON_BOX), (1, 0, 0.8, ELSEWHERE)]
    data, records = new_scene(2, ["player", "ball"], boxes, detections)
    errors = image_errors(data, operating_points(data, records, 0.5).matches)
    assert describe_errors(errors, 0) == ""
    expected = "false negatives: 1, false positives: 1, misclassified: 1"
    assert describe_errors(errors, 1) == describe_errors(errors) == expected


def with_files(data: CocoData, folder: Path, *names: str) -> CocoData:
    """Return the data with these file names; those with a suffix are written, grey and 400 pixels wide."""
    for name in filter(lambda name: "." in name, names):
        Image.new("RGB", (400, 400), (90, 90, 90)).save(folder / name)
    return replace(data, images_dir=folder, file_names=np.array([name.encode() for name in names]))


def colours_in(tile_image: Image.Image) -> set[tuple[int, int, int]]:
    marks = (
        module.FALSE_NEGATIVE,
        module.FALSE_POSITIVE,
        module.MISCLASSIFIED,
        module.DUPLICATE,
        module.TRUE_POSITIVE,
        module.CROWD,
    )
    return {colour for _, colour in tile_image.getcolors(2**24) if colour in marks}


def tiles(sheet: Image.Image) -> Image.Image:
    """Return the tiles of a sheet of one row, without its head and the text under the tiles."""
    top = sheet.height - 480 - 2 * module.LINE - module.GAP
    return sheet.crop((0, top, sheet.width, top + 480))


@pytest.mark.parametrize(
    ("boxes", "detections", "colours"),
    [
        ([(0, 0, BOX, False)], [(0, 0, 0.9, ON_BOX)], {module.TRUE_POSITIVE}),
        ([(0, 0, BOX, False)], [], {module.FALSE_NEGATIVE}),
        (
            [(0, 0, BOX, False), (0, 1, (0, 0, 20, 20), False)],
            [(0, 1, 0.9, ON_BOX)],
            {module.MISCLASSIFIED, module.FALSE_NEGATIVE},
        ),
        (
            [(0, 0, BOX, False)],
            [(0, 0, 0.9, ON_BOX), (0, 0, 0.8, ELSEWHERE)],
            {module.TRUE_POSITIVE, module.FALSE_POSITIVE},
        ),
        (
            [(0, 0, BOX, False)],
            [(0, 0, 0.9, ON_BOX), (0, 0, 0.8, (80, 100, 220, 230))],
            {module.TRUE_POSITIVE, module.DUPLICATE},
        ),
        (
            [(0, 0, (0, 0, 20, 20), False), (0, 0, BOX, True)],
            [(0, 0, 0.9, (0, 0, 20, 20)), (0, 0, 0.8, (110, 110, 140, 140))],
            {module.TRUE_POSITIVE, module.CROWD},
        ),
    ],
    ids=["true positive", "false negative", "misclassified", "false positive", "duplicate", "crowd"],
)
def test_each_kind_of_error_has_its_colour(boxes, detections, colours, new_scene, tmp_path: Path) -> None:
    data, records = new_scene(1, ["player", "ball"], boxes, detections)
    data = with_files(data, tmp_path, "one.png")
    sheet = contact_sheet(data, operating_points(data, records, 0.5).matches)
    assert colours_in(tiles(sheet)) == colours


def test_an_image_that_cannot_be_read_is_an_empty_tile(new_scene, tmp_path: Path) -> None:
    boxes = [(0, 0, BOX, False), (1, 0, BOX, False), (2, 0, BOX, False)]
    data, records = new_scene(3, ["player"], boxes, [])
    data = with_files(data, tmp_path, "good.png", "gone", "broken")
    (tmp_path / "broken").write_bytes(b"no image")
    row = tiles(contact_sheet(data, operating_points(data, records, 0.5).matches))
    pitch = module.TILE_WIDTH + module.GAP
    each = [row.crop((module.GAP + i * pitch, 0, (i + 1) * pitch, 480)) for i in range(3)]
    assert [colours_in(tile) for tile in each] == [{module.FALSE_NEGATIVE}, set(), set()]
    for tile in each[1:]:
        assert max(tile.getcolors(2**24))[1] == module.BACKGROUND
        assert len(tile.getcolors(2**24)) > 1  # and says so


@pytest.mark.parametrize("num_images", [1, 2, 3, 20])
def test_title_and_legend_have_room_whatever_the_number_of_images(num_images: int, new_scene) -> None:
    boxes = [(0, 0, BOX, False)] * 11_111 + [(0, 1, (0, 0, 20, 20), False)]
    detections = [(0, 0, 0.9, ELSEWHERE)] * 100 + [(0, 1, 0.9, ON_BOX)]
    data, records = new_scene(num_images, ["player", "ball"], boxes, detections)
    sheet = contact_sheet(data, operating_points(data, records, 0.5).matches)
    margin = np.asarray(sheet)[:, -module.GAP :]
    assert (margin == 255).all()
    assert sheet.width < 2100
    assert sheet.height < 2100


def test_tiles_have_the_shape_of_the_images(new_scene) -> None:
    data, records = new_scene(4, ["player"], [], [])
    wide = replace(data, sizes_hw=np.tile([[540, 960]], (4, 1)))
    square, flat = (
        contact_sheet(each, operating_points(each, records, 0.5).matches) for each in (data, wide)
    )
    assert square.height - flat.height == 480 - 270


def test_training_images_are_drawn_with_their_boxes() -> None:
    black = torch.zeros(3, 100, 200, dtype=torch.uint8)
    box = torch.tensor([[0.5, 0.5, 0.5, 0.5]])
    no_labels, no_boxes = torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4)
    samples = [
        Sample(black, torch.tensor([1]), box, 1, (100, 200)),
        Sample(black, no_labels, no_boxes, 2, (100, 200)),
    ]
    sheet = np.asarray(sample_sheet(samples, ["player", "ball"]))
    first, second = sheet[GAP : GAP + 100, GAP : GAP + 200], sheet[GAP : GAP + 100, 2 * GAP + TILE_WIDTH :]
    assert (first == class_colour(1)).all(axis=-1).any()
    assert (second[:, :200] == 0).all()
    assert not samples[0].image.any(), "the sample itself was changed"
