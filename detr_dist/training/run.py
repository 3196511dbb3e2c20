"""A training run from its options to its results: everything is assembled here, nothing is computed."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers.utils import logging as transformers_logging

from detr_dist.config import Config
from detr_dist.data.coco import CocoData, check_same_classes, load_coco
from detr_dist.data.sampling import StepPlan
from detr_dist.distributed import HostGroup, build_accelerator
from detr_dist.errors import DataError, UsageError
from detr_dist.evaluation.evaluate import Evaluator
from detr_dist.models.build import Detector, build_detector
from detr_dist.models.criterion import SetCriterion
from detr_dist.tracking.mlflow import MLflowTracker
from detr_dist.tracking.tracker import run_params, start_trackers
from detr_dist.training.agreement import StepAgreement
from detr_dist.training.groups import GroupStream
from detr_dist.training.loop import Training, fit
from detr_dist.training.observer import RunObserver
from detr_dist.training.optim import build_optimizer, build_scheduler
from detr_dist.training.progress import Progress
from detr_dist.training.state import TrainState


def train(config: Config, *, train_dir: Path, val_dir: Path, output_dir: Path) -> None:
    """Train, evaluate, track and save.

    Collective. What can be known to be wrong is found before the processes form a group, by each of them.

    Raises:
        DetrDistError: with one clear line, on every process.
    """
    transformers_logging.disable_progress_bar()
    train_data, val_data = _load_data(train_dir, val_dir)
    detector = _build_network(config, train_data)
    accelerator = build_accelerator(
        mixed_precision=config.training.mixed_precision,
        gradient_accumulation_steps=config.training.gradient_accumulation_steps,
    )
    try:
        host = HostGroup(accelerator)
        tracker = host.on_main_process(lambda: _open_output(config, accelerator, output_dir))
        with _run_status(tracker):
            training = _assemble(config, accelerator, host, detector, num_samples=len(train_data))
            observer = _run(training, host, config, detector, train_data, val_data, tracker, output_dir)
            if accelerator.is_main_process:
                _write_results(config, observer, tracker, output_dir)
    finally:
        accelerator.end_training()


def _load_data(train_dir: Path, val_dir: Path) -> tuple[CocoData, CocoData]:
    train_data = load_coco(train_dir)
    val_data = load_coco(val_dir, classes=train_data.class_names)
    check_same_classes(train_data, val_data)
    return train_data, val_data


def _build_network(config: Config, train_data: CocoData) -> Detector:
    torch.manual_seed(config.training.seed)
    detector = build_detector(
        config.model,
        train_data.class_names,
        channels_last=config.training.channels_last,
        train_backbone=config.training.learning_rate_backbone > 0,
    )
    if train_data.max_boxes_per_image > detector.num_queries:
        raise DataError(
            f"{train_data.annotations_path}: an image has {train_data.max_boxes_per_image} boxes, but the "
            f"model finds at "
            f"most {detector.num_queries}; set model.num_queries to at least {train_data.max_boxes_per_image}"
        )
    if config.training.compile_model:
        detector.network.compile()
    return detector


def _assemble(
    config: Config, accelerator: Accelerator, host: HostGroup, detector: Detector, *, num_samples: int
) -> Training:
    settings = config.training
    plan = StepPlan(
        num_samples, settings.batch_size, accelerator.num_processes, settings.gradient_accumulation_steps
    )
    total_steps = settings.num_epochs * plan.steps_per_epoch
    if settings.max_steps is not None:
        total_steps = min(total_steps, settings.max_steps)
    detector.to(accelerator.device)
    optimizer = build_optimizer(detector, settings)
    scheduler = build_scheduler(optimizer, settings, total_steps)
    model, prepared_optimizer = accelerator.prepare(detector.train(), optimizer)
    return Training(
        accelerator=accelerator,
        agreement=StepAgreement(host),
        model=model,
        criterion=SetCriterion(detector.loss_settings),
        optimizer=prepared_optimizer,
        scheduler=scheduler,
        plan=plan,
        total_steps=total_steps,
        seed=settings.seed,
        gradient_clip=settings.gradient_clip,
    )


def _run(
    training: Training,
    host: HostGroup,
    config: Config,
    detector: Detector,
    train_data: CocoData,
    val_data: CocoData,
    tracker: MLflowTracker | None,
    output_dir: Path,
) -> RunObserver:
    accelerator, state = training.accelerator, TrainState()
    params = run_params(config, detector, train_data, val_data, accelerator.num_processes)
    for each in accelerator.trackers:
        each.store_init_configuration(params)
    groups = GroupStream(
        train_data,
        config,
        training.plan,
        process_index=accelerator.process_index,
        first_step=state.step,
        total_steps=training.total_steps,
        pin_memory=accelerator.device.type == "cuda",
    )
    progress = Progress(
        is_main_process=accelerator.is_main_process, first_step=state.step, total_steps=training.total_steps
    )
    for line in (*train_data.notices, *val_data.notices, *_describe(training, train_data, val_data)):
        progress.say(line)
    observer = RunObserver(
        training,
        detector,
        config,
        host=host,
        groups=groups,
        evaluator=Evaluator(val_data, config, accelerator, host),
        tracker=tracker,
        output_dir=output_dir,
        progress=progress,
    )
    try:
        fit(training, state, groups, observer)
    finally:
        progress.close()
    return observer


def _describe(training: Training, train_data: CocoData, val_data: CocoData) -> list[str]:
    plan, accelerator = training.plan, training.accelerator
    left_out = f", {plan.num_dropped} images of each epoch left out" if plan.num_dropped else ""
    classes = ", ".join(train_data.class_names)
    return [
        f"{len(train_data)} images to train on, {len(val_data)} to validate; classes: {classes}",
        f"{accelerator.num_processes} processes ({accelerator.device}, precision "
        f"{accelerator.mixed_precision}) x batch "
        f"{plan.batch_size} x accumulation {plan.accumulation} = {plan.global_batch_size} images a step; "
        f"{plan.steps_per_epoch} steps an epoch{left_out}, {training.total_steps} steps in all",
    ]


def _open_output(config: Config, accelerator: Accelerator, output_dir: Path) -> MLflowTracker | None:
    """Make the output folder and the trackers; an earlier run in the folder is kept, aside. Main process."""
    ours = [
        output_dir / name
        for name in ("checkpoints", "model", "models", "tensorboard", "config.yaml", "results.json")
    ]
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        earlier = [path for path in ours if path.exists()]
        if earlier:
            aside = output_dir / "earlier_runs" / time.strftime("%Y-%m-%d_%H-%M-%S")
            aside.mkdir(parents=True)
            for path in earlier:
                path.rename(aside / path.name)
            print(f"{output_dir} held an earlier run: moved to {aside}", flush=True)
        (output_dir / "config.yaml").write_text(config.to_yaml())
    except OSError as error:
        raise UsageError(
            f"--output-dir {output_dir}: {error.strerror}; give a folder that can be written to"
        ) from error
    tracker = start_trackers(accelerator, config, output_dir)
    if tracker is not None:
        tracker.log_file(output_dir / "config.yaml")
    return tracker


@contextmanager
def _run_status(tracker: MLflowTracker | None) -> Iterator[None]:
    """Close the MLflow run with what became of it."""
    try:
        yield
    except BaseException as error:
        if tracker is not None:
            tracker.set_tags({"error": f"{type(error).__name__}: {error}"[:5000]})
            tracker.end("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise
    if tracker is not None:
        tracker.end("FINISHED")


def _write_results(
    config: Config, observer: RunObserver, tracker: MLflowTracker | None, output_dir: Path
) -> None:
    """Print the last evaluation and leave it in `results.json`, with where the run is to be found."""
    results: dict[str, Any] = {"metrics": observer.results}
    for name, value in observer.results.items():
        print(f"{name:<24} {value:.4f}")
    if tracker is not None:
        results |= {"run_id": tracker.run_id, "tracking_uri": tracker.uri}
        experiment = config.logging.mlflow_experiment_name
        print(f"MLflow run {tracker.run_id} in experiment {experiment} ({tracker.uri})")
        print(f"see it with: mlflow ui --backend-store-uri {tracker.uri}", flush=True)
    (output_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n")
