"""Generated ground truth and detections, with every special case."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from detr_dist.data.coco import CocoData
from detr_dist.evaluation.detections import DetectionRecords

CLASS_NAMES = ("Player", "ball", "goal post", "crowds only", "never seen")

Box = tuple[int, int, tuple[float, ...], bool]
"""Image, class, xywh in pixels, whether it is a crowd."""
Detection = tuple[int, int, float, tuple[float, ...]]
"""Image, class, score, xyxy in pixels."""
Scene = tuple[CocoData, DetectionRecords]
MakeScene = Callable[..., Scene]


def make_scene(
    num_images: int, class_names: Sequence[str], boxes: Sequence[Box], detections: Sequence[Detection]
) -> Scene:
    boxes = sorted(boxes, key=lambda box: box[0])
    image_rows = np.array([box[0] for box in boxes], dtype=np.int64)
    xywh_px = np.array([box[2] for box in boxes]).reshape(-1, 4)
    data = CocoData(
        annotations_path=Path("scene.json"),
        images_dir=Path(),
        class_names=tuple(class_names),
        category_ids=tuple(range(len(class_names))),
        notices=[],
        image_ids=np.arange(num_images),
        sizes_hw=np.full((num_images, 2), 400),
        file_names=np.array([b"scene.jpg"] * num_images),
        box_offsets=np.append(0, np.cumsum(np.bincount(image_rows, minlength=num_images))),
        boxes_xywh_px=xywh_px,
        box_classes=np.array([box[1] for box in boxes], dtype=np.int64),
        iscrowd=np.array([box[3] for box in boxes], dtype=bool),
        areas=xywh_px[:, 2:].prod(axis=1),
        annotation_ids=np.arange(1, len(boxes) + 1),
    )
    records = DetectionRecords(
        evaluated_rows=np.arange(num_images),
        image_rows=np.array([d[0] for d in detections], dtype=np.int64),
        boxes_xyxy_px=np.array([d[3] for d in detections], dtype=np.float32).reshape(-1, 4),
        scores=np.array([d[2] for d in detections], dtype=np.float32),
        labels=np.array([d[1] for d in detections], dtype=np.int64),
    )
    return data, records


def odd_scene(seed: int, *, num_images: int = 40, most_detections: int = 40) -> Scene:
    """Return a scene with every special case.

    Images without boxes or detections, crowds, a class with crowds only, an unused class, boxes of all sizes
    and of equal overlap, equal scores, and one image with 300 detections.
    """
    rng = np.random.default_rng(seed)
    boxes: list[Box] = []
    detections: list[Detection] = []
    for image in range(num_images):
        of_image: list[Box] = []
        for _ in range(rng.integers(1, 7) if image % 5 else 0):
            label = int(rng.integers(4))
            xywh = (*rng.integers(0, 100, 2).tolist(), *rng.integers(4, [60, 180]).tolist())
            of_image.append((image, label, xywh, label == 3 or rng.random() < 0.15))
            if rng.random() < 0.2:
                of_image.append((image, int(rng.integers(3)), xywh, rng.random() < 0.3))
        boxes += of_image
        num_detections = 300 if image == 1 else int(rng.integers(most_detections)) * (image % 7 != 6)
        for _ in range(num_detections):
            label, (x, y, w, h) = int(rng.integers(5)), (*rng.uniform(0, 100, 2), *rng.uniform(4, 90, 2))
            if of_image and rng.random() < 0.7:
                _, of_box, (x, y, w, h), _ = of_image[rng.integers(len(of_image))]
                x, y = x + rng.integers(-4, 5), y + rng.integers(-4, 5)
                label = of_box if rng.random() < 0.7 else label
            score = float(rng.choice([rng.random(), 0.25, 0.5]))
            detections.append((image, label, score, (x, y, x + w, y + h)))
    return make_scene(num_images, CLASS_NAMES, boxes, detections)


@pytest.fixture(params=range(6))
def scene(request: pytest.FixtureRequest) -> Scene:
    return odd_scene(request.param)


@pytest.fixture
def new_scene() -> MakeScene:
    """Return a function that makes a scene of a number of images, class names, boxes and detections."""
    return make_scene
