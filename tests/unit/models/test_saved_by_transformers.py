"""Networks that were saved by transformers alone predict the same here, bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from harness.data import TINY_CONFIG
from transformers import AutoConfig, AutoModelForObjectDetection

from detr_dist.config import ModelConfig
from detr_dist.models.build import trained_detector
from detr_dist.models.detector import IMAGENET

WIDTHS: dict[str, dict[str, Any]] = {
    "detr": {"d_model": 32},
    "conditional_detr": {"d_model": 32},
    "deformable_detr": {"d_model": 32, "num_feature_levels": 2},
    "dab-detr": {"hidden_size": 32},
    "rt_detr": {"d_model": 32, "encoder_hidden_dim": 32, "decoder_in_channels": [32] * 3},
    "rt_detr_v2": {"d_model": 32, "encoder_hidden_dim": 32, "decoder_in_channels": [32] * 3},
    "d_fine": {"d_model": 32, "encoder_hidden_dim": 32, "decoder_in_channels": [32] * 3},
    "deimv2": {"d_model": 32, "encoder_hidden_dim": 32, "decoder_in_channels": [32] * 3},
}
SHAPE = {"encoder_layers": 1, "decoder_layers": 3, "encoder_attention_heads": 4, "decoder_attention_heads": 4}


@pytest.mark.parametrize("auxiliary_loss", [False, True])
@pytest.mark.parametrize("kind", WIDTHS)
def test_a_network_saved_by_transformers_predicts_the_same(
    tmp_path: Path, kind: str, auxiliary_loss: bool
) -> None:
    backbone = TINY_CONFIG["model"]["backbone"]
    if "decoder_in_channels" in WIDTHS[kind]:
        backbone = backbone | {"out_features": ["stage2", "stage3", "stage4"]}
    options = {"backbone_config": backbone, "num_queries": 10, "num_labels": 2}
    config = AutoConfig.for_model(kind, **options, **SHAPE, **WIDTHS[kind], auxiliary_loss=auxiliary_loss)
    torch.manual_seed(0)
    AutoModelForObjectDetection.from_config(config).save_pretrained(tmp_path)
    alone, ours = (AutoModelForObjectDetection.from_pretrained(tmp_path).eval() for _ in range(2))
    image = torch.randint(255, (1, 3, 64, 96), dtype=torch.uint8)
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (IMAGENET.mean, IMAGENET.std))
    settings = ModelConfig(model_architecture=kind.replace("-", "_"))
    detector = trained_detector(ours, settings, channels_last=False)
    with torch.no_grad():
        expected = alone(pixel_values=(image / 255 - mean) / std)
        found = detector(image, torch.tensor([[64, 96]]), False)
    torch.testing.assert_close(found["pred_logits"][-1], expected.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["pred_boxes"][-1], expected.pred_boxes, rtol=1e-4, atol=1e-5)
