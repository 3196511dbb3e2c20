"""`detr-dist check-data` as a person or a script runs it, and the warnings of training."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

JSON = "_annotations.coco.json"
Document = dict[str, Any]


def write_split(folder: Path, document: Document, first_seed: int) -> None:
    """Write a split with a different image for each entry."""
    folder.mkdir(parents=True)
    for i, image in enumerate(document["images"]):
        colours = np.random.default_rng(first_seed + i).integers(0, 256, (4, 6, 3), dtype=np.uint8)
        Image.fromarray(colours).resize((60, 40)).save(folder / image["file_name"])
    (folder / JSON).write_text(json.dumps(document))


def sound_document(num_images: int = 8) -> Document:
    return {
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": 60, "height": 40} for i in range(num_images)],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 1 + i % 2, "bbox": [5, 5, 20, 20]}
            for i in range(num_images)
        ],
        "categories": [{"id": 1, "name": "player"}, {"id": 2, "name": "ball"}],
    }


@pytest.fixture
def faulty(tmp_path: Path) -> Path:
    """Write `train` and `val` with one of each fault that can occur together with the others."""
    train, val = sound_document(16), sound_document()
    boxes = train["annotations"]
    boxes += [{"id": 100 + i, "image_id": 9, "category_id": 1, "bbox": [1, 1, 9, 9]} for i in range(12)]
    boxes[16] |= {"image_id": 999}
    boxes[17] |= {"category_id": 999}
    boxes[18] |= {"bbox": [5, 5, -3, 4]}
    boxes[19] |= {"bbox": "everywhere"}
    boxes[20] |= {"id": "x"}
    boxes[21] |= {"bbox": [50, 1, 20, 9]}
    boxes[22] |= {"bbox": [70, 1, 9, 9]}
    boxes[23] |= {"bbox": [6, 5, 20, 20]}  # over the box that image 9 has of class `ball`
    boxes[23] |= {"category_id": 2}
    boxes[24] |= {"bbox": [1, 20, 9, 9], "id": 1}
    boxes[25] |= {"bbox": [40, 30, 0.1, 0.1]}
    boxes[26] |= {"bbox": [20, 1, 20, 9]}
    boxes[27] |= {"bbox": [30, 20, 20, 9]}
    train["categories"] += [
        {"id": 3, "name": "referee"},
        {"id": 2, "name": "goal"},
        {"id": 4, "name": "player"},
    ]
    write_split(tmp_path / "train", train, 0)
    write_split(tmp_path / "val", val, 100)
    train["images"] += [
        {"id": 3, "file_name": "0.jpg", "width": 60, "height": 40},
        {"id": 30, "file_name": "./4.jpg", "width": 60, "height": 40},
        {"id": 31, "file_name": "no_size.jpg"},
    ]
    train["images"][7] |= {"height": 50}
    (tmp_path / "train" / JSON).write_text(json.dumps(train))

    (tmp_path / "train" / "1.jpg").unlink()
    (tmp_path / "train" / "2.jpg").write_bytes(b"no image")
    shutil.copy(tmp_path / "train" / "5.jpg", tmp_path / "train" / "6.jpg")
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.open(tmp_path / "train" / "8.jpg").save(tmp_path / "train" / "8.jpg", exif=exif)
    Image.open(tmp_path / "val" / "7.jpg").rotate(180).save(tmp_path / "train" / "no_size.jpg")
    Image.open(tmp_path / "val" / "7.jpg").save(tmp_path / "train" / "extra.jpg")
    shutil.copy(tmp_path / "train" / "0.jpg", tmp_path / "val" / "0.jpg")
    Image.open(tmp_path / "train" / "3.jpg").save(tmp_path / "val" / "3.jpg", quality=50)
    return tmp_path


FAULTS_OF_TRAIN = {
    "missing_image": "error",
    "unreadable_image": "error",
    "wrong_size": "error",
    "file_listed_twice": "error",
    "duplicate_image_id": "error",
    "unknown_image": "error",
    "unknown_category": "error",
    "negative_box": "error",
    "malformed_box": "error",
    "malformed_record": "error",
    "duplicate_category_id": "error",
    "duplicate_category_name": "error",
    "too_many_boxes": "error",
    "box_outside": "warning",
    "box_without_extent": "warning",
    "duplicate_box": "warning",
    "duplicate_annotation_id": "warning",
    "tiny_box": "warning",
    "class_without_boxes": "warning",
    "no_size": "warning",
    "unlisted_picture": "warning",
    "duplicate_picture": "warning",
    "exif_rotation": "warning",
}
FAULTS_OF_VAL = {
    "classes_differ": "error",
    "picture_in_two_splits": "error",
    "lookalike_in_two_splits": "warning",
}


def test_each_fault_is_found_exactly_once(workplace, faulty: Path) -> None:
    settings = ("model.num_queries=6", "data.shortest_edge=80")
    finished = workplace.run("check-data", "--json", "train", "val", *settings)
    assert finished.returncode == 1
    assert finished.stderr == ""
    report = json.loads(finished.stdout)
    assert report["ready"] is False
    found = {(f["split"], f["kind"]): (f["level"], f["count"]) for f in report["findings"]}
    assert len(found) == len(report["findings"])
    expected = {("train", kind): (level, 1) for kind, level in FAULTS_OF_TRAIN.items()}
    expected |= {("val", kind): (level, 1) for kind, level in FAULTS_OF_VAL.items()}
    assert found == expected


def test_the_text_report_lists_the_same_findings_and_ends_with_the_verdict(workplace, faulty: Path) -> None:
    settings = ("model.num_queries=6", "data.shortest_edge=80")
    report = json.loads(workplace.run("check-data", "--json", "train", "val", *settings).stdout)
    finished = workplace.run("check-data", "train", "val", *settings)
    assert finished.returncode == 1
    lines = finished.stdout.splitlines()
    assert all(any(f["message"] in line for line in lines) for f in report["findings"])
    assert lines[-1] == "verdict: 15 errors, 11 warnings: not ready to train"
    assert finished.stderr == ""


def test_quick_reports_the_faults_that_need_no_image(workplace, faulty: Path) -> None:
    report = json.loads(workplace.run("check-data", "--json", "--quick", "train", "val").stdout)
    found = {finding["kind"] for finding in report["findings"]}
    assert {"missing_image", "unknown_image", "classes_differ", "box_outside"} <= found
    need_images = {"unreadable_image", "wrong_size", "exif_rotation", "duplicate_picture"}
    assert not found & (need_images | {"picture_in_two_splits", "lookalike_in_two_splits"})
    assert report["opened_pictures"] is False


def test_generated_scenes_have_no_findings(workplace) -> None:
    assert workplace.run("make-data", "data", "--num-train", "24", "--num-val", "8").returncode == 0
    finished = workplace.run("check-data", "data/train", "data/val")
    assert finished.returncode == 0
    lines = finished.stdout.splitlines()
    assert lines[-1] == "verdict: 0 errors, 0 warnings: ready to train"
    assert not any(": error: " in line or "warning:" in line for line in lines)
    document = json.loads((workplace.folder / "data" / "train" / JSON).read_text())
    names = {c["id"]: c["name"] for c in document["categories"]}
    for name in ("player", "ball"):
        counts = next(line for line in lines if line.split()[:1] == [name]).split()  # the first is of train
        assert int(counts[1]) == sum(names[a["category_id"]] == name for a in document["annotations"])
        assert int(counts[1]) == sum(map(int, counts[2:]))


def test_warnings_alone_exit_with_success(workplace) -> None:
    document = sound_document()
    document["annotations"][0]["bbox"] = [-5, 5, 20, 20]
    write_split(workplace.folder / "a=b", document, 0)
    finished = workplace.run("check-data", "a=b", "--config", workplace.config)
    assert finished.returncode == 0
    assert "1 warning: ready to train" in finished.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "fragment"),
    [
        (["nowhere"], 1, "nowhere: does not exist"),
        (["data.shortest_edge=64"], 2, "no data folder"),
        (["train", "data.shortest_egde=64"], 2, "data.shortest_edge"),
        (["train", "no_json"], 1, "no_json"),
        (["broken", "--json"], 1, "broken JSON"),
        (["list"], 1, "holds a list"),
    ],
)
def test_data_that_cannot_be_checked_fails_with_one_line(arguments, code, fragment, workplace) -> None:
    write_split(workplace.folder / "train", sound_document(), 0)
    (workplace.folder / "no_json").mkdir()
    for name, text in (("broken", '{"images": [}'), ("list", "[]")):
        (workplace.folder / name).mkdir()
        (workplace.folder / name / JSON).write_text(text)
    finished = workplace.run("check-data", *arguments)
    assert finished.returncode == code
    assert finished.stdout == ""
    (line,) = finished.stderr.splitlines()
    assert fragment in line


def test_training_warns_of_suspicious_annotations_before_the_first_step(workplace) -> None:
    train, val = sound_document(), sound_document()
    train["annotations"].append(train["annotations"][0] | {"id": 100, "bbox": [5, 5, 20, 20.5]})
    val["annotations"][1]["category_id"] = 1
    val["annotations"] += [
        {"id": 100 + i, "image_id": 0, "category_id": 2 - i % 2, "bbox": [30, 4 * i, 9, 3]} for i in range(9)
    ]
    write_split(workplace.folder / "data" / "train", train, 0)
    write_split(workplace.folder / "data" / "val", val, 100)
    finished = workplace.train(workplace.folder / "data", "training.max_steps=1", "logging.mlflow=false")
    assert finished.returncode == 0, finished.stderr
    before, _, _ = finished.stdout.partition("images to train on")
    assert f"train/{JSON}: 1 box on another" in before
    assert f"val/{JSON}: 1 image with more boxes than" in before
    assert len(before.splitlines()) == 3
