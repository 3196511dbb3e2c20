"""Detectors that transformers alone has made give what transformers alone gives."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForObjectDetection,
    ConditionalDetrImageProcessor,
    DeformableDetrImageProcessor,
    DetrImageProcessor,
    pipeline,
)

from tests.conftest import TINY_CONFIG, Workplace

BACKBONE = TINY_CONFIG["model"]["backbone"]
KINDS: dict[str, tuple[type, dict[str, Any]]] = {
    "detr": (DetrImageProcessor, {"d_model": 32}),
    "conditional_detr": (ConditionalDetrImageProcessor, {"d_model": 32}),
    "deformable_detr": (DeformableDetrImageProcessor, {"d_model": 32, "num_feature_levels": 2}),
    "dab-detr": (ConditionalDetrImageProcessor, {"hidden_size": 32}),
}
SHAPE = {"encoder_layers": 1, "decoder_layers": 3, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
LABELS = {0: "player", 1: "ball"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, new_workplace: Callable) -> Workplace:
    """With the folder `data` of two images in a format without losses, of the size that models work at."""
    place: Workplace = new_workplace(tmp_path_factory.mktemp("elsewhere"))
    (place.folder / "data").mkdir()
    images, boxes, rng = [], [], np.random.default_rng(0)
    for number in (1, 2):
        noise = rng.integers(0, 255, (10, 12, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((96, 80)).save(place.folder / "data" / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "height": 80, "width": 96})
        box = {"bbox": [10, 10, 30, 30], "area": 900, "iscrowd": 0}
        boxes.append({"id": number, "image_id": number, "category_id": 7, **box})
    document = {"images": images, "annotations": boxes, "categories": [{"id": 7, "name": "ball"}]}
    (place.folder / "data" / "annotations.json").write_text(json.dumps(document))
    return place


def make_model(
    folder: Path, kind: str, *, processor: dict[str, Any] | None = None, **options: object
) -> Path:
    """A network whose weights are all random, norms and biases too, or much would go unseen."""
    processor_class, width = KINDS[kind]
    config = AutoConfig.for_model(
        kind,
        **{"backbone_config": BACKBONE, "num_queries": 10, "id2label": LABELS} | width | SHAPE | options,
    )
    torch.manual_seed(0)
    network = AutoModelForObjectDetection.from_config(config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    network.save_pretrained(folder)
    size = {"shortest_edge": 80, "longest_edge": 96}
    processor_class(**{"size": size} | (processor or {})).save_pretrained(folder)
    return folder


def assert_as_the_pipeline(place: Workplace, model: Path) -> None:
    output = f"found_{model.name}"
    arguments = ("--model", model, "--input", "data", "--output-dir", output, "--threshold", "0")
    finished = place.run("predict", *arguments, "data.num_workers=0", "training.mixed_precision=no")
    assert finished.returncode == 0, finished.stderr
    results = json.loads((place.folder / output / "predictions.json").read_text())
    detect = pipeline("object-detection", model=str(model))
    for name in ("1.png", "2.png"):
        found = [each for each in results if each["file_name"] == name]
        expected = sorted(
            detect(str(place.folder / "data" / name), threshold=0.0), key=lambda each: -each["score"]
        )
        assert [each["category_name"] for each in found] == [each["label"] for each in expected]
        # Batches of two, where the pipeline's hold one image: another order of float32 sums.
        scores = ([each["score"] for each in some] for some in (found, expected))
        np.testing.assert_allclose(*scores, atol=1e-4)
        corners = np.array([each["bbox"] for each in found])
        corners[:, 2:] += corners[:, :2]
        whole = np.array([list(each["box"].values()) for each in expected]).clip(0, (96, 80, 96, 80))
        assert np.abs(corners - whole).max() < 1.01  # the pipeline cuts decimals off


@pytest.mark.parametrize("auxiliary_loss", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_predictions_are_those_of_the_pipeline(
    place: Workplace, tmp_path: Path, kind: str, auxiliary_loss: bool
) -> None:
    model = make_model(tmp_path / f"{kind}_{auxiliary_loss}", kind, auxiliary_loss=auxiliary_loss)
    assert_as_the_pipeline(place, model)


PROCESSORS = {
    "other_mean": {"image_mean": [0.1, 0.5, 0.9], "image_std": [0.5, 0.2, 1.0]},
    "not_normalized": {"do_normalize": False},
    "whole_numbers": {"do_rescale": False, "image_mean": [120.0, 110.0, 100.0], "image_std": [60.0] * 3},
    "not_padded": {"do_pad": False},
    "other_edges": {"size": {"shortest_edge": 64, "longest_edge": 200}},
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_pixels_are_prepared_as_the_model_wants_them(place: Workplace, tmp_path: Path, name: str) -> None:
    model = make_model(tmp_path / name, "detr", processor=PROCESSORS[name])
    assert_as_the_pipeline(place, model)
    exported = tmp_path / f"exported_{name}"
    assert place.run("export", "--model", model, "--output-dir", exported).returncode == 0
    assert_as_the_pipeline(place, exported)


@pytest.mark.parametrize(
    "processor", [{"do_resize": False}, {"size": {"height": 64, "width": 64}}], ids=["kept", "squeezed"]
)
def test_sizes_that_cannot_be_followed_are_an_error(
    place: Workplace, tmp_path: Path, processor: dict[str, Any]
) -> None:
    model = make_model(tmp_path / "model", "detr", processor=processor)
    finished = place.run("predict", "--model", model, "--input", "data", "--output-dir", tmp_path / "found")
    assert finished.returncode == 2
    (line,) = finished.stderr.splitlines()
    assert "preprocessor_config.json" in line


@pytest.mark.parametrize("kind", KINDS)
def test_classes_are_matched_by_name(place: Workplace, tmp_path: Path, kind: str) -> None:
    labels = {11: "racket", 0: "N/A", 1: "player", 2: "ball", **dict.fromkeys(range(3, 11), "N/A")}
    model = make_model(tmp_path / "model", kind, id2label=labels)
    report = tmp_path / "report.json"
    arguments = ("--model", model, "--data-dir", "data", "--report", report, "data.num_workers=0")
    finished = place.run("evaluate", *arguments)
    assert finished.returncode == 0, finished.stderr
    metrics = json.loads(report.read_text())["metrics"]
    assert "val_ball_map" in metrics
    assert metrics["val_loss"] > 0


@pytest.mark.parametrize("kind", KINDS)
def test_training_begins_with_the_predictions_of_the_model(
    place: Workplace, tmp_path: Path, kind: str
) -> None:
    """At a learning rate that changes nothing to speak of."""
    model = make_model(tmp_path / "model", kind, id2label={0: "ball"})
    data = ("--train-dir", "data", "--val-dir", "data", "--output-dir", tmp_path / "out")
    overrides = (
        *(f"model.model_architecture={kind.replace('-', '_')}", "training.learning_rate=1e-12"),
        *("training.learning_rate_backbone=0", "training.max_steps=1", "training.batch_size=2"),
        *("data.num_workers=0", "data.shortest_edge=80", "data.longest_edge=96", "evaluation.pictures=false"),
        *("logging.mlflow=false", "logging.tensorboard=false", "training.mixed_precision=no"),
    )
    finished = place.run("train", *data, "--init-from", model, *overrides)
    assert finished.returncode == 0, finished.stderr
    trained = json.loads((tmp_path / "out" / "results.json").read_text())["metrics"]
    report = tmp_path / "report.json"
    place.run("evaluate", "--model", model, "--data-dir", "data", "--report", report, "data.num_workers=0")
    expected = json.loads(report.read_text())["metrics"]
    assert trained["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-5)
    assert_as_the_pipeline(place, tmp_path / "out" / "model")
