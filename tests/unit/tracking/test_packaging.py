"""A model is packed into a folder of any name."""

from pathlib import Path

import mlflow.pytorch
import pytest
import torch
import yaml
from harness.data import TINY_CONFIG
from transformers import AutoConfig, AutoModelForObjectDetection

from detr_dist.config import Config
from detr_dist.tracking.packaging import write_model


@pytest.mark.parametrize("name", ["run #3", "what?", "50%41", "a ü;b"])
def test_a_model_is_packed_into_a_folder_of_any_name(tmp_path: Path, name: str) -> None:
    config = AutoConfig.for_model(
        "detr",
        backbone_config=TINY_CONFIG["model"]["backbone"],
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        num_queries=3,
    )
    network = AutoModelForObjectDetection.from_config(config).eval()
    write_model(network, tmp_path / name, config=Config(), metadata={"classes": ["Torwart ü"]})
    packed = yaml.safe_load((tmp_path / name / "MLmodel").read_text(encoding="utf-8"))
    assert packed["flavors"].keys() == {"python_function", "pytorch"}
    assert packed["metadata"] == {"classes": ["Torwart ü"]}
    assert {path.name for path in tmp_path.iterdir()} == {name}
    plain = (tmp_path / name).rename(tmp_path / "plain")  # MLflow itself takes paths for URIs
    image = torch.zeros(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(mlflow.pytorch.load_model(str(plain))(image).logits, network(image).logits)
