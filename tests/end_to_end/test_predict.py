"""`detr-dist predict` finds and draws the detections of an evaluation, and skips unreadable files."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, new_workplace: Callable, easy_data: Path):
    """Train a few steps, and write the validation images to `images`.

    They are in two folders and several formats, together with files that are no images.
    """
    place = new_workplace(tmp_path_factory.mktemp("trained"))
    finished = place.train(easy_data, "training.max_steps=4")
    assert finished.returncode == 0, finished.stderr
    folder = place.folder / "images"
    (folder / "more").mkdir(parents=True)
    for number, source in enumerate(sorted((easy_data / "val").glob("*.jpg"))):
        with Image.open(source) as image:
            image.save(folder / ("more" if number > 4 else ".") / f"{number}.{'png' if number else 'gif'}")
    complete = (easy_data / "val" / "000.jpg").read_bytes()
    (folder / "broken.jpg").write_bytes(b"no image")
    (folder / os.fsdecode(b"br\xffken.jpg")).write_bytes(b"no image, with a name that is no text")
    (folder / "folder.jpg").mkdir()
    (folder / "truncated.jpg").write_bytes(complete[: len(complete) // 20])
    (folder / "notes.txt").write_text("no image, and not meant to be one")
    return place


def predict(
    place, output: str, *arguments: str | Path
) -> tuple[list[dict], subprocess.CompletedProcess[str]]:
    finished = place.run("predict", "--model", "out/model", "--output-dir", output, *arguments)
    assert finished.returncode == 0, finished.stderr
    return json.loads((place.folder / output / "predictions.json").read_text()), finished


def test_all_images_of_a_folder_are_drawn_and_unreadable_ones_reported(trained) -> None:
    results, finished = predict(trained, "found", "--input", "images", "--threshold", "0")
    drawn = {
        str(path.relative_to(trained.folder / "found")) for path in (trained.folder / "found").rglob("*.*")
    }
    assert drawn == {
        *("0.gif.png", "1.png", "2.png", "3.png", "4.png", "more/5.png", "more/6.png", "predictions.json")
    }
    warnings = [line for line in finished.stdout.splitlines() if line.startswith("warning: ")]
    assert [line.split(":")[1].strip() for line in warnings] == [
        *("images/broken.jpg", "'images/br\\udcffken.jpg", "images/truncated.jpg")
    ]
    assert finished.stdout.splitlines()[-1].startswith("56 detections in 7 images, 3 skipped")
    assert {each["file_name"] for each in results} == {
        *("0.gif", "1.png", "2.png", "3.png", "4.png", "more/5.png", "more/6.png")
    }
    for name in ("1.png", "more/6.png"):
        with (
            Image.open(trained.folder / "images" / name) as source,
            Image.open(trained.folder / "found" / name) as copy,
        ):
            assert copy.size == source.size
            assert not np.array_equal(np.asarray(copy), np.asarray(source))


def test_no_image_is_skipped_silently_and_no_copy_overwrites_another(trained, easy_data: Path) -> None:
    source = trained.folder / "formats"
    (source / "more").mkdir(parents=True)
    (trained.folder / "elsewhere").mkdir()
    with Image.open(easy_data / "val" / "000.jpg") as image:
        for name in ("b.jfif", "c.avif", "d.jp2", "e.ppm", "x.gif", "x.gif.png", "more/b.jfif"):
            image.save(source / name, **({"format": "JPEG"} if name.endswith("jfif") else {}))
        for path in (source / "A.jpg", source / "a.JPG", trained.folder / "elsewhere" / "linked.jpg"):
            image.save(path)
    Image.fromarray(np.zeros((9, 9), np.float32)).save(source / "float.tif")
    (source / "link").symlink_to(trained.folder / "elsewhere")
    (source / "circle").symlink_to(source)
    (source / "notes.txt").write_text("no image")
    results, finished = predict(trained, "of_formats", "--input", "formats", "--threshold", "0")
    file_names = {
        *("A.jpg", "a.JPG", "b.jfif", "c.avif", "d.jp2", "e.ppm", "x.gif", "x.gif.png"),
        *("more/b.jfif", "link/linked.jpg"),
    }
    assert {each["file_name"] for each in results} == file_names
    copies = [path for path in (trained.folder / "of_formats").rglob("*") if path.is_file()]
    names = {str(path.relative_to(trained.folder / "of_formats")).lower() for path in copies}
    assert len(names - {"predictions.json"}) == len(file_names)
    assert (
        "skipped 2 that are no images by suffix, hidden, or links in a circle: 'circle', 'notes.txt'"
        in finished.stdout
    )
    assert "formats/float.tif: values from 0 to 0 in Pillow's mode F" in finished.stdout
    assert "80 detections in 10 images, 1 skipped" in finished.stdout


def test_a_failed_drawing_loses_no_detections(trained, easy_data: Path) -> None:
    source = trained.folder / "long"
    source.mkdir()
    for name in ("x" * 250 + ".ppm", "a.png"):  # no room for .png behind it
        with Image.open(easy_data / "val" / "000.jpg") as image:
            image.save(source / name)
    results, finished = predict(trained, "of_long", "--input", "long", "--threshold", "0")
    assert len({each["file_name"] for each in results}) == 2
    assert "warning: 1 images could not be drawn, first long/xxx" in finished.stdout


def test_detections_equal_those_of_an_evaluation(trained, easy_data: Path) -> None:
    """Predict on the validation images, bit for bit."""
    evaluated = trained.run(
        *("evaluate", "--model", "out/model", "--data-dir", easy_data / "val", "--predictions", "all.json")
    )
    assert evaluated.returncode == 0, evaluated.stderr
    expected = json.loads((trained.folder / "all.json").read_text())
    results, _ = predict(trained, "of_val", "--input", easy_data / "val", "--threshold", "0")
    # Images count from 10 in the data and from 1 here, categories from 1 and from 0; batches are the same.
    assert [
        (each["image_id"] + 9, each["category_id"] + 1, each["bbox"], each["score"]) for each in results
    ] == [(each["image_id"], each["category_id"], each["bbox"], each["score"]) for each in expected]
    assert {each["category_name"] for each in results} <= {"player", "ball"}


def test_only_detections_above_their_class_threshold_are_kept(trained, easy_data: Path) -> None:
    everything, _ = predict(trained, "everything", "--input", easy_data / "val", "--threshold", "0")
    thresholds = {
        name: trained.results()["metrics"].get(f"val_{name}_threshold", 0.5) for name in ("player", "ball")
    }
    results, finished = predict(trained, "by_class", "--input", easy_data / "val")
    assert results == [each for each in everything if each["score"] >= thresholds[each["category_name"]]]
    unknown = [name for name in thresholds if f"val_{name}_threshold" not in trained.results()["metrics"]]
    assert ("the model brings no threshold for" in finished.stdout) == bool(unknown)


def test_a_single_image_with_any_name_is_accepted(trained, easy_data: Path) -> None:
    (trained.folder / "image").write_bytes((easy_data / "val" / "000.jpg").read_bytes())
    results, _ = predict(trained, "single", "--input", "image", "--threshold", "0")
    assert {(each["image_id"], each["file_name"]) for each in results} == {(1, "image")}
    assert sorted(path.name for path in (trained.folder / "single").iterdir()) == [
        "image.png", "predictions.json"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (("--input", "nowhere"), 1, "nowhere: does not exist"),
        (("--input", "out/checkpoints"), 1, "out/checkpoints: holds no image"),
        (("--input", "images/broken.jpg"), 1, "none of 1 images can be read"),
        (("--input", "images/broken.jpg", "data.num_workers=2"), 1, "none of 1 images can be read"),
        (("--input", "images", "--output-dir", "images"), 2, "--output-dir images: already exists"),
        (("--input", "images", "--output-dir", "images/found"), 2, "lies inside --input images"),
        (("--input", "images", "--threshold", "2"), 2, "--threshold"),
        (("--input", "images", "--model", "out/modle"), 2, "out/modle: no such folder"),
    ],
)
def test_invalid_arguments_fail_with_one_line(
    trained, arguments: tuple[str, ...], code: int, part: str
) -> None:
    finished = trained.run("predict", "--model", "out/model", "--output-dir", "never", *arguments)
    assert finished.returncode == code, finished.stderr
    (line,) = finished.stderr.splitlines()
    assert part in line
    assert not (trained.folder / "never").exists()
