import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detr_dist.data.coco import load_data
from detr_dist.data.columns import Finding
from detr_dist.data.formats import read_annotations
from detr_dist.data.formats.coco_json import find_annotations
from detr_dist.data.records import check_records
from detr_dist.errors import DataError

Document = dict[str, Any]
WriteCoco = Callable[..., Path]


def findings_of(folder: Path) -> list[Finding]:
    return check_records(read_annotations(folder)).findings


def test_the_columns_equal_the_json(document: Document, write_coco: WriteCoco) -> None:
    data = load_data(write_coco(document))
    assert data.image_ids.tolist() == [7, 3, 5]
    assert [data.size_hw(row) for row in range(3)] == [(40, 60)] * 3
    assert data.image_path(0) == data.images_dir / "7.jpg"
    assert data.box_offsets.tolist() == [0, 1, 3, 3]
    assert data.boxes_xywh_px.tolist() == [[0, 0, 6.5, 8], [10, 5, 20, 30], [30, 20, 30, 20]]
    assert data.annotation_ids.tolist() == [12, 11, 13]
    assert data.areas.tolist() == [52, 500, 600], "the annotated area, and width x height where there is none"
    assert data.max_boxes_per_image == 2


def test_classes_are_numbered_by_ascending_category_id(document: Document, write_coco: WriteCoco) -> None:
    data = load_data(write_coco(document))
    assert data.class_names == ("ball", "player")
    assert data.category_ids == (10, 20)
    assert data.box_classes.tolist() == [0, 1, 0]


def test_images_without_boxes_are_kept_and_reported(document: Document, write_coco: WriteCoco) -> None:
    data = load_data(write_coco(document))
    assert len(data.training_targets(2)[0]) == 0
    assert [notice.rpartition(": ")[2] for notice in data.notices] == [
        "1 of 3 images have no boxes and are kept"
    ]


def test_crowd_boxes_are_used_in_evaluation_but_not_in_training(
    document: Document, write_coco: WriteCoco
) -> None:
    document["annotations"][0]["iscrowd"] = 1
    data = load_data(write_coco(document))
    assert data.training_targets(1)[0].tolist() == [[30, 20, 30, 20]]
    assert data.training_targets(1)[1].tolist() == [0]
    assert data.iscrowd.tolist() == [False, True, False]
    assert data.max_boxes_per_image == 1
    assert "1 crowd boxes" in data.notices[0]


def test_boxes_are_clipped_to_their_image_or_dropped_and_counted(
    document: Document, write_coco: WriteCoco
) -> None:
    boxes = [[-5, 10, 10, 10], [50, 30, 20, 20], [70, 10, 5, 5], [10, 10, 0, 5], [0, 0, 60, 40]]
    document["annotations"] = [
        {"id": i, "image_id": 3, "category_id": 10, "bbox": box} for i, box in enumerate(boxes)
    ]
    data = load_data(write_coco(document))
    assert data.boxes_xywh_px.tolist() == [[0, 10, 5, 10], [50, 30, 10, 10], [0, 0, 60, 40]]
    assert data.areas.tolist() == [50, 100, 2400]
    clipped, dropped, *_ = data.notices
    assert re.search(r"2 boxes .*outside.* clipped.*: annotation 0, annotation 1$", clipped)
    assert re.search(r"2 boxes without extent .*dropped: annotation 2, annotation 3$", dropped)


def test_boxes_inside_their_image_keep_every_bit(document: Document, write_coco: WriteCoco) -> None:
    box = [0.1, 0.2, 0.30000000000000004, 1 / 3]
    document["annotations"][0]["bbox"] = box
    assert load_data(write_coco(document)).boxes_xywh_px[1].tolist() == box


def test_image_ranks_are_small_numbers_in_the_order_of_the_ids(
    document: Document, write_coco: WriteCoco
) -> None:
    assert load_data(write_coco(document)).image_ranks.tolist() == [2, 0, 1]


def test_sizes_missing_in_the_json_are_read_from_the_files(document: Document, write_coco: WriteCoco) -> None:
    folder = write_coco(document)
    del document["images"][0]["width"], document["images"][1]["height"]
    (folder / "_annotations.coco.json").write_text(json.dumps(document))
    data = load_data(folder)
    assert data.sizes_hw.tolist() == [[40, 60]] * 3
    assert re.search(r"2 images without width and height .*: 7.jpg, 3.jpg$", data.notices[0])


def test_file_names_may_include_folders(document: Document, write_coco: WriteCoco) -> None:
    document["images"][0]["file_name"] = "night/été/7.jpg"
    data = load_data(write_coco(document))
    assert data.image_path(0).is_file()


def test_no_column_holds_python_objects(document: Document, write_coco: WriteCoco) -> None:
    data = load_data(write_coco(document))
    columns = [value for name in data.__slots__ if isinstance(value := getattr(data, name), np.ndarray)]
    assert len(columns) == 9
    assert not any(column.dtype.hasobject for column in columns)


def test_all_layouts_are_found(document: Document, write_coco: WriteCoco, tmp_path: Path) -> None:
    folder = write_coco(document)
    for name in ("annotations.json", "whatever.json"):
        shutil.move(next(folder.glob("*.json")), folder / name)
        assert find_annotations(folder) == (folder / name, folder)
    (folder / "._whatever.json").write_text("left by a copy from a Mac")
    assert find_annotations(folder) == (folder / "whatever.json", folder)
    coco = tmp_path / "coco"
    (coco / "annotations").mkdir(parents=True)
    shutil.move(folder / "whatever.json", coco / "annotations" / "instances.json")
    folder.rename(coco / "images")
    assert find_annotations(coco) == (coco / "annotations" / "instances.json", coco / "images")
    assert len(load_data(coco)) == 3


def test_a_group_without_boxes_is_no_class(document: Document, write_coco: WriteCoco) -> None:
    document["categories"] = [
        {"id": 0, "name": "ball", "supercategory": "none"},  # Roboflow's, here with the name of a class
        {"id": 10, "name": "ball", "supercategory": "ball"},
        {"id": 20, "name": "player", "supercategory": "player"},
        {"id": 30, "name": "referee", "supercategory": "ball"},
    ]
    data = load_data(write_coco(document))
    assert data.class_names == ("ball", "player", "referee"), "a class without boxes that groups none is kept"
    assert data.category_ids == (10, 20, 30)
    assert any("'ball' only groups others" in notice for notice in data.notices)


def test_a_group_with_boxes_is_a_class(document: Document, write_coco: WriteCoco) -> None:
    document["categories"][0]["supercategory"] = "ball"
    assert load_data(write_coco(document)).class_names == ("ball", "player")


@pytest.mark.parametrize("name", ["None", "none", "null", "NaN", "undefined", "-"])
@pytest.mark.parametrize("supercategory", [None, "", "none", "None", "null", float("nan"), "as the class"])
def test_a_class_named_like_no_supercategory_is_kept(
    document: Document, write_coco: WriteCoco, name: str, supercategory: object
) -> None:
    document["categories"].append({"id": 30, "name": name})
    for category in document["categories"]:
        category["supercategory"] = name if supercategory == "as the class" else supercategory
    assert load_data(write_coco(document)).class_names == ("ball", "player", name)


def test_a_category_without_supercategory_groups_nothing(document: Document, write_coco: WriteCoco) -> None:
    document["categories"] = [
        {"id": 0, "name": "match"},
        {"id": 10, "name": "ball", "supercategory": "match"},
        {"id": 20, "name": "player"},
        {"id": 30, "name": "None", "supercategory": None},
    ]
    assert load_data(write_coco(document)).class_names == ("ball", "player", "None")


def test_validation_classes_follow_the_training_classes_by_name(
    document: Document, write_coco: WriteCoco
) -> None:
    train = load_data(write_coco(document))
    document["categories"][0]["id"], document["categories"][1]["id"] = 1, 2
    for annotation in document["annotations"]:
        annotation["category_id"] = {20: 1, 10: 2}[annotation["category_id"]]
    val = load_data(write_coco(document, "val"), classes=train.class_names)
    assert val.class_names == ("ball", "player")
    assert val.category_ids == (2, 1)
    assert val.box_classes.tolist() == train.box_classes.tolist()


def test_a_group_in_one_set_may_be_a_class_in_the_other(document: Document, write_coco: WriteCoco) -> None:
    document["categories"][0]["supercategory"] = "ball"
    train = load_data(write_coco(document))
    document["annotations"] = document["annotations"][:1]
    val = load_data(write_coco(document, "val"), classes=train.class_names)
    assert val.class_names == ("ball", "player"), (
        "ball has no box here and groups player, but is a training class"
    )
    assert load_data(write_coco(document, "alone")).class_names == ("player",)


def test_a_group_only_in_validation_is_no_difference(document: Document, write_coco: WriteCoco) -> None:
    train = load_data(write_coco(document))
    document["categories"].append({"id": 1, "name": "match", "supercategory": "none"})
    document["categories"][0]["supercategory"] = "match"
    assert load_data(write_coco(document, "val"), classes=train.class_names).class_names == train.class_names


def test_classes_that_differ_are_named(document: Document, write_coco: WriteCoco) -> None:
    train = load_data(write_coco(document))
    document["categories"][0]["name"] = "referee"
    folder = write_coco(document, "val")
    message = r"val/.*: 2 classes .*agree by name: player only in the training data, referee only here"
    with pytest.raises(DataError, match=message):
        load_data(folder, classes=train.class_names)


def change(path: str, value: object) -> Callable[[Document], None]:
    """Set the value at a path like `images/0/id`; None removes it."""

    def apply(document: Any) -> None:
        *parents, last = (int(key) if key.isdigit() else key for key in path.split("/"))
        for key in parents:
            document = document[key]
        if value is None:
            del document[last]
        else:
            document[last] = value

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change("annotations", None), "has no 'annotations'"),
        (change("images", {}), "'images' is {}; it must be a list"),
        (change("images", []), "without a usable image"),
        (change("images/1", 5), r"images\[1\]: 5 is no object"),
        (change("images/1/id", None), r"images\[1\]: has no 'id'"),
        (change("images/1/id", "x3"), r"images\[1\] \(id 'x3'\): 'id' is 'x3'; it must be a whole number"),
        (change("images/1/id", 2**70), "it must be a whole number"),
        (change("images/1/id", 2**63), r"'id' is 9223372036854775808; it must be .* to 2\^63 - 1"),
        (change("annotations/2/id", -(2**63) - 1), r"it must be a whole number from -2\^63 to 2\^63 - 1"),
        (change("annotations/2/image_id", 2**64 + 3), r"'image_id' is 18.*9; it must be .* 2\^63 - 1"),
        (change("categories/0/id", 1e19), r"'id' is 1e\+19; it must be .* to 2\^63 - 1"),
        (change("images/1/id", 7), r"1 image with the id of an earlier .*images\[1\] \(id 7\)"),
        (change("images/1/file_name", 3), r"\(id 3\): 'file_name' is 3; it must be a text"),
        (change("images/1/width", 0), r"images\[1\] \(id 3\): width and height must be at least 1"),
        (change("images/1/width", 60.5), "'width' is 60.5; it must be a whole number"),
        (change("annotations/2/bbox", None), r"annotations\[2\] \(id 13\): has no 'bbox'"),
        (change("annotations/2/bbox", [1, 2, 3]), r"13\): 'bbox' is \[1, 2, 3\]; it must be four finite"),
        (change("annotations/2/bbox", [1, 2, 3, "4"]), r"\(id 13\): 'bbox' is .* four finite numbers"),
        (change("annotations/2/bbox", [1, 2, 3, float("nan")]), r"13\): 'bbox' is .* four finite numbers"),
        (change("annotations/2/bbox", [1, 2, -3, 4]), r"negative .*13\): \[1.0, .*, 4.0\]"),
        (change("annotations/2/image_id", 99), r"'images' does not list.*13\): image_id 99"),
        (change("annotations/2/category_id", 99), r"'categories' does not.*13\): category_id 99"),
        (change("annotations/2/area", "big"), r"\(id 13\): 'area' is 'big'; it must be a number"),
        (change("annotations/2/iscrowd", "no"), r"\(id 13\): 'iscrowd' is 'no'; it must be a whole number"),
        (change("categories/0/name", "ball"), r"1 category with the name .*\(id 20\): ball"),
        (change("categories/0/id", 10), r"1 category with the id .*\(id 10\): ball"),
    ],
)  # fmt: skip
def test_damaged_records_are_named_in_one_line(
    document: Document, write_coco: WriteCoco, damage: Callable[[Document], None], message: str
) -> None:
    folder = write_coco(document)
    damage(document)
    (folder / "_annotations.coco.json").write_text(json.dumps(document))
    with pytest.raises(DataError, match=message) as caught:
        load_data(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_without_categories_is_refused(document: Document, write_coco: WriteCoco) -> None:
    document["categories"], document["annotations"] = [], []
    with pytest.raises(DataError, match="without a usable category"):
        load_data(write_coco(document))


def test_missing_files_are_counted_and_the_first_named(document: Document, write_coco: WriteCoco) -> None:
    folder = write_coco(document)
    (folder / "3.jpg").unlink()
    (folder / "5.jpg").unlink()
    with pytest.raises(DataError, match=r"2 images of 3 missing in .*train; .*: 3.jpg, 5.jpg"):
        load_data(folder)
    assert len(load_data(folder, check_files=False)) == 3


def test_absolute_file_names_are_found(document: Document, write_coco: WriteCoco, tmp_path: Path) -> None:
    folder, elsewhere = write_coco(document), tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.move(folder / "7.jpg", elsewhere)
    for image, path in zip(document["images"], (elsewhere / "7.jpg", folder / "3.jpg"), strict=False):
        image["file_name"] = str(path)
    (folder / "_annotations.coco.json").write_text(json.dumps(document))
    assert [load_data(folder).image_path(row).is_file() for row in range(3)] == [True] * 3
    assert findings_of(folder) == []


@pytest.mark.parametrize(
    ("on_disk", "in_json", "shown"),
    [
        (
            "e\u0301t\u00e9.jpg",
            "\u00e9t\u00e9.jpg",
            ["'e\\u0301t\\xe9.jpg'", "'\\xe9t\\xe9.jpg'", "normal form"],
        ),
        ("caf\u00e9/7.jpg", "cafe\u0301/7.jpg", ["'caf\\xe9/7.jpg'", "'cafe\\u0301/7.jpg'", "normal form"]),
        ("7.JPG", "7.jpg", ["'7.JPG'", "'7.jpg'", "case"]),
        ("a/7.jpg", "a\\7.jpg", ["'a/7.jpg'", "backslashes"]),
        ("7.jpg", "/no/such/7.jpg", [": /no/such/7.jpg", "absolute"]),
        ("7.jpg", "C:\\data\\7.jpg", [": C:", "absolute"]),
    ],
)
def test_a_file_whose_name_looks_the_same_is_shown(
    document: Document, write_coco: WriteCoco, on_disk: str, in_json: str, shown: list[str]
) -> None:
    document["images"][0]["file_name"] = on_disk
    folder = write_coco(document)
    document["images"][0]["file_name"] = in_json
    (folder / "_annotations.coco.json").write_text(json.dumps(document))
    with pytest.raises(DataError, match="1 image of 3 missing") as caught:
        load_data(folder)
    (finding,) = (each for each in findings_of(folder) if each.kind == "missing_image")
    assert all(part in str(caught.value) and part in str(finding) for part in shown[1:]), caught.value
    assert shown[0] in str(caught.value)


def test_class_names_that_look_the_same_are_distinguished(document: Document, write_coco: WriteCoco) -> None:
    document["categories"][0]["name"] = "caf\u00e9"
    train = load_data(write_coco(document))
    document["categories"][0]["name"] = "cafe\u0301"
    with pytest.raises(DataError, match=r"'caf\\xe9' only in .*'cafe\\u0301' only here"):
        load_data(write_coco(document, "val"), classes=train.class_names)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"images": [], "annotations": [], "images": [{}]}', "several values for 'images'"),
        ('{"images": [{"id": 1, "id": 2}]}', "several values for 'id'"),
        ('{"images": [,]}', "broken JSON at line 1, column 13"),
        ("", "broken JSON at line 1, column 1"),
        ("[]", "holds a list"),
        ("\xff\xfe\xfd", "not a JSON file"),
    ],
)
def test_a_file_without_coco_json_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=message):
        load_data(tmp_path)


def test_folders_without_one_clear_json_are_refused(document: Document, write_coco: WriteCoco) -> None:
    folder = write_coco(document)
    with pytest.raises(DataError, match=r"nowhere: does not exist"):
        load_data(folder / "nowhere")
    with pytest.raises(DataError, match=r"7.jpg: is a file"):
        load_data(folder / "7.jpg")
    (folder / "copy.json").write_text("{}")
    with pytest.raises(DataError, match=r"2 JSON files.*'_annotations.coco.json', 'copy.json'"):
        load_data(folder)
    for path in folder.glob("*.json"):
        path.unlink()
    with pytest.raises(DataError, match=r"no JSON file"):
        load_data(folder)
    (folder / "annotations").mkdir()
    (folder / "annotations" / "a.json").write_text("{}")
    with pytest.raises(DataError, match=r"has annotations/ but no images/"):
        load_data(folder)
