"""Set-up of a run: everything is found and checked before the run writes or tracks anything."""

import logging
import math
import platform
import socket
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import Accelerator

from detr_dist import __version__
from detr_dist.config import Config, ModelConfig, TrainingConfig
from detr_dist.data.automatic_tiles import resolve_tiles
from detr_dist.data.coco import CocoData
from detr_dist.data.concatenation import weights_of
from detr_dist.data.dataset import CocoDetectionDataset, training_dataset
from detr_dist.data.repeat_factors import epoch_samples
from detr_dist.data.sampling import EpochSamples, StepPlan
from detr_dist.distributed import HostGroup
from detr_dist.errors import DataError, UsageError
from detr_dist.extensions import load_object
from detr_dist.models.build import build_detector
from detr_dist.models.class_weights import class_weights_of
from detr_dist.models.criterion import SetCriterion
from detr_dist.models.detector import Detector
from detr_dist.models.families import finest_stride_of
from detr_dist.models.image_sizes import check_image_sizes
from detr_dist.models.optimizations import check_compiler, compile_regions, recompute_activations
from detr_dist.redaction import redact
from detr_dist.training.checkpoint import Checkpoint, RunFacts
from detr_dist.training.optim import parameter_groups
from detr_dist.training.resume import (
    compare_with_saved,
    has_other_validation,
    keep_settings,
    restore_weights,
)
from detr_dist.training.sources import Sources
from detr_dist.training.strategy import Replicated, strategy_for, synchronise_batch_norm

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """The host and device of a process."""

    host: str
    device: str
    """The device, with the name of the GPU if it is one."""


@dataclass(frozen=True)
class Setup:
    """A run that is ready to be assembled, after all checks."""

    config: Config
    output_dir: Path
    train_data: CocoData
    val_data: CocoData
    accelerator: Accelerator
    strategy: Replicated
    host: HostGroup
    plan: StepPlan
    samples: EpochSamples | None
    """The samples of every epoch, if they are not each image once."""
    sources: Sources
    resumed: Checkpoint | None
    facts: RunFacts
    changes: list[str]
    """A line for each setting that differs from the resumed run's."""
    windows: str | None
    """A line on what `data.tiles=auto` stands for, if it was set."""
    detector: Detector
    criterion: SetCriterion
    places: list[Place]
    """The place of each process, by rank."""

    @property
    def host_names(self) -> list[str]:
        """Names of all hosts of the run, sorted."""
        return sorted({place.host for place in self.places})

    @property
    def steps_of_all_epochs(self) -> int:
        """Optimizer steps of `num_epochs`, which the learning-rate schedule spans."""
        return self.config.training.num_epochs * self.plan.steps_per_epoch

    @property
    def total_steps(self) -> int:
        """Optimizer steps of this run, limited by `training.max_steps`."""
        return min(self.steps_of_all_epochs, self.config.training.max_steps or self.steps_of_all_epochs)


def set_up(
    config: Config,
    train_data: CocoData,
    val_data: CocoData,
    accelerator: Accelerator,
    *,
    output_dir: Path,
    resume: str | None = None,
    init_from: str | None = None,
    may_clear_up: bool = True,
) -> Setup:
    """Find the checkpoint or weights to start from, and build the network. Collective.

    Args:
        config: The configuration, with the precision resolved.
        train_data: Data set to train on.
        val_data: Data set to evaluate on.
        accelerator: The Accelerator of this process.
        output_dir: Folder of the run.
        resume: The value of `--resume`.
        init_from: The value of `--init-from`.
        may_clear_up: Whether to remove incomplete files of a killed run from the output folder.

    Raises:
        DetrDistError: on every process.
    """
    _check_device(config.training, accelerator)
    host, strategy = HostGroup(accelerator), strategy_for(accelerator)
    sources = Sources(host, output_dir, config.logging.mlflow_tracking_uri, may_clear_up=may_clear_up)
    config, resumed = _find_resumed(config, sources, resume, init_from, output_dir)
    model = _first_model(config.model, sources, init_from, resumed)
    config, windows = _with_specific_tiles(config, model, train_data, resumed)
    dataset = training_dataset(train_data, config)  # reports a transform that cannot be used now
    _check_paths(config, host)
    samples, plan = _plan_of(config, train_data, host.num_processes)
    facts = _facts_of(config, train_data, val_data, plan, init_from, resumed, strategy.zero_stage)
    resumed, changes = _compared(resumed, facts)
    class_weights = class_weights_of(config.loss.class_weights, train_data.class_names)
    detector = _build_network(model, facts, train_data, resumed)
    if host.is_main_process:
        warn_of_augmentation(dataset, detector.num_queries)
    return Setup(
        config=config,
        output_dir=output_dir,
        train_data=train_data,
        val_data=val_data,
        accelerator=accelerator,
        strategy=strategy,
        host=host,
        plan=plan,
        samples=samples,
        sources=sources,
        resumed=resumed,
        facts=facts,
        changes=changes,
        windows=windows,
        detector=detector,
        criterion=SetCriterion(detector.loss_settings, config.loss.weights, class_weights),
        places=host.all_gather_objects(_place(accelerator.device)),
    )


def _check_device(settings: TrainingConfig, accelerator: Accelerator) -> None:
    """Check that the device supports what is configured."""
    device, num_processes = accelerator.device.type, accelerator.num_processes
    if settings.compile_model:
        check_compiler(device)
    if settings.sync_batch_norm and num_processes > 1 and device == "cpu":
        raise UsageError(
            f"training.sync_batch_norm: torch synchronises batch norm on GPUs only, but {num_processes} "
            "processes compute on the CPU; set it to false"
        )


def _find_resumed(
    config: Config, sources: Sources, resume: str | None, init_from: str | None, output_dir: Path
) -> tuple[Config, Checkpoint | None]:
    """Return the checkpoint that `resume` names, if there is one, and the settings to resume it with."""
    resumed = sources.checkpoint(resume) if resume is not None else None
    if resumed is not None:
        _check_origin(init_from, resumed.facts.init_from)
        config = keep_settings(config, resumed.facts, str(resume), output_dir)
        sources.tracking_uri = config.logging.mlflow_tracking_uri
    return config, resumed


def warn_of_augmentation(dataset: CocoDetectionDataset, num_queries: int) -> None:
    """Warn if augmentation can give an image more boxes than can be matched, or has nothing to paste."""
    if dataset.copy_paste is not None and not dataset.copy_paste.num_objects:
        _logger.warning("data.copy_paste: nothing is pasted: no box of these classes is small enough")
    if dataset.most_boxes_per_image > num_queries:
        _logger.warning(
            f"data.augmentation and data.copy_paste: an image can get up to {dataset.most_boxes_per_image} "
            f"boxes, but the model finds at most {num_queries} and learns nothing from the others; raise "
            "model.num_queries"
        )


def _plan_of(
    config: Config, train_data: CocoData, num_processes: int
) -> tuple[EpochSamples | None, StepPlan]:
    """Return the samples of every epoch, unless they are each image once, and their split into steps."""
    settings = config.training
    split = settings.batch_size, num_processes, settings.gradient_accumulation_steps
    samples = epoch_samples(train_data, config, math.prod(split))
    return samples, StepPlan(len(train_data if samples is None else samples), *split)


def _check_paths(config: Config, host: HostGroup) -> None:
    """Import the user's callbacks and trackers on the main process, and create none of them. Collective."""
    with host.failing_together():
        if host.is_main_process:
            for path in config.training.callbacks:
                load_object(path, "training.callbacks")
            for path in config.logging.trackers:
                load_object(path, "logging.trackers")


def _facts_of(
    config: Config,
    train_data: CocoData,
    val_data: CocoData,
    plan: StepPlan,
    init_from: str | None,
    resumed: Checkpoint | None,
    zero_stage: int,
) -> RunFacts:
    return RunFacts(
        config=config,
        class_names=list(train_data.class_names),
        num_train_images=len(train_data),
        source_weights=weights_of(train_data),
        num_processes=plan.num_processes,
        zero_stage=zero_stage,
        global_batch_size=plan.global_batch_size,
        init_from=init_from if resumed is None else resumed.facts.init_from,
        mlflow_run_id=resumed.facts.mlflow_run_id if resumed is not None else None,
        data_sha256=train_data.fingerprint(),
        val_data_sha256=val_data.fingerprint(),
        versions=_versions(),
    )


def _compared(resumed: Checkpoint | None, facts: RunFacts) -> tuple[Checkpoint | None, list[str]]:
    """Return the checkpoint, without its best score if that is of other data, and the allowed changes."""
    if resumed is None:
        return None, []
    changes = compare_with_saved(resumed.facts, facts)
    if has_other_validation(resumed.facts, facts):
        resumed = replace(resumed, state=resumed.state.without_best())
    return resumed, changes


def _check_origin(init_from: str | None, saved: str | None) -> None:
    if init_from is not None and redact(init_from) != redact(str(saved)):
        raise UsageError(
            f"--init-from {init_from}: the run to be resumed started from {saved}; give that or nothing, or "
            "another --output-dir for a new run"
        )


def _place(device: torch.device) -> Place:
    name = f"{device}, {torch.cuda.get_device_name(device)}" if device.type == "cuda" else device.type
    return Place(socket.gethostname(), name)


def _versions() -> dict[str, str]:
    libraries = {name: version(name) for name in ("torch", "transformers", "accelerate")}
    return {"detr_dist": __version__, "python": platform.python_version(), **libraries}


def _first_model(
    model: ModelConfig, sources: Sources, init_from: str | None, resumed: Checkpoint | None
) -> ModelConfig:
    """Return the settings of the network, with the source of its first weights."""
    if resumed is not None:
        init_from = source = resumed.facts.init_from
    elif init_from is not None:
        source = sources.weights(init_from)
    return model if init_from is None else model.model_copy(update={"pretrained": source})


def _with_specific_tiles(
    config: Config, model: ModelConfig, train_data: CocoData, resumed: Checkpoint | None
) -> tuple[Config, str | None]:
    """Return the configuration without `data.tiles=auto`, and a line on the windows that replace it."""
    if config.data.tiles != "auto":
        return config, None
    if resumed is not None:  # the network that was built then
        model = model.model_copy(update={"pretrained": str(resumed.folder)})
    return resolve_tiles(config, train_data, finest_stride_of(model))


def _build_network(
    model: ModelConfig, facts: RunFacts, train_data: CocoData, resumed: Checkpoint | None
) -> Detector:
    """Build the network with its first weights, or those of the checkpoint."""
    settings = facts.config.training
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
        if facts.init_from is None:
            raise
        raise UsageError(f"--init-from {facts.init_from}: {error}") from error
    check_image_sizes(facts.config.data, detector.family, detector.network.config, train=True)
    if train_data.max_boxes_per_image == 0:  # nothing would be learned
        raise DataError(
            f"{train_data.annotations_path}: has no box to train on (crowd boxes do not count); check that "
            "it is the right file"
        )
    if train_data.max_boxes_per_image > detector.num_queries:
        raise DataError(
            f"{train_data.annotations_path}: an image has {train_data.max_boxes_per_image} boxes, but the "
            f"model finds at most {detector.num_queries}; raise model.num_queries"
        )
    parameter_groups(detector, settings)  # reports a layer decay that the backbone does not support
    if resumed is not None:
        restore_weights(resumed, detector)
    if settings.sync_batch_norm and facts.num_processes > 1:
        synchronise_batch_norm(detector.network)
    if settings.gradient_checkpointing:
        recompute_activations(detector.network)
    if settings.compile_model:
        compile_regions(detector.network)
    return detector
