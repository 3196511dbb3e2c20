"""Every family as ONNX: the predictions of torch at any number and size of images."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import pytest
import torch
from harness.data import RESNET_FAMILIES
from transformers import PreTrainedModel

from detr_dist.errors import DetrDistError, UsageError
from detr_dist.inference.onnx import check_onnx_packages, write_onnx
from detr_dist.models.detector import plain_network
from detr_dist.models.families import family_of

VARIANTS = {name: (name, {}) for name in RESNET_FAMILIES} | {
    "deformable_detr, boxes refined": ("deformable_detr", {"with_box_refine": True, "num_feature_levels": 3})
}


@pytest.fixture
def tiny_network(tiny_detector) -> Callable[..., PreTrainedModel]:
    """Return a function that builds a network of the library; it accepts options of its configuration."""

    def build(architecture: str, **overrides: object) -> PreTrainedModel:
        return plain_network(tiny_detector(architecture, config_overrides=overrides))

    return build


@pytest.mark.parametrize("variant", VARIANTS)
def test_onnxruntime_equals_torch_at_untraced_sizes(tiny_network, variant: str, tmp_path: Path) -> None:
    architecture, overrides = VARIANTS[variant]
    network = tiny_network(architecture, **overrides)
    assert write_onnx(network, tmp_path / "model.onnx") < 1e-5
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    uses_mask = family_of(network.config).uses_mask
    for num_images, height, width in ((4, 160, 128), (1, 333, 200) if uses_mask else (1, 320, 192)):
        pixel_values = torch.randn(num_images, 3, height, width)
        pixel_mask = torch.ones(num_images, height, width, dtype=torch.int64)
        pixel_mask[0, height // 2 :] = 0
        if not uses_mask:
            pixel_values[0, :, height // 2 :] = 0
        found = session.run(
            ["logits", "pred_boxes"],
            {"pixel_values": pixel_values.numpy(), "pixel_mask": pixel_mask.numpy()},
        )
        with torch.no_grad():
            expected = network(pixel_values=pixel_values, pixel_mask=pixel_mask)
        # Another order of float32 sums, in values of about 1.
        assert torch.allclose(torch.from_numpy(found[0]), expected.logits, atol=1e-5)
        assert torch.allclose(torch.from_numpy(found[1]), expected.pred_boxes, atol=1e-5)


def test_a_trace_that_fixes_the_image_size_is_refused_by_the_comparison(
    tiny_network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("detr_dist.inference.onnx.DeformableDetrMultiscaleDeformableAttention", ())
    with pytest.raises(DetrDistError, match=r"differ from torch's by .* more than"):
        write_onnx(tiny_network("deformable_detr"), tmp_path / "model.onnx")


def test_a_network_with_non_finite_outputs_is_refused(tiny_network, tmp_path: Path) -> None:
    network = tiny_network("detr")
    torch.nn.init.constant_(network.class_labels_classifier.bias, float("nan"))
    with pytest.raises(DetrDistError, match="logits of this detr differ from torch's by nan"):
        write_onnx(network, tmp_path / "model.onnx")


def test_a_network_that_cannot_be_traced_fails_with_one_line(
    tiny_network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = tiny_network("detr")
    monkeypatch.setattr(network.model.encoder, "forward", lambda **_: 1 / 0)
    with pytest.raises(DetrDistError, match=r"this detr cannot be exported .*division by zero"):
        write_onnx(network, tmp_path / "model.onnx")


def test_a_missing_package_is_named_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        "detr_dist.inference.onnx.find_spec", lambda name: None if name == "onnx" else find_spec(name)
    )
    with pytest.raises(UsageError, match=r"needs onnx: pip install 'detr_dist\[export\]'"):
        check_onnx_packages()
