"""Resuming from a checkpoint: changes that are allowed since, and restoring weights and optimizer."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.amp import GradScaler
from torch.optim import Optimizer

from detr_dist.config import FROM_ENVIRONMENT, Config
from detr_dist.errors import CheckpointError, UsageError
from detr_dist.models.average import WeightAverage
from detr_dist.models.detector import Detector
from detr_dist.redaction import redact, redact_value
from detr_dist.tracking.outbox import with_credentials
from detr_dist.tracking.uris import is_run_id
from detr_dist.training.checkpoint import Checkpoint, RunFacts

FREE_SECTIONS = {"evaluation", "checkpoint", "logging"}
FREE_KEYS = {
    "data.num_workers",
    "data.prefetch_factor",
    "training.num_epochs",
    "training.max_steps",
    "training.batch_size",  # with the number of processes and the accumulation: their product is compared
    "training.gradient_accumulation_steps",
    "training.compile_model",
    "training.gradient_checkpointing",
    "training.try_largest_batch",
    "training.channels_last",
    "training.deterministic",
    "training.early_stopping_patience",
    "training.extensions",
    "training.callbacks",
}
"""Settings that may change in a resumed run; all other keys affect the trained weights."""


def keep_settings(config: Config, saved: RunFacts, resume: str, output_dir: Path) -> Config:
    """Return `config` with some settings of the run that `--resume` names, unless they are set explicitly.

    They are MLflow's store (with the credentials in the run's outbox), experiment and run name, and settings
    whose default was another in earlier versions, such as `data.canvas_multiple`: a run of a version that did
    not round its canvas continues without rounding.
    """
    logging, data, model = config.logging, config.data, config.model
    if saved.mlflow_run_id is not None:
        unset = FROM_ENVIRONMENT.keys() - logging.model_fields_set
        was_found_there = is_run_id(resume) or resume.startswith("runs:/")  # wherever it was before
        saved_uri = saved.config.logging.mlflow_tracking_uri
        if was_found_there or redact(logging.mlflow_tracking_uri) == redact(saved_uri):
            unset -= {"mlflow_tracking_uri"}  # the saved one has no credentials
        logging = logging.model_copy(update=saved.config.logging.model_dump(include=unset))
        uri = with_credentials(logging.mlflow_tracking_uri, output_dir / "outbox" / saved.mlflow_run_id)
        logging = logging.model_copy(update={"mlflow_tracking_uri": uri})
    if "canvas_multiple" not in data.model_fields_set:
        data = data.model_copy(update={"canvas_multiple": saved.config.data.canvas_multiple})
    if "backbone" not in model.model_fields_set and saved.config.model.backbone == "resnet50":
        model = model.model_copy(update={"backbone": "resnet50"})
    return config.model_copy(update={"logging": logging, "data": data, "model": model})


def compare_with_saved(saved: RunFacts, now: RunFacts) -> list[str]:
    """Return a line for each allowed change since the checkpoint was saved.

    Raises:
        UsageError: something has changed that would make it another run; the message lists all such changes.
    """
    taken: list[str] = []
    refused: list[str] = []
    for (key, before), (_, after) in zip(_leaves(saved.config), _leaves(now.config), strict=True):
        if before != after and not (key == "data.exif" and _ignored_exif(saved) and after == "ignore"):
            is_free = key.split(".")[0] in FREE_SECTIONS or key in FREE_KEYS
            (taken if is_free else refused).append(f"{key} {_shown(before)} -> {_shown(after)}")
    if saved.class_names != now.class_names:
        refused.append(f"classes of the data {_shown(saved.class_names)} -> {_shown(now.class_names)}")
    if saved.num_train_images != now.num_train_images:
        refused.append(f"number of training images {saved.num_train_images} -> {now.num_train_images}")
    elif saved.data_sha256 != now.data_sha256:
        refused.append(
            "annotations of the training data, which have other images, boxes or another order now"
        )
    if saved.source_weights != now.source_weights:
        before, after = (_shown(_weights(each.source_weights)) for each in (saved, now))
        refused.append(f"weights of the sources in --train-dir {before} -> {after}")
    if saved.global_batch_size != now.global_batch_size:
        refused.append(_global_batch(saved, now))
    if refused:
        raise UsageError(
            f"this is not the run that was saved: {'; '.join(refused)}. Set it as it was to resume, or "
            "start a new run, optionally from its weights with --init-from"
        )
    if has_other_validation(saved, now):
        taken.append("validation data: the best score so far is of other data and no longer counts")
    if saved.num_processes != now.num_processes:
        taken.append(f"number of processes {saved.num_processes} -> {now.num_processes}")
    if saved.zero_stage != now.zero_stage:
        taken.append(f"ZeRO stage {saved.zero_stage} -> {now.zero_stage}")
    taken += [
        f"{name} {saved.versions.get(name)} -> {version}"
        for name, version in now.versions.items()
        if saved.versions.get(name) != version
    ]
    return taken


def _ignored_exif(saved: RunFacts) -> bool:
    """Return whether the run is of a version that rotated no image, and read sizes before the rotation."""
    return "exif" not in saved.config.data.model_fields_set


def has_other_validation(saved: RunFacts, now: RunFacts) -> bool:
    """Return whether the validation data have changed, so that scores cannot be compared."""
    return saved.val_data_sha256 not in (None, now.val_data_sha256)


def _global_batch(saved: RunFacts, now: RunFacts) -> str:
    training = now.config.training
    per_micro_step = training.batch_size * now.num_processes
    way_out = ""
    if saved.global_batch_size % per_micro_step == 0:
        way_out = (
            f", training.gradient_accumulation_steps={saved.global_batch_size // per_micro_step} keeps it"
        )
    return (
        f"global batch size {saved.global_batch_size} -> {now.global_batch_size} (training.batch_size "
        f"{training.batch_size} x {now.num_processes} processes x training.gradient_accumulation_steps "
        f"{training.gradient_accumulation_steps}{way_out})"
    )


def _leaves(config: Config) -> Iterator[tuple[str, Any]]:
    """Yield each section.key with its value, without credentials: a checkpoint holds none."""
    for section, values in config:
        for key, value in values:
            yield f"{section}.{key}", redact_value(value)


def _weights(weights: tuple[float, ...] | None) -> str | None:
    return None if weights is None else ", ".join(f"{weight:g}" for weight in weights)


def _shown(value: Any) -> str:
    return "unset" if value is None else str(value)


def restore_weights(checkpoint: Checkpoint, detector: Detector) -> None:
    """Load the network's weights.

    Raises:
        CheckpointError: the weights do not fit the network.
    """
    _load(checkpoint, detector, checkpoint.network())


def restore_average(checkpoint: Checkpoint, average: WeightAverage) -> None:
    """Load the moving average of the weights, if the checkpoint has one."""
    weights = checkpoint.average()
    if weights is not None:
        _load(checkpoint, average.detector, weights)


def _load(checkpoint: Checkpoint, detector: Detector, weights: dict[str, torch.Tensor]) -> None:
    try:
        detector.network.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(
            f"{checkpoint.folder}: its weights do not fit the network ({' '.join(str(error).split())[:300]})"
        ) from None


def restore_optimizer(checkpoint: Checkpoint, optimizer: Optimizer, scaler: GradScaler | None) -> int:
    """Restore the optimizer state of each parameter and the loss scale, not the optimizer's options.

    Returns:
        The number of steps that the learning-rate schedule has done.
    """
    saved = checkpoint.optimizer()
    try:
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": saved["optimizer"], "param_groups": groups})
        for parameter, memory in optimizer.state.items():
            for name in ("exp_avg", "exp_avg_sq"):
                # Fused optimizers require the parameter's own memory format.
                memory[name] = torch.empty_like(parameter).copy_(memory[name].view(parameter.shape))
        if scaler is not None and saved["scaler"]:
            scaler.load_state_dict(saved["scaler"])
        return int(saved["scheduler"]["last_epoch"])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"{checkpoint.folder}: its optimizer state does not fit the network ({error})"
        ) from None
