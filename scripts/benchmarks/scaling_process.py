"""Measure the step of one training process for scaling.py, which starts it with `accelerate launch`.

    accelerate launch --config_file FILE scripts/benchmarks/scaling_process.py OUT.json CONFIG EDGE ROUNDS

The step is the package's own, on one batch of square images in memory. It alternates with the same step
without communication, which all processes run concurrently.
"""

import itertools
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from timing import medians, seconds_of, take_turns
from torch.nn.parallel import DistributedDataParallel

from detr_dist.config import load_config
from detr_dist.data.dataset import Batch, Sample, collate
from detr_dist.data.sampling import StepPlan
from detr_dist.distributed import HostGroup, build_accelerator, group_of_processes
from detr_dist.models.average import WeightAverage
from detr_dist.models.build import build_detector
from detr_dist.models.criterion import SetCriterion
from detr_dist.numerics import resolve_precision
from detr_dist.serving.precision import set_numerics
from detr_dist.training.loop import Training, train_step
from detr_dist.training.optim import build_optimizer, build_scheduler
from detr_dist.training.signals import StopSignals
from detr_dist.training.step_sync import StepSync
from detr_dist.training.strategy import Replicated

WARM_UP = 5
EXCHANGED = [0.0] * 6  # as many values as a step exchanges


def build(config_path: str, accelerator: Accelerator) -> Training:
    config = load_config(Path(config_path), ["model.pretrained_backbone=false"])
    torch.manual_seed(0)
    detector = build_detector(config.model, ["player", "ball"]).to(accelerator.device)
    optimizer = build_optimizer(detector, config.training)
    scheduler = build_scheduler(optimizer, config.training, total_steps=10**6)
    strategy = Replicated()
    model, prepared = strategy.prepare(accelerator, detector.train(), optimizer)
    batch_size = config.training.batch_size
    return Training(
        accelerator=accelerator,
        strategy=strategy,
        step_sync=StepSync(HostGroup(accelerator), StopSignals()),
        model=model,
        average=WeightAverage(detector, 0.0),
        criterion=SetCriterion(detector.loss_settings),
        optimizer=prepared,
        scheduler=scheduler,
        plan=StepPlan(10**6, batch_size, accelerator.num_processes, 1),
        total_steps=10**6,
        seed=0,
        gradient_clip=config.training.gradient_clip,
        patience=0,
    )


def ready_batches(batch_size: int, edge: int) -> Iterator[list[Batch]]:
    generator = torch.Generator().manual_seed(0)
    samples = [
        Sample(
            image=torch.randint(256, (3, edge, edge), dtype=torch.uint8, generator=generator),
            labels=torch.randint(2, (10,), generator=generator),
            boxes_cxcywh=0.2 + 0.3 * torch.rand(10, 4, generator=generator),
            image_id=image_id,
            original_size_hw=(edge, edge),
        )
        for image_id in range(batch_size)
    ]
    return itertools.repeat([collate(samples)])


def median_s(action: Callable[[], object], rounds: int, device: torch.device) -> float:
    return statistics.median([seconds_of(action, device) for _ in range(WARM_UP + rounds)][WARM_UP:])


def measure(accelerator: Accelerator, config_path: str, edge: int, rounds: int) -> dict[str, float]:
    training, device = build(config_path, accelerator), accelerator.device
    batches, steps = ready_batches(training.plan.batch_size, edge), itertools.count()
    host = HostGroup(accelerator)
    gradients = [each for each in training.model.parameters() if each.requires_grad]
    flat = torch.zeros(sum(each.numel() for each in gradients), device=device)

    def step() -> None:
        number = next(steps)
        train_step(training, number, training.step_sync.next_step(number, batches))

    agreed = training.step_sync.next_step(next(steps), batches)
    alone = replace(training, model=accelerator.unwrap_model(training.model))

    def backward_s() -> float:
        """Return the seconds of a backward pass without the exchange of gradients."""
        batch = agreed.group[0].to(device)
        is_ddp = isinstance(training.model, DistributedDataParallel)
        with training.model.no_sync() if is_ddp else nullcontext():
            outputs = training.model(batch.images, batch.sizes_hw, batch.is_padded)
            targets = batch.labels, batch.boxes_cxcywh, batch.num_boxes
            loss = training.criterion(outputs, *targets, agreed.counts).total
            took_s = seconds_of(loss.backward, device)
        training.optimizer.zero_grad()
        return took_s

    def all_reduce(tensor: torch.Tensor) -> Callable[[], object]:
        return (lambda: dist.all_reduce(tensor)) if accelerator.num_processes > 1 else (lambda: None)

    ways = {"step_s": step, "alone_s": lambda: train_step(alone, next(steps), agreed)}
    seconds = take_turns(ways, rounds=rounds, warm_up=WARM_UP, device=device)
    # The slowest process of each round, because a synchronised step waits for it.
    slowest_s = [max(of_round) for of_round in zip(*host.gather_rows(seconds["alone_s"]), strict=True)]
    return {
        **medians(seconds | {"slowest_s": slowest_s}),
        "backward_s": statistics.median([backward_s() for _ in range(WARM_UP + rounds)][WARM_UP:]),
        "exchange_s": median_s(lambda: host.gather_rows(EXCHANGED), rounds, device),
        "all_reduce_s": median_s(all_reduce(flat), rounds, device),
        # A ring of n processes takes 2 (n - 1) steps.
        "latency_s": median_s(all_reduce(flat[:1].clone()), rounds, device)
        / (2 * max(1, accelerator.num_processes - 1)),
        "gradient_bytes": float(flat.nbytes),
        "batch_size": float(training.plan.batch_size),
    }


def main() -> None:
    out_path, config_path, edge, rounds = sys.argv[1:]
    with group_of_processes() as processes:
        config = resolve_precision(load_config(Path(config_path)), HostGroup(processes))
        set_numerics(config.training)
        accelerator = build_accelerator(
            mixed_precision=config.training.mixed_precision, gradient_accumulation_steps=1
        )
        figures = measure(accelerator, config_path, int(edge), int(rounds))
        if accelerator.is_main_process:
            Path(out_path).write_text(json.dumps(figures), encoding="utf-8")


if __name__ == "__main__":
    main()
