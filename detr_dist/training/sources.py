"""Sources of a run's first state: checkpoints and weights on disk, in MLflow or on the hub."""

import logging
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from detr_dist.distributed import HostGroup
from detr_dist.errors import CheckpointError, DataError, UsageError
from detr_dist.storage import finish_interrupted, locked
from detr_dist.tracking.uris import is_artifact_uri, is_run_id
from detr_dist.training.checkpoint import (
    AVERAGE,
    NETWORK,
    STRUCTURE,
    Checkpoint,
    is_checkpoint,
    newest_checkpoint,
    open_checkpoint,
)

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FoundModel:
    """A model that transformers can load, found by its reference."""

    location: str
    """A local folder, or a hub id."""
    checkpoint: Checkpoint | None = None
    """The checkpoint that the weights are from; they are its averaged ones, if it has any."""


def find_model(reference: str, tracking_uri: str, scratch: Path) -> FoundModel:
    """Find the model that `reference` names.

    Args:
        reference: A model's or checkpoint's folder, an artifact URI of MLflow (`runs:/...`, `models:/...`), a
            run's id for its best model, or a hub id.
        tracking_uri: URI of MLflow's store.
        scratch: Folder for downloads and assembled models.

    Raises:
        UsageError: the reference names nothing.
        CheckpointError: the checkpoint is corrupt.
    """
    if is_run_id(reference):
        reference = f"runs:/{reference}"
    if re.fullmatch("runs:/[^/]+/?", reference):
        reference = f"{reference.rstrip('/')}/model"
    if re.fullmatch("models:/[^/@]+/?", reference) and not reference.startswith("models:/m-"):
        raise UsageError(f"{reference}: names no version; add one, e.g. /1, or an alias, e.g. @best")
    if is_artifact_uri(reference):
        from detr_dist.tracking.artifacts import download_folder  # imports MLflow, which is slow

        into = Path(tempfile.mkdtemp(dir=scratch))
        folder = download_folder(re.sub("^(models:/[^/]+)/@", r"\1@", reference), tracking_uri, into)
    else:
        folder = Path(reference).expanduser()
    if is_checkpoint(folder):
        return _weights_of(open_checkpoint(folder), scratch)
    if (folder / STRUCTURE).exists():
        return FoundModel(str(folder))
    if folder.is_dir():
        raise UsageError(
            f"{reference}: neither a model nor a checkpoint (it has no {STRUCTURE}); give the folder of one, "
            "such as OUTPUT_DIR/model or OUTPUT_DIR/checkpoints/best"
        )
    if _is_path(reference):
        raise UsageError(
            f"{reference}: no such folder; give the folder of a model or of a checkpoint, or a hub id, which "
            "is OWNER/NAME"
        )
    return FoundModel(reference)


def _is_path(reference: str) -> bool:
    """Return whether a reference cannot be a detector's hub id, which is OWNER/NAME.

    A name alone is the id of a few of the oldest models, and more often a folder that is missing: asking the
    hub for it takes 20 s without internet.
    """
    parts = reference.split("/")
    return reference[:1] in {".", "~"} or len(parts) != 2 or not all(parts) or Path(parts[0]).exists()


def _weights_of(checkpoint: Checkpoint, scratch: Path) -> FoundModel:
    """Arrange the weights of a checkpoint as transformers expects a model."""
    weights = AVERAGE if (checkpoint.folder / AVERAGE).exists() else NETWORK
    folder = Path(tempfile.mkdtemp(dir=scratch))
    for name, source in ((STRUCTURE, STRUCTURE), ("model.safetensors", weights)):
        (folder / name).symlink_to((checkpoint.folder / source).absolute())
    return FoundModel(str(folder), checkpoint)


class Sources:
    """Finds checkpoints and weights, for all processes of a run. Collective, except for `download`.

    One process of each node downloads from MLflow, into a folder that is removed by `close`, or when the
    process ends.
    """

    def __init__(
        self, host: HostGroup, output_dir: Path, tracking_uri: str, *, may_clear_up: bool = True
    ) -> None:
        self._host = host
        self._may_clear_up = may_clear_up
        self._output_dir = output_dir
        self.tracking_uri = tracking_uri
        self._scratch = tempfile.TemporaryDirectory(prefix="detr_dist_")  # each process has its own

    def close(self) -> None:
        """Remove the downloads, after every process has read them."""
        self._host.gather_rows([0.0])
        self._scratch.cleanup()

    def download(self, artifact_uri: str) -> Path:
        """Download a folder from MLflow, on this process only, and return its local path.

        Raises:
            UsageError: there is no such folder, or it cannot be downloaded.
        """
        from detr_dist.tracking.artifacts import download_folder  # as above

        into = Path(tempfile.mkdtemp(dir=self._scratch.name))
        return download_folder(artifact_uri, self.tracking_uri, into)

    def checkpoint(self, resume: str) -> Checkpoint | None:
        """Find and verify the checkpoint that `--resume` names; return None if `auto` finds none.

        Raises:
            UsageError: there is no such checkpoint.
            CheckpointError: the specified checkpoint is corrupt.
        """
        if self._may_clear_up:
            with self._host.failing_together():
                if self._host.is_main_process:
                    self._clear_up()
        found = self._host.once_per_node(lambda: self._find(resume))
        states = self._host.all_gather_objects(found and found.state)
        if any(state != states[0] for state in states):
            steps = ", ".join("none" if state is None else f"step {state.step}" for state in states)
            raise DataError(
                f"--resume {resume}: the nodes find different checkpoints (by process: {steps}); put "
                "--output-dir on a disk that all of them share"
            )
        if found is None and self._host.is_main_process:
            _logger.info(f"no checkpoint in {self._output_dir}: starting a new run")
        return found

    def weights(self, init_from: str) -> str:
        """Return the folder or hub id, for transformers, of the weights that `--init-from` names.

        For a checkpoint these are its averaged weights, if it has any.

        Raises:
            UsageError: there are no such weights.
            CheckpointError: the specified checkpoint is corrupt.
        """
        return self._host.once_per_node(
            lambda: find_model(init_from, self.tracking_uri, Path(self._scratch.name)).location
        )

    def _clear_up(self) -> None:
        """Complete or undo writes in the output folder that a kill interrupted.

        Raises:
            DataError: a run is active in the output folder.
        """
        if not os.access(self._output_dir, os.W_OK):  # does not exist yet, or will be reported later
            return
        with locked(self._output_dir):
            finish_interrupted(self._output_dir, "model")
            for name in finish_interrupted(self._output_dir / "checkpoints"):
                _logger.info(f"checkpoint {name} was being written when its process ended: removed")

    def _find(self, resume: str) -> Checkpoint | None:
        if resume == "auto":
            return newest_checkpoint(self._output_dir / "checkpoints")
        folder = Path(resume)
        if folder.is_dir():
            if is_checkpoint(folder):
                return open_checkpoint(folder)
            newest = newest_checkpoint(folder / "checkpoints")
            if newest is None:
                raise UsageError(f"--resume {folder}: holds no intact checkpoint; give the folder of one")
            return newest
        if is_run_id(resume):
            return self._newest_of_run(resume)
        if is_artifact_uri(resume):
            return open_checkpoint(self.download(resume))
        raise UsageError(
            f"--resume {resume}: not an existing folder; give one, `auto`, an MLflow run id (32 hexadecimal "
            "digits) or an artifact URI such as runs:/<run id>/checkpoints/last"
        )

    def _newest_of_run(self, run_id: str) -> Checkpoint:
        from detr_dist.tracking.artifacts import checkpoint_uris  # as above

        for uri in checkpoint_uris(run_id, self.tracking_uri, Path(self._scratch.name)):
            try:
                return open_checkpoint(self.download(uri))
            except CheckpointError as error:
                _logger.warning(f"skipped {uri}, which is corrupt: {error}")
        raise UsageError(
            f"--resume {run_id}: MLflow run {run_id} has no intact checkpoint; it cannot be resumed"
        )
