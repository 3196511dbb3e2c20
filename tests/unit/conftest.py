"""A tiny detector of any architecture."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from harness.data import TINY_BACKBONE

from detr_dist.config import ModelConfig
from detr_dist.models.build import build_detector
from detr_dist.models.denoising import Denoising, denoising_queries
from detr_dist.models.detector import Detector

CLASS_NAMES = ["player", "ball"]
TINY = {
    "backbone": TINY_BACKBONE | {"out_features": ["stage2", "stage3", "stage4"]},
    "pretrained_backbone": False,
    "hidden_dim": 32,
    "num_encoder_layers": 1,
    "num_decoder_layers": 3,
    "num_queries": 6,
    "config_overrides": {"encoder_attention_heads": 2, "decoder_attention_heads": 2},
}
_VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 64,
    "patch_size": 8,
    "out_features": ["stage2", "stage3"],
}
_GROUPS = {
    "num_encoder_layers": None,
    "config_overrides": {
        "decoder_self_attention_heads": 2,
        "decoder_cross_attention_heads": 2,
        "decoder_ffn_dim": 32,
        "group_detr": 3,
    },
}
_LW_VIT = {"model_type": "lw_detr_vit", "pretrain_image_size": 64, "window_block_indices": [0, 2]}
TINY_OF = {
    "lw_detr": _GROUPS | {"backbone": _VIT | _LW_VIT | {"num_windows": 4}},
    "rf_detr": _GROUPS | {"backbone": _VIT | {"model_type": "rf_detr_dinov2", "num_windows": 2}},
}
"""What differs from `TINY` for families with a backbone of their own."""


@pytest.fixture(scope="session")
def tiny_detector() -> Callable[..., Detector]:
    """Return a function that builds one; it accepts settings of the model section, and adds overrides."""

    def build(architecture: str, **settings: Any) -> Detector:
        torch.manual_seed(0)
        tiny: dict[str, Any] = TINY | TINY_OF.get(architecture, {})
        overrides = tiny["config_overrides"] | settings.get("config_overrides", {})
        model = tiny | settings | {"model_architecture": architecture, "config_overrides": overrides}
        return build_detector(ModelConfig.model_validate(model), CLASS_NAMES)

    return build


@pytest.fixture(scope="session")
def denoising_of() -> Callable[[Detector], Denoising | None]:
    """Return a function that makes the queries with which a detector is trained on objects in two images."""

    def make(detector: Detector) -> Denoising | None:
        if detector.denoising is None:
            return None
        rngs = [np.random.default_rng(seed) for seed in (1, 2)]
        boxes_cxcywh = torch.tensor([[0.4, 0.4, 0.2, 0.3], [0.5, 0.6, 0.3, 0.1], [0.3, 0.7, 0.2, 0.2]])
        return denoising_queries(detector.denoising, torch.tensor([0, 1, 1]), boxes_cxcywh, [1, 2], rngs)

    return make


@pytest.fixture
def two_images() -> tuple[torch.Tensor, torch.Tensor]:
    """Return images of 64 x 96 and 50 x 70 on one canvas, and their sizes."""
    images = torch.randint(
        0, 255, (2, 3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    return images, torch.tensor([[64, 96], [50, 70]])


@pytest.fixture
def images_for(two_images) -> Callable[[Detector], tuple[torch.Tensor, torch.Tensor]]:
    """Return a function that returns those images, or square ones for a family that takes no other."""

    def images(detector: Detector) -> tuple[torch.Tensor, torch.Tensor]:
        wide, sizes_hw = two_images
        if not detector.family.square_only:
            return wide, sizes_hw
        square = torch.zeros(2, 3, 96, 96, dtype=torch.uint8)
        square[:, :, :64] = wide
        return square, torch.tensor([[96, 96], [50, 70]])

    return images
