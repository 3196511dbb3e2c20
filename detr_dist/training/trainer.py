"""A training run from its options to its results: everything is assembled here, nothing is computed."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from transformers.utils import logging as transformers_logging

from detr_dist.config import Config
from detr_dist.data.checks import check_splits
from detr_dist.data.coco import load_coco
from detr_dist.data.loading import Need, check_room, shared_memory_need
from detr_dist.distributed import HostGroup, allow_for_compiling, build_accelerator, group_of_processes
from detr_dist.errors import DataError, StopRequested, UsageError
from detr_dist.evaluation.evaluator import Evaluator
from detr_dist.extensions import import_extensions
from detr_dist.models.criterion import SetCriterion
from detr_dist.models.device_memory import DeviceMemory
from detr_dist.models.families import num_queries_of
from detr_dist.numerics import resolve_precision, set_numerics
from detr_dist.storage import check_writable, locked
from detr_dist.tracking.tracker import Trackers, tracked
from detr_dist.training.callbacks import PlotWriter, RunCallbacks
from detr_dist.training.deepspeed import zero_plugin
from detr_dist.training.groups import GroupStream, canvas_rule
from detr_dist.training.loop import Training, fit
from detr_dist.training.optim import build_optimizer, build_scheduler
from detr_dist.training.output import check_output, leave_results, open_output, open_run
from detr_dist.training.progress import Progress
from detr_dist.training.report import describe_run
from detr_dist.training.resume import restore_average, restore_optimizer
from detr_dist.training.saver import ModelPacker, Saver
from detr_dist.training.setup import Setup, set_up
from detr_dist.training.signals import StopSignals, leave_note
from detr_dist.training.state import TrainState
from detr_dist.training.step_sync import StepSync
from detr_dist.training.trial import try_largest_batch

if TYPE_CHECKING:
    from detr_dist.tracking.mlflow import MLflowTracker

_logger = logging.getLogger(__name__)


def train(
    config: Config,
    *,
    train_dir: Path,
    val_dir: Path,
    output_dir: Path,
    resume: str | None = None,
    init_from: str | None = None,
    dry_run: bool = False,
) -> None:
    """Train, evaluate, track and save.

    Collective. What can be known to be wrong is found before the first step, on every process.

    Args:
        resume: `auto`, a checkpoint's folder, a run id or an artifact URI: continue that run, exactly.
        init_from: A model to take the first weights from.
        dry_run: Check and report, and do not train.

    Raises:
        DetrDistError: with one clear line, on every process.
        StopRequested: a signal asked for it; everything is saved.
    """
    transformers_logging.disable_progress_bar()
    if init_from is not None and resume not in (None, "auto"):
        raise UsageError("--init-from starts a new run and --resume continues one; leave one of them out")
    set_numerics(config.training)
    allow_for_compiling(config.training)
    with group_of_processes(stacks_dir=output_dir / "stacks") as processes:
        host = HostGroup(processes)
        with host.failing_together():
            import_extensions(config.training.extensions)
            if host.is_main_process:
                check_output(output_dir)
                if dry_run:
                    _check_data(config, train_dir, val_dir)
        config = resolve_precision(config, host)
        train_data = load_coco(train_dir)
        val_data = load_coco(val_dir, classes=train_data.class_names)
        accelerator = build_accelerator(
            mixed_precision=config.training.mixed_precision,
            gradient_accumulation_steps=config.training.gradient_accumulation_steps,
            deepspeed=zero_plugin(config.training, processes.num_processes),
        )
        setup = set_up(
            config,
            train_data,
            val_data,
            accelerator,
            output_dir=output_dir,
            resume=resume,
            init_from=init_from,
            may_clear_up=not dry_run,
        )
        setup.host.once_per_machine(partial(check_room, _shared_memory_need(setup)))
        if dry_run:
            if host.is_main_process:
                _log_lines(describe_run(setup))
            return
        _run(setup)


def _check_data(config: Config, train_dir: Path, val_dir: Path) -> None:
    splits = [str(train_dir), str(val_dir)]
    report = check_splits(splits, config, num_queries=num_queries_of(config.model), open_images=True)
    _log_lines(report.lines())
    if report.num_errors:
        raise DataError(f"the data are not ready to train on: {report.num_errors} errors, named above")


def _shared_memory_need(setup: Setup) -> Need:
    """Return what both loaders of a process need: while one evaluates, the other keeps what it prepared."""
    training = shared_memory_need(setup.config, setup.train_data, train=True)
    return training.beside(shared_memory_need(setup.config, setup.val_data, train=False))


def _log_lines(lines: Iterator[str] | list[str]) -> None:
    for line in lines:
        _logger.info(line)


def _run(setup: Setup) -> None:
    """Track the run, train, and write the results. Collective."""
    host, trackers, tracker = setup.host, Trackers(), None  # on the main process alone there are any
    with StopSignals(host.hurry) as signals, ExitStack() as held:
        with host.failing_together():
            if host.is_main_process:
                check_writable("--output-dir", setup.output_dir)
                held.enter_context(locked(setup.output_dir))
                tracker = open_run(setup, trackers)
        with tracked(trackers), host.on_failure(trackers.close_after_loss):
            with host.failing_together():
                if host.is_main_process:
                    open_output(setup, trackers, tracker)
            state = _train(setup, assemble(setup, signals), signals, trackers, tracker)
            with host.failing_together():
                if host.is_main_process:
                    leave_results(setup, state, tracker)


def assemble(setup: Setup, signals: StopSignals) -> Training:
    """Put the network, its optimizer and everything else that the loop needs on the device. Collective."""
    config, accelerator, detector, resumed = setup.config, setup.accelerator, setup.detector, setup.resumed
    settings = config.training
    detector.to(accelerator.device)
    average = setup.strategy.average(detector, settings.ema_decay)
    optimizer = build_optimizer(detector, settings)
    done_steps = 0
    if resumed is not None:
        restore_average(resumed, average)
        done_steps = restore_optimizer(resumed, optimizer, accelerator.scaler)
    setup.sources.close()
    scheduler = build_scheduler(optimizer, settings, setup.steps_of_all_epochs, done_steps=done_steps)
    model, prepared_optimizer = setup.strategy.prepare(accelerator, detector.train(), optimizer)
    return Training(
        accelerator=accelerator,
        strategy=setup.strategy,
        step_sync=StepSync(setup.host, signals, canvas_rule(config.data)),
        model=model,
        average=average,
        criterion=SetCriterion(detector.loss_settings, config.loss.weights),
        optimizer=prepared_optimizer,
        scheduler=scheduler,
        plan=setup.plan,
        total_steps=setup.total_steps,
        seed=settings.seed,
        gradient_clip=settings.gradient_clip,
        patience=settings.early_stopping_patience,
        memory=DeviceMemory(config, accelerator.device),
    )


def _train(
    setup: Setup,
    training: Training,
    signals: StopSignals,
    trackers: Trackers,
    tracker: "MLflowTracker | None",
) -> TrainState:
    """Train to the end, or to a request to stop. Collective."""
    host = setup.host
    state = setup.resumed.state if setup.resumed is not None else TrainState()
    groups = training_data(setup, training, state)
    callbacks = build_callbacks(
        setup, training, state, groups, signals=signals, trackers=trackers, tracker=tracker
    )
    try:
        _try_largest_batch(setup, training, state, groups)
        with host.explained():
            fit(training, state, groups, callbacks)
        callbacks.finish()
    except StopRequested as request:
        groups.close()  # its loader processes may be about to end, as all processes were asked to
        callbacks.save_last(state)
        callbacks.finish()
        text = (
            f"{request}: saved in {setup.output_dir / 'checkpoints' / 'last'} at step {state.step} of "
            f"{training.total_steps}; the same command with --resume auto continues"
        )
        with host.failing_together():
            if host.is_main_process:
                leave_note(text)  # before anything that may take long
        raise StopRequested(text) from None
    finally:
        groups.close()
        callbacks.close()
    return state


def _try_largest_batch(setup: Setup, training: Training, state: TrainState, groups: GroupStream) -> None:
    """Run the largest batch once, on a GPU that holds the whole network. Collective."""
    settings, device = setup.config.training, setup.accelerator.device
    if not settings.try_largest_batch or device.type == "cpu" or setup.strategy.zero_stage:
        return
    if not training.is_over(state):
        try_largest_batch(
            training,
            state.step,
            num_images=settings.batch_size,
            num_boxes=setup.train_data.max_boxes_per_image,
            canvas_hw=groups.largest_canvas_hw(),
        )


def training_data(setup: Setup, training: Training, state: TrainState) -> GroupStream:
    """Return the training data from `state` on."""
    return GroupStream(
        setup.train_data,
        setup.config,
        training.plan,
        process_index=setup.accelerator.process_index,
        first_step=state.step,
        total_steps=max(training.total_steps, state.step),
        pin_memory=setup.accelerator.device.type == "cuda",
    )


def build_callbacks(
    setup: Setup,
    training: Training,
    state: TrainState,
    groups: GroupStream,
    *,
    signals: StopSignals,
    trackers: Trackers,
    tracker: "MLflowTracker | None",
) -> RunCallbacks:
    """Return what logs, evaluates and saves around the loop; the main process logs how the run starts.

    Collective.
    """
    config, accelerator, output_dir = setup.config, setup.accelerator, setup.output_dir
    progress = saver = plots = None
    files = trackers if trackers.keeps_files else None
    if accelerator.is_main_process:
        _log_lines(describe_run(setup))
        _log_lines(_describe_start(setup, training, state))
        progress = Progress(first_step=state.step, total_steps=training.total_steps)
        if config.evaluation.pictures:
            plots = PlotWriter(setup.val_data, output_dir / "pictures", files)
        saver = Saver(
            output_dir / "checkpoints",
            keep_last=config.checkpoint.keep_last,
            tracker=files,
            pack_model=ModelPacker(training.average.detector, config, output_dir, files).pack,
        )
    evaluator = Evaluator(
        setup.val_data, config, accelerator, setup.host, stop_requested=lambda: signals.is_requested
    )
    return RunCallbacks(
        training,
        setup.detector,
        config,
        host=setup.host,
        groups=groups,
        evaluator=evaluator,
        progress=progress,
        trackers=trackers,
        saver=saver,
        plots=plots,
        facts=setup.facts if tracker is None else replace(setup.facts, mlflow_run_id=tracker.run_id),
    )


def _describe_start(setup: Setup, training: Training, state: TrainState) -> Iterator[str]:
    """Say where training resumes."""
    if setup.resumed is None:
        return
    yield (
        f"resuming from {setup.resumed.folder} at step {state.step}, "
        f"{state.step * training.plan.global_batch_size} samples seen"
    )
    yield from (f"  changed since: {change}" for change in setup.changes)
    if training.is_over(state):
        limit = "training.num_epochs or training.max_steps"
        if state.closed_step < training.total_steps:
            limit = "training.early_stopping_patience"
        yield f"there is nothing left to do: raise {limit} to train on"
