"""Measure the parts of a training step, from the bare network to the complete command.

    python scripts/benchmarks/train_step.py [--config YAML] [--train-dir DIR] [section.key=value ...]

Pass your configuration and data to find your own bottleneck. The default configuration is that of the
quickstart on the CPU, and on a GPU configs/training.yaml, compiled, in bf16, with 8 images a step and
random weights, so that nothing is downloaded. The default data are the quickstart's scenes on the CPU, and
on a GPU images of 1280x720, resized to 750x1333.

Each row includes all rows above it except the library's loss:

    bare network           forward, backward and AdamW, on images that are on the device already
    with our criterion     from bytes to losses: conversion, normalisation, matching, losses
    the library's loss     the bare network with its own loss instead (`labels=`), never compiled
    with the loop          `train_step` as in training: synchronisation, clipping, schedule, average
    with loader            the same with images from loader processes, prefetched
    whole command          `detr-dist train` in its own process, including waiting for data

Steps are measured in blocks, and the device is synchronised only at the end of each block. On the CPU the
loader processes have their own cores, as they do beside a GPU; the other cores compute. Images are repeated
to one long epoch and the learning rate stays near 0, so that only steps are measured. "of the bare" is the
median of the ratios of each round.
"""

import argparse
import copy
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from loader import write_data, write_photos
from mlflow import MlflowClient
from timing import (
    command_line,
    median_ratio,
    medians,
    peak_memory_mib,
    publish,
    reset_peak_memory,
    seconds_of,
    take_turns,
)
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from detr_dist.config import Config, load_config
from detr_dist.data.coco import CocoData, load_data
from detr_dist.data.dataset import Batch
from detr_dist.data.loading import num_loader_processes
from detr_dist.data.synthetic import make_data
from detr_dist.distributed import HostGroup, build_accelerator, group_of_processes
from detr_dist.errors import DetrDistError, report_error
from detr_dist.models.criterion import StepCounts
from detr_dist.models.detector import IMAGENET
from detr_dist.numerics import resolve_precision
from detr_dist.serving.precision import autocast, set_numerics
from detr_dist.tracking.tracker import tracked
from detr_dist.training.callback import Callbacks
from detr_dist.training.loop import StepDone, Training, TrainState, train_step
from detr_dist.training.observer import RunObserver
from detr_dist.training.optim import build_optimizer
from detr_dist.training.output import RunTrackers, open_output, open_run
from detr_dist.training.setup import Setup, set_up
from detr_dist.training.signals import StopSignals
from detr_dist.training.trainer import assemble, training_data

REPOSITORY = Path(__file__).parents[2]
BARE, CRITERION, LIBRARY = "bare network", "with our criterion", "the library's loss"
LOOP, LOADER, COMMAND = "with the loop", "with loader", "whole command"
BLOCK_STEPS = 5
STEPS_TO_WARM_UP = 30  # in the complete command

WAYS_TO_COMPUTE = ("mixed_precision", "compile_model", "channels_last", "gradient_checkpointing")
ON_GPU = [
    "training.batch_size=8",
    "training.mixed_precision=bf16",
    "training.compile_model=true",
    "training.channels_last=true",
    "data.augmentation=light",
    "data.num_workers=12",
]


@dataclass
class Workbench:
    """A run that is ready to train, and its first batch for the rows without a loader."""

    setup: Setup
    training: Training
    observer: RunObserver
    groups: Iterator[list[Batch]]
    state: TrainState
    batch: Batch
    idle: torch.optim.Optimizer = field(init=False)
    """The optimizer of training with learning rates of 0: the same work without a change of weights."""

    def __post_init__(self) -> None:
        self.idle = self._idle(self.setup.detector)
        self.library = copy.deepcopy(self.setup.detector)
        self.library_idle = self._idle(self.library)
        on_device = self.batch.to(self.device)
        self.images, self.sizes_hw, self.is_padded = on_device.images, on_device.sizes_hw, on_device.is_padded
        self.labels, self.boxes_cxcywh = on_device.labels, on_device.boxes_cxcywh
        mean, std = (
            torch.tensor(values, device=self.device).view(3, 1, 1) for values in (IMAGENET.mean, IMAGENET.std)
        )
        layout = torch.channels_last if self.setup.config.training.channels_last else torch.contiguous_format
        self.pixels = ((self.images / 255 - mean) / std).contiguous(memory_format=layout)
        self.mask = torch.zeros(self.images[:, 0].shape, dtype=torch.bool, device=self.device)
        for mask, (height, width) in zip(self.mask, self.batch.sizes_hw.tolist(), strict=True):
            mask[:height, :width] = True
        # Two rows bypass the detector; their network keeps the attention masking of this call. Without
        # gradients, which would compile the regions again.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            for detector in (self.setup.detector, self.library):
                detector(self.images, self.sizes_hw, self.is_padded)
        del self.library.network._loss_function  # restores the library's loss
        self.resident = itertools.repeat([self.batch])

    @property
    def device(self) -> torch.device:
        return self.setup.accelerator.device

    def bare(self) -> None:
        with self._autocast():
            outputs = self.setup.detector.network(pixel_values=self.pixels, pixel_mask=self.mask, labels=())
        loss = torch.stack([output.float().mean() for output in outputs.loss_dict.values()]).sum()
        self._learn(loss, self.idle)

    def with_criterion(self) -> None:
        counts = StepCounts(float(len(self.labels)), float(len(self.images)))
        with self._autocast():
            outputs = self.setup.detector(self.images, self.sizes_hw, self.is_padded)
        losses = self.training.criterion(
            outputs, self.labels, self.boxes_cxcywh, self.batch.num_boxes, counts
        )
        self._learn(losses.total, self.idle)

    def with_library_loss(self) -> None:
        per_image = zip(
            self.labels.split(self.batch.num_boxes),
            self.boxes_cxcywh.split(self.batch.num_boxes),
            strict=True,
        )
        targets = [{"class_labels": labels, "boxes": boxes} for labels, boxes in per_image]
        with self._autocast():
            outputs = self.library.network(pixel_values=self.pixels, pixel_mask=self.mask, labels=targets)
        self._learn(outputs.loss, self.library_idle)

    def with_loop(self) -> None:
        self.step(self.resident)

    def with_loader(self) -> None:
        self.step(self.groups)

    def step(self, groups: Iterator[list[Batch]]) -> StepDone:
        agreed = self.training.step_sync.next_step(self.state.step, groups)
        done = train_step(self.training, self.state.step, agreed)
        self.state.step += 1
        return done

    def _learn(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def _idle(self, detector: Any) -> torch.optim.Optimizer:
        optimizer = build_optimizer(detector, self.setup.config.training)
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        return optimizer

    def _autocast(self) -> torch.autocast:
        return autocast(self.device, self.setup.config.training.mixed_precision)

    def count_operations(self) -> float:
        """Return the floating-point operations of the bare network's forward and backward that torch counts:
        matrix products and convolutions, on a GPU also attention."""
        with FlopCounterMode(display=False) as counter, torch.compiler.set_stance("force_eager"):
            self.bare()
        return float(counter.get_total_flops())


def main() -> None:
    try:
        run(parse_options())
    except DetrDistError as error:
        report_error(str(error))
        raise SystemExit(error.exit_code) from None


def run(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder, ExitStack() as held:
        config = configure(options, Path(folder))
        if options.device == "cpu":
            os.environ["ACCELERATE_USE_CPU"] = "true"  # even on a host with GPUs; the command inherits it
            num_cores = len(os.sched_getaffinity(0))
            torch.set_num_threads(max(1, num_cores - num_loader_processes(config.data.num_workers)))
        places = place(options, config, Path(folder))
        set_numerics(config.training)
        processes = held.enter_context(group_of_processes())
        config = resolve_precision(config, HostGroup(processes))
        bench = lay_out(config, places, held)
        measured = measure(bench, options.rounds)
        operations, logging_s = bench.count_operations(), measure_logging(bench, options.log_steps)
        report(options, bench, measured, operations, logging_s, whole_command(bench, places, options.runs))


class Places(NamedTuple):
    """The folders of a run."""

    train_dir: Path
    val_dir: Path
    output_dir: Path


def parse_options() -> argparse.Namespace:
    parser = command_line(__doc__)
    parser.add_argument("--config", type=Path, help="configuration (default: see above)")
    parser.add_argument(
        "--train-dir", type=Path, help="folder with images and a COCO JSON (default: generated)"
    )
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"]
    )
    parser.add_argument("--rounds", type=int, default=8, help="blocks of steps per row")
    parser.add_argument("--log-steps", type=int, default=100, help="steps over which logging is measured")
    parser.add_argument("--runs", type=int, default=2, help="runs of the complete command")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU")
    return options


def configure(options: argparse.Namespace, folder: Path) -> Config:
    """Return the user's or the default configuration, without pauses for evaluation and saving."""
    on_gpu = options.device == "cuda"
    path = options.config or REPOSITORY / "configs" / ("training.yaml" if on_gpu else "quickstart.yaml")
    return load_config(
        path,
        [
            *([*without_download(folder), *ON_GPU] if on_gpu and options.config is None else []),
            *options.overrides,
            "training.gradient_accumulation_steps=1",
            "training.num_epochs=1",
            "training.warmup_steps=1000000",  # so that these steps barely change the weights
            f"logging.mlflow_tracking_uri=sqlite:///{folder / 'mlflow.db'}",
            "logging.log_every_steps=10",
        ],
    )


def without_download(folder: Path) -> list[str]:
    """Return settings for the network that users train, with frozen batch norm and first stage, and with
    random weights instead of ImageNet weights."""
    path = folder / "backbone.pth"
    if not path.exists():
        torch.save(timm.create_model("resnet50").state_dict(), path)
    return [f"model.pretrained_backbone={path}"]


def place(options: argparse.Namespace, config: Config, folder: Path) -> Places:
    """Write data for one long epoch, so that nothing happens between timed steps; return the folders."""
    if options.train_dir is not None:
        data = load_data(options.train_dir)
    elif options.device == "cuda":
        (folder / "photos").mkdir()
        data = write_data(folder / "photos", write_photos(folder / "photos", (720, 1280)))
    else:
        make_data(folder / "scenes", num_train=64, num_val=4, seed=0)
        data = load_data(folder / "scenes" / "train")
    blocks = (options.rounds + 4) * BLOCK_STEPS
    num_steps = max(STEPS_TO_WARM_UP + 100, 2 * blocks + options.log_steps)
    write_long_epoch(data, folder / "train", (num_steps + 20) * config.training.batch_size)
    write_long_epoch(data, folder / "val", 1)
    return Places(folder / "train", folder / "val", folder / "out")


def write_long_epoch(data: CocoData, folder: Path, num_images: int) -> None:
    """Write a COCO JSON that repeats the images of `data` up to `num_images`."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id in range(num_images):
        row = image_id % len(data)
        height, width = data.size_hw(row)
        path = str(data.image_path(row).resolve())
        images.append({"id": image_id, "file_name": path, "height": height, "width": width})
        for box, category in zip(*data.training_targets(row), strict=True):
            annotation = {"image_id": image_id, "category_id": int(category), "bbox": box.tolist()}
            annotations.append({"id": len(annotations), **annotation})
    categories = [{"id": index, "name": name} for index, name in enumerate(data.class_names)]
    folder.mkdir()
    document = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations.json").write_text(json.dumps(document), encoding="utf-8")


def lay_out(config: Config, places: Places, held: ExitStack) -> Workbench:
    accelerator = build_accelerator(
        mixed_precision=config.training.mixed_precision, gradient_accumulation_steps=1
    )
    train_data = load_data(places.train_dir)
    val_data = load_data(places.val_dir, classes=train_data.class_names)
    setup = set_up(config, train_data, val_data, accelerator, output_dir=places.output_dir)
    places.output_dir.mkdir()
    trackers = RunTrackers()
    open_run(setup, trackers)
    held.enter_context(tracked(trackers))
    open_output(setup, trackers)
    signals, state = StopSignals(), TrainState()
    training = assemble(setup, signals)
    groups = training_data(setup, training, state)
    observer = RunObserver(setup, training, groups, state, signals, trackers=trackers, callbacks=Callbacks())
    held.callback(observer.close)
    held.callback(groups.close)
    return Workbench(setup, training, observer, groups, state, next(groups)[0])


def measure(bench: Workbench, rounds: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Return the seconds per step of each block. On a GPU also return the peak memory of each row on top of
    the weights and optimizers."""
    memory: dict[str, float] = {}
    on_gpu = bench.device.type == "cuda"

    def block(name: str, action: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            reset_peak_memory(bench.device)
            resident_mib = torch.cuda.memory_allocated() / 2**20 if on_gpu else 0.0
            for _ in range(BLOCK_STEPS):
                action()
            if on_gpu:
                took_mib = peak_memory_mib(bench.device) - resident_mib
                memory[name] = max(memory.get(name, 0.0), took_mib)

        return run

    ways = {
        BARE: bench.bare,
        CRITERION: bench.with_criterion,
        LIBRARY: bench.with_library_loss,
        LOOP: bench.with_loop,
        LOADER: bench.with_loader,
    }
    blocks = {name: block(name, action) for name, action in ways.items()}
    seconds = take_turns(blocks, rounds=rounds, warm_up=2, device=bench.device)
    return {name: [block_s / BLOCK_STEPS for block_s in each] for name, each in seconds.items()}, memory


def measure_logging(bench: Workbench, num_steps: int) -> float:
    """Return the mean seconds per step of logging losses, memory and progress."""
    spent_s = 0.0
    for _ in range(num_steps):
        done = bench.step(bench.resident)
        spent_s += seconds_of(lambda done=done: bench.observer.after_step(bench.state, done), bench.device)
    return spent_s / num_steps


def whole_command(bench: Workbench, places: Places, rounds: int) -> tuple[dict[str, list[float]], float]:
    """Return the seconds per step of the complete command and of the bare network around it, and the
    fraction of time in which the command waited for data."""
    num_steps = 4 * BLOCK_STEPS

    def bare_s() -> float:
        return seconds_of(lambda: [bench.bare() for _ in range(num_steps)], bench.device) / num_steps

    seconds: dict[str, list[float]] = {BARE: [], COMMAND: []}
    wait_shares, before_s = [], bare_s()
    for number in range(rounds):
        step_s, wait_share = run_command(bench.setup.config, places, f"command_{number}")
        after_s = bare_s()
        seconds[BARE].append((before_s + after_s) / 2)
        seconds[COMMAND].append(step_s)
        before_s = after_s
        wait_shares.append(wait_share)
    return seconds, statistics.median(wait_shares)


def run_command(config: Config, places: Places, name: str) -> tuple[float, float]:
    """Return the seconds per step of a real run after its warm-up, from timestamps in MLflow, and the
    fraction of time in which it waited for data."""
    output_dir = places.output_dir.parent / name
    num_steps = STEPS_TO_WARM_UP + 90
    config_path = output_dir.with_suffix(".yaml")
    config_path.write_text(config.to_yaml(), encoding="utf-8")
    command = [sys.executable, "-m", "detr_dist", "train", "--config", config_path]
    command += ["--output-dir", output_dir, "--train-dir", places.train_dir, "--val-dir", places.val_dir]
    command += [f"training.max_steps={num_steps}", f"logging.mlflow_run_name={name}"]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONWARNINGS": "ignore"}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    results = json.loads((output_dir / "results.json").read_text(encoding="utf-8"))
    client = MlflowClient(results["tracking_uri"])
    history = client.get_metric_history(results["run_id"], "train_data_wait_share")
    at_ms = {metric.step: metric.timestamp for metric in history}
    step_s = (at_ms[num_steps] - at_ms[STEPS_TO_WARM_UP]) / 1000 / (num_steps - STEPS_TO_WARM_UP)
    return step_s, statistics.mean(metric.value for metric in history if metric.step > STEPS_TO_WARM_UP)


def report(
    options: argparse.Namespace,
    bench: Workbench,
    measured: tuple[dict[str, list[float]], dict[str, float]],
    operations: float,
    logging_s: float,
    whole: tuple[dict[str, list[float]], float],
) -> None:
    (seconds, memory), (command, wait_share) = measured, whole
    num_images = len(bench.batch.image_ids)
    steps_s = medians(seconds) | {COMMAND: statistics.median(command[COMMAND])}
    share = {name: median_ratio(seconds, name, BARE) for name in seconds}
    share[COMMAND] = median_ratio(command, COMMAND, BARE)
    rows = [
        {
            "row": name,
            "ms": 1000 * step_s,
            "images/s": num_images / step_s,
            "of the bare": share[name],
            "TFLOP/s": operations / step_s / 1e12,
        }
        | ({"MiB beside": memory[name], "MiB an image": memory[name] / num_images} if name in memory else {})
        for name, step_s in steps_s.items()
    ]
    config = bench.setup.config
    publish(
        rows,
        options.json,
        device=bench.device,
        goals={
            "whole_command_of_the_bare": "at most 1.1",
            "data_wait_share": "under 0.03",
            "logging_share": "at most 0.005",
            "speed_over_the_librarys_loss": "at least 1.5 on a GPU, compiled",
        },
        images=list(bench.batch.images.shape),
        boxes=len(bench.labels),
        network=config.model.model_architecture,
        **{name: getattr(config.training, name) for name in WAYS_TO_COMPUTE},
        whole_command_of_the_bare=share[COMMAND],
        data_wait_share=wait_share,
        logging_ms=1000 * logging_s,
        logging_share=logging_s / steps_s[BARE],
        speed_over_the_librarys_loss=steps_s[LIBRARY] / steps_s[COMMAND],
        peak_memory_mib=max(memory.values()) if memory else peak_memory_mib(bench.device),
    )


if __name__ == "__main__":
    main()
