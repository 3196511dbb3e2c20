"""A tiny detector of any architecture."""

from collections.abc import Callable

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


@pytest.fixture(scope="session")
def tiny_detector() -> Callable[..., Detector]:
    """Return a function that builds one; it accepts settings of the model section."""

    def build(architecture: str, **settings: object) -> Detector:
        torch.manual_seed(0)
        model = ModelConfig.model_validate(TINY | {"model_architecture": architecture} | settings)
        return build_detector(model, CLASS_NAMES)

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
