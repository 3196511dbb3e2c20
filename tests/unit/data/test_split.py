"""A split keeps clips together, comes close to the wanted fractions, and loses no image or annotation."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detr_dist.data import coco_writing
from detr_dist.data import split as split_module
from detr_dist.data.clips import clip_name
from detr_dist.data.coco import load_data
from detr_dist.data.coco_writing import ANNOTATIONS_NAME, target_names
from detr_dist.data.split import assign_clips, split_data
from detr_dist.errors import DataError, UsageError

Document = dict[str, Any]
WriteCoco = Callable[..., Path]


def write_clips(folder: Path, sizes: dict[str, int], classes: dict[str, set[str]] | None = None) -> Path:
    """Write empty image files in clips, and a COCO JSON with a box of each class in every image of a clip."""
    names = [f"{clip}_{frame:03d}.jpg" for clip, size in sizes.items() for frame in range(size)]
    order = np.random.default_rng(len(names)).permutation(len(names))
    categories = {"player": 7, "ball": 3}
    images, annotations = [], []
    for id_, name in enumerate(names[i] for i in order):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
        images.append({"id": id_, "file_name": name, "width": 60, "height": 40})
        for class_ in sorted((classes or {}).get(clip_name(name), {"player"})):
            box = {"bbox": [1.25, 2, 30, 20.5], "area": 99.5, "iscrowd": 0}
            ids = {"id": 1000 + len(annotations), "image_id": id_, "category_id": categories[class_]}
            annotations.append(ids | box)
    listed = [{"id": id_, "name": name} for name, id_ in categories.items()]
    document = {"images": images, "annotations": annotations, "categories": listed}
    (folder / ANNOTATIONS_NAME).write_text(json.dumps(document))
    return folder


def run(source: Path, out: Path, **options: Any) -> dict[str, Document]:
    """Split, and return the document of each side."""
    split_data(source, out, **{"val": 0.2, "test": None, "by": "clip", "seed": 0} | options)
    return {side.name: json.loads((side / ANNOTATIONS_NAME).read_text()) for side in sorted(out.iterdir())}


def by_id(records: list[Document]) -> list[Document]:
    return sorted(records, key=lambda record: record["id"])


@pytest.mark.parametrize("seed", range(5))
def test_no_image_or_annotation_is_lost_or_doubled_and_no_clip_divided(seed: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    sizes = {f"match{i}_half{1 + i % 2}": int(rng.integers(1, 9)) for i in range(rng.integers(3, 12))}
    sizes |= {"08fd33_3": 4, "video/a": 3}
    source = write_clips(tmp_path / "source", sizes)
    before = json.loads((source / ANNOTATIONS_NAME).read_text())
    sides = run(source, tmp_path / "out", test=0.2)
    assert sides.keys() == {"train", "valid", "test"}
    after = {
        key: [each for side in sides.values() for each in side[key]] for key in ("images", "annotations")
    }
    assert by_id(after["images"]) == by_id(before["images"])
    assert by_id(after["annotations"]) == by_id(before["annotations"])
    clips = [{clip_name(image["file_name"]) for image in side["images"]} for side in sides.values()]
    assert sum(map(len, clips)) == len(set.union(*clips)) == len(sizes)
    assert min(map(len, clips)) > 0
    for name, side in sides.items():
        assert by_id(side["categories"]) == by_id(before["categories"])
        for image in side["images"]:
            path = tmp_path / "out" / name / image["file_name"]
            assert path.samefile(source / image["file_name"]), "a hard link, not a copy"


def test_the_same_seed_gives_the_same_split_whatever_the_order_of_images(tmp_path: Path) -> None:
    source = write_clips(tmp_path / "source", {f"m{i}": 3 for i in range(20)})
    first = run(source, tmp_path / "first", seed=3)
    assert run(source, tmp_path / "again", seed=3) == first
    document = json.loads((source / ANNOTATIONS_NAME).read_text())
    document["images"].reverse()
    (source / ANNOTATIONS_NAME).write_text(json.dumps(document))
    turned = run(source, tmp_path / "turned", seed=3)
    other = run(source, tmp_path / "other", seed=4)
    for side in first:
        assert by_id(turned[side]["images"]) == by_id(first[side]["images"])
        assert by_id(other[side]["images"]) != by_id(first[side]["images"])


@pytest.mark.parametrize("seed", range(20))
def test_fractions_are_met_and_every_class_is_on_every_side_that_it_can_be_on(seed: int) -> None:
    rng = np.random.default_rng(seed)
    num_clips = int(rng.integers(30, 60))
    present = rng.random((num_clips, 4)) < [0.9, 0.5, 0.2, 0.1]
    present[:3, 3] = True  # in three clips at least, as many as sides
    counts = np.hstack([rng.integers(20, 80, (num_clips, 1)), present * rng.integers(1, 200, (num_clips, 4))])
    sides = assign_clips(counts, [0.7, 0.2, 0.1], seed)
    sums = np.stack([counts[sides == side].sum(axis=0) for side in range(3)])
    assert (sums > 0).all()
    # A clip has at most 6 % of the images, so that the nearest sum is within half of that.
    assert sums[:, 0] / sums[:, 0].sum() == pytest.approx([0.7, 0.2, 0.1], abs=0.03)


@pytest.mark.parametrize("num_clips", [2, 3, 4])
def test_a_class_in_a_few_clips_is_trained_on_first_then_validated(num_clips: int) -> None:
    counts = np.array([[10, 50, 0]] * 20)
    counts[:num_clips, 2] = 1
    sides = assign_clips(counts, [0.8, 0.1, 0.1], 0)
    assert {*sides[:num_clips].tolist()} == {*range(min(num_clips, 3))}


def test_the_command_prints_boxes_by_class_and_side_and_warns_of_classes_in_one_clip(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], messages: list[str]
) -> None:
    source = write_clips(tmp_path / "source", {f"m{i}": 4 for i in range(5)}, {"m2": {"player", "ball"}})
    run(source, tmp_path / "out")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[:6] == [
        ["5", "clips", "by", "file", "name,", "of", "4", "images,", "such", "as", "'m0'"],
        ["train", "valid"],
        ["clips", "4", "1"],
        ["images", "16", "(80.0%)", "4", "(20.0%)"],
        ["boxes", "of", "ball", "4", "0"],
        ["boxes", "of", "player", "16", "4"],
    ]
    assert messages == ["ball: no box in valid, because only 1 clip of 5 has any; add clips with it"]


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        ({"val": 0.0}, "--val 0.0: must be a fraction between 0 and 1"),
        ({"val": 1.0}, "--val 1.0: must be"),
        ({"val": float("nan")}, "--val nan: must be"),
        ({"test": -0.1}, "--test -0.1: must be"),
        ({"val": 0.6, "test": 0.4}, "--val + --test = 1: nothing is left to train on"),
        ({"by": "("}, "not a regular expression"),
    ],
)
def test_impossible_options_are_refused_before_anything_is_written(
    options: dict[str, Any], fragment: str, tmp_path: Path
) -> None:
    source = write_clips(tmp_path / "source", {"a": 2, "b": 2, "c": 2})
    with pytest.raises(UsageError) as raised:
        run(source, tmp_path / "out", **options)
    assert fragment in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_fewer_clips_than_sides_and_a_folder_in_use_are_refused(tmp_path: Path) -> None:
    source = write_clips(tmp_path / "source", {"a": 2, "b": 2})
    with pytest.raises(DataError, match=r"2 clips by file name, .* too few for 3 sides"):
        run(source, tmp_path / "out", test=0.2)
    with pytest.raises(UsageError, match="already exists"):
        run(source, source)


def test_an_interrupted_split_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_clips(tmp_path / "source", {"a": 2, "b": 2})

    def interrupted(data: Any, rows: list[int], folder: Path) -> None:
        coco_writing.write_coco(data, rows, folder)
        if folder.name == "valid":
            raise KeyboardInterrupt

    monkeypatch.setattr(split_module, "write_coco", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_linked_images_keep_their_mode(tmp_path: Path) -> None:
    source = write_clips(tmp_path / "source", {"a": 2, "b": 2})
    for path in source.glob("*.jpg"):
        path.chmod(0o440)
    run(source, tmp_path / "out")
    assert {path.stat().st_mode & 0o777 for path in source.glob("*.jpg")} == {0o440}


def test_names_that_lead_out_of_the_folder_become_relative_to_the_common_one(
    document: Document, write_coco: WriteCoco, tmp_path: Path
) -> None:
    folder = write_coco(document, with_images=False)
    names = ["../a/1.jpg", str(tmp_path / "b" / "1.jpg"), "../b/link.jpg"]
    for name, image in zip(names[:2], document["images"], strict=False):
        (folder / name).parent.mkdir()
        (folder / name).write_bytes(name.encode())
        image["file_name"] = name
    (tmp_path / "b" / "link.jpg").symlink_to("../a/1.jpg")
    document["images"][2]["file_name"] = names[2]
    (folder / ANNOTATIONS_NAME).write_text(json.dumps(document))
    data = load_data(folder)
    assert target_names(data) == ["a/1.jpg", "b/1.jpg", "b/link.jpg"]
    coco_writing.write_coco(data, [0, 1, 2], tmp_path / "out")
    assert (tmp_path / "out" / "b" / "link.jpg").read_bytes() == b"../a/1.jpg"
    assert not (tmp_path / "out" / "b" / "link.jpg").is_symlink()
    written = load_data(tmp_path / "out")
    assert written.fingerprint() != data.fingerprint(), "the names differ"
    for column in ("image_ids", "boxes_xywh_px", "box_classes", "areas", "annotation_ids", "iscrowd"):
        assert np.array_equal(getattr(written, column), getattr(data, column))
    assert (written.class_names, written.category_ids) == (data.class_names, data.category_ids)
