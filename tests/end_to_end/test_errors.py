"""`detr-dist errors` writes the hardest images, which can be corrected and trained on."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, new_workplace: Callable, tiny_data: Path):
    place = new_workplace(tmp_path_factory.mktemp("trained"))
    finished = place.train(tiny_data, "training.max_steps=1", "logging.mlflow=false")
    assert finished.returncode == 0, finished.stderr
    (place.folder / "images" / "more").mkdir(parents=True)
    for number, path in enumerate(sorted((tiny_data / "val").glob("*.jpg"))):
        shutil.copy(path, place.folder / "images" / ("more" if number % 2 else "") / path.name)
    (place.folder / "images" / "broken.jpg").write_bytes(b"no image")
    (place.folder / "empty").mkdir()
    return place


def errors_of(place, output_dir: str, *arguments: object) -> list[dict[str, str]]:
    """Run the command and return the rows of its table."""
    finished = place.run("errors", "--model", "out/model", "--output-dir", output_dir, *arguments)
    assert finished.returncode == 0, finished.stderr
    with (place.folder / output_dir / "errors.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("form", ["coco", "cvat", "yolo"])
def test_the_data_to_correct_can_be_checked_and_trained_on(trained, tiny_data: Path, form: str) -> None:
    """Every query counts at the threshold 0, so that all images have false positives."""
    rows = errors_of(
        *(trained, form, "--data-dir", tiny_data / "train", "--top", "5", "--as", form),
        "evaluation.score_threshold=0",
    )
    assert {int(row["rank"]) for row in rows} == {1, 2, 3, 4, 5}
    assert {row["why"] for row in rows} >= {"false positive"}
    for folder in ("drawn", "crops"):
        paths = sorted((trained.folder / form / folder).iterdir())
        assert [path.name[:5] for path in paths] == [f"000{rank}_" for rank in range(1, 6)]
        for path in paths:
            with Image.open(path) as image:
                image.load()
    checked = trained.run("check-data", f"{form}/data", "--json")
    assert checked.returncode == 0, checked.stdout
    dry = trained.run(
        *("train", "--config", trained.config, "--train-dir", f"{form}/data", "--val-dir", tiny_data / "val"),
        *("--output-dir", "again", "--dry-run", "model.num_queries=20"),
    )
    assert dry.returncode == 0, dry.stderr


def test_annotations_stay_and_false_positives_join_them(trained, tiny_data: Path) -> None:
    rows = errors_of(
        trained, "kept", "--data-dir", tiny_data / "val", "evaluation.score_threshold=0", "--top", "3"
    )
    written = json.loads((trained.folder / "kept" / "data" / "_annotations.coco.json").read_text())
    source = json.loads((tiny_data / "val" / "_annotations.coco.json").read_text())
    kept = {each["id"] for each in written["images"]}
    expected = [each for each in source["annotations"] if each["image_id"] in kept]
    ids = {each["id"] for each in written["annotations"]}
    assert ids >= {each["id"] for each in expected}
    added = sum(row["why"] == "false positive" for row in rows)
    assert len(written["annotations"]) == len(expected) + added


def test_a_folder_of_images_is_ranked_by_uncertainty(trained) -> None:
    rows = errors_of(trained, "unknown", "--data-dir", "images", "evaluation.score_threshold=0.4")
    assert {row["why"] for row in rows} == {"uncertain"}
    assert len({row["image"] for row in rows}) <= 7
    weights = [sum(float(row["weight"]) for row in rows if row["rank"] == rank) for rank in ("1", "2")]
    assert weights[0] >= weights[1]
    written = json.loads((trained.folder / "unknown" / "data" / "_annotations.coco.json").read_text())
    assert {each["file_name"] for each in written["images"]} == {row["image"] for row in rows}


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (("--data-dir", "nowhere"), 1, "nowhere: does not exist"),
        (("--data-dir", "empty"), 1, "empty: holds no image"),
        (("--data-dir", "images", "--output-dir", "images/found"), 2, "lies inside --data-dir images"),
        (("--data-dir", "images", "--output-dir", "images"), 2, "--output-dir images: already exists"),
        (("--data-dir", "images", "--as", "voc"), 2, "voc"),
        (("--data-dir", "images", "--top", "0"), 2, "--top"),
        (("--data-dir", "images", "evaluation.score_threshold=1"), 1, "no uncertain detections in 7 images"),
    ],
)
def test_invalid_arguments_fail_with_one_line(
    trained, arguments: tuple[str, ...], code: int, part: str
) -> None:
    finished = trained.run("errors", "--model", "out/model", "--output-dir", "never", *arguments)
    assert finished.returncode == code, finished.stderr
    (line,) = finished.stderr.splitlines()
    assert part in line
    assert not (trained.folder / "never").exists()
