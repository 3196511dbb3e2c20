"""D-FINE and DEIMv2 train every parameter, and predict what transformers predicts."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from detr_dist.config import ModelConfig
from detr_dist.errors import UsageError
from detr_dist.models.build import build_detector, load_network, trained_detector
from detr_dist.models.criterion import Losses, SetCriterion, StepCounts
from detr_dist.models.denoising import denoising_queries
from detr_dist.models.detector import Detector, plain_network

HGNET = {
    "model_type": "hgnet_v2",
    "stem_channels": [3, 8, 8],
    "stage_in_channels": [8, 8, 16, 16],
    "stage_mid_channels": [4, 4, 8, 8],
    "stage_out_channels": [8, 16, 16, 32],
    "stage_num_blocks": [1, 1, 1, 1],
    "stage_numb_of_layers": [1, 1, 1, 1],
    "embedding_size": 8,
    "hidden_sizes": [8, 16, 16, 32],
    "depths": [1, 1, 1, 1],
    "out_indices": [2, 3, 4],
}
DINO = {
    "model_type": "dinov3_vit",
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "patch_size": 16,
    "out_indices": [1, 2, 3],
}
HEADS = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
SMALL = {**HEADS, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_denoising": 6}
LITE = {
    "encoder_type": "lite",
    "use_gateway": False,
    "share_bbox_head": True,
    "use_dense_one_to_one": False,
    "feat_strides": [16, 32],
    "encoder_in_channels": [16],
    "num_feature_levels": 2,
}
VARIANTS: dict[str, tuple[str, dict[str, object]]] = {
    "d_fine": ("d_fine", {}),
    "d_fine_hgnet": ("d_fine", {"backbone": HGNET}),
    "deimv2_hgnet": ("deimv2", {"backbone": HGNET}),
    "deimv2_dino": ("deimv2", {"backbone": DINO}),
    "deimv2_lite": (
        "deimv2",
        {"backbone": HGNET | {"out_indices": [3]}, "config_overrides": SMALL | LITE},
    ),
}
IMAGES = torch.randint(255, (3, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
SIZES = torch.tensor([[64, 64]] * 3)
LABELS = torch.tensor([0, 1, 1])
BOXES = torch.tensor([[0.5, 0.5, 0.2, 0.3], [0.2, 0.3, 0.1, 0.1], [0.6, 0.6, 0.3, 0.3]])


@pytest.fixture(params=list(VARIANTS))
def detector(request: pytest.FixtureRequest, tiny_detector: Callable[..., Detector]) -> Detector:
    family, settings = VARIANTS[request.param]
    return tiny_detector(family, **{"config_overrides": SMALL, "num_decoder_layers": 2} | settings)


def loss_of(detector: Detector, num_boxes: list[int]) -> Losses:
    labels, boxes = LABELS[: sum(num_boxes)], BOXES[: sum(num_boxes)]
    random_numbers = [np.random.default_rng(image) for image in range(3)]
    assert detector.denoising is not None
    queries = denoising_queries(detector.denoising, labels, boxes, num_boxes, random_numbers)
    outputs = detector.train()(IMAGES, SIZES, False, queries)
    counts = StepCounts(sum(num_boxes), 3)
    return SetCriterion(detector.loss_settings)(outputs, labels, boxes, num_boxes, counts, queries)


@pytest.mark.parametrize("num_boxes", [[2, 0, 1], [0, 0, 0]])
def test_every_parameter_gets_a_gradient(detector: Detector, num_boxes: list[int]) -> None:
    loss = loss_of(detector, num_boxes)
    loss.total.backward()
    assert loss.finite
    assert [name for name, p in detector.named_parameters() if p.requires_grad and p.grad is None] == []


def test_it_predicts_what_transformers_predicts_and_is_saved(detector: Detector, tmp_path: Path) -> None:
    detector.train()(IMAGES, SIZES)  # moves the statistics of batch norm
    detector.eval()
    plain = plain_network(detector)
    with torch.no_grad():
        outputs = detector(IMAGES, SIZES, False)
        expected = plain((IMAGES - detector.mean) / detector.std)
    assert torch.allclose(outputs["pred_logits"][-1], expected.logits, atol=1e-5)
    assert torch.allclose(outputs["pred_boxes"][-1], expected.pred_boxes, atol=1e-5)
    plain.save_pretrained(tmp_path)
    loaded = trained_detector(load_network("it", str(tmp_path)), ModelConfig(), channels_last=False)
    assert (loaded.family, loaded.loss_settings) == (detector.family, detector.loss_settings)
    assert torch.allclose(loaded(IMAGES, SIZES, False)["pred_boxes"], outputs["pred_boxes"], atol=1e-5)


def test_the_layers_are_paired_with_their_own_distributions(tiny_detector) -> None:
    """The boxes of each row follow from its distribution, the reference boxes, up and reg_scale."""
    detector = tiny_detector("d_fine", config_overrides=SMALL | {"reg_scale": 3.0, "up": 0.7}).train()
    for head in detector.network.model.decoder.bbox_embed:
        torch.nn.init.normal_(head.layers[-1].weight, std=0.5)
    outputs = detector(IMAGES, SIZES, False)
    assert len(outputs["pred_logits"]) == 5  # proposals, first head, three layers
    logits = outputs["edge_logits"].unflatten(-1, (4, 33))
    limit = 0.7 * 3
    growth = (limit + 1) ** (2 / 30)
    inner = torch.tensor([growth**n - 1 for n in range(1, 16)])
    shifts = torch.cat((inner.new_tensor([-2 * limit]), -inner.flip(0), inner.new_zeros(1), inner))
    shifts = torch.cat((shifts, inner.new_tensor([2 * limit])))
    left, top, right, bottom = (logits.softmax(-1) @ shifts + 1.5).unbind(-1)
    x, y, width, height = outputs["reference_boxes"].unbind(-1)
    x1, y1, x2, y2 = (
        x - left * width / 3,
        y - top * height / 3,
        x + right * width / 3,
        y + bottom * height / 3,
    )
    expected = torch.stack(((x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1), -1)
    assert torch.allclose(outputs["pred_boxes"][2:], expected, atol=1e-5)


def test_the_scale_of_distributions_is_that_of_the_weights(tiny_detector, tmp_path: Path) -> None:
    plain = plain_network(tiny_detector("d_fine", config_overrides=SMALL))
    plain.model.decoder.reg_scale.fill_(8.0)  # as in published weights whose configuration has 4
    plain.save_pretrained(tmp_path)
    settings = ModelConfig(model_architecture="d_fine", pretrained=str(tmp_path))
    assert build_detector(settings, ["player", "ball"]).loss_settings.reg_scale == 8


def test_autocast_does_not_round_coordinates(tiny_detector) -> None:
    detector = tiny_detector("d_fine", config_overrides=SMALL).eval()
    decoder = detector.network.model.decoder
    generator = torch.Generator().manual_seed(0)
    for head in decoder.bbox_embed:  # the same shift for every query
        head.layers[-1].bias.data = torch.randn(132, generator=generator)
    shifts = []
    for is_enabled in (False, True):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=is_enabled):
            outputs = detector(IMAGES, SIZES, False)
        boxes, reference = outputs["pred_boxes"][-1], outputs["reference_boxes"]
        # The reference boxes are anchors, whose centres lie on a grid of 8, 4 or 2 cells.
        on_grid = [(reference[..., :2] * n - 0.5) for n in (8, 4, 2)]
        distance = torch.stack([(each - each.round()).abs().amax(-1) for each in on_grid]).amin(0)
        assert float(distance.max()) < 1e-4  # bf16 would round by up to 1/512 of the image
        shifts.append(torch.cat((boxes[..., :2] - reference[..., :2], boxes[..., 2:]), -1))
        shifts[-1] /= reference[..., 2:].repeat(1, 1, 2)
    expected = shifts[0][0, 0]
    for found in shifts:
        assert torch.allclose(found, expected.expand_as(found), atol=1e-5)


def test_a_class_loss_replaces_the_familys(tiny_detector) -> None:
    weights = {
        loss: tiny_detector("d_fine", config_overrides=SMALL, class_loss=loss).loss_settings.weights
        for loss in ("focal", "vfl", "mal", "ia_bce")
    }
    boxes = {"bbox": 5.0, "giou": 2.0, "fgl": 0.15, "ddf": 1.5}
    terms = {"focal": "ce", "vfl": "vfl", "mal": "mal", "ia_bce": "ia_bce"}
    assert weights == {loss: {terms[loss]: 1.0, **boxes} for loss in terms}
    assert tiny_detector("deformable_detr", class_loss="focal").loss_settings.weights["ce"] == 2
    assert tiny_detector("detr", class_loss="softmax").loss_settings.weights["ce"] == 1
    settings = tiny_detector("deimv2", config_overrides=SMALL).loss_settings
    assert (settings.weights, settings.mal_gamma) == ({"mal": 1.0, **boxes}, 1.5)


@pytest.mark.parametrize(("family", "loss"), [("detr", "vfl"), ("deformable_detr", "softmax")])
def test_a_class_loss_for_other_heads_is_refused(tiny_detector, family: str, loss: str) -> None:
    with pytest.raises(UsageError, match=rf"^model\.class_loss: {loss} does not fit .* {family}; choose "):
        tiny_detector(family, class_loss=loss)


@pytest.mark.parametrize("family", ["rt_detr", "rt_detr_v2", "d_fine", "deimv2"])
def test_learned_queries_are_refused(tiny_detector, family: str) -> None:
    with pytest.raises(UsageError, match=r"^model\.config_overrides\.learn_initial_query: transformers"):
        tiny_detector(family, config_overrides=SMALL | {"learn_initial_query": True})
