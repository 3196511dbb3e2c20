"""Images written as YOLO and as CVAT are read again with the same boxes."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detr_dist.data.coco import CocoData, load_data
from detr_dist.data.coco_writing import write_coco
from detr_dist.data.cvat_writing import write_cvat
from detr_dist.data.yolo_writing import write_yolo
from detr_dist.errors import DataError

Writer = Callable[[CocoData, list[int], Path], None]


@pytest.fixture
def data(tiny_data: Path, tmp_path: Path) -> CocoData:
    """Return images in folders, two of which have one stem, with a crowd and class names to be escaped."""
    data = load_data(tiny_data / "val")
    names = ["a/one.jpg", "b/one.jpg", "a/images/two & 3.jpg", "one.jpg", "one.png", "x.jpg", "y.jpg"]
    for row, name in enumerate(names):
        path = tmp_path / "source" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(data.image_path(row)) as image:
            image.save(path)
    iscrowd = np.zeros_like(data.iscrowd)
    iscrowd[-1] = True
    return replace(
        data,
        images_dir=tmp_path / "source",
        file_names=np.array([name.encode() for name in names]),
        class_names=('pla<y>er "1"', "ball: no"),
        iscrowd=iscrowd,
    )


@pytest.mark.parametrize("write", [write_yolo, write_cvat, write_coco])
def test_what_was_written_is_read_with_the_same_boxes(write: Writer, data: CocoData, tmp_path: Path) -> None:
    rows = [5, 3, 1, 0, 2, 4, 6]
    write(data, rows, tmp_path / "written")
    found = load_data(tmp_path / "written")
    assert found.class_names == data.class_names
    assert len(found) == len(rows)
    keep_crowds = write is write_coco
    expected = sorted(
        (data.image_path(row).read_bytes(), *map(tuple, boxes_of(data, row, keep_crowds))) for row in rows
    )
    got = sorted(
        (found.image_path(row).read_bytes(), *map(tuple, boxes_of(found, row, True)))
        for row in range(len(found))
    )
    assert [each[0] for each in got] == [each[0] for each in expected]
    for one, other in zip(got, expected, strict=True):
        assert len(one) == len(other)
        for box, wanted in zip(one[1:], other[1:], strict=True):
            assert box == pytest.approx(wanted, abs=2e-3)  # three digits after the point


@pytest.mark.parametrize("name", [b"by\xff.jpg", b"by\x01.jpg"])
def test_a_name_that_xml_cannot_hold_is_refused_before_anything_is_written(
    name: bytes, data: CocoData, tmp_path: Path
) -> None:
    renamed = replace(data, file_names=np.array([name, *data.file_names[1:].tolist()]))
    with pytest.raises(DataError, match=r"^'by.*\.jpg': CVAT's XML cannot hold this name"):
        write_cvat(renamed, [2, 0], tmp_path / "written")
    assert not (tmp_path / "written").exists()
    write_cvat(renamed, [2], tmp_path / "written")


def boxes_of(data: CocoData, row: int, keep_crowds: bool) -> list[list[float]]:
    rows = data.box_rows(row)
    columns = (data.boxes_xywh_px[rows].tolist(), data.box_classes[rows], data.iscrowd[rows])
    return sorted(
        [label, *box] for box, label, crowd in zip(*columns, strict=True) if keep_crowds or not crowd
    )
