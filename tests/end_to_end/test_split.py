"""`detr-dist split` as a person runs it, from frames in one folder to a split without findings."""

import json
from pathlib import Path

import pytest
from harness.data import write_coco

JSON = "_annotations.coco.json"


@pytest.fixture
def frames(tmp_path: Path) -> Path:
    """Write 24 frames of six clips of different views, named as Roboflow does."""
    folder = tmp_path / "frames"
    write_coco(folder, num_images=24, with_boxes=lambda i: 2, mixed_sizes=False)
    document = json.loads((folder / JSON).read_text())
    for i, image in enumerate(document["images"]):
        name = f"08fd33_{i % 6}_{i // 6}_png.rf.{i:032x}.jpg"
        (folder / image["file_name"]).rename(folder / name)
        image["file_name"] = name
    (folder / JSON).write_text(json.dumps(document))
    return folder


def test_a_split_is_ready_to_train_and_a_random_one_is_not_honest(workplace, frames: Path) -> None:
    finished = workplace.run("split", "frames", "out", "--val", "0.34", "--by", "clip")
    assert finished.returncode == 0, finished.stderr
    lines = finished.stdout.splitlines()
    assert lines[0] == "6 clips by file name, of 4 images, such as '08fd33_0'"
    assert lines[2].split() == ["clips", "4", "2"]
    settings = ("data.shortest_edge=400", "data.longest_edge=640")
    report = json.loads(workplace.run("check-data", "--json", "out/train", "out/valid", *settings).stdout)
    assert not [f for f in report["findings"] if f["kind"] in ("clip_in_two_splits", "unlisted_picture")]
    assert report["ready"]

    assert workplace.run("split", "frames", "random", "--by", ".+").returncode == 0
    checked = workplace.run("check-data", "--quick", "random/train", "random/valid", *settings)
    assert checked.returncode == 0
    assert "ready to train, but clips in two splits make the metrics too good" in checked.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "fragment"),
    [
        (["frames", "out", "--val", "1.5"], 2, "--val 1.5"),
        (["frames", "frames"], 2, "frames: already exists"),
        (["nowhere", "out"], 1, "nowhere: does not exist"),
        (["frames", "out", "--by", "folder"], 1, "all 24 images are in one folder"),
        (["frames", "out", "--by", "match"], 2, "finds no clip in 24 of 24 file names"),
    ],
)
def test_what_cannot_be_split_fails_with_one_line(arguments, code, fragment, workplace, frames) -> None:
    finished = workplace.run("split", *arguments)
    assert (finished.returncode, finished.stdout) == (code, "")
    (line,) = finished.stderr.splitlines()
    assert fragment in line
    assert not (workplace.folder / "out").exists()


def test_the_splits_of_a_data_set_are_joined_before_they_are_split_again(workplace, frames: Path) -> None:
    assert workplace.run("split", "frames", "random", "--by", ".+").returncode == 0
    both = workplace.folder / "random"
    for name in ("train", "valid"):  # exporters number the images of each split from 1
        document = json.loads((both / name / JSON).read_text())
        numbers = {image["id"]: number for number, image in enumerate(document["images"], start=1)}
        for image in document["images"]:
            image["id"] = numbers[image["id"]]
        for box in document["annotations"]:
            box["image_id"] = numbers[box["image_id"]]
        (both / name / JSON).write_text(json.dumps(document))
    finished = workplace.run("split", "random", "again", "--val", "0.34")
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.startswith("6 clips by file name, of 4 images")
    images = [
        image["file_name"]
        for name in ("train", "valid")
        for image in json.loads((workplace.folder / "again" / name / JSON).read_text())["images"]
    ]
    assert sorted(images) == sorted(path.name for path in frames.glob("*.jpg"))
