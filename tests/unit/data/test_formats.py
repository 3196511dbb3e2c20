"""One data set in all formats, how a format is recognized, and the splits of a data set."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from harness.formats import WRITERS, write_voc, write_yolo, zipped

from detr_dist.data.coco import CocoData, load_data
from detr_dist.data.formats import Split, read_annotations, split_names, split_of, splits_of
from detr_dist.errors import DataError


@pytest.fixture(scope="module")
def splits(tiny_data: Path) -> dict[str, CocoData]:
    return {split: load_data(tiny_data / split) for split in ("train", "val")}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DETR_DIST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def assert_same_columns(data: CocoData, original: CocoData) -> None:
    """Compare all but ids and names; boxes to a millionth of a pixel, as YOLO has fractions."""
    assert data.class_names == original.class_names
    for column in ("sizes_hw", "box_offsets", "box_classes", "iscrowd"):
        np.testing.assert_array_equal(getattr(data, column), getattr(original, column))
    np.testing.assert_allclose(data.boxes_xywh_px, original.boxes_xywh_px, rtol=0, atol=1e-6)
    np.testing.assert_allclose(data.areas, original.areas, rtol=0, atol=1e-3)
    for row in range(len(original)):
        assert data.image_path(row).read_bytes() == original.image_path(row).read_bytes()


@pytest.mark.parametrize("name", WRITERS)
def test_all_formats_give_the_same_columns(
    name: str, splits: dict[str, CocoData], tmp_path: Path, cache: Path
) -> None:
    # COCO's classes are in the order of their ids, those of Pascal VOC in the order of their names.
    classes = ("player", "ball")
    source = WRITERS[name](splits, tmp_path / name)
    archive = zipped(tmp_path / name)
    for path in (source, tmp_path / name, archive):
        assert split_names(path) == ("train", "val")
        for split, original in splits.items():
            data = load_data(Split(path, split), classes=classes)
            assert_same_columns(data, original)
            assert data.image_ids.tolist() == list(range(1, 1 + len(original)))
    assert list(cache.glob("archives/*/*")) == [next(cache.glob("archives/*/")) / name]


def test_sub_folders_of_any_format_are_splits(
    splits: dict[str, CocoData], tiny_data: Path, tmp_path: Path, cache: Path
) -> None:
    shutil.copytree(tiny_data / "train", tmp_path / "export" / "train")
    shutil.copytree(tiny_data / "val", tmp_path / "export" / "valid")
    for source in (tmp_path / "export", zipped(tmp_path / "export")):
        assert [str(split) for split in splits_of(source)] == [f"{source} (train)", f"{source} (val)"]
        assert_same_columns(load_data(Split(source, "val")), splits["val"])
    assert_same_columns(load_data(tmp_path / "export.zip" / "valid"), splits["val"])
    (tmp_path / "export" / "validation").mkdir()
    with pytest.raises(DataError, match="several folders for the split 'val'"):
        split_names(tmp_path / "export")


def test_a_split_that_a_data_set_lacks_is_named(splits: dict[str, CocoData], tmp_path: Path) -> None:
    source = write_yolo({"train": splits["train"]}, tmp_path / "yolo")
    assert str(split_of(source, "val", "train")) == f"{source} (train)"
    with pytest.raises(DataError, match="has no split 'val', only 'train'"):
        split_of(source, "val", "test")
    with pytest.raises(DataError, match="has no split 'val', only 'train'"):
        load_data(Split(source, "val"))
    assert len(load_data(source)) == len(splits["train"]), "the only split needs no name"


def test_a_data_set_that_is_split_needs_the_name_of_one(splits: dict[str, CocoData], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is split into 'train', 'val'"):
        read_annotations(write_yolo(splits, tmp_path / "yolo"))


def test_a_data_set_that_is_not_split_is_any_split(tiny_data: Path) -> None:
    assert split_names(tiny_data / "val") == ()
    assert str(split_of(tiny_data / "val", "train")) == str(tiny_data / "val")
    assert len(load_data(Split(tiny_data / "val", "train"))) == 7


def test_a_split_of_yolo_or_voc_can_be_named_by_its_folder(
    splits: dict[str, CocoData], tmp_path: Path
) -> None:
    for split in splits:  # Roboflow's layout
        write_yolo({split: splits[split]}, tmp_path / "scratch" / split)
        for kind in ("images", "labels"):
            shutil.move(tmp_path / "scratch" / split / kind / split, tmp_path / "yolo" / split / kind)
    (tmp_path / "yolo" / "data.yaml").write_text(
        "train: ../train/images\nval: ..\\valid\\images\ntest: ../test/images\n"
        "nc: 2\nnames: ['player', 'ball']\n"
    )
    assert_same_columns(load_data(tmp_path / "yolo" / "val"), splits["val"])
    assert_same_columns(load_data(tmp_path / "yolo" / "val" / "images"), splits["val"])
    (tmp_path / "yolo" / "val").rename(tmp_path / "yolo" / "valid")
    assert split_names(tmp_path / "yolo") == ("train", "val"), "a test split that does not exist is left out"
    for split, original in splits.items():
        assert_same_columns(load_data(Split(tmp_path / "yolo", split)), original)


def test_xml_files_beside_their_images_are_read(splits: dict[str, CocoData], tmp_path: Path) -> None:
    write_voc({"val": splits["val"]}, tmp_path / "voc")
    folder = tmp_path / "voc" / "JPEGImages"
    for path in (tmp_path / "voc" / "Annotations").iterdir():
        shutil.move(path, folder)
    assert_same_columns(load_data(folder, classes=("player", "ball")), splits["val"])


def _nothing(folder: Path) -> None:
    (folder / "readme.txt").write_text("")


def _both(folder: Path) -> None:
    (folder / "a.json").write_text("{}")
    (folder / "data.yaml").write_text("")


def _two_spellings(folder: Path) -> None:
    (folder / "data.yml").write_text("")
    (folder / "data.yaml").write_text("")


def _cvat_and_another(folder: Path) -> None:
    (folder / "a.xml").write_text("<annotations/>")
    (folder / "b.xml").write_text("<annotations/>")


def _labels_alone(folder: Path) -> None:
    (folder / "images").mkdir()
    (folder / "labels").mkdir()


@pytest.mark.parametrize(
    ("fill", "message"),
    [
        (_nothing, r"no JSON file \(COCO\), no data.yaml \(YOLO\), no XML file .* name a folder with images"),
        (_both, r"annotations of COCO \(a.json\) and YOLO \(data.yaml\)"),
        (_two_spellings, "has data.yaml and data.yml"),
        (_cvat_and_another, r"CVAT \(a.xml\) and another XML file \(b.xml\)"),
        (_labels_alone, "has labels of YOLO, but there is no data.yaml"),
    ],
)
def test_folders_whose_format_is_not_clear_are_refused(
    fill: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    fill(tmp_path)
    with pytest.raises(DataError, match=message):
        split_names(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jpg", "", "a.jpg: is a file; name a folder"),
        ("a.xml", "<annotation/>", "a.xml: is not CVAT's XML"),
        ("a.xml", "<annotations><meta/><track/></annotations>", "video 1.1"),
        ("a.zip", "no zip", "a.zip: a damaged zip"),
    ],
)
def test_files_that_are_no_data_set_are_refused(
    name: str, content: str, message: str, tmp_path: Path, cache: Path
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        split_names(tmp_path / name)


def test_classes_that_a_split_of_voc_lacks_are_no_difference(
    splits: dict[str, CocoData], tmp_path: Path
) -> None:
    source = write_voc(splits, tmp_path / "voc")
    for path in (source / "Annotations").glob("val_*"):
        path.write_text(path.read_text().replace(">ball<", ">player<"))
    data = load_data(Split(source, "val"), classes=("ball", "player"))
    assert data.class_names == ("ball", "player")
    assert set(data.box_classes.tolist()) == {1}
