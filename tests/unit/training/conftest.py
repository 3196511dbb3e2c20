"""A tiny detector in training, and its checkpoints."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from harness.data import TINY_BACKBONE

from detr_dist.config import Config, ModelConfig, TrainingConfig
from detr_dist.data.sampling import StepPlan
from detr_dist.distributed import HostGroup
from detr_dist.models.average import WeightAverage
from detr_dist.models.build import build_detector
from detr_dist.models.criterion import SetCriterion
from detr_dist.models.detector import Detector
from detr_dist.training.checkpoint import MANIFEST, RunFacts, Snapshot, take_snapshot, write_checkpoint
from detr_dist.training.loop import Training, TrainState
from detr_dist.training.optim import build_optimizer, build_scheduler
from detr_dist.training.signals import StopSignals
from detr_dist.training.step_sync import StepSync
from detr_dist.training.strategy import Replicated

CLASS_NAMES = ["player", "ball"]


@pytest.fixture(scope="session")
def tiny_model() -> ModelConfig:
    return ModelConfig(
        backbone=TINY_BACKBONE | {"hidden_sizes": [8, 8, 8, 8]},
        pretrained_backbone=False,
        hidden_dim=32,
        num_encoder_layers=1,
        num_decoder_layers=1,
        config_overrides={"encoder_ffn_dim": 32, "decoder_ffn_dim": 32},
    )


@pytest.fixture
def detector(tiny_model: ModelConfig) -> Detector:
    torch.manual_seed(0)
    return build_detector(tiny_model, CLASS_NAMES)


@pytest.fixture
def training(detector: Detector) -> Training:
    """Take one optimizer step, on gradients of 1, and one update of the average."""
    settings, accelerator = TrainingConfig(warmup_steps=5), Accelerator(cpu=True)
    optimizer = build_optimizer(detector, settings)
    scheduler = build_scheduler(optimizer, settings, total_steps=20)
    average = WeightAverage(detector, decay=0.9)
    for parameter in detector.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    scheduler.step()
    average.update(0)
    return Training(
        accelerator=accelerator,
        strategy=Replicated(),
        step_sync=StepSync(HostGroup(accelerator), StopSignals(), num_queries=detector.num_queries),
        model=detector,
        average=average,
        criterion=SetCriterion(detector.loss_settings),
        optimizer=accelerator.prepare(optimizer),
        scheduler=scheduler,
        plan=StepPlan(num_samples=40, batch_size=4, num_processes=1, accumulation=1),
        total_steps=20,
        seed=42,
        gradient_clip=0.1,
        patience=0,
    )


@pytest.fixture
def facts(tiny_model: ModelConfig) -> RunFacts:
    return RunFacts(
        config=Config(model=tiny_model),
        class_names=CLASS_NAMES,
        num_train_images=40,
        data_sha256="0",
        num_processes=1,
        global_batch_size=4,
        init_from=None,
        mlflow_run_id="0" * 32,
        versions={"torch": torch.__version__},
    )


@pytest.fixture
def snapshot_at(training: Training, detector: Detector, facts: RunFacts) -> Callable[..., Snapshot]:
    """Return a function that takes a snapshot of the tiny detector at a step, with the given state."""
    return lambda step, **state: take_snapshot(training, detector, TrainState(step=step, **state), facts)


@pytest.fixture
def checkpoint(snapshot_at: Callable[..., Snapshot], tmp_path: Path) -> Path:
    """Write a checkpoint with all its files."""
    write_checkpoint(tmp_path / "checkpoints", ["epoch_1"], snapshot_at(10, closed_step=10))
    return tmp_path / "checkpoints" / "epoch_1"


def rewrite(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / MANIFEST).write_text(json.dumps(manifest))


@pytest.fixture(name="rewrite")
def rewrite_fixture() -> Callable[[Path, str, bytes], None]:
    """Return a function that replaces a file of a checkpoint and, like a forger, its manifest entry."""
    return rewrite
