"""The learning rate and weight decay of each parameter, and the schedule."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoBackbone, AutoConfig

from detr_dist.config import TrainingConfig
from detr_dist.errors import UsageError
from detr_dist.models.detector import Detector
from detr_dist.training.optim import build_optimizer, build_scheduler, parameter_groups

VIT = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}
VITS = {
    "rf_detr_dinov2": {"image_size": 28, "patch_size": 14, "out_features": ["stage3"]},
    "lw_detr_vit": {"image_size": 256},
    "dinov3_vit": {"image_size": 32, "num_register_tokens": 2},
    "dinov2_with_registers": {"image_size": 32},
}


def learning_rates(total_steps: int, *, last_steps: int = 0, **settings: object) -> list[float]:
    config = TrainingConfig(learning_rate=1.0, **settings)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = build_scheduler(optimizer, config, total_steps, last_steps=last_steps)
    rates = []
    for _ in range(total_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def settings_by_name(detector: nn.Module, **settings: object) -> dict[str, tuple[float, float]]:
    """Return learning rate and weight decay of each trained parameter."""
    groups = parameter_groups(detector, TrainingConfig(**settings))
    of_id = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    return {name: of_id[id(p)] for name, p in detector.named_parameters() if p.requires_grad}


class WithBackbone(nn.Module):
    """A detector as far as its parameters are concerned."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        model = nn.ModuleDict({"backbone": backbone, "decoder": nn.Linear(2, 2), "query": nn.Linear(2, 2)})
        self.network = nn.ModuleDict({"model": model})

    def backbone_parameters(self) -> Any:
        return self.network["model"]["backbone"].parameters()


@pytest.fixture
def with_vit() -> Callable[[str], WithBackbone]:
    def build(model_type: str) -> WithBackbone:
        config = AutoConfig.for_model(model_type, **VIT, **VITS[model_type])
        return WithBackbone(AutoBackbone.from_config(config))

    return build


def test_the_backbone_has_its_own_rate_and_norms_and_biases_do_not_decay(detector: Detector) -> None:
    optimizer = build_optimizer(detector, TrainingConfig(weight_decay=0.1))
    settings = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    backbone = {id(p) for p in detector.backbone_parameters()}
    assert set(settings) == {id(p) for p in detector.parameters()}
    for parameter in detector.parameters():
        rate, decay = settings[id(parameter)]
        assert rate == (1e-5 if id(parameter) in backbone else 1e-4)
        assert decay == (0.0 if parameter.ndim == 1 else 0.1)
    assert optimizer.param_groups[0]["lr"] == 1e-4


def test_groups_and_their_order_are_those_of_earlier_versions(detector: Detector) -> None:
    # An optimizer state is saved by position in these groups.
    backbone = {id(p) for p in detector.backbone_parameters()}
    expected = [
        [p for p in detector.parameters() if (id(p) in backbone, p.ndim <= 1) == key]
        for key in [(False, False), (False, True), (True, False), (True, True)]
    ]
    groups = [group["params"] for group in build_optimizer(detector, TrainingConfig()).param_groups]
    assert [[id(p) for p in group] for group in groups] == [[id(p) for p in group] for group in expected]


@pytest.mark.parametrize("model_type", VITS)
def test_layers_of_a_vit_learn_more_the_deeper_they_are(model_type: str, with_vit: Callable) -> None:
    rates = settings_by_name(with_vit(model_type), layer_decay=0.5, learning_rate_backbone=1.0)
    prefix = "network.model.backbone."
    for name, (rate, _) in rates.items():
        if not name.startswith(prefix):
            assert rate == 1e-4
        elif "layer." in name:  # of the layers 0 to 4, embeddings and norm included, these are 1 to 3
            layer = 1 + int(name.partition("layer.")[2].partition(".")[0])
            assert rate == 0.5 ** (4 - layer)
        else:
            assert rate == (0.5**4 if name.startswith(f"{prefix}embeddings.") else 1.0)
    assert len({rate for name, (rate, _) in rates.items() if name.startswith(prefix)}) >= 4


def test_layers_that_are_not_trained_do_not_count(with_vit: Callable) -> None:
    detector = with_vit("rf_detr_dinov2")
    detector.get_submodule("network.model.backbone.encoder.layer.2").requires_grad_(False)
    rates = settings_by_name(detector, layer_decay=0.5, learning_rate_backbone=1.0)
    assert rates["network.model.backbone.encoder.layer.1.norm1.weight"][0] == 0.5
    assert rates["network.model.backbone.embeddings.patch_embeddings.projection.bias"][0] == 0.5**3


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [
        ("convnext_atto", "stages_0.blocks.0.norm.bias", "stages_3.blocks.1.norm.bias"),
        ("resnet18", "layer1.0.bn1.bias", "layer4.1.bn2.bias"),
        ("vit_tiny_patch16_224", "model.blocks.0.norm1.bias", "model.blocks.11.norm1.bias"),
        ("hgnetv2_b0", "stages_0.blocks.0.aggregation.1.bn.bias", "stages_3.blocks.0.aggregation.1.bn.bias"),
        ("tf_efficientnet_lite0", "blocks.0.0.bn1.bias", "blocks.6.0.bn3.bias"),
    ],
)
def test_layers_of_timm_backbones_are_found(name: str, first: str, last: str) -> None:
    import timm

    with torch.device("meta"):
        detector = WithBackbone(timm.create_model(name, features_only=True))
    rates = settings_by_name(detector, layer_decay=0.5, learning_rate_backbone=1.0)
    of_backbone = {
        each.removeprefix("network.model.backbone."): rate
        for each, (rate, _) in rates.items()
        if each.startswith("network.model.backbone.")
    }
    num_layers = len(set(of_backbone.values())) - 1  # without the stem
    assert next(iter(of_backbone.values())) == 0.5 ** (num_layers + 1)
    assert of_backbone[first] == 0.5**num_layers
    assert of_backbone[last] == 0.5


def test_a_layer_decay_without_layers_is_refused() -> None:
    detector = WithBackbone(nn.Sequential(nn.Conv2d(3, 4, 1)))
    with pytest.raises(UsageError, match=r"^training\.layer_decay: .*network\.model\.backbone\.0\.weight"):
        parameter_groups(detector, TrainingConfig(layer_decay=0.8))
    assert parameter_groups(detector.requires_grad_(False), TrainingConfig(layer_decay=0.8)) == []


@pytest.mark.parametrize("model_type", VITS)
def test_embeddings_and_tokens_of_a_vit_do_not_decay(model_type: str, with_vit: Callable) -> None:
    detector = with_vit(model_type)
    settings = settings_by_name(detector, weight_decay=0.1)
    added = ("position_embeddings", "cls_token", "mask_token", "register_tokens")
    for name, parameter in detector.named_parameters():
        assert settings[name][1] == (0.0 if parameter.ndim == 1 or name.endswith(added) else 0.1)


def test_query_embeddings_decay_as_in_the_paper(tiny_detector: Callable[..., Detector]) -> None:
    name = "network.model.query_position_embeddings.weight"
    assert settings_by_name(tiny_detector("detr"), weight_decay=0.1)[name] == (1e-4, 0.1)


def test_the_decoder_may_have_a_rate_of_its_own(tiny_detector: Callable[..., Detector]) -> None:
    detector = tiny_detector("detr")
    settings = settings_by_name(detector, learning_rate_decoder_factor=0.7)
    of_decoder = {name for name, (rate, _) in settings.items() if rate == pytest.approx(0.7e-4)}
    assert of_decoder == {name for name in settings if name.startswith("network.model.decoder.")} != set()
    first = build_optimizer(detector, TrainingConfig(learning_rate_decoder_factor=0.7)).param_groups[0]
    assert first["lr"] == 1e-4  # the one that is reported


def test_the_step_schedule_warms_up_and_drops_after_two_thirds() -> None:
    rates = learning_rates(9, lr_schedule="step", warmup_steps=3)
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 0.1, 0.1, 0.1])


def test_the_cosine_schedule_falls_from_the_peak_towards_zero() -> None:
    rates = learning_rates(10, lr_schedule="cosine", warmup_steps=2)
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1])
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert 0 < rates[-1] < 0.05


def test_the_flat_cosine_schedule_is_flat_falls_and_is_flat_again() -> None:
    settings = {"lr_schedule": "flat_cosine", "lr_flat_share": 0.4, "lr_final_factor": 0.2}
    rates = learning_rates(20, last_steps=4, warmup_steps=3, **settings)
    assert rates[:3] == pytest.approx([0.25, 0.5, 0.75])
    assert rates[3:9] == [1.0] * 6
    falling = [0.2 + 0.8 * (1 + math.cos(math.pi * i / 8)) / 2 for i in range(8)]
    assert rates[8:16] == pytest.approx(falling)
    assert rates[16:] == pytest.approx([0.2] * 4)


def test_the_flat_cosine_schedule_drops_if_the_flat_part_reaches_its_end() -> None:
    rates = learning_rates(10, last_steps=5, lr_schedule="flat_cosine", lr_flat_share=0.8)
    assert rates == pytest.approx([1] * 9 + [0.5])


def test_a_quadratic_warm_up_is_slower_at_first() -> None:
    rates = learning_rates(5, lr_schedule="constant", warmup_steps=3, warmup="quadratic")
    assert rates == pytest.approx([1 / 16, 1 / 4, 9 / 16, 1, 1])


def test_the_constant_schedule_does_not_change() -> None:
    assert learning_rates(4, lr_schedule="constant") == [1, 1, 1, 1]


@pytest.mark.parametrize("schedule", ["step", "cosine", "flat_cosine", "constant"])
def test_a_resumed_schedule_continues_at_its_step(schedule: str) -> None:
    settings = {"lr_schedule": schedule, "warmup_steps": 2, "warmup": "quadratic"}
    expected = learning_rates(12, last_steps=2, **settings)
    for done in range(12):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        build_scheduler(
            optimizer, TrainingConfig(learning_rate=1.0, **settings), 12, last_steps=2, done_steps=done
        )
        assert optimizer.param_groups[0]["lr"] == expected[done]
