"""A checkpoint: a folder from which training resumes, with checksums of its files.

    model.safetensors   the network's weights
    ema.safetensors     their moving average, if there is one
    optimizer.pt        optimizer, scheduler and loss scaler: tensors and numbers only
    config.json         the network's structure, as transformers writes it
    state.json          the progress of the run, and everything it depends on
    manifest.json       size and SHA-256 of the other files, written last

Nothing in it is ever executed: a checkpoint from a shared server may be anybody's.
"""

import hashlib
import json
import logging
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from accelerate.utils import recursively_apply
from pydantic import PlainSerializer, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from detr_dist.config import Config
from detr_dist.errors import CheckpointError
from detr_dist.models.detector import Detector
from detr_dist.redaction import redact_value
from detr_dist.storage import link_folder, new_folder
from detr_dist.text import one_line
from detr_dist.training.loop import Training, TrainState
from detr_dist.training.strategy import OptimizerMemory

_logger = logging.getLogger(__name__)

NETWORK, AVERAGE, OPTIMIZER = "model.safetensors", "ema.safetensors", "optimizer.pt"
STRUCTURE, STATE, MANIFEST = "config.json", "state.json", "manifest.json"

UNREADABLE = (float("inf"), 0.0)
"""The age of a folder whose state.json cannot be read."""


@dataclass(frozen=True)
class RunFacts:
    """Everything that a run depends on besides its progress; a resumed run is compared with it."""

    config: Config
    class_names: list[str]
    num_train_images: int
    data_sha256: str
    """Fingerprint of the training annotations, which depends on their order and boxes."""
    num_processes: int
    global_batch_size: int
    init_from: Annotated[str, PlainSerializer(redact_value, when_used="json")] | None
    """The `--init-from` of the run, if any: the source of the first weights."""
    mlflow_run_id: str | None
    versions: dict[str, str]
    zero_stage: int = 0
    """ZeRO stage of DeepSpeed; 0 without DeepSpeed."""
    val_data_sha256: str | None = None
    """Fingerprint of the validation annotations; None in checkpoints of earlier versions."""
    source_weights: tuple[float, ...] | None = None
    """Weights of the sources of the training data, if they have any."""


# state.json contains the fields of both.
_STATE, _FACTS = TypeAdapter(TrainState), TypeAdapter(RunFacts)


@dataclass(frozen=True)
class Snapshot:
    """The content of a checkpoint, copied to the host so that training continues while it is written."""

    network: dict[str, Tensor]
    average: dict[str, Tensor] | None
    optimizer: dict[str, Any]
    structure: str
    document: dict[str, Any]

    @property
    def model(self) -> dict[str, Tensor]:
        """The weights that are evaluated and saved as the model: the average, if there is one."""
        return self.network if self.average is None else self.average


def take_snapshot(
    training: Training,
    detector: Detector,
    state: TrainState,
    facts: RunFacts,
    memory: OptimizerMemory | None = None,
) -> Snapshot:
    """Copy the current state of the run to the host. Waits for the device.

    `memory` is the optimizer state, if the optimizer of this process has only a part of it.
    """
    scaler = training.accelerator.scaler
    average = training.average
    return Snapshot(
        network=_to_host(detector.network.state_dict()),
        average=_to_host(average.detector.network.state_dict()) if average.decay else None,
        optimizer=_to_host(
            {
                "optimizer": training.optimizer.state_dict()["state"] if memory is None else memory,
                "scheduler": training.scheduler.state_dict(),
                "scaler": scaler.state_dict() if scaler else None,
            }
        ),
        structure=detector.plain_config.to_json_string(),
        document=_STATE.dump_python(state)
        | {
            "epoch": state.step / training.plan.steps_per_epoch,
            "samples_seen": state.step * training.plan.global_batch_size,
            "saved_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        | _FACTS.dump_python(facts, mode="json"),
    )


def copy_model(training: Training) -> dict[str, Tensor]:
    """Copy only the `model` of a snapshot, at most a third of it. Waits for the device."""
    weights: dict[str, Tensor] = _to_host(training.average.detector.network.state_dict())
    return weights


def _to_host(tree: Any) -> Any:
    return recursively_apply(lambda tensor: tensor.detach().to("cpu", copy=True).contiguous(), tree)


def write_checkpoint(checkpoints_dir: Path, names: Sequence[str], snapshot: Snapshot) -> None:
    """Write a snapshot under each of `names`; on any failure each of them is complete or unchanged.

    Raises:
        OSError: the disk is full, unavailable or read-only.
    """
    first, *others = names
    with new_folder(checkpoints_dir / first) as partial:
        save_file(snapshot.network, partial / NETWORK)
        if snapshot.average is not None:
            save_file(snapshot.average, partial / AVERAGE)
        torch.save(snapshot.optimizer, partial / OPTIMIZER)
        (partial / STRUCTURE).write_text(snapshot.structure, encoding="utf-8")
        (partial / STATE).write_text(json.dumps(snapshot.document, indent=2) + "\n", encoding="utf-8")
        manifest = {path.name: _fingerprint(path) for path in sorted(partial.iterdir())}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    for name in others:
        link_folder(checkpoints_dir / first, checkpoints_dir / name)


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was intact when it was opened.

    Raises:
        CheckpointError: from every method, naming the file, if its content is invalid.
    """

    folder: Path
    state: TrainState
    facts: RunFacts

    @property
    def age(self) -> tuple[int, int]:
        """A key that sorts the checkpoints of a run from the oldest to the newest."""
        return self.state.step, self.state.closed_step

    def network(self) -> dict[str, Tensor]:
        """Return the network's weights."""
        return self._tensors(NETWORK)

    def average(self) -> dict[str, Tensor] | None:
        """Return the moving average of the weights, if there is one."""
        return self._tensors(AVERAGE) if (self.folder / AVERAGE).exists() else None

    def optimizer(self) -> dict[str, Any]:
        """Return the states of optimizer, scheduler and loss scaler, by these names."""
        path = self.folder / OPTIMIZER
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises nearly any type for files it cannot read
            raise CheckpointError(
                f"{path}: holds something else than tensors and numbers, or is damaged; nothing of it was "
                f"run. Use another checkpoint ({one_line(error)})"
            ) from None
        if not isinstance(content, dict) or content.keys() != {"optimizer", "scheduler", "scaler"}:
            raise CheckpointError(
                f"{path}: does not hold optimizer, scheduler and scaler; use another checkpoint"
            )
        return content

    def _tensors(self, name: str) -> dict[str, Tensor]:
        try:
            return load_file(self.folder / name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{self.folder / name}: no safetensors file ({one_line(error)}); use another checkpoint"
            ) from None


def is_checkpoint(folder: Path) -> bool:
    """Return whether a folder looks like a checkpoint, intact or not."""
    return (folder / STATE).exists() or (folder / MANIFEST).exists()


def open_checkpoint(folder: Path) -> Checkpoint:
    """Check every file of a checkpoint and read its state.

    Raises:
        CheckpointError: naming the first file that is missing or has changed.
    """
    manifest = _read_json(folder / MANIFEST)
    expected = {NETWORK, OPTIMIZER, STRUCTURE, STATE}
    if not expected <= manifest.keys() <= expected | {AVERAGE}:
        raise CheckpointError(f"{folder / MANIFEST}: does not list the files of a checkpoint")
    for name, written in manifest.items():
        path = folder / name
        try:
            found = _fingerprint(path)
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror}, but its checkpoint lists it") from None
        if found != written:
            raise CheckpointError(f"{path}: not as it was written (size or SHA-256 differs)")
    document = _read_json(folder / STATE)
    match document:
        case {"config": {"data": dict(data)}}:  # versions without this key did not group
            data.setdefault("group_by_shape", False)
            data.setdefault("canvas_multiple", 1)
    try:
        return Checkpoint(
            folder,
            _STATE.validate_python(document),
            _FACTS.validate_python(document),
        )
    except ValidationError as error:
        wrong = ", ".join(str(problem["loc"][0]) for problem in error.errors())
        raise CheckpointError(f"{folder / STATE}: {wrong} not as this version writes it") from None


def newest_checkpoint(checkpoints_dir: Path) -> Checkpoint | None:
    """Return the newest intact checkpoint in a folder of checkpoints; warn about newer corrupt ones."""
    folders = sorted(path for path in checkpoints_dir.glob("[!.]*") if path.is_dir())
    for folder in sorted(folders, key=claimed_age, reverse=True):
        try:
            return open_checkpoint(folder)
        except CheckpointError as error:
            _logger.warning(f"skipped a corrupt checkpoint: {error}")
    return None


def claimed_age(folder: Path) -> tuple[float, float]:
    """Return the age in `state.json`, unverified; an unreadable one counts as newest, to be reported."""
    try:
        document = _read_json(folder / STATE)
        return float(document["step"]), float(document["closed_step"])
    except (CheckpointError, KeyError, TypeError, ValueError, OverflowError):
        return UNREADABLE


def outdated_checkpoints(checkpoints_dir: Path, keep_last: int) -> list[Path]:
    """Return all but the newest `keep_last` of epoch_<N> and step_<N>, not `best` and `last`.

    Damaged checkpoints come first.
    """
    folders = [path for path in checkpoints_dir.glob("*") if re.fullmatch(r"(epoch|step)_\d+", path.name)]
    ages = {path: claimed_age(path) for path in folders}
    return sorted(folders, key=lambda path: (ages[path] != UNREADABLE, ages[path]))[:-keep_last]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or "not JSON"
        raise CheckpointError(f"{path}: {reason}; its checkpoint is corrupt") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a JSON object; its checkpoint is corrupt")
    return content
