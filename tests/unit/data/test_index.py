"""The index of large annotation files, here made for small ones."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detr_dist.data import index as index_module
from detr_dist.data.coco import CocoData, load_data
from detr_dist.data.columns import found
from detr_dist.data.formats import coco_json
from detr_dist.errors import DataError

Document = dict[str, Any]
WriteCoco = Callable[..., Path]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the cache, which also takes files of a few bytes."""
    monkeypatch.setattr(coco_json, "LARGE_BYTES", 0)
    monkeypatch.setenv("DETR_DIST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def columns_of(data: CocoData) -> dict[str, Any]:
    values = {name: getattr(data, name) for name in data.__slots__ if name != "index"}
    return {
        name: (value.dtype.str, value.shape, value.tobytes()) if isinstance(value, np.ndarray) else value
        for name, value in values.items()
    }


def equals(data: CocoData, folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> bool:
    """Return whether the data set is the one that is read without an index."""
    with monkeypatch.context() as patch:
        patch.setattr(coco_json, "LARGE_BYTES", 2**60)
        other = load_data(folder, **options)
    assert other.index is None
    assert data.num_boxes.tolist() == other.num_boxes.tolist()
    assert data.fingerprint() == other.fingerprint()
    return columns_of(data) == columns_of(other)


def no_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the annotation file was read")

    monkeypatch.setattr(coco_json.LargeDocument, "__getitem__", refuse)


def test_first_and_later_opens_give_the_same_data(
    document: Document, write_coco: WriteCoco, monkeypatch: pytest.MonkeyPatch
) -> None:
    document["annotations"][0]["bbox"] = [50, 30, 20, 20]  # clipped, which is reported
    document["annotations"][1]["iscrowd"] = 1
    folder = write_coco(document)
    first = load_data(folder)
    assert first.index is not None
    assert equals(first, folder, monkeypatch)
    no_reading(monkeypatch)
    later = load_data(folder)
    assert later.index is not None
    assert equals(later, folder, monkeypatch)
    assert not later.boxes_xywh_px.flags.writeable


def test_classes_of_the_training_data_are_used_without_reading_again(
    document: Document, write_coco: WriteCoco, monkeypatch: pytest.MonkeyPatch
) -> None:
    document["categories"].append({"id": 1, "name": "all", "supercategory": "none"})
    document["categories"][0]["supercategory"] = "all"
    folder = write_coco(document)
    load_data(folder)
    no_reading(monkeypatch)
    for options in ({"classes": ("ball", "player")}, {"classes": ("player", "ball")}):
        assert equals(load_data(folder, **options), folder, monkeypatch, **options)
    options = {"classes": ("all", "x", "player", "ball"), "may_lack_classes": True}
    assert equals(load_data(folder, **options), folder, monkeypatch, **options)
    with pytest.raises(DataError, match="classes must agree by name: referee only in the training data"):
        load_data(folder, classes=("referee", "player", "ball"))


def test_the_index_follows_the_content_and_not_the_path(
    document: Document, write_coco: WriteCoco, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_coco(document)
    load_data(folder)
    copied = folder.with_name("copied")
    shutil.copytree(folder, copied)
    with monkeypatch.context() as patch:
        no_reading(patch)
        assert load_data(copied).images_dir == copied
    document["annotations"][0]["bbox"] = [1, 2, 3, 4]
    (folder / "_annotations.coco.json").write_text(json.dumps(document))
    assert equals(load_data(folder), folder, monkeypatch)
    assert len(list((cache / "indices").iterdir())) == 2


@pytest.mark.parametrize("damage", ["cut", "removed", "facts"])
def test_an_incomplete_index_is_made_again(
    document: Document, write_coco: WriteCoco, cache: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    folder = write_coco(document)
    load_data(folder)
    (entry,) = (cache / "indices").iterdir()
    if damage == "cut":
        os.truncate(entry / "columns-2.arrow", 100)
    elif damage == "removed":
        (entry / "columns-0.arrow").unlink()
    else:
        (entry / "facts.json").write_text("{}")
    assert equals(load_data(folder), folder, monkeypatch)
    no_reading(monkeypatch)
    assert load_data(folder).index is not None


def test_missing_images_are_found(document: Document, write_coco: WriteCoco) -> None:
    folder = write_coco(document)
    assert load_data(folder, check_files=False).index is not None
    (folder / "3.jpg").rename(folder / "x")
    with pytest.raises(DataError, match=r"1 image of 3 missing"):  # the first time that files are checked
        load_data(folder)
    (folder / "x").rename(folder / "3.jpg")
    load_data(folder)
    (folder / "3.jpg").unlink()
    with pytest.raises(DataError, match=r"1 image of 3 missing .*: 3.jpg"):
        load_data(folder)


def test_data_with_errors_have_no_index(document: Document, write_coco: WriteCoco, cache: Path) -> None:
    document["annotations"][0]["image_id"] = 99
    folder = write_coco(document)
    for _ in range(2):
        with pytest.raises(DataError, match="'images' does not list"):
            load_data(folder)
    assert not list((cache / "indices").iterdir())


def test_sizes_from_files_are_not_kept(document: Document, write_coco: WriteCoco, cache: Path) -> None:
    folder = write_coco(document)
    del document["images"][0]["width"]
    (folder / "_annotations.coco.json").write_text(json.dumps(document))
    assert load_data(folder).index is None
    assert not list((cache / "indices").iterdir())


def test_a_cache_that_cannot_be_written_is_not_needed(
    document: Document, write_coco: WriteCoco, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.write_text("a file where the folder should be")
    folder = write_coco(document)
    data = load_data(folder)
    assert data.index is None
    assert equals(data, folder, monkeypatch)


def test_pickling_passes_on_the_folder_of_the_index_only(document: Document, write_coco: WriteCoco) -> None:
    document["annotations"] *= 1
    document["annotations"] = [document["annotations"][number % 3] | {"id": number} for number in range(5000)]
    data = load_data(write_coco(document))
    assert data.index is not None
    sent = pickle.dumps(data)
    assert len(sent) < 5000
    received: CocoData = pickle.loads(sent)
    assert columns_of(received) == columns_of(data)
    assert received.index is not None
    assert received.index.holds(received.boxes_xywh_px)
    without = load_data(data.images_dir, classes=("player", "ball"))
    assert columns_of(pickle.loads(pickle.dumps(without))) == columns_of(without)


def test_findings_are_computed_once_for_each_setting(document: Document, write_coco: WriteCoco) -> None:
    folder, calls = write_coco(document), []

    def compute() -> list[Any]:
        calls.append(1)
        return found("tiny_box", "box", "too small", ["annotation 1"], level="warning")

    for _ in range(2):
        assert load_data(folder).computed_once("a", compute) == compute()
    assert len(calls) == 3
    load_data(folder).computed_once("b", compute)
    assert len(calls) == 4


OPEN = """
import sys
from detr_dist.data.formats import coco_json
coco_json.LARGE_BYTES = 0
read = coco_json.LargeDocument.__getitem__
reads = []
coco_json.LargeDocument.__getitem__ = lambda self, name: reads.append(name) or read(self, name)
from detr_dist.data.coco import load_data
data = load_data(sys.argv[1])
print(bool(reads), data.index is not None, data.fingerprint())
"""


@pytest.mark.parametrize("has_locks", [True, False])
def test_of_several_processes_one_makes_the_index(
    document: Document, write_coco: WriteCoco, cache: Path, has_locks: bool
) -> None:
    folder = write_coco(document)
    program = OPEN
    if not has_locks:
        program = (
            "import filelock\ndef FileLock(path): raise OSError('no locks')\nfilelock.FileLock = FileLock\n"
        )
        program += OPEN
    command = [sys.executable, "-c", program, str(folder)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    lines = [process.communicate(timeout=250)[0].split() for process in running]
    assert [process.returncode for process in running] == [0] * 3
    assert {line[2] for line in lines} == {load_data(folder).fingerprint()}
    assert [line[1] for line in lines] == ["True"] * 3
    if has_locks:
        assert sorted(line[0] for line in lines) == ["False", "False", "True"]
    assert len([each for each in (cache / "indices").iterdir() if not each.name.startswith(".")]) == 1
    assert index_module.VERSION == 1, "raise it whenever what is stored has changed"
