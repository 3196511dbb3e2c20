"""Every family is trained, evaluated, exported and used by transformers alone, with the same results."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness.data import RESNET_FAMILIES, TINY_BACKBONE, TINY_CONFIG
from transformers import pipeline

import detr_dist as dd

THREE_SCALES = {"backbone": TINY_BACKBONE | {"out_features": ["stage2", "stage3", "stage4"]}}
VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 64,
    "patch_size": 8,
    "out_features": ["stage2", "stage3"],
}
LW_VIT = {"model_type": "lw_detr_vit", "num_windows": 4, "pretrain_image_size": 64}
GROUPS = {
    "num_encoder_layers": None,
    "config_overrides": {"decoder_self_attention_heads": 2, "decoder_cross_attention_heads": 2},
}
TWO_STAGES = {"two_stage": True, "with_box_refine": True, "num_feature_levels": 3}
MODELS: dict[str, dict[str, Any]] = dict.fromkeys(RESNET_FAMILIES, THREE_SCALES) | {
    "deformable_detr, two stages": THREE_SCALES | {"config_overrides": TWO_STAGES},
    "lw_detr": GROUPS | {"backbone": VIT | LW_VIT | {"window_block_indices": [0, 2]}},
    "rf_detr": GROUPS | {"backbone": VIT | {"model_type": "rf_detr_dinov2", "num_windows": 2}},
}


def config_of(name: str) -> dd.Config:
    settings: dict[str, Any] = TINY_CONFIG | {"logging": {"mlflow": False, "tensorboard": False}}
    settings["training"] = settings["training"] | {"max_steps": 2}
    settings["model"] = settings["model"] | MODELS[name] | {"model_architecture": name.partition(",")[0]}
    return dd.Config.model_validate(settings)


@pytest.mark.parametrize("name", MODELS)
def test_an_exported_model_is_the_trained_one(name: str, tiny_data: Path, tmp_path: Path) -> None:
    folders = {"train_dir": tiny_data / "train", "val_dir": tiny_data / "val"}
    run = dd.train(config_of(name), output_dir=tmp_path / "out", **folders)
    dd.export(run.model_dir, tmp_path / "export", onnx=True)  # compared with torch at several sizes
    model = dd.load_model(tmp_path / "export")
    assert dd.evaluate(model, tiny_data / "val").metrics == run.metrics

    image = tiny_data / "val" / "000.jpg"
    own = model.predict(image, threshold=0.0)
    detect = pipeline("object-detection", model=str(tmp_path / "export"))
    found = detect(str(image), threshold=0.0)
    assert 0 < len(found) <= len(own)  # some processors keep fewer of the pairs of query and class
    for each in found:
        box = np.clip(list(each["box"].values()), 0, (96, 80) * 2)  # a pipeline does not clip boxes
        is_same = np.array([name == each["label"] for name in own.names])
        is_same &= np.isclose(own.scores, each["score"], rtol=0, atol=1e-5)
        is_same &= (np.abs(own.boxes_xyxy_px - box) < 1.001).all(axis=1)  # it omits fractions of pixels
        assert is_same.any(), (each, own)
