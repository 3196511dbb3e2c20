"""The findings of the data set checks, and the data that they accept."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from detr_dist.config import Config
from detr_dist.data.box_sizes import CheckSettings, resized_sides, statistics_of
from detr_dist.data.checks import Report, check_splits
from detr_dist.data.coco import load_data
from detr_dist.errors import DataError
from detr_dist.models.families import finest_stride_of, num_queries_of
from detr_dist.resize import Resize

Document = dict[str, Any]
WriteCoco = Callable[..., Path]
JSON = "_annotations.coco.json"


def check(*folders: Path, open_images: bool = False, num_train: int = 1, **sections: Any) -> Report:
    config = Config(**sections)
    return check_splits(
        [str(f) for f in folders],
        config,
        num_queries=num_queries_of(config.model),
        finest_stride=finest_stride_of(config.model),
        open_images=open_images,
        num_train=num_train,
    )


def kinds(report: Report) -> dict[str, int]:
    """Return the findings of all splits together, each kind at most once."""
    findings = [finding for findings in report.findings.values() for finding in findings]
    assert len({f.kind for f in findings}) == len(findings)
    return {finding.kind: finding.count for finding in findings}


def change(section: str, row: int, **values: Any) -> Callable[[Document], object]:
    return lambda document: document[section][row].update(values)


def add(section: str, record: Any) -> Callable[[Document], object]:
    return lambda document: document[section].append(record)


NEW_BOX = {"id": 20, "image_id": 5, "category_id": 10, "bbox": [1, 1, 30, 20]}
NEW_IMAGE = {"id": 9, "file_name": "9.jpg", "width": 60, "height": 40}

ERRORS: dict[str, tuple[Callable[[Document], object], str]] = {
    "image_that_is_a_text": (add("images", "x"), "malformed_record"),
    "image_without_id": (lambda d: d["images"][2].pop("id"), "malformed_record"),
    "image_id_not_whole": (add("images", NEW_IMAGE | {"id": 1.5}), "malformed_record"),
    "image_id_beyond_all_bounds": (add("images", NEW_IMAGE | {"id": 2**70}), "malformed_record"),
    "file_name_a_number": (add("images", NEW_IMAGE | {"file_name": 9}), "malformed_record"),
    "width_a_text": (add("images", NEW_IMAGE | {"width": "60"}), "malformed_record"),
    "height_zero": (change("images", 0, height=0), "malformed_record"),
    "image_id_twice": (add("images", NEW_IMAGE | {"id": 5}), "duplicate_image_id"),
    "annotation_null": (add("annotations", None), "malformed_record"),
    "annotation_without_id": (lambda d: d["annotations"][2].pop("id"), "malformed_record"),
    "crowd_a_text": (add("annotations", NEW_BOX | {"iscrowd": "no"}), "malformed_record"),
    "area_a_list": (add("annotations", NEW_BOX | {"area": [1]}), "malformed_record"),
    "area_beyond_all_bounds": (add("annotations", NEW_BOX | {"area": 2**70}), "malformed_record"),
    "image_id_of_a_box_a_list": (add("annotations", NEW_BOX | {"image_id": [5]}), "malformed_record"),
    "box_of_three_numbers": (add("annotations", NEW_BOX | {"bbox": [1, 2, 3]}), "malformed_box"),
    "box_null": (add("annotations", NEW_BOX | {"bbox": None}), "malformed_box"),
    "box_not_a_number": (add("annotations", NEW_BOX | {"bbox": [1, 2, 3, float("nan")]}), "malformed_box"),
    "box_without_end": (add("annotations", NEW_BOX | {"bbox": [1, 2, float("inf"), 3]}), "malformed_box"),
    "box_of_texts": (add("annotations", NEW_BOX | {"bbox": ["1", "2", "3", "4"]}), "malformed_box"),
    "box_negative": (add("annotations", NEW_BOX | {"bbox": [5, 5, -3, 4]}), "negative_box"),
    "box_of_no_image": (add("annotations", NEW_BOX | {"image_id": 99}), "unknown_image"),
    "box_of_no_category": (add("annotations", NEW_BOX | {"category_id": 99}), "unknown_category"),
    "category_a_number": (add("categories", 3), "malformed_record"),
    "category_without_name": (add("categories", {"id": 30}), "malformed_record"),
    "category_id_twice": (add("categories", {"id": 10, "name": "goal"}), "duplicate_category_id"),
    "category_name_twice": (add("categories", {"id": 30, "name": "ball"}), "duplicate_category_name"),
    "no_image": (lambda d: d.update(images=[], annotations=[]), "no_images"),
    "no_category": (lambda d: d.update(categories=[], annotations=[]), "no_classes"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_refused_annotations_are_one_error_and_the_rest_is_counted(
    name: str, document: Document, write_coco: WriteCoco
) -> None:
    corrupt, kind = ERRORS[name]
    corrupt(document)
    folder = write_coco(document, with_images=False)
    with pytest.raises(DataError) as raised:
        load_data(folder, check_files=False)
    for i in (3, 5, 7):
        (folder / f"{i}.jpg").touch()
    (folder / "9.jpg").touch()
    report = check(folder)
    found = kinds(report)
    found.pop("unlisted_picture", None)  # 9.jpg, and all of them where no image is listed
    assert found == {kind: 1}
    (finding,) = (each for each in report.findings[str(folder)] if each.kind == kind)
    assert str(raised.value) == f"{folder / JSON}: {finding}", "both say the same"


def test_all_faults_of_a_kind_are_counted_and_the_first_are_named(
    document: Document, write_coco: WriteCoco
) -> None:
    document["annotations"] += [NEW_BOX | {"id": 100 + i, "image_id": 99} for i in range(25)]
    (finding,) = next(iter(check(write_coco(document)).findings.values()))
    assert finding.count == 25
    assert finding.examples[0] == "annotations[3] (id 100): image_id 99"
    assert len(finding.examples) == 10
    assert str(finding).endswith(" and 21 more")


def test_boxes_of_a_faulty_image_are_not_reported_separately(
    document: Document, write_coco: WriteCoco
) -> None:
    document["images"][1]["width"] = 0
    report = check(write_coco(document, with_images=False))
    assert "unknown_image" not in kinds(report)
    (statistics,) = report.statistics.values()
    assert (statistics.num_images, statistics.num_boxes) == (2, 1)


def test_a_valid_data_set_has_no_findings(document: Document, write_coco: WriteCoco) -> None:
    report = check(write_coco(document), open_images=True)
    assert kinds(report) == {}
    assert report.verdict == "0 errors, 0 warnings: ready to train"


def test_a_category_that_only_groups_others_does_not_count(document: Document, write_coco: WriteCoco) -> None:
    train = write_coco(document, "train")
    document["categories"].append({"id": 0, "name": "things", "supercategory": "none"})
    document["categories"][0]["supercategory"] = "things"
    assert kinds(check(train, write_coco(document, "val"))) == {}


def test_classes_found_in_only_one_split_are_each_named(document: Document, write_coco: WriteCoco) -> None:
    train = write_coco(document, "train")
    document["categories"][0]["name"] = "referee"
    val = write_coco(document, "val")
    (finding,) = check(train, val).findings[str(val)]
    assert (finding.kind, finding.level, finding.count) == ("classes_differ", "error", 2)
    assert finding.examples == (f"player only in {train}", f"referee only in {val}")


@pytest.mark.parametrize(
    ("bbox", "category_id", "is_duplicate"),
    [
        ([10, 5, 20, 30], 20, True),
        ([11, 6, 20, 29], 20, True),
        ([10, 5, 20, 30], 10, False),  # of another class
        ([10, 5, 20, 20], 20, False),  # overlap 2/3
        ([18, 5, 20, 30], 20, False),
    ],
)
def test_a_box_on_another_of_its_class_is_a_duplicate(
    bbox: list[float], category_id: int, is_duplicate: bool, document: Document, write_coco: WriteCoco
) -> None:
    document["annotations"].append({"id": 14, "image_id": 3, "category_id": category_id, "bbox": bbox})
    assert kinds(check(write_coco(document))) == ({"duplicate_box": 1} if is_duplicate else {})


def test_duplicates_equal_those_of_a_comparison_of_all_pairs(
    document: Document, write_coco: WriteCoco
) -> None:
    rng = np.random.default_rng(0)
    boxes = np.hstack([rng.uniform(0, 6, (60, 2)), rng.uniform(20, 26, (60, 2))])
    document["annotations"] = [
        {"id": i, "image_id": 3, "category_id": (10, 20)[i % 2], "bbox": box}
        for i, box in enumerate(boxes.tolist())
    ]
    starts, ends = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
    shared = np.minimum(ends[:, None], ends) - np.maximum(starts[:, None], starts)
    intersection, areas = shared.clip(0).prod(axis=2), boxes[:, 2:].prod(axis=1)
    iou = intersection / (areas[:, None] + areas - intersection)
    same_class = np.arange(60)[:, None] % 2 == np.arange(60) % 2
    expected = int((np.tril((iou > 0.8) & same_class, -1)).any(axis=1).sum())
    assert 5 < expected < 55
    assert kinds(check(write_coco(document)))["duplicate_box"] == expected


def test_boxes_are_counted_by_class_and_size_after_the_resize(
    document: Document, write_coco: WriteCoco
) -> None:
    """Resize 60x40 to 120x80, so that sides double: 7.2 -> 14.4, 24.5 -> 49 (twice)."""
    data = load_data(write_coco(document))
    statistics = statistics_of(data, CheckSettings(Resize(80, 1333)))
    assert statistics.num_boxes_by_band == {"ball": [0, 0, 1, 0, 1, 0], "player": [0, 0, 0, 0, 1, 0]}
    assert (statistics.num_images, statistics.num_empty, statistics.most_boxes) == (3, 1, 2)


@pytest.mark.parametrize("size_hw", [(480, 640), (300, 1200), (1080, 1920), (2000, 500), (33, 32)])
def test_sizes_are_measured_after_the_resize_of_training(
    size_hw: tuple[int, int], document: Document, write_coco: WriteCoco
) -> None:
    """Compare within 1 %: the resized image is not rounded to whole pixels here."""
    height, width = size_hw
    document["images"] = [NEW_IMAGE | {"height": height, "width": width}]
    document["annotations"] = [NEW_BOX | {"image_id": 9, "bbox": [0, 0, width, height]}]
    data = load_data(write_coco(document))
    expected = float(np.sqrt(np.prod(Resize(800, 1333).size_hw(height, width))))
    assert resized_sides(data, CheckSettings(Resize(800, 1333))) == pytest.approx([expected], rel=0.01)


def test_whether_a_box_is_tiny_depends_on_the_resize(document: Document, write_coco: WriteCoco) -> None:
    document["annotations"][1]["bbox"] = [0, 0, 1.5, 1.5]
    folder = write_coco(document)
    assert kinds(check(folder)) == {}, "60x40 becomes 1200x800"
    (finding,) = check(folder, data={"shortest_edge": 80, "longest_edge": 133}).findings[str(folder)]
    assert finding.kind == "tiny_box"
    assert "at 80/133: 1 ball" in finding.message
    report = check(folder, data={"resize": "square", "shortest_edge": 80})
    (finding,) = report.findings[str(folder)]
    assert "at 80x80: 1 ball" in finding.message
    assert "  boxes by pixels a side after the resize to 80x80:" in report.lines()
    settings = {"resize": "square", "shortest_edge": 80, "longest_edge": 1333}
    assert report.as_document()["settings"].items() >= settings.items()


@pytest.mark.parametrize(
    ("sides", "architecture", "is_too_small"),
    [
        ([7.9, 7.9, 20, 20], "detr", False),  # not more than half of them
        ([7.9, 7.9, 7.9, 20], "detr", True),
        ([8, 8, 8, 20], "detr", False),
        ([7.9, 7.9, 7.9, 20], "rt_detr", False),  # stride 8
    ],
)
def test_a_class_mostly_smaller_than_a_quarter_of_the_stride_is_named(
    sides: list[float], architecture: str, is_too_small: bool, document: Document, write_coco: WriteCoco
) -> None:
    document["annotations"] = [
        {"id": i, "image_id": 3, "category_id": 10, "bbox": [12 * i, 0, side, side]}
        for i, side in enumerate(sides)
    ] + [{"id": 9, "image_id": 5, "category_id": 20, "bbox": [0, 0, 30, 30]}]
    folder = write_coco(document)
    same_size = {"resize": "rectangle", "shortest_edge": 40, "longest_edge": 60}
    report = check(folder, data=same_size, model={"model_architecture": architecture})
    found = [finding for finding in report.findings[str(folder)] if finding.kind == "class_too_small"]
    assert bool(found) == is_too_small
    if found:
        assert str(found[0]) == (
            "1 class too small for the model: its finest feature map has a stride of 32 pixels, and most "
            "boxes are under 8 pixels a side after the resize to 40x60; set data.tiles, raise "
            "data.shortest_edge or choose a model with a finer one, such as d_fine with 8: 3 of 4 ball"
        )
        assert report.verdict == (
            "0 errors, 1 warning: ready to train, but not every class is large enough for the model"
        )
        assert report.as_document()["settings"]["finest_stride"] == 32


def with_names(document: Document, first_id: int, *names: str) -> Document:
    boxes = [
        annotation | {"image_id": first_id + i % len(names), "id": first_id + i}
        for i, annotation in enumerate(document["annotations"])
    ]
    size = {"width": 60, "height": 40}
    images = [{"id": first_id + i, "file_name": name, **size} for i, name in enumerate(names)]
    return document | {"images": images, "annotations": boxes}


def test_clips_with_frames_in_two_splits_are_named_and_qualify_the_verdict(
    document: Document, write_coco: WriteCoco
) -> None:
    names = ["goal_1.jpg", "goal_3.jpg", "corner_1.jpg", "corner_2.jpg"]
    train = write_coco(with_names(document, 100, *names), "train")
    val = write_coco(with_names(document, 200, "goal_2.jpg", "kick-off_1.jpg"), "val")
    report = check(train, val, open_images=True)
    assert report.findings[str(train)] == []
    (finding,) = report.findings[str(val)]
    assert (finding.kind, finding.level, finding.count) == ("clip_in_two_splits", "warning", 1)
    assert finding.examples == (f"goal (2 frames in {train}, 1 here)",)
    assert "detr-dist split" in finding.message
    assert report.verdict.endswith(
        "1 warning: ready to train, but clips in two splits make the metrics too good"
    )


def test_sources_to_train_on_are_one_split(document: Document, write_coco: WriteCoco) -> None:
    names = ["goal_1.jpg", "goal_3.jpg", "corner_1.jpg", "corner_2.jpg"]
    sources = [write_coco(with_names(document, 100, *names), name) for name in ("first", "second")]
    val = write_coco(with_names(document, 100, "goal_1.jpg", "kick-off_1.jpg"), "val")
    report = check(*sources, val, open_images=True, num_train=2)
    by_source = [[finding.kind for finding in report.findings[str(each)]] for each in (*sources, val)]
    in_val = ["picture_in_two_splits", "clip_in_two_splits"]
    assert by_source == [[], ["duplicate_picture"], in_val], "what sources share makes no metric too good"


@pytest.mark.parametrize(
    "names",
    [
        ["0001.jpg", "0002.jpg", "0003.jpg"],
        ["frame_1.jpg", "frame_2.jpg", "frame_3.jpg"],
        ["cell_1.jpg", "cell_2.jpg", "cell_3.jpg"],  # all of one name, which need not be a clip's
        ["Messi.jpg", "Pele.jpg", "Kane.jpg"],
    ],
)
def test_names_that_do_not_tell_clips_apart_are_no_finding(
    names: list[str], document: Document, write_coco: WriteCoco
) -> None:
    train = write_coco(with_names(document, 100, *names), "train")
    val = write_coco(with_names(document, 200, *names), "val")
    assert kinds(check(train, val)) == {}


def test_more_boxes_than_queries_are_an_error_where_training_refuses_them(
    document: Document, write_coco: WriteCoco
) -> None:
    train, val = write_coco(document, "train"), write_coco(document, "val")
    report = check(train, val, model={"num_queries": 1})
    assert [(f.kind, f.level) for f in report.findings[str(train)]] == [("too_many_boxes", "error")]
    assert [(f.kind, f.level) for f in report.findings[str(val)]] == [("too_many_boxes", "warning")]
    assert report.num_errors == report.num_warnings == 1


def test_unset_num_queries_is_that_of_the_architecture(document: Document, write_coco: WriteCoco) -> None:
    document["annotations"] = [
        {"id": i, "image_id": 3, "category_id": 10 + 10 * (i % 2), "bbox": [i % 15 * 4, i // 15 * 4, 4, 4]}
        for i in range(101)
    ]
    folder = write_coco(document)
    assert kinds(check(folder)) == {"too_many_boxes": 1, "mostly_empty": 2}
    assert kinds(check(folder, model={"model_architecture": "deformable_detr"})) == {"mostly_empty": 2}


def test_normalised_boxes_instead_of_pixels_are_an_error(document: Document, write_coco: WriteCoco) -> None:
    for annotation in document["annotations"]:
        annotation["bbox"] = [0.25, 0.25, 0.5, 0.5]
    assert kinds(check(write_coco(document))) == {"boxes_in_fractions": 3}


def test_training_data_without_boxes_are_one_error(document: Document, write_coco: WriteCoco) -> None:
    with_boxes = write_coco(document, "with_boxes")
    document["annotations"] = []
    empty = write_coco(document, "empty")
    report = check(empty)
    assert kinds(report) == {"no_boxes": 1}
    assert report.num_errors == 1
    report = check(with_boxes, empty, num_train=2)
    assert [(each.kind, each.level) for each in report.findings[str(empty)]] == [("no_boxes", "warning")]


def test_boxes_in_corner_format_are_recognised(document: Document, write_coco: WriteCoco) -> None:
    right_most = {"image_id": 3, "category_id": 10, "bbox": [30, 20, 58, 39]}  # of an image of 60 x 40
    document["annotations"] += [right_most | {"id": 100 + i, "bbox": [30, 2 * i, 58, 39]} for i in range(9)]
    found = kinds(check(write_coco(document), model={"num_queries": 20}))
    assert found.pop("boxes_as_corners") == 9
    assert found.keys() <= {"duplicate_box", "class_without_boxes"}


def test_a_class_without_boxes_is_named(document: Document, write_coco: WriteCoco) -> None:
    document["annotations"] = document["annotations"][1:]
    (finding,) = next(iter(check(write_coco(document)).findings.values()))
    assert (finding.kind, finding.examples) == ("class_without_boxes", ("player",))


def test_sizes_missing_in_the_json_are_read_from_the_files(document: Document, write_coco: WriteCoco) -> None:
    for image in document["images"]:
        del image["width"]
    folder = write_coco(document)
    assert kinds(check(folder)) == {"no_size": 3}
    (folder / "7.jpg").write_bytes(b"no image")
    assert kinds(check(folder)) == {"no_size": 3, "unreadable_image": 1}


def test_missing_damaged_or_differently_sized_images_are_named(
    document: Document, write_coco: WriteCoco
) -> None:
    folder = write_coco(document)
    (folder / "7.jpg").unlink()
    complete = (folder / "3.jpg").read_bytes()
    (folder / "3.jpg").write_bytes(complete[: len(complete) // 2])
    Image.open(folder / "5.jpg").resize((50, 40)).save(folder / "5.jpg")
    report = check(folder, open_images=True)
    assert kinds(report) == {"missing_image": 1, "unreadable_image": 1, "wrong_size": 1}
    examples = {f.kind: f.examples[0] for f in report.findings[str(folder)]}
    assert examples["missing_image"] == "7.jpg"
    assert "3.jpg" in examples["unreadable_image"]
    assert examples["wrong_size"] == "5.jpg is 50x40, not 60x40"


def test_a_rotation_in_the_exif_data_is_a_warning_unless_the_size_shows_it(
    document: Document, write_coco: WriteCoco
) -> None:
    folder = write_coco(document)
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("7.jpg", "3.jpg"):
        Image.open(folder / name).save(folder / name, exif=exif)
    document["images"][1].update(width=40, height=60)
    (folder / JSON).write_text(json.dumps(document))
    found = kinds(check(folder, open_images=True))
    assert (found["exif_rotation"], found.get("wrong_size", 0)) == (1, 0)
    report = check(folder, open_images=True, data={"exif": "ignore"})
    found = kinds(report)
    assert (found["exif_rotation"], found["wrong_size"]) == (1, 1)
    (wrong,) = (f for f in report.findings[str(folder)] if f.kind == "wrong_size")
    assert wrong.examples == ("3.jpg is 60x40, not 40x60 (its EXIF rotation is not applied)",)


def test_twelve_bits_stored_as_sixteen_are_a_warning(document: Document, write_coco: WriteCoco) -> None:
    document["images"][1]["file_name"] = "dark.tif"
    folder = write_coco(document)
    values = np.linspace(0, 4095, 40 * 60).reshape(40, 60).astype(np.uint16)
    Image.fromarray(values).save(folder / "dark.tif")
    assert kinds(check(folder, open_images=True))["dark_picture"] == 1


def test_equal_pixels_in_two_splits_are_found_in_any_file_format(
    document: Document, write_coco: WriteCoco
) -> None:
    train = write_coco(document, "train")
    document["images"] = [image | {"id": image["id"] + 10} for image in document["images"]]
    for annotation in document["annotations"]:
        annotation["image_id"] += 10
    val = write_coco(document, "val")
    assert kinds(check(train, val, open_images=True)) == {}
    with Image.open(train / "5.jpg") as image:
        image.save(val / "7.jpg", format="PNG")
    report = check(train, val, open_images=True)
    (finding,) = report.findings[str(val)]
    assert (finding.kind, finding.level) == ("picture_in_two_splits", "error")
    assert finding.examples == (f"7.jpg is {train / '5.jpg'}",)


@pytest.mark.parametrize("size", [(60, 40), (300, 200)])
def test_a_compressed_or_enlarged_copy_in_another_split_is_a_warning(
    size: tuple[int, int], document: Document, write_coco: WriteCoco
) -> None:
    train = write_coco(document, "train")
    document["images"] = [image | {"id": image["id"] + 10} for image in document["images"]]
    for annotation in document["annotations"]:
        annotation["image_id"] += 10
    document["images"][2].update(width=size[0], height=size[1])
    val = write_coco(document, "val")
    Image.open(train / "5.jpg").resize(size).save(val / "5.jpg", quality=40)
    (finding,) = check(train, val, open_images=True).findings[str(val)]
    assert (finding.kind, finding.level) == ("lookalike_in_two_splits", "warning")
    assert finding.examples == (f"5.jpg is like {train / '5.jpg'}",)


def test_uniform_images_are_not_duplicates(document: Document, write_coco: WriteCoco) -> None:
    folders = [write_coco(document, name) for name in ("train", "val")]
    for i, folder in enumerate(folders):
        for j, image in enumerate(document["images"]):
            grey = np.full((40, 60, 3), 100 + 10 * i + j, dtype=np.uint8)
            grey[0, 0] += 1
            Image.fromarray(grey).save(folder / image["file_name"], format="PNG")
    assert kinds(check(*folders, open_images=True)) == {}


def test_a_duplicate_image_in_one_split_is_one_warning(document: Document, write_coco: WriteCoco) -> None:
    folder = write_coco(document)
    shutil.copy(folder / "3.jpg", folder / "7.jpg")
    assert kinds(check(folder, open_images=True)) == {"duplicate_picture": 1}


def test_one_file_in_two_entries_is_no_duplicate_image(document: Document, write_coco: WriteCoco) -> None:
    document["images"][2]["file_name"] = "./7.jpg"
    assert kinds(check(write_coco(document), open_images=True)) == {"file_listed_twice": 1}


def test_unlisted_images_are_found_in_all_folders_of_listed_images(
    document: Document, write_coco: WriteCoco
) -> None:
    document["images"][0]["file_name"] = "night/7.jpg"
    folder = write_coco(document)
    for name in ("extra.PNG", "night/extra.jpg", "._7.jpg", "notes.txt"):
        (folder / name).touch()
    (finding,) = check(folder).findings[str(folder)]
    assert finding.kind == "unlisted_picture"
    assert finding.examples == ("extra.PNG", "night/extra.jpg")


@pytest.mark.parametrize("file_name", ["no/such/1.jpg", "a\0.jpg", "\0/a.jpg", "\ud800.jpg", "..", "3.jpg/x"])
def test_impossible_file_names_are_missing_images(
    file_name: str, document: Document, write_coco: WriteCoco
) -> None:
    folder = write_coco(document)
    document["images"][0]["file_name"] = file_name
    (folder / JSON).write_text(json.dumps(document))
    (folder / "7.jpg").unlink()
    report = check(folder, open_images=True)
    assert kinds(report) == {"missing_image": 1}
    (finding,) = report.findings[str(folder)]
    str(finding).encode()
