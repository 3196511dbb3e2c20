"""YOLO: the ways to write data.yaml, lists and labels, and what is refused."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from detr_dist.data.coco import CocoData, load_data
from detr_dist.data.formats import Split, read_annotations, split_names
from detr_dist.data.formats.yolo_yaml import read_yaml
from detr_dist.data.records import check_records
from detr_dist.errors import DataError

WriteYolo = Callable[..., Path]


@pytest.fixture
def write_yolo(tmp_path: Path) -> WriteYolo:
    """Return a function that writes images of 60x40, a label file for each, and a data.yaml."""

    def write(
        labels: dict[str, str | bytes | None], yaml: str = "train: images\nnames: [ball, player]\n"
    ) -> Path:
        for name, text in labels.items():
            path = tmp_path / "images" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (60, 40)).save(path, format="png" if path.suffix.lower() == ".png" else "jpeg")
            label = (tmp_path / "labels" / name).with_suffix(".txt")
            label.parent.mkdir(parents=True, exist_ok=True)
            if text is not None:
                label.write_bytes(text if isinstance(text, bytes) else text.encode())
        (tmp_path / "data.yaml").write_text(yaml, encoding="utf-8")
        return tmp_path / "data.yaml"

    return write


def boxes(data: CocoData) -> list[list[float]]:
    return [[round(side, 6) for side in box] for box in data.boxes_xywh_px.tolist()]


def test_boxes_are_converted_to_pixels(write_yolo: WriteYolo) -> None:
    data = load_data(
        write_yolo({"a.jpg": "1 0.5 0.5 0.5 0.25\n0 0.1 0.1 0.2 0.2", "b.jpg": "", "c.jpg": None})
    )
    assert data.class_names == ("ball", "player")
    assert data.box_classes.tolist() == [1, 0]
    assert boxes(data) == [[15, 15, 30, 10], [0, 0, 12, 8]]
    assert data.box_offsets.tolist() == [0, 2, 2, 2], "no label file, or an empty one, is a background image"
    assert data.annotation_ids.tolist() == [1, 2]


def test_a_polygon_becomes_the_box_around_it(write_yolo: WriteYolo) -> None:
    data = load_data(write_yolo({"a.jpg": "0 0.1 0.2 0.5 0.1 0.3 0.6\n1 0.5 0.5 0.6 0.5 0.6 0.75 0.5 0.75"}))
    assert boxes(data) == [[6, 4, 24, 20], [30, 20, 6, 10]]


@pytest.mark.parametrize(
    "content",
    [
        b"1 0.5 0.5 0.5 0.5\r\n\r\n0 0.5 0.5 0.1 0.1\r\n",
        b"\xef\xbb\xbf1 0.5 0.5 0.5 0.5\n0 0.5 0.5 0.1 0.1",
        b"1\t0.5 0.5  0.5 0.5 \n0.0 5e-1 0.5 0.1 0.1\n",
    ],
    ids=["CRLF", "BOM", "white space"],
)
def test_other_ways_to_write_a_label_file_are_read(write_yolo: WriteYolo, content: bytes) -> None:
    assert load_data(write_yolo({"a.jpg": content})).box_classes.tolist() == [1, 0]


def test_names_may_have_spaces_upper_case_suffixes_and_any_letters(write_yolo: WriteYolo) -> None:
    names = ["match 1/frame 2.JPG", "été/Ü.png", "a.b.jpg"]
    path = write_yolo(dict.fromkeys(names, "0 0.5 0.5 0.5 0.5"))
    for label in list((path.parent / "labels").rglob("*.txt")):
        label.rename(label.with_suffix(".TXT"))
    data = load_data(path)
    assert [str(data.image_path(row).relative_to(data.images_dir)) for row in range(3)] == sorted(names)
    assert data.box_offsets.tolist() == [0, 1, 2, 3]


def test_a_split_with_one_sub_folder_has_it_in_the_names_of_its_images(write_yolo: WriteYolo) -> None:
    names = ["train/cam1/1.jpg", "train/cam2/1.jpg", "val/cam1/2.jpg"]
    yaml = "train: images/train\nval: images/val\nnames: [ball]\n"
    path = write_yolo(dict.fromkeys(names, "0 0.5 0.5 0.5 0.5"), yaml)
    found = [load_data(Split(path, split)).file_names.tolist() for split in ("train", "val")]
    assert found == [[b"cam1/1.jpg", b"cam2/1.jpg"], [b"cam1/2.jpg"]], "so that clips can be compared"
    (path.parent / "list.txt").write_text("images/val/cam1/2.jpg\n")
    path.write_text("val: list.txt\nnames: [ball]\n")
    assert load_data(path).file_names.tolist() == [b"images/val/cam1/2.jpg"], "relative to the data.yaml"


def test_folders_of_images_are_told_apart_by_the_folder_above(write_yolo: WriteYolo, tmp_path: Path) -> None:
    for split in ("train", "valid"):
        write_yolo({"a.jpg": "0 0.5 0.5 0.5 0.5"})
        (tmp_path / split).mkdir()
        for name in ("images", "labels"):
            (tmp_path / name).rename(tmp_path / split / name)
    paths = [load_data(tmp_path / split / "images").annotations_path.name for split in ("train", "valid")]
    assert paths == ["data.yaml (train)", "data.yaml (valid)"], "or a run would warn that they are the same"


def test_labels_may_be_beside_the_images(write_yolo: WriteYolo) -> None:
    path = write_yolo({"a.jpg": "0 0.5 0.5 0.5 0.5"})
    (path.parent / "labels" / "a.txt").rename(path.parent / "images" / "a.txt")
    assert len(load_data(path).box_classes) == 1


def test_rounded_numbers_do_not_reach_outside(write_yolo: WriteYolo) -> None:
    data = load_data(write_yolo({"a.jpg": "0 0.333333 0.5 0.666667 1.000001"}))
    assert boxes(data) == [[0, 0, 40.00001 - 0.00001, 40]] or data.boxes_xywh_px[0, 0] == 0
    assert data.notices == []


def test_boxes_that_reach_outside_are_clipped(write_yolo: WriteYolo) -> None:
    data = load_data(write_yolo({"a.jpg": "0 0.1 0.5 0.4 0.5"}))
    assert boxes(data) == [[0, 10, 18, 20]]
    assert re.search(r"1 box reaching outside the image; clipped.*: labels/a.txt:1$", data.notices[0])


@pytest.mark.parametrize(
    "yaml",
    [
        "path: {folder}\ntrain: images/a\nval: images/b\nnames: {{0: ball, 1: player}}",
        "path: .\ntrain: ['images\\a']\nvalid: ./images/b\nnames:\n- ball\n- player\nnc: 2",
        "path: /content/dataset\ntrain: ../images/a/\nval: [images/b]\ntest:\nnames: [ball, player]",
        "train: lists/train.txt\nval: lists/val.txt\nnames: [ball, player]",
    ],
    ids=["absolute path", "backslashes and valid", "path of another host", "lists"],
)
def test_the_usual_ways_to_name_the_splits_are_understood(
    write_yolo: WriteYolo, yaml: str, tmp_path: Path
) -> None:
    path = write_yolo({"a/1.jpg": "0 0.5 0.5 0.5 0.5", "b/1.jpg": "1 0.5 0.5 0.5 0.5", "b/2.jpg": None})
    path.write_text(yaml.format(folder=tmp_path))
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "train.txt").write_bytes(b"\xef\xbb\xbf../images/a/1.jpg\r\n\r\n")
    (tmp_path / "lists" / "val.txt").write_text(
        "./images\\b\\1.jpg\n" + str(tmp_path / "images/b/2.jpg") + "\n"
    )
    assert load_data(Split(path, "train")).box_classes.tolist() == [0]
    assert load_data(Split(path, "val")).box_offsets.tolist() == [0, 1, 1]


def test_names_are_texts_even_if_yaml_would_read_numbers_and_booleans(write_yolo: WriteYolo) -> None:
    path = write_yolo({"a.jpg": None}, "train: images\nnames: [no, 1, ~]")
    assert read_yaml(path).names == {0: "no", 1: "1", 2: "~"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("2 0.5 0.5 0.1 0.1", r"1 label of a class that 'names' does not list.*: labels/a.txt:2: class '2'"),
        ("-1 0.5 0.5 0.1 0.1", r"labels/a.txt:2: class '-1', but 'names' has 0 to 1"),
        ("0.5 0.5 0.5 0.1 0.1", r"labels/a.txt:2: class '0.5'"),
        ("0 0.5 0.5 0.1", r"labels/a.txt:2: 4 numbers; five are expected"),
        ("0 0.5 0.5 0.1 0.1 0.9", r"labels/a.txt:2: 6 numbers; five are expected"),
        ("0 0.5 0.5 0.1 0.1 0.9 0.1 2", r"labels/a.txt:2: 8 numbers; five .*keypoints are not read"),
        ("0 0.5 x 0.1 0.1", r"labels/a.txt:2: 'x' is not a number"),
        ("ball 0.5 0.5 0.1 0.1", r"labels/a.txt:2: 'ball' is not a number"),
        ("0 nan 0.5 0.1 0.1", r"1 box not of finite numbers.*: labels/a.txt:2: nan 0.5 0.1 0.1"),
        ("0 0.5 0.5 inf 0.1", r"1 box not of finite numbers.*: labels/a.txt:2: 0.5 0.5 inf 0.1"),
        ("0 30 20 10 10", r"1 box far outside the image; .*not pixels: labels/a.txt:2: 30 20 10 10"),
        ("0 0.5 0.5 0.1 0.1 0.5 0.5 2 0.4 0.4 2", r"1 box far outside the image"),
        ("0 0.5 0.5 -0.1 0.1", r"1 box of negative width.*: labels/a.txt:2: 0.5 0.5 -0.1 0.1"),
    ],
)  # fmt: skip
def test_a_faulty_line_is_named(write_yolo: WriteYolo, line: str, message: str) -> None:
    path = write_yolo({"a.jpg": f"0 0.5 0.5 0.5 0.5\n{line}\n", "b.jpg": "1 0.5 0.5 0.5 0.5"})
    with pytest.raises(DataError, match=message) as caught:
        load_data(path)
    assert str(caught.value).startswith(f"{path} (train): ")
    assert "\n" not in str(caught.value)
    records = check_records(read_annotations(path))
    assert len(records.findings) == 1, "the other labels have no fault"
    assert len(records.category_ids) == 2


def test_the_numbers_of_a_mapping_with_gaps_are_listed(write_yolo: WriteYolo) -> None:
    path = write_yolo({"a.jpg": "1 0.5 0.5 0.1 0.1"}, "train: images\nnames: {0: player, 3: ball}")
    with pytest.raises(DataError, match="class '1', but 'names' has 0, 3"):
        load_data(Split(path, "train"))


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("train: images\nnames: []", r"data.yaml: 'names' is \[\]; list the names"),
        ("train: images\nnames:\n", "'names' is ''; list the names"),
        ("train: images\nnc: 2", "has no 'names'; list the names"),
        ("train: images\nnames: [ball, ball]", "'names' lists 'ball' twice"),
        ("train: images\nnames: [ball, '']", "class 1 has the name ''"),
        ("train: images\nnames: {a: ball}", "'names' has the key 'a'"),
        ("train: images\nnames: [ball]\nnc: 3", "nc is '3', but 'names' has 1"),
        ("names: [ball]", "names no images; give 'train' and 'val'"),
        ("train: pictures/x\nnames: [ball]", "train is 'pictures/x', which does not exist; correct it"),
        ("train: data.yaml\nnames: [ball]", "is neither a folder nor a .txt list"),
        ("train: images\nkpt_shape: [17, 3]\nnames: [ball]", "has 'kpt_shape', so its labels are keypoints"),
        ("train: images\nval: images\nvalid: labels\nnames: [ball]", "several values for the split 'val'"),
        ("train: images\nnames: [ball", r"data.yaml:\d: broken YAML: .*"),
        ("- images", "is no data.yaml"),
        ("train: images\nnames: [a]\ntrain: old", r"data.yaml:3: .*'train' is given twice"),
        ("train: images\nnames:\n  0: a\n  0: b", r"data.yaml:4: .*'0' is given twice"),
    ],
)
def test_a_faulty_yaml_is_refused(write_yolo: WriteYolo, yaml: str, message: str) -> None:
    path = write_yolo({"a.jpg": None}, yaml)
    with pytest.raises(DataError, match=message) as caught:
        load_data(Split(path, "train"))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_two_images_with_one_label_file_are_refused(write_yolo: WriteYolo) -> None:
    path = write_yolo(
        {"a.jpg": "0 0.5 0.5 0.5 0.5", "a.png": "0 0.5 0.5 0.5 0.5", "b.jpg": None, "b.png": None}
    )
    with pytest.raises(DataError, match=r"1 image with the label file of an earlier one.*a.png and a.jpg"):
        load_data(path)


def test_a_list_with_an_unknown_image_names_its_line(write_yolo: WriteYolo, tmp_path: Path) -> None:
    path = write_yolo({"a.jpg": None}, "train: train.txt\nnames: [ball]")
    (tmp_path / "train.txt").write_text("images/a.jpg\nimages/b.jpg\n")
    with pytest.raises(DataError, match=r"1 image of the list missing; .*: train.txt:2: images/b.jpg"):
        load_data(path)


def test_an_image_that_cannot_be_read_is_named(write_yolo: WriteYolo, tmp_path: Path) -> None:
    path = write_yolo({"a.jpg": "0 0.5 0.5 0.5 0.5", "b.jpg": "0 0.5 0.5 0.5 0.5"})
    (tmp_path / "images" / "a.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"1 image that cannot be decoded.*a.jpg: not an image"):
        load_data(path)


def test_labels_without_an_image_are_reported(write_yolo: WriteYolo, tmp_path: Path) -> None:
    path = write_yolo({"a.jpg": "0 0.5 0.5 0.5 0.5"})
    (tmp_path / "labels" / "b.txt").write_text("0 0.5 0.5 0.5 0.5")
    (tmp_path / "labels" / "classes.txt").write_text("ball")
    (notice,) = load_data(path).notices
    assert re.search(r"1 label file of no image .*labels/b.txt$", notice)


def test_images_without_any_label_file_are_refused(write_yolo: WriteYolo, tmp_path: Path) -> None:
    path = write_yolo({"a.jpg": None, "b.jpg": None})
    with pytest.raises(DataError, match=r"1 split without any label file.*looked in .*labels"):
        load_data(path)


@pytest.mark.parametrize("is_there", [False, True])
def test_a_test_split_without_images_is_left_out(
    write_yolo: WriteYolo, tmp_path: Path, is_there: bool
) -> None:
    path = write_yolo({"train/a.jpg": ""}, "train: images/train\ntest: images/test\nnames: [ball]\n")
    if is_there:
        (tmp_path / "images" / "test").mkdir()
    assert split_names(path) == ("train",)
