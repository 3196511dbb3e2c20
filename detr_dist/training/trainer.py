"""Assembly of a training run, from its options to its results."""

import logging
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path

from detr_dist.config import Config
from detr_dist.data.checks import check_splits
from detr_dist.data.coco import load_data
from detr_dist.data.columns import counted
from detr_dist.data.concatenation import TrainDir, TrainSource, load_sources, train_sources
from detr_dist.data.dataset import training_dataset
from detr_dist.data.formats import Split, split_of, split_to_validate_on
from detr_dist.data.loading import Need, check_room, shared_memory_need
from detr_dist.distributed import HostGroup, build_accelerator, group_of_processes
from detr_dist.errors import DataError, StopRequested, UsageError
from detr_dist.extensions import import_extensions, instantiate
from detr_dist.models.build import quiet_transformers
from detr_dist.models.device_memory import DeviceMemory
from detr_dist.models.families import finest_stride_of, num_queries_of
from detr_dist.numerics import resolve_precision
from detr_dist.serving.precision import temporary_numerics
from detr_dist.storage import check_writable, locked
from detr_dist.text import value_of
from detr_dist.tracking.tracker import Tracker, tracked
from detr_dist.training.callback import Callback, Callbacks, EndEvent, RunResult
from detr_dist.training.groups import GroupStream, canvas_rule
from detr_dist.training.loop import Training, TrainState, fit
from detr_dist.training.observer import RunObserver
from detr_dist.training.optim import build_optimizer, build_scheduler
from detr_dist.training.output import RunTrackers, check_output, leave_results, open_output, open_run
from detr_dist.training.report import describe_resumption, describe_run
from detr_dist.training.resume import restore_average, restore_optimizer
from detr_dist.training.setup import Setup, set_up
from detr_dist.training.signals import StopSignals, leave_note
from detr_dist.training.step_sync import StepSync
from detr_dist.training.strategy import zero_plugin
from detr_dist.training.trial import try_before_first_step

_logger = logging.getLogger(__name__)


def train(
    config: Config,
    *,
    train_dir: TrainDir | Sequence[TrainDir],
    val_dir: str | Path | None = None,
    output_dir: str | Path,
    resume: str | None = None,
    init_from: str | None = None,
    callbacks: Iterable[Callback] = (),
    trackers: Iterable[Tracker] = (),
    handle_signals: bool = False,
) -> RunResult:
    """Train, evaluate, track and save.

    Collective. Configuration, data and environment are checked before the first step, on every process.

    Args:
        config: The configuration, e.g. from `Config.load`.
        train_dir: Data set to train on, in one of the formats of docs/data.md; or a list of data sets with
            the same classes, by path, as texts `DIR=WEIGHT`, or as pairs of path and weight, which is the
            part of a data set in every epoch, relative to that of the others.
        val_dir: Data set to evaluate on; None: the split `val` of `train_dir`.
        output_dir: Folder for checkpoints, the best model and results.
        resume: `auto`, a checkpoint's folder, a run id or an artifact URI: continue that run exactly.
        init_from: A model whose weights to start from.
        callbacks: Called at steps, evaluations, checkpoints and the end, in addition to `training.callbacks`.
        trackers: Record the run, in addition to MLflow, TensorBoard and `logging.trackers`.
        handle_signals: Make SIGTERM, SIGINT and SIGUSR1 save and stop the run, and SIGUSR2 print stacks, as
            in the command. Only possible in the main thread.

    Raises:
        DetrDistError: with one clear line, on every process.
        StopRequested: a signal asked the run to stop; everything is saved.
        KeyboardInterrupt: Ctrl-C without `handle_signals`; the tracked run becomes KILLED.
    """
    _check_types(config, callbacks=callbacks, trackers=trackers)
    folders = train_sources(train_dir), None if val_dir is None else Path(val_dir), Path(output_dir)
    with _prepared(config, *folders, resume=resume, init_from=init_from) as setup:
        signals = StopSignals(setup.host.rendezvous.watch.hurry)
        is_main_thread = threading.current_thread() is threading.main_thread()
        with signals if handle_signals and is_main_thread else nullcontext():
            return _run(setup, signals, callbacks, trackers)


def dry_run(
    config: Config,
    *,
    train_dir: TrainDir | Sequence[TrainDir],
    val_dir: Path | None = None,
    output_dir: Path,
    resume: str | None = None,
    init_from: str | None = None,
) -> None:
    """Check everything that `train` checks, and log what would run where; write nothing.

    The user's callbacks and trackers are created, and some training images augmented. Collective.

    Raises:
        DetrDistError: as `train`.
    """
    folders = train_sources(train_dir), val_dir, output_dir
    with (
        _prepared(config, *folders, resume=resume, init_from=init_from, is_dry=True) as setup,
        setup.host.failing_together(),
    ):
        if setup.host.is_main_process:
            _try_users_code(setup)
            _log_lines(describe_run(setup))


def _try_users_code(setup: Setup) -> None:
    """Create the user's callbacks and trackers, and make the samples with most and with fewest boxes.

    Several samples, as many augmentations change only some images, and some fail without boxes.

    Raises:
        DetrDistError: naming what fails.
    """
    _create_callbacks(setup.config)
    RunTrackers().add(*setup.config.logging.trackers)
    dataset = training_dataset(setup.train_data, setup.config)
    by_num_boxes = setup.train_data.num_boxes.argsort()
    for row in {*by_num_boxes[:4].tolist(), *by_num_boxes[-4:].tolist()}:
        dataset[0, row]


def _check_types(config: object, **collections: object) -> None:
    """Refuse arguments that would fail later with Python's own message.

    Raises:
        UsageError: naming the argument.
    """
    if not isinstance(config, Config):
        raise UsageError(
            f"config: a Config is wanted, got {value_of(config)}; load it with Config.load(path, overrides)"
        )
    for name, values in collections.items():
        if isinstance(values, str) or not isinstance(values, Iterable):
            raise UsageError(f"{name}: a list is wanted, got {value_of(values)}")


@contextmanager
def _prepared(
    config: Config,
    sources: list[TrainSource],
    val_dir: Path | None,
    output_dir: Path,
    *,
    resume: str | None,
    init_from: str | None,
    is_dry: bool = False,
) -> Iterator[Setup]:
    """Form the process group, and yield the run, ready to be assembled. Collective."""
    if init_from is not None and resume not in (None, "auto"):
        raise UsageError("--init-from starts a new run and --resume continues one; leave one of them out")
    stacks_dir, settings = output_dir / "stacks", config.training
    with (
        group_of_processes(stacks_dir, may_compile=settings.compile_model) as processes,
        temporary_numerics(settings),
        quiet_transformers(),
    ):
        host = HostGroup(processes)
        with host.failing_together():
            import_extensions(settings.extensions)
            if host.is_main_process:
                check_output(output_dir)
        val = split_to_validate_on([each.location for each in sources], val_dir)
        with host.failing_together():
            if host.is_main_process and is_dry:
                _check_data(config, sources, val)
        config = resolve_precision(config, host)
        train_data = load_sources(sources, config.data.exif)
        val_data = load_data(val, classes=train_data.class_names, exif=config.data.exif)
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
            may_clear_up=not is_dry,
        )
        setup.host.once_per_node(partial(check_room, _shared_memory_need(setup)))
        yield setup


def _check_data(config: Config, sources: list[TrainSource], val: Split) -> None:
    splits = [*(split_of(source.location, "train") for source in sources), val]
    report = check_splits(
        splits,
        config,
        num_queries=num_queries_of(config.model),
        finest_stride=finest_stride_of(config.model),
        open_images=True,
        num_train=len(sources),
    )
    _log_lines(report.lines())
    if report.num_errors:
        errors = counted(report.num_errors, "error")
        raise DataError(f"the data are not ready to train on: {errors}, named above")


def _shared_memory_need(setup: Setup) -> Need:
    """Return the need of both loaders of a process: during evaluation the other one keeps its batches."""
    training = shared_memory_need(setup.config, setup.train_data, train=True)
    return training.beside(shared_memory_need(setup.config, setup.val_data, train=False))


def _log_lines(lines: Iterable[str]) -> None:
    for line in lines:
        _logger.info(line)


def _run(
    setup: Setup, signals: StopSignals, callbacks: Iterable[Callback], trackers: Iterable[Tracker]
) -> RunResult:
    """Track the run, train, write the results, and record how the run ended. Collective."""
    host, config = setup.host, setup.config
    opened, called = RunTrackers(), Callbacks()  # filled on the main process only
    with ExitStack() as held:
        try:
            host.rendezvous.before_exit = opened.close_after_loss
            with tracked(opened):
                with host.failing_together():
                    if host.is_main_process:
                        opened.add(*trackers)  # whatever fails next, they are closed
                        called = _create_callbacks(config, callbacks)
                        opened.add(*config.logging.trackers)
                        check_writable("--output-dir", setup.output_dir)
                        held.enter_context(locked(setup.output_dir))
                        open_run(setup, opened)
                        open_output(setup, opened)
                state = _train(setup, signals, opened, called)
                with host.failing_together():
                    if host.is_main_process:
                        leave_results(setup, state, opened)
                result: RunResult = host.broadcast(RunResult(state.metrics, opened.run_id, setup.output_dir))
        except BaseException as error:
            was_asked = isinstance(error, KeyboardInterrupt | StopRequested)
            called.notify(EndEvent("KILLED" if was_asked else "FAILED", error, None))
            raise
        called.notify(EndEvent("FINISHED", None, result))
        return result


def _create_callbacks(config: Config, more: Iterable[Callback] = ()) -> Callbacks:
    named = [instantiate(path, "training.callbacks") for path in config.training.callbacks]
    return Callbacks([*more, *named])


def assemble(setup: Setup, signals: StopSignals) -> Training:
    """Put the network, its optimizer and everything else that the loop needs on the device. Collective."""
    config, accelerator, detector, resumed = setup.config, setup.accelerator, setup.detector, setup.resumed
    settings = config.training
    detector.to(accelerator.device)
    average = setup.strategy.average(detector, settings.ema_decay, settings.ema_warmup_steps)
    optimizer = build_optimizer(detector, settings)
    done_steps = 0
    if resumed is not None:
        restore_average(resumed, average)
        done_steps = restore_optimizer(resumed, optimizer, accelerator.scaler)
    setup.sources.close()
    scheduler = build_scheduler(
        optimizer,
        settings,
        setup.steps_of_all_epochs,
        last_steps=config.data.augmentation_off_epochs * setup.plan.steps_per_epoch,
        done_steps=done_steps,
    )
    model, prepared_optimizer = setup.strategy.prepare(accelerator, detector.train(), optimizer)
    return Training(
        accelerator=accelerator,
        strategy=setup.strategy,
        step_sync=StepSync(
            setup.host,
            signals,
            canvas_rule(config.data),
            num_queries=detector.num_queries,
            class_weights=setup.criterion.class_weights,
        ),
        model=model,
        average=average,
        criterion=setup.criterion,
        optimizer=prepared_optimizer,
        scheduler=scheduler,
        plan=setup.plan,
        total_steps=setup.total_steps,
        seed=settings.seed,
        gradient_clip=settings.gradient_clip,
        patience=settings.early_stopping_patience,
        denoising=setup.detector.denoising,
        memory=DeviceMemory(config, accelerator.device),
    )


def _train(setup: Setup, signals: StopSignals, trackers: RunTrackers, callbacks: Callbacks) -> TrainState:
    """Train until the end, or until a request to stop. Collective."""
    host = setup.host
    training = assemble(setup, signals)
    state = setup.resumed.state if setup.resumed is not None else TrainState()
    groups = training_data(setup, training, state)
    if host.is_main_process:
        _log_lines(describe_run(setup))
        _log_lines(describe_resumption(setup, training, state))
    observer = RunObserver(setup, training, groups, state, signals, trackers=trackers, callbacks=callbacks)
    try:
        try_before_first_step(setup, training, state, groups)
        with host.explained():
            fit(training, state, groups, observer)
        observer.finish()
    except StopRequested as request:
        groups.close()  # its loader processes may be ending, because all processes were asked to
        observer.save_last(state)
        observer.finish()
        text = (
            f"{request}: saved in {setup.output_dir / 'checkpoints' / 'last'} at step {state.step} of "
            f"{training.total_steps}; the same command with --resume auto continues"
        )
        with host.failing_together():
            if host.is_main_process:
                leave_note(text)  # before anything slow
        raise StopRequested(text) from None
    finally:
        groups.close()
        observer.close()
    return state


def training_data(setup: Setup, training: Training, state: TrainState) -> GroupStream:
    """Return the training data from the step of `state` on."""
    return GroupStream(
        setup.train_data,
        setup.config,
        training.plan,
        process_index=setup.accelerator.process_index,
        first_step=state.step,
        total_steps=max(training.total_steps, state.step),
        pin_memory=setup.accelerator.device.type == "cuda",
        samples=setup.samples,
    )
