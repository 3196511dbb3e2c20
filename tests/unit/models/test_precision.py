"""Autocast neither rounds predictions nor keeps more activations than float32."""

import copy

import pytest
import torch
from harness.data import RESNET_FAMILIES
from torch import Tensor, nn

from detr_dist.models.detector import Detector

VARIANTS = {name: (name, {}) for name in RESNET_FAMILIES} | {
    "deformable_detr, boxes refined": ("deformable_detr", {"with_box_refine": True, "num_feature_levels": 3})
}
WIDTH_PX = 1344  # a multiple of 32, which some families need


@pytest.fixture(params=VARIANTS)
def detector(tiny_detector, request: pytest.FixtureRequest) -> Detector:
    """Return a detector whose boxes differ between queries, as they do after training."""
    architecture, overrides = VARIANTS[request.param]
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    detector = tiny_detector(architecture, num_queries=50, config_overrides=heads | overrides)
    for name, weight in detector.network.named_parameters():
        if "bbox" in name and weight.ndim == 2:
            nn.init.normal_(weight, std=0.6 * weight.shape[1] ** -0.5)
    return detector


def predict(detector: Detector, precision: torch.dtype) -> dict[str, Tensor]:
    """Return all layers' predictions for a striped image, with padding at its right, under CPU autocast."""
    images = torch.arange(WIDTH_PX).remainder(251).to(torch.uint8).expand(1, 3, 96, WIDTH_PX)
    with torch.autocast("cpu", dtype=precision, enabled=precision != torch.float32):
        return detector(images, torch.tensor([[96, 1200]]))


@pytest.mark.parametrize("train", [False, True], ids=["evaluation", "training"])
def test_predictions_under_bf16_are_not_rounded_to_bf16(detector: Detector, train: bool) -> None:
    found = predict(detector.train(train), torch.bfloat16)
    for name, values in found.items():
        assert values.dtype == torch.float32, name
        on_grid = (values == values.bfloat16()).float().mean()
        assert on_grid < 0.05, name  # by chance one in 65,536; all of them, if it were computed in bf16


@torch.no_grad()
def test_bf16_moves_boxes_by_less_than_a_third_of_a_pixel(
    detector: Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The same proposals become queries, whatever their scores are rounded to.
    monkeypatch.setattr(torch, "topk", lambda values, k, dim: (None, torch.arange(k)[None]))
    exact, found = (
        predict(detector.eval(), dtype)["pred_boxes"] for dtype in (torch.float32, torch.bfloat16)
    )
    assert exact.std() > 2 / WIDTH_PX  # or any constant would do
    assert (found - exact).abs().mean() * WIDTH_PX < 0.3


@torch.no_grad()
def test_the_heads_of_a_copy_have_their_own_weights(detector: Detector) -> None:
    average = copy.deepcopy(detector.eval())
    before = predict(average, torch.float32)
    for parameter in detector.parameters():
        parameter.zero_()
    after = predict(average, torch.float32)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("freeze", [True, False])
def test_bf16_keeps_less_memory_than_float32(tiny_detector, freeze: bool) -> None:
    detector = tiny_detector("detr", freeze_batch_norm=freeze)
    assert kept_bytes(detector, torch.bfloat16) < 0.8 * kept_bytes(detector, torch.float32)


def kept_bytes(detector: Detector, precision: torch.dtype) -> int:
    """Return the bytes of activations that a forward pass in training keeps."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        outputs = predict(detector.train(), precision)
    weights = {each.untyped_storage().data_ptr() for each in detector.state_dict().values()}
    assert len(outputs) == 2
    return sum(num_bytes for address, num_bytes in kept.items() if address not in weights)
