"""Detections added to annotations, and the enlarged region around an object."""

from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from detr_dist.data.coco import load_data
from detr_dist.data.unannotated import read_unannotated
from detr_dist.evaluation.detections import DetectionRecords
from detr_dist.evaluation.drawing import Mark
from detr_dist.inference.hard_images import CROP_PX, crop_around, warn_of_rotations, with_detections


def test_detections_join_the_annotations_inside_their_images(tiny_data: Path) -> None:
    data = load_data(tiny_data / "val", classes=["player", "ball", "referee"], may_lack_classes=True)
    _, width = data.size_hw(2)
    records = DetectionRecords(
        evaluated_rows=np.arange(7),
        image_rows=np.array([2, 0, 2]),
        boxes_xyxy_px=np.array([[-5, 10, 20, 30], [1, 1, 9, 9], [width, 0, width + 9, 9]], dtype=np.float32),
        scores=np.array([0.9, 0.8, 0.7], dtype=np.float32),
        labels=np.array([2, 1, 0]),
    )
    joined = with_detections(data, records)
    num_boxes = np.diff(joined.box_offsets) - np.diff(data.box_offsets)
    assert num_boxes.tolist() == [1, 0, 1, 0, 0, 0, 0]  # the last one lies outside its image
    added = joined.box_rows(2).stop - 1
    assert joined.boxes_xywh_px[added].tolist() == [0, 10, 20, 20]
    assert (joined.box_classes[added], joined.areas[added], joined.iscrowd[added]) == (2, 400, False)
    assert joined.category_ids == (1, 2, 3)
    assert len(set(joined.annotation_ids.tolist())) == len(joined.annotation_ids)
    assert np.isin(data.annotation_ids, joined.annotation_ids).all()


def test_rotations_that_training_would_not_apply_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The size of an image shows that it was turned by 90 degrees, but not by 180."""
    orientations = {"upright.jpg": 1, "by_90.jpg": 6, "by_180.jpg": 3}
    for name, orientation in orientations.items():
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        Image.new("RGB", (40, 30)).save(tmp_path / name, exif=exif)
    data, _ = read_unannotated(tmp_path, list(orientations), ["ball"], "auto")
    warn_of_rotations(data, [0, 1])
    assert not caplog.messages
    warn_of_rotations(data, [0, 1, 2])
    (message,) = caplog.messages
    assert message.startswith("'by_180.jpg': ")
    assert message.endswith("data.exif=apply")


@pytest.mark.parametrize("box", [(0, 0, 8, 8), (300, 100, 308, 108), (632, 352, 640, 360), (0, 0, 640, 360)])
def test_a_crop_shows_the_object_enlarged(box: tuple[float, float, float, float]) -> None:
    image = Image.new("RGB", (640, 360), "black")
    image.paste((0, 0, 255), tuple(map(round, box)))
    crop = crop_around(image, box, [Mark(box, (255, 0, 0)), Mark((150, 300, 160, 310), (0, 255, 0))])
    assert max(crop.size) == CROP_PX
    colours = {colour for _, colour in crop.getcolors(2**24)}
    assert (255, 0, 0) in colours
    blue = (np.asarray(crop)[..., 2] > 200).sum()
    assert blue > 500
    assert ((0, 255, 0) in colours) == (box == (0, 0, 640, 360))
