"""Settings passed to DeepSpeed, contradictions between them and ours, and synchronised batch norm."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from detr_dist.config import TrainingConfig
from detr_dist.errors import UsageError
from detr_dist.models.detector import Detector, plain_network
from detr_dist.training.strategy import synchronise_batch_norm, zero_plugin

SETTINGS = TrainingConfig(batch_size=3, gradient_accumulation_steps=2, gradient_clip=0.5)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Set variables like `accelerate launch`: a stage and further variables, or a file of DeepSpeed's own."""

    def launch(stage: int = 2, file: dict[str, object] | None = None, **variables: str) -> None:
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", str(stage))
        for name, value in variables.items():
            monkeypatch.setenv(f"ACCELERATE_{name}", value)
        if file is not None:
            path = tmp_path / "deepspeed.json"
            path.write_text(json.dumps({"zero_optimization": {"stage": stage}} | file))
            monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(path))

    return launch


def test_without_deepspeed_nothing_is_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED", raising=False)
    assert zero_plugin(SETTINGS, 2) is None


@pytest.mark.parametrize(
    "file",
    [
        None,
        {},
        {"gradient_clipping": "auto", "train_batch_size": "auto", "bf16": {"enabled": "auto"}},
        {"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}},
    ],
)
def test_unset_launcher_values_are_filled_from_our_configuration(
    launched, file: dict[str, object] | None
) -> None:
    launched(3, file)
    plugin = zero_plugin(SETTINGS.model_copy(update={"mixed_precision": "bf16"}), 4)
    assert plugin is not None
    settings = plugin.deepspeed_config
    assert (settings["train_micro_batch_size_per_gpu"], settings["train_batch_size"]) == (3, 24)
    assert (settings["gradient_accumulation_steps"], settings["gradient_clipping"]) == (2, 0.5)
    assert settings["zero_optimization"]["stage"] == 3
    assert "auto" not in settings["zero_optimization"].values()
    assert "bf16" not in settings
    assert settings["torch_autocast"] == {
        "enabled": True,
        "dtype": "bfloat16",
        "lower_precision_safe_modules": [],
    }


def test_equal_values_are_no_contradiction(launched) -> None:
    launched(2, {"gradient_clipping": 0.5, "gradient_accumulation_steps": 2, "train_batch_size": 12})
    assert zero_plugin(SETTINGS, 2) is not None


@pytest.mark.parametrize(
    ("file", "parts"),
    [
        ({"gradient_clipping": 1.0}, ["gradient_clipping is 1.0", "training.gradient_clip is 0.5"]),
        (
            {"gradient_accumulation_steps": 4},
            ["gradient_accumulation_steps is 4", "training.gradient_accumulation_steps is 2"],
        ),
        (
            {"train_micro_batch_size_per_gpu": 8},
            ["train_micro_batch_size_per_gpu is 8", "training.batch_size is 3"],
        ),
        ({"train_batch_size": 8}, ["train_batch_size is 8", "is 12"]),
        ({"bf16": {"enabled": True}}, ["section bf16"]),
        ({"optimizer": {"type": "Adam"}}, ["section optimizer"]),
    ],
)
def test_a_contradiction_names_both_values(launched, file: dict[str, object], parts: list[str]) -> None:
    launched(2, file)
    with pytest.raises(UsageError) as caught:
        zero_plugin(SETTINGS, 2)
    assert all(part in str(caught.value) for part in parts), caught.value
    assert "\n" not in str(caught.value)


def test_gradient_clipping_in_accelerate_settings_is_also_compared(launched) -> None:
    launched(GRADIENT_CLIPPING="1.0")
    with pytest.raises(UsageError, match=r"gradient_clipping is 1\.0 .* training\.gradient_clip is 0\.5"):
        zero_plugin(SETTINGS, 2)


@pytest.mark.parametrize(
    ("stage", "variables", "changes", "part"),
    [
        (0, {}, {}, "ZeRO stage 0"),
        (2, {"DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "nvme"}, {}, "nvme"),
        (2, {}, {"mixed_precision": "fp16"}, "training.mixed_precision=fp16"),
        (3, {}, {"compile_model": True}, "training.compile_model=true"),
    ],
)
def test_unsupported_settings_are_reported(
    launched, stage: int, variables: dict[str, str], changes: dict[str, object], part: str
) -> None:
    launched(stage, **variables)
    with pytest.raises(UsageError, match=part):
        zero_plugin(SETTINGS.model_copy(update=changes), 2)


def test_an_unreadable_file_is_reported(launched, monkeypatch: pytest.MonkeyPatch) -> None:
    launched()
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", "nowhere.json")
    with pytest.raises(UsageError, match=r"nowhere\.json"):
        zero_plugin(SETTINGS, 2)


def test_synchronised_batch_norm_changes_neither_weights_nor_saved_models(detector: Detector) -> None:
    images = torch.randint(0, 255, (1, 3, 64, 96), dtype=torch.uint8)
    batch = images, torch.tensor([[64, 96]])
    before, expected = detector.state_dict(), detector.eval()(*batch)
    synchronise_batch_norm(detector.network)
    norms = [module for module in detector.modules() if isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm)]
    assert norms
    assert {type(norm) for norm in norms} == {nn.SyncBatchNorm}
    torch.testing.assert_close(detector.state_dict(), before, rtol=0, atol=0)
    torch.testing.assert_close(detector(*batch), expected, rtol=0, atol=0)
    assert not any(isinstance(module, nn.SyncBatchNorm) for module in plain_network(detector).modules())


def test_frozen_batch_norm_is_not_synchronised(tiny_detector: Callable[..., Detector]) -> None:
    detector = tiny_detector("detr", freeze_batch_norm=True)
    kinds = [type(module) for module in detector.modules()]
    synchronise_batch_norm(detector.network)
    assert [type(module) for module in detector.modules()] == kinds


def test_synchronised_batch_norm_of_timm_keeps_its_activation() -> None:
    from timm.layers import BatchNormAct2d

    network = nn.Sequential(BatchNormAct2d(4)).eval()
    synchronise_batch_norm(network)
    assert isinstance(network[0], nn.SyncBatchNorm)
    assert bool((network(-torch.ones(1, 4, 2, 2)) == 0).all())
