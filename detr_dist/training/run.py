"""A training run from its options to its results: everything is assembled here, nothing is computed."""

import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers.utils import logging as transformers_logging

from detr_dist.config import Config
from detr_dist.data.coco import CocoData, load_coco
from detr_dist.data.sampling import StepPlan
from detr_dist.distributed import HostGroup, build_accelerator
from detr_dist.errors import DataError, UsageError
from detr_dist.evaluation.evaluate import Evaluator
from detr_dist.models.build import build_detector
from detr_dist.models.criterion import SetCriterion
from detr_dist.models.detector import Detector
from detr_dist.tracking.mlflow import MLflowTracker
from detr_dist.tracking.tracker import run_params, tensorboard_tracker
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
        plan = StepPlan(
            len(train_data),
            config.training.batch_size,
            accelerator.num_processes,
            config.training.gradient_accumulation_steps,
        )
        tracker = host.on_main_process(lambda: _open_run(config, output_dir))
        with _run_status(tracker):
            host.on_main_process(lambda: _open_output(config, accelerator, tracker, output_dir))
            training = _assemble(config, accelerator, host, detector, plan)
            observer = _run(training, host, config, detector, train_data, val_data, tracker, output_dir)
            host.on_main_process(lambda: _write_results(config, observer, tracker, output_dir))
    finally:
        accelerator.end_training()


def _load_data(train_dir: Path, val_dir: Path) -> tuple[CocoData, CocoData]:
    train_data = load_coco(train_dir)
    val_data = load_coco(val_dir, classes=train_data.class_names)
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
            f"model finds at most {detector.num_queries}; raise model.num_queries"
        )
    if config.training.compile_model:
        detector.network.compile()
    return detector


def _assemble(
    config: Config, accelerator: Accelerator, host: HostGroup, detector: Detector, plan: StepPlan
) -> Training:
    settings = config.training
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
    for line in (
        *train_data.notices,
        *val_data.notices,
        *_describe(training, train_data, val_data, config.training.warmup_steps),
    ):
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


def _describe(training: Training, train_data: CocoData, val_data: CocoData, warmup_steps: int) -> list[str]:
    plan, accelerator = training.plan, training.accelerator
    left_out = f", {plan.num_dropped} images of each epoch left out" if plan.num_dropped else ""
    classes = ", ".join(train_data.class_names)
    lines = [
        f"{len(train_data)} images to train on, {len(val_data)} to validate; classes: {classes}",
        f"{accelerator.num_processes} processes ({accelerator.device}, precision "
        f"{accelerator.mixed_precision}) x batch "
        f"{plan.batch_size} x accumulation {plan.accumulation} = {plan.global_batch_size} images a step; "
        f"{plan.steps_per_epoch} steps an epoch{left_out}, {training.total_steps} steps in all",
    ]
    if warmup_steps >= training.total_steps:
        lines.append(
            f"training.warmup_steps {warmup_steps}: the learning rate does not reach its peak in this run"
        )
    return lines


def _open_run(config: Config, output_dir: Path) -> MLflowTracker | None:
    """Make sure of the output folder, then begin the MLflow run. Main process."""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output_dir):
            pass
    except OSError as error:
        raise UsageError(
            f"--output-dir {output_dir}: {error.strerror}; give a folder that can be written to"
        ) from error
    return MLflowTracker(config.logging) if config.logging.mlflow else None


def _open_output(
    config: Config, accelerator: Accelerator, tracker: MLflowTracker | None, output_dir: Path
) -> None:
    """Give the main process its trackers and the run its files; an earlier run in the folder is kept,
    aside."""
    names = ("checkpoints", "model", "models", "tensorboard", "config.yaml", "results.json")
    earlier = [output_dir / name for name in names if (output_dir / name).exists()]
    if earlier:
        aside = output_dir / "earlier_runs" / time.strftime("%Y-%m-%d_%H-%M-%S")
        aside.mkdir(parents=True)
        for path in earlier:
            path.rename(aside / path.name)
        print(f"{output_dir} held an earlier run: moved to {aside}", flush=True)
    (output_dir / "config.yaml").write_text(config.to_yaml())
    if tracker is not None:
        accelerator.trackers.append(tracker)
        tracker.log_file(output_dir / "config.yaml")
    if config.logging.tensorboard:
        accelerator.trackers.append(tensorboard_tracker(output_dir))


@contextmanager
def _run_status(tracker: MLflowTracker | None) -> Iterator[None]:
    """Close the MLflow run with what became of it."""
    try:
        yield
    except BaseException as error:
        if tracker is not None:
            _close_failed(tracker, error)
        raise
    if tracker is not None:
        tracker.end("FINISHED")


def _close_failed(tracker: MLflowTracker, error: BaseException) -> None:
    try:
        tracker.set_tags({"error": f"{type(error).__name__}: {error}"[:5000]})
        tracker.end("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
    except Exception as trouble:  # must not hide what went wrong first
        reason = " ".join(str(trouble).split())
        print(f"warning: MLflow run {tracker.run_id} could not be closed: {reason}", flush=True)


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
