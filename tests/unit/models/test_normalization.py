"""A network keeps the mean and standard deviation that its weights were trained with."""

import json
from pathlib import Path

import pytest
import torch
from transformers import DetrImageProcessor

from detr_dist.config import Config, ModelConfig
from detr_dist.errors import UsageError
from detr_dist.inference.model import load_model
from detr_dist.models.build import build_detector
from detr_dist.models.detector import IMAGENET, Detector, plain_network
from detr_dist.tracking.packaging import write_model

CLASS_NAMES = ["player", "ball"]
HALVES = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.25, 0.5]}


@pytest.fixture
def published(tiny_detector, tmp_path: Path) -> Path:
    """Save a detector with transformers alone, without ImageNet's normalization."""
    folder = tmp_path / "published"
    plain_network(tiny_detector("detr")).save_pretrained(folder)
    DetrImageProcessor(**HALVES).save_pretrained(folder)
    return folder


def constants(detector: Detector) -> tuple[list[float], list[float]]:
    return (detector.mean.flatten() / 255).tolist(), (detector.std.flatten() / 255).tolist()


def test_fine_tuning_keeps_the_normalization_of_the_first_weights(published: Path, tmp_path: Path) -> None:
    expected = (HALVES["image_mean"], HALVES["image_std"])
    tuned = build_detector(ModelConfig(pretrained=str(published)), CLASS_NAMES)
    assert constants(tuned) == expected

    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text(tuned.plain_config.to_json_string())
    assert constants(build_detector(ModelConfig(), CLASS_NAMES, structure=checkpoint)) == expected

    plain = plain_network(tuned)
    plain.save_pretrained(checkpoint)  # without an image processor, as the weights of a checkpoint
    again = build_detector(ModelConfig(pretrained=str(checkpoint)), CLASS_NAMES)
    assert constants(again) == expected

    model = tmp_path / "model"
    write_model(plain, model, config=Config(), metadata={})
    written = json.loads((model / "preprocessor_config.json").read_text())
    assert {name: written[name] for name in HALVES} == HALVES
    opened = load_model(model)
    assert constants(opened.detector(opened.settings([]), torch.device("cpu"))) == expected


def test_without_an_image_processor_imagenet_normalization_is_used(published: Path) -> None:
    (published / "preprocessor_config.json").unlink()
    tuned = build_detector(ModelConfig(pretrained=str(published)), CLASS_NAMES)
    assert torch.tensor(constants(tuned)).allclose(torch.tensor([IMAGENET.mean, IMAGENET.std]))
    assert not hasattr(tuned.plain_config, "pixel_normalization")


def test_an_unreadable_image_processor_is_an_error(published: Path) -> None:
    (published / "preprocessor_config.json").write_text("{")
    with pytest.raises(UsageError, match=r"pretrained model .*published cannot be loaded"):
        build_detector(ModelConfig(pretrained=str(published)), CLASS_NAMES)
