"""The learning rate of each parameter, and its schedule."""

import pytest
import torch

from detr_dist.config import TrainingConfig
from detr_dist.models.detector import Detector
from detr_dist.training.optim import build_optimizer, build_scheduler


def learning_rates(total_steps: int, **settings: object) -> list[float]:
    config = TrainingConfig(learning_rate=1.0, **settings)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = build_scheduler(optimizer, config, total_steps)
    rates = []
    for _ in range(total_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


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


def test_the_step_schedule_warms_up_and_drops_after_two_thirds() -> None:
    rates = learning_rates(9, lr_schedule="step", warmup_steps=3)
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 0.1, 0.1, 0.1])


def test_the_cosine_schedule_falls_from_the_peak_towards_zero() -> None:
    rates = learning_rates(10, lr_schedule="cosine", warmup_steps=2)
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1])
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert 0 < rates[-1] < 0.05


def test_the_constant_schedule_does_not_change() -> None:
    assert learning_rates(4, lr_schedule="constant") == [1, 1, 1, 1]
