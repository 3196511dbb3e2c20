"""A training run from its options to its results: everything is assembled here, nothing is computed."""

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers.utils import logging as transformers_logging

from detr_dist import __version__
from detr_dist.config import Config
from detr_dist.data.coco import CocoData, load_coco
from detr_dist.data.sampling import StepPlan
from detr_dist.distributed import HostGroup, build_accelerator, is_lost_contact
from detr_dist.errors import CheckpointError, DataError, StopRequested, TrainingError, UsageError
from detr_dist.evaluation.evaluate import Evaluator
from detr_dist.models.average import WeightAverage
from detr_dist.models.build import build_detector
from detr_dist.models.criterion import SetCriterion
from detr_dist.models.detector import Detector
from detr_dist.tracking.mlflow import MLflowTracker
from detr_dist.tracking.tracker import run_params, tensorboard_tracker
from detr_dist.training.agreement import StepAgreement
from detr_dist.training.checkpoint import MANIFEST, Checkpoint
from detr_dist.training.groups import GroupStream
from detr_dist.training.loop import Training, fit
from detr_dist.training.observer import RunObserver
from detr_dist.training.optim import build_optimizer, build_scheduler
from detr_dist.training.output import bring_best, check_writable, make_room, write_results
from detr_dist.training.preemption import StopSignals
from detr_dist.training.progress import Progress
from detr_dist.training.resume import (
    compare_with_saved,
    restore_average,
    restore_optimizer,
    restore_weights,
)
from detr_dist.training.saver import CheckpointSaver
from detr_dist.training.sources import Sources
from detr_dist.training.state import RunFacts, TrainState


@dataclass(frozen=True)
class RunOptions:
    """What the command line says beside the configuration."""

    train_dir: Path
    val_dir: Path
    output_dir: Path
    resume: str | None = None
    init_from: str | None = None


def train(config: Config, options: RunOptions) -> None:
    """Train, evaluate, track and save.

    Collective. What can be known to be wrong is found before the first step, on every process.

    Raises:
        DetrDistError: with one clear line, on every process.
        StopRequested: a signal asked for it; everything is saved.
    """
    transformers_logging.disable_progress_bar()
    if options.init_from is not None and options.resume not in (None, "auto"):
        raise UsageError("--init-from begins a new run and --resume goes on with one; leave one of them out")
    train_data = load_coco(options.train_dir)
    val_data = load_coco(options.val_dir, classes=train_data.class_names)
    accelerator = build_accelerator(
        mixed_precision=config.training.mixed_precision,
        gradient_accumulation_steps=config.training.gradient_accumulation_steps,
    )
    try:
        setup = _set_up(config, options, train_data, val_data, accelerator)
        with StopSignals() as signals:
            tracker = setup.host.on_main_process(lambda: _open_run(setup))
            with _run_status(tracker):
                setup.host.on_main_process(lambda: _open_output(setup, tracker))
                _run(setup, _assemble(setup, signals), signals, tracker)
    except RuntimeError as error:
        if accelerator.num_processes > 1 and is_lost_contact(error):
            raise TrainingError(
                "lost contact with another process, which has ended or cannot be reached: the cause is what "
                "that "
                f"one says, or the exit code that the launcher reports ({' '.join(str(error).split())[:200]})"
            ) from error
        raise
    finally:
        accelerator.end_training()


@dataclass(frozen=True)
class _Setup:
    """What is known of a run before anything of it is visible from outside."""

    config: Config
    options: RunOptions
    train_data: CocoData
    val_data: CocoData
    accelerator: Accelerator
    host: HostGroup
    plan: StepPlan
    sources: Sources
    resumed: Checkpoint | None
    facts: RunFacts
    changes: list[str]
    """Settings that differ from the resumed run's, in words."""
    detector: Detector


def _set_up(
    config: Config, options: RunOptions, train_data: CocoData, val_data: CocoData, accelerator: Accelerator
) -> _Setup:
    host = HostGroup(accelerator)
    plan = StepPlan(
        len(train_data),
        config.training.batch_size,
        accelerator.num_processes,
        config.training.gradient_accumulation_steps,
    )
    sources = Sources(host, options.output_dir, config.logging.mlflow_tracking_uri)
    resumed = sources.checkpoint(options.resume) if options.resume is not None else None
    facts = RunFacts(
        config=config,
        class_names=list(train_data.class_names),
        num_train_images=len(train_data),
        num_processes=accelerator.num_processes,
        global_batch_size=plan.global_batch_size,
        init_from=options.init_from if resumed is None else resumed.facts.init_from,
        mlflow_run_id=None,
        versions=_versions(),
    )
    return _Setup(
        config=config,
        options=options,
        train_data=train_data,
        val_data=val_data,
        accelerator=accelerator,
        host=host,
        plan=plan,
        sources=sources,
        resumed=resumed,
        facts=facts,
        changes=compare_with_saved(resumed.facts, facts) if resumed is not None else [],
        detector=_build_network(facts, train_data, sources, resumed),
    )


def _versions() -> dict[str, str]:
    libraries = {name: version(name) for name in ("torch", "transformers", "accelerate")}
    return {"detr_dist": __version__, "python": platform.python_version(), **libraries}


def _build_network(
    facts: RunFacts, train_data: CocoData, sources: Sources, resumed: Checkpoint | None
) -> Detector:
    """The network with its first weights, or those of the checkpoint."""
    settings, model = facts.config.training, facts.config.model
    if facts.init_from is not None:
        source = facts.init_from if resumed is not None else sources.weights(facts.init_from)
        model = model.model_copy(update={"pretrained": source})
    torch.manual_seed(settings.seed)
    try:
        detector = build_detector(
            model,
            train_data.class_names,
            channels_last=settings.channels_last,
            train_backbone=settings.learning_rate_backbone > 0,
            structure=resumed.folder if resumed is not None else None,
        )
    except UsageError as error:
        raise UsageError(
            str(error).replace(f"model.pretrained {model.pretrained}", f"--init-from {facts.init_from}")
            if facts.init_from is not None
            else str(error)
        ) from error
    if train_data.max_boxes_per_image > detector.num_queries:
        raise DataError(
            f"{train_data.annotations_path}: an image has {train_data.max_boxes_per_image} boxes, but the "
            f"model finds at most {detector.num_queries}; raise model.num_queries"
        )
    if resumed is not None:
        restore_weights(resumed, detector)
    if settings.compile_model:
        detector.network.compile()
    return detector


def _open_run(setup: _Setup) -> MLflowTracker | None:
    """Make sure of the output folder, then begin the MLflow run, or go on with it. Main process."""
    check_writable(setup.options.output_dir)
    if not setup.config.logging.mlflow:
        return None
    resumed = setup.resumed
    tracker = MLflowTracker(setup.config.logging, run_id=resumed.facts.mlflow_run_id if resumed else None)
    if resumed is not None:
        tracker.note_resume(resumed.state.step, setup.changes)
    return tracker


def _open_output(setup: _Setup, tracker: MLflowTracker | None) -> None:
    """Give the run its files and the main process its trackers. Main process."""
    output_dir, config, resumed = setup.options.output_dir, setup.config, setup.resumed
    make_room(output_dir, resumed)
    if resumed is not None and resumed.state.best_step is not None and not (output_dir / "model").exists():
        _bring_best(setup, resumed)
    (output_dir / "config.yaml").write_text(config.to_yaml())
    trackers = setup.accelerator.trackers
    if tracker is not None:
        trackers.append(tracker)
        tracker.log_file(output_dir / "config.yaml")
    if config.logging.tensorboard:
        trackers.append(tensorboard_tracker(output_dir, first_step=resumed.state.step if resumed else 0))
    params = run_params(
        config, setup.detector, setup.train_data, setup.val_data, setup.accelerator.num_processes
    )
    for each in trackers:
        each.store_init_configuration(params)


def _bring_best(setup: _Setup, resumed: Checkpoint) -> None:
    """The best model so far belongs to the run as well; it lies beside the checkpoint, or in MLflow."""
    try:
        best, model = resumed.folder.parent / "best", resumed.folder.parent.parent / "model"
        if not (best.exists() and model.exists()) and resumed.facts.mlflow_run_id is not None:
            of_run = f"runs:/{resumed.facts.mlflow_run_id}"
            best = setup.sources.download(f"{of_run}/checkpoints/best")
            model = setup.sources.download(f"{of_run}/model")
        bring_best(setup.options.output_dir, resumed, best, model)
    except (CheckpointError, UsageError, OSError) as error:
        print(f"warning: the best model so far could not be brought here ({error})", flush=True)


def _assemble(setup: _Setup, signals: StopSignals) -> Training:
    config, accelerator, detector, resumed = setup.config, setup.accelerator, setup.detector, setup.resumed
    settings = config.training
    steps_of_all_epochs = settings.num_epochs * setup.plan.steps_per_epoch
    detector.to(accelerator.device)
    average = WeightAverage(detector, settings.ema_decay)
    optimizer = build_optimizer(detector, settings)
    done_steps = 0
    if resumed is not None:
        restore_average(resumed, average)
        done_steps = restore_optimizer(resumed, optimizer, accelerator.scaler)
        setup.sources.close()
    scheduler = build_scheduler(optimizer, settings, steps_of_all_epochs, done_steps=done_steps)
    model, prepared_optimizer = accelerator.prepare(detector.train(), optimizer)
    return Training(
        accelerator=accelerator,
        agreement=StepAgreement(setup.host, signals),
        model=model,
        average=average,
        criterion=SetCriterion(detector.loss_settings),
        optimizer=prepared_optimizer,
        scheduler=scheduler,
        plan=setup.plan,
        total_steps=min(steps_of_all_epochs, settings.max_steps or steps_of_all_epochs),
        seed=settings.seed,
        gradient_clip=settings.gradient_clip,
        patience=settings.early_stopping_patience,
    )


def _run(setup: _Setup, training: Training, signals: StopSignals, tracker: MLflowTracker | None) -> None:
    """Train to the end, or to a request to stop. Collective."""
    config, accelerator, host, options = setup.config, setup.accelerator, setup.host, setup.options
    state = setup.resumed.state if setup.resumed is not None else TrainState()
    groups = GroupStream(
        setup.train_data,
        config,
        training.plan,
        process_index=accelerator.process_index,
        first_step=state.step,
        total_steps=max(training.total_steps, state.step),
        pin_memory=accelerator.device.type == "cuda",
    )
    progress = Progress(
        is_main_process=accelerator.is_main_process, first_step=state.step, total_steps=training.total_steps
    )
    for line in _describe(setup, training, state):
        progress.say(line)
    saver = None
    if accelerator.is_main_process:
        saver = CheckpointSaver(
            options.output_dir / "checkpoints",
            keep_last=config.checkpoint.keep_last,
            upload=partial(tracker.log_folder, last=MANIFEST) if tracker is not None else None,
            say=progress.say,
        )
    observer = RunObserver(
        training,
        setup.detector,
        config,
        host=host,
        groups=groups,
        evaluator=Evaluator(
            setup.val_data, config, accelerator, host, stop_requested=lambda: signals.is_requested
        ),
        tracker=tracker,
        output_dir=options.output_dir,
        progress=progress,
        saver=saver,
        facts=replace(setup.facts, mlflow_run_id=tracker.run_id if tracker is not None else None),
    )
    try:
        fit(training, state, groups, observer)
        observer.finish()
    except StopRequested as request:
        observer.save_last(state)
        observer.finish()
        raise StopRequested(
            f"{request}: saved in {options.output_dir / 'checkpoints' / 'last'} at step {state.step} of "
            f"{training.total_steps}; the same command with --resume auto goes on"
        ) from None
    finally:
        groups.close()
        observer.close()
    host.on_main_process(lambda: _leave_results(setup, state, tracker))


def _leave_results(setup: _Setup, state: TrainState, tracker: MLflowTracker | None) -> None:
    where = {"run_id": tracker.run_id, "tracking_uri": tracker.uri} if tracker is not None else {}
    write_results(setup.options.output_dir, state.metrics, where)
    if tracker is not None:
        experiment = setup.config.logging.mlflow_experiment_name
        print(f"MLflow run {tracker.run_id} in experiment {experiment} ({tracker.uri})")
        print(f"see it with: mlflow ui --backend-store-uri {tracker.uri}", flush=True)


def _describe(setup: _Setup, training: Training, state: TrainState) -> Iterator[str]:
    """What there is to know before the first step."""
    plan, accelerator, train_data = training.plan, setup.accelerator, setup.train_data
    yield from train_data.notices
    yield from setup.val_data.notices
    left_out = f", {plan.num_dropped} images of each epoch left out" if plan.num_dropped else ""
    yield (
        f"{len(train_data)} images to train on, {len(setup.val_data)} to validate; classes: "
        f"{', '.join(train_data.class_names)}"
    )
    yield (
        f"{accelerator.num_processes} processes ({accelerator.device}, precision "
        f"{accelerator.mixed_precision}) x batch "
        f"{plan.batch_size} x accumulation {plan.accumulation} = {plan.global_batch_size} images a step; "
        f"{plan.steps_per_epoch} steps an epoch{left_out}, {training.total_steps} steps in all"
    )
    if setup.config.training.warmup_steps >= training.total_steps:
        yield (
            f"training.warmup_steps {setup.config.training.warmup_steps}: the learning rate does not reach "
            f"its "
            "peak in this run"
        )
    if setup.resumed is not None:
        yield (
            f"going on from {setup.resumed.folder} at step {state.step}, "
            f"{state.step * plan.global_batch_size} samples seen"
        )
        yield from (f"  changed since: {change}" for change in setup.changes)
        if training.is_over(state):
            yield "there is nothing left to do: raise training.num_epochs or training.max_steps to train on"
    elif setup.options.resume is not None:
        yield f"no checkpoint in {setup.options.output_dir}: a new run begins"


@contextmanager
def _run_status(tracker: MLflowTracker | None) -> Iterator[None]:
    """Close the MLflow run with what became of it."""
    try:
        yield
    except BaseException as error:
        if tracker is not None:
            _close_unfinished(tracker, error)
        raise
    if tracker is not None:
        tracker.end("FINISHED")


def _close_unfinished(tracker: MLflowTracker, error: BaseException) -> None:
    try:
        if isinstance(error, (KeyboardInterrupt, StopRequested)):
            tracker.end("KILLED")
        else:
            tracker.set_tags({"error": f"{type(error).__name__}: {error}"[:5000]})
            tracker.end("FAILED")
    except Exception as trouble:  # must not hide what went wrong first
        reason = " ".join(str(trouble).split())
        print(f"warning: MLflow run {tracker.run_id} could not be closed: {reason}", flush=True)
