"""How long training waits for a checkpoint, against how long the complete save takes.

    python scripts/benchmarks/checkpoint.py [--folder DIR] [--rounds 5] [--ema] [--device cuda]
        [--json FILE]

Saves a DETR with a ResNet-50 and the state of its optimizer, as a run does: copied to the host while training
waits, then written, flushed to disk and hashed in the background. The goal is that training waits at most a
third.
"""

import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from timing import command_line, publish

from detr_dist.config import Config, ModelConfig, TrainingConfig
from detr_dist.data.sampling import StepPlan
from detr_dist.distributed import HostGroup
from detr_dist.models.average import WeightAverage
from detr_dist.models.build import build_detector
from detr_dist.models.criterion import SetCriterion
from detr_dist.models.detector import Detector
from detr_dist.training.callback import Callbacks
from detr_dist.training.checkpoint import RunFacts, take_snapshot
from detr_dist.training.loop import Training, TrainState
from detr_dist.training.optim import build_optimizer, build_scheduler
from detr_dist.training.saver import Saver
from detr_dist.training.signals import StopSignals
from detr_dist.training.step_sync import StepSync
from detr_dist.training.strategy import Replicated

GOAL = 1 / 3


def build_training(device: str, *, ema_decay: float) -> tuple[Training, Detector, RunFacts]:
    """A run after its first step: every parameter has its optimizer state."""
    config = Config(
        model=ModelConfig(pretrained_backbone=False), training=TrainingConfig(ema_decay=ema_decay)
    )
    classes = ["player", "ball"]
    accelerator = Accelerator(cpu=device == "cpu")
    detector = build_detector(config.model, classes).to(accelerator.device)
    optimizer = build_optimizer(detector, config.training)
    for parameter in detector.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()
    plan = StepPlan(num_samples=8, batch_size=4, num_processes=1, accumulation=1)
    training = Training(
        accelerator=accelerator,
        strategy=Replicated(),
        step_sync=StepSync(HostGroup(accelerator), StopSignals()),
        model=detector,
        average=WeightAverage(detector, ema_decay),
        criterion=SetCriterion(detector.loss_settings),
        optimizer=accelerator.prepare(optimizer),
        scheduler=build_scheduler(optimizer, config.training, total_steps=10),
        plan=plan,
        total_steps=10,
        seed=0,
        gradient_clip=0.1,
        patience=0,
    )
    facts = RunFacts(
        config=config,
        class_names=classes,
        num_train_images=plan.num_samples,
        data_sha256="0",
        num_processes=1,
        global_batch_size=plan.global_batch_size,
        init_from=None,
        mlflow_run_id=None,
        versions={},
    )
    return training, detector, facts


def measure(
    folder: Path, rounds: int, training: Training, detector: Detector, facts: RunFacts
) -> dict[str, float]:
    """Medians over the rounds, after one that does not count."""
    saver = Saver(
        folder, keep_last=2, tracker=None, pack_model=lambda weights, card: None, callbacks=Callbacks()
    )
    waits_s, wholes_s = [], []
    for step in range(rounds + 1):
        take = partial(take_snapshot, training, detector, TrainState(step=step), facts)
        began_at = time.perf_counter()
        saver.save(take, [f"step_{step}", "last"])
        waits_s.append(time.perf_counter() - began_at)
        saver.wait()
        wholes_s.append(time.perf_counter() - began_at)
    saver.finish()
    saver.close()
    size = sum(path.stat().st_size for path in (folder / "last").iterdir())
    waits_s, wholes_s = waits_s[1:], wholes_s[1:]
    return {
        "size_mib": size / 2**20,
        "training_waits_s": statistics.median(waits_s),
        "whole_save_s": statistics.median(wholes_s),
        "share": statistics.median(wait / whole for wait, whole in zip(waits_s, wholes_s, strict=True)),
    }


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder if left out")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ema", action="store_true", help="save a moving average of the weights as well")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    prepared = build_training(options.device, ema_decay=0.999 if options.ema else 0.0)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        figures = measure(Path(folder), options.rounds, *prepared)
    goals = {"share": f"at most {GOAL:.2f}"}
    publish([figures], options.json, device=options.device, goals=goals, share=figures["share"])


if __name__ == "__main__":
    main()
