"""A packed model serves images of every kind through MLflow, with the results of `predict` to the bit."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import numpy as np
import pandas as pd
import pytest
import torch
from harness.data import TINY_CONFIG, TINY_OVERRIDES
from mlflow.exceptions import MlflowException
from mlflow.models.signature import ModelSignature
from mlflow.pyfunc.scoring_server import _parse_json_data, predictions_to_json
from mlflow.types.schema import (
    AnyType,
    Array,
    ColSpec,
    DataType,
    Object,
    ParamSchema,
    ParamSpec,
    Property,
    Schema,
)
from PIL import Image

from detr_dist.config import Config, override_config
from detr_dist.errors import DataError, UsageError
from detr_dist.evaluation.detections import Detections
from detr_dist.extensions import FAMILIES
from detr_dist.inference.model import load_model
from detr_dist.models.build import build_detector
from detr_dist.models.detector import plain_network
from detr_dist.tracking.packaging import write_model

CLASS_NAMES = ["player", "ball"]
THRESHOLDS = {"player": 0.4, "ball": None}


def tiny(name: str) -> tuple[str, ...]:
    """Return the settings of a tiny network of a family, with images of a size that it takes."""
    overrides = TINY_OVERRIDES.get(name, (f"model.model_architecture={name}",))
    return (*overrides, "data.resize=square") if name.startswith("rt_detr") else overrides


def packed(folder: Path, *overrides: str) -> Path:
    """Return the folder of a model of these settings, and of random weights."""
    config = override_config(Config.model_validate(TINY_CONFIG), overrides)
    torch.manual_seed(0)
    detector = build_detector(config.model, CLASS_NAMES)
    for name, statistics in detector.network.named_buffers():  # so that the kinds of batch norm differ
        if name.endswith("running_var"):
            statistics.uniform_(0.5, 2)
    metadata = {"config": config.model_dump(mode="json"), "thresholds": THRESHOLDS}
    folder.mkdir()
    write_model(plain_network(detector), folder, config=config, metadata=metadata)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed(tmp_path_factory.mktemp("served") / "model")


@pytest.fixture(scope="module")
def served(folder: Path) -> mlflow.pyfunc.PyFuncModel:
    return mlflow.pyfunc.load_model(str(folder))


@pytest.fixture
def images() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*size_hw, 3), dtype=np.uint8) for size_hw in [(70, 90), (90, 70), (70, 90)]]


def png(image: np.ndarray) -> bytes:
    content = io.BytesIO()
    Image.fromarray(image).save(content, "png")
    return content.getvalue()


def text(image: np.ndarray) -> str:
    return base64.b64encode(png(image)).decode()


def rows_of(found: list[Detections]) -> list[list[dict[str, Any]]]:
    """Return the detections of images as a served model returns them."""
    return [
        [
            {"label": name, "label_id": int(label), "score": float(score), "box": box.astype(float).tolist()}
            for name, label, score, box in zip(
                each.names, each.labels, each.scores, each.boxes_xyxy_px, strict=True
            )
        ]
        for each in found
    ]


def served_like_a_request(model: mlflow.pyfunc.PyFuncModel, request: dict) -> list[list[dict[str, Any]]]:
    """Return the detections of a request as MLflow's scoring server parses and answers it."""
    parsed = _parse_json_data(json.dumps(request), model.metadata, model.metadata.get_input_schema())
    answer = io.StringIO()
    predictions_to_json(model.predict(parsed.data, params=parsed.params), answer)
    return [row["detections"] for row in json.loads(answer.getvalue())["predictions"]]


@pytest.mark.parametrize(
    ("name", "settings"),
    [(name, ()) for name in FAMILIES.built_in]
    + [(name, ("model.freeze_batch_norm=true",)) for name in ("detr", "rt_detr")]
    + [("detr", ("model.backbone=mobilenetv3_small_050",))],  # with batch norm of timm's own
)
def test_every_family_is_served_with_the_results_of_predict_to_the_bit(
    name: str, settings: tuple[str, ...], images: list[np.ndarray], tmp_path: Path
) -> None:
    folder = packed(tmp_path / "model", *tiny(name), *settings)
    found = mlflow.pyfunc.load_model(str(folder)).predict(
        pd.DataFrame({"image": images}), params={"threshold": 0.0}
    )
    expected = rows_of(load_model(folder).predict(images, threshold=0))
    assert len(expected[0]) > 0
    assert found["detections"].tolist() == expected


def test_windows_are_searched_with_the_results_of_predict_to_the_bit(
    images: list[np.ndarray], tmp_path: Path
) -> None:
    images.append(np.random.default_rng(1).integers(0, 256, (400, 300, 3), dtype=np.uint8))
    whole = rows_of(load_model(packed(tmp_path / "whole", *tiny("detr"))).predict(images, threshold=0))
    for size in ("[32, 40]", "200"):
        folder = packed(tmp_path / size, *tiny("detr"), f"data.tiles={{size: {size}}}")
        found = mlflow.pyfunc.load_model(str(folder)).predict(
            pd.DataFrame({"image": images}), params={"threshold": 0.0}
        )
        expected = rows_of(load_model(folder).predict(images, threshold=0))
        assert found["detections"].tolist() == expected
        assert (expected[0] == whole[0]) == (size == "200")
        assert expected[3] != whole[3]
        without = load_model(folder).predict(images, threshold=0, overrides=["data.tiles=null"])
        assert rows_of(without) == whole
    with pytest.raises(UsageError, match=r"^data\.tiles=auto: "):
        load_model(folder).predict(images, overrides=["data.tiles=auto"])


def test_half_precision_and_memory_layout_are_those_of_predict(
    images: list[np.ndarray], tmp_path: Path
) -> None:
    for place, name in enumerate(("detr", "deformable_detr", "rt_detr_v2", "lw_detr")):
        settings = ("training.mixed_precision=bf16", "training.channels_last=true")
        folder = packed(tmp_path / str(place), *tiny(name), *settings)
        found = mlflow.pyfunc.load_model(str(folder)).predict(
            pd.DataFrame({"image": images}), params={"threshold": 0.0}
        )
        assert found["detections"].tolist() == rows_of(load_model(folder).predict(images, threshold=0)), name


def test_every_form_of_an_image_gives_the_same_detections(
    served, folder: Path, images: list[np.ndarray], tmp_path: Path
) -> None:
    paths = [tmp_path / f"{place}.png" for place in range(3)]
    for path, image in zip(paths, images, strict=True):
        path.write_bytes(png(image))
    model = load_model(folder)
    expected = rows_of(model.predict(paths))
    assert expected == rows_of(model.predict(images))
    texts = [text(image) for image in images]
    columns: list[list[object]] = [
        images,
        [png(image) for image in images],
        [Image.fromarray(image) for image in images],
        paths,
        [str(path) for path in paths],
        texts,
        [f"data:image/png;base64,{each}" for each in texts],
        [base64.encodebytes(png(image)).decode() for image in images],
        [images[0], str(paths[1]), Image.fromarray(images[2])],
    ]
    for column in columns:
        inputs = (
            pd.DataFrame({"image": column}, index=[7, 8, 9]),
            {"image": column},
            [{"image": each} for each in column],
            pd.Series(column, name="image"),
        )
        for each in inputs:
            assert served.predict(each)["detections"].tolist() == expected, type(column[0])
    columns_of_lists = {"image": [image.tolist() for image in images]}
    for request in (
        {"inputs": {"image": texts}},
        {"inputs": texts},
        {"inputs": [{"image": each} for each in texts]},
        {"instances": [{"image": each} for each in texts]},
        {"dataframe_split": {"columns": ["image"], "data": [[each] for each in texts]}},
        {"dataframe_records": [{"image": each} for each in texts]},
        {"inputs": columns_of_lists},
    ):
        assert served_like_a_request(served, request) == expected


def test_thresholds_are_the_models_own_unless_a_parameter_sets_one(
    served, folder: Path, images: list[np.ndarray]
) -> None:
    model, request = load_model(folder), {"inputs": {"image": [text(image) for image in images]}}
    for params, threshold in (({}, None), ({"threshold": None}, None), ({"threshold": 0.2}, 0.2)):
        expected = rows_of(model.predict(images, threshold=threshold))
        assert served_like_a_request(served, request | {"params": params}) == expected
    every = rows_of(model.predict(images, threshold=0))
    few = served_like_a_request(served, request | {"params": {"threshold": 0, "max_detections": 2}})
    assert few == [found[:2] for found in every]
    assert served_like_a_request(served, {"inputs": {"image": []}}) == []
    for wrong in ({"threshold": 1.5}, {"max_detections": -1}):
        with pytest.raises(MlflowException, match=next(iter(wrong))) as caught:
            served_like_a_request(served, request | {"params": wrong})
        assert caught.value.get_http_status_code() == 400


def test_unusable_images_are_named_by_their_index(served, images: list[np.ndarray], tmp_path: Path) -> None:
    column = [
        images[0],
        b"no image",
        "///",
        None,
        np.zeros((9, 9)),
        png(images[0])[:200],
        tmp_path / "missing.png",
        [[1, 2], [3]],
        images[1].tolist()[0],
        Image.fromarray(np.zeros((9, 9), np.float32)),
    ]
    with pytest.raises(MlflowException) as caught:
        served.predict(pd.DataFrame({"image": column}))
    assert caught.value.get_http_status_code() == 400
    parts = caught.value.message.split("; image ")
    assert [part.partition(":")[0].removeprefix("image ") for part in parts] == list("123456789")
    for index, reason in (
        (1, "not an image in a known format"),
        (2, "neither base64 nor"),
        (3, "NoneType is no image"),
        (4, "ndarray float64 [9, 9] is no image"),
        (6, "missing.png: No such file"),
        (9, "mode F"),
    ):
        assert reason in parts[index - 1]


def test_pillow_images_that_cannot_be_read_are_named(served, folder: Path, images: list[np.ndarray]) -> None:
    closed = Image.open(io.BytesIO(png(images[0])))
    closed.close()
    for image, reason in ((Image.new("RGB", (0, 5)), "0 x 5 pixels"), (closed, "ValueError")):
        with pytest.raises(MlflowException, match=f"image 1: {reason}") as caught:
            served.predict(pd.DataFrame({"image": [images[0], image]}))
        assert caught.value.get_http_status_code() == 400
        with pytest.raises(DataError, match=f"cannot be read: {reason}"):
            load_model(folder).predict(image)


def test_a_row_without_an_image_is_not_left_out(served, images: list[np.ndarray]) -> None:
    request = {"dataframe_records": [{"image": []}, {"image": text(images[0])}]}
    with pytest.raises(MlflowException, match="image 0: list is no image"):
        served_like_a_request(served, request)


def test_a_scoring_server_opens_no_files(
    served, images: list[np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "image.png").write_bytes(png(images[0]))
    request = {"inputs": {"image": [text(images[0]), str(tmp_path / "image.png")]}}
    assert len(served_like_a_request(served, request)) == 2
    monkeypatch.setenv("_MLFLOW_IS_IN_SERVING_ENVIRONMENT", "true")
    with pytest.raises(MlflowException, match="image 1: neither base64 nor"):
        served_like_a_request(served, request)


def test_the_signature_and_the_example_describe_the_model(served, folder: Path) -> None:
    detection = Object(
        [
            Property("label", DataType.string),
            Property("label_id", DataType.long),
            Property("score", DataType.double),
            Property("box", Array(DataType.double)),
        ]
    )
    params = [ParamSpec("threshold", DataType.double, None), ParamSpec("max_detections", DataType.long, None)]
    signature = served.metadata.signature
    assert signature == ModelSignature(
        Schema([ColSpec(AnyType(), "image")]),
        Schema([ColSpec(Array(detection), "detections")]),
        ParamSchema(params),
    )
    frame = served.metadata.load_input_example(str(folder))
    found = served.predict(frame, params={"threshold": 0.0})
    assert found.columns.tolist() == signature.outputs.input_names() == ["detections"]
    request = json.loads((folder / "serving_input_example.json").read_text())
    assert len(served_like_a_request(served, request)) == 1
