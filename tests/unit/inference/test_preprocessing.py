"""The resize of the training follows a model to evaluation, prediction and transformers' pipelines."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import pipeline

from detr_dist.config import Config
from detr_dist.errors import UsageError
from detr_dist.inference.evaluate import evaluate
from detr_dist.inference.model import load_model
from detr_dist.models.detector import Detector, plain_network
from detr_dist.tracking.packaging import write_model


@pytest.fixture
def saved(tiny_detector: Callable[..., Detector], tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a model, trained with settings of the section `data`."""

    def write(architecture: str, **data: object) -> Path:
        settings = {"data": {"num_workers": 0} | data, "model": {"model_architecture": architecture}}
        detector = tiny_detector(architecture)
        write_model(
            plain_network(detector),
            tmp_path / "model",
            config=Config.model_validate(settings),
            metadata={"config": settings},
        )
        return tmp_path / "model"

    return write


@pytest.mark.parametrize("architecture", ["detr", "rt_detr_v2"])
@pytest.mark.parametrize(
    ("data", "size"),
    [
        ({"resize": "square", "shortest_edge": 96}, (96, 96)),
        ({"resize": "rectangle", "shortest_edge": 64, "longest_edge": 96}, (64, 96)),
    ],
)
def test_evaluation_prediction_and_a_pipeline_find_the_same(
    architecture: str,
    data: dict[str, object],
    size: tuple[int, int],
    saved: Callable[..., Path],
    tiny_data: Path,
) -> None:
    folder = saved(architecture, **data)
    written = json.loads((folder / "preprocessor_config.json").read_text())["size"]
    assert written == dict(zip(("height", "width"), size, strict=True))
    model = load_model(folder)
    assert {key: getattr(model.config.data, key) for key in data} == data
    details = evaluate(model, tiny_data / "val").details
    assert details is not None
    detect = pipeline("object-detection", model=str(folder), threshold=0.0)
    shapes = set()
    for row, path in enumerate(details.data.image_path(row) for row in range(len(details))):
        found, evaluated = model.predict(path, threshold=0), details.detections(row)
        np.testing.assert_allclose(found.scores, evaluated.scores, atol=1e-5)  # float32, another batch size
        np.testing.assert_allclose(found.boxes_xyxy_px, evaluated.boxes_xyxy_px, atol=1e-3)
        width, height = Image.open(path).size
        shapes.add((height, width))
        if data["resize"] == "rectangle" and height > width:
            continue  # a pipeline cannot turn the rectangle
        others = sorted(detect(str(path)), key=lambda each: -each["score"])
        num = len(others)  # RT-DETR's processor keeps as many as queries, this package up to 100
        assert [each["label"] for each in others] == list(found.names[:num])
        np.testing.assert_allclose([each["score"] for each in others], found.scores[:num], atol=1e-5)
        boxes = [[each["box"][side] for side in ("xmin", "ymin", "xmax", "ymax")] for each in others]
        np.testing.assert_array_equal(boxes, found.boxes_xyxy_px[:num].astype(int))
    assert any(height > width for height, width in shapes)
    assert any(height < width for height, width in shapes)


def test_sizes_that_the_network_does_not_take_are_refused(saved: Callable[..., Path]) -> None:
    model = load_model(saved("rt_detr_v2", resize="square", shortest_edge=96))
    image = np.zeros((50, 70, 3), np.uint8)
    assert len(model.predict(image, threshold=0, overrides=["data.shortest_edge=64"])) > 0
    with pytest.raises(UsageError, match=r"multiples of 32: set data\.shortest_edge=96 or 128 \(it is 100\)"):
        model.predict(image, overrides=["data.shortest_edge=100"])
