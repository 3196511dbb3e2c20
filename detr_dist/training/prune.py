"""Deletion of old checkpoints and epoch models, on disk and in MLflow, except `best`, `last` and `model`."""

import json
import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import NamedTuple

import yaml
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from detr_dist.errors import DetrDistError, UsageError
from detr_dist.storage import locked, remove_folder
from detr_dist.text import one_line
from detr_dist.tracking.artifacts import delete_artifacts, fetch
from detr_dist.tracking.logged_models import LoggedModels
from detr_dist.tracking.outbox import OutboxReader, outdated
from detr_dist.tracking.store import open_client, patience
from detr_dist.tracking.uris import is_run_id
from detr_dist.training.checkpoint import outdated_checkpoints

_TIMEOUT_S = 60

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Find:
    """A folder that may be deleted."""

    name: str
    num_bytes: int
    delete: Callable[[], None]


def prune(
    targets: Sequence[str], *, experiment: str | None, tracking_uri: str, keep_last: int, delete: bool
) -> None:
    """Report all but the newest `keep_last` checkpoints and epoch models of runs; with `delete`, delete them.

    Each target is an output folder with its MLflow run, or the id of a run. All runs of `experiment` are
    added.

    Raises:
        UsageError: a target is neither, or MLflow cannot be reached.
        DataError: a run is active in an output folder.
        DetrDistError: something could not be deleted; the rest was.
    """
    if not targets and experiment is None:
        raise UsageError("nothing to prune: give output folders, MLflow run ids or --experiment")
    with ExitStack() as held, patience(_TIMEOUT_S):
        finds: list[_Find] = []
        for target in {Path(target).resolve(): target for target in targets}.values():
            folder = Path(target)
            if folder.is_dir():
                held.enter_context(locked(folder))
                finds += _in_output(folder, keep_last)
            elif is_run_id(target):
                finds += _in_ended_runs(_runs(tracking_uri, run_id=target), tracking_uri, keep_last)
            else:
                raise UsageError(f"{target}: neither an existing folder nor an MLflow run id")
        if experiment is not None:
            finds += _in_ended_runs(_runs(tracking_uri, experiment=experiment), tracking_uri, keep_last)
        # By name, because a run may be given as a folder, as an id and with its experiment.
        done, failures = _go_through(list({find.name: find for find in finds}.values()), delete=delete)
    total = f"{len(done)} folders, {sum(find.num_bytes for find in done) / 2**20:.1f} MiB"
    _logger.info(
        f"{total} deleted" if delete else f"{total} could be deleted; nothing is deleted without --delete"
    )
    if failures:
        raise DetrDistError("\n".join(failures))


def _go_through(finds: Iterable[_Find], *, delete: bool) -> tuple[list[_Find], list[str]]:
    """Report the finds, and delete them with `delete`; return those that succeeded, and the failures."""
    done: list[_Find] = []
    failures: list[str] = []
    for find in finds:
        try:
            if delete:
                find.delete()
        except Exception as error:  # each kind of store raises its own types
            failures.append(f"{find.name} could not be deleted ({one_line(error)})")
            continue
        _logger.info(f"{'deleted ' if delete else ''}{find.num_bytes / 2**20:10.1f} MiB  {find.name}")
        done.append(find)
    return done, failures


def _in_output(folder: Path, keep_last: int) -> Iterator[_Find]:
    checkpoints_dir, outboxes = folder / "checkpoints", sorted(folder.glob("outbox/*/run.json"))
    if not checkpoints_dir.is_dir() and not outboxes:
        raise UsageError(f"{folder}: holds neither checkpoints nor an outbox; give the --output-dir of a run")
    for checkpoint in outdated_checkpoints(checkpoints_dir, keep_last):
        num_bytes = sum(path.stat().st_size for path in checkpoint.iterdir())
        yield _Find(str(checkpoint), num_bytes, partial(remove_folder, checkpoint))
    for path in outboxes:
        address = OutboxReader(path.parent).address
        yield from _in_runs(
            _runs(address.tracking_uri, run_id=address.run_id), address.tracking_uri, keep_last
        )


def _runs(tracking_uri: str, *, run_id: str | None = None, experiment: str | None = None) -> list[Run]:
    client = open_client(tracking_uri)
    try:
        if run_id is not None:
            return [client.get_run(run_id)]
        found = client.get_experiment_by_name(str(experiment))
        if found is None:
            raise UsageError(f"--experiment {experiment}: there is none of that name at {tracking_uri}")
        runs: list[Run] = []
        page: str | None = None
        while page is None or page:
            answer = client.search_runs([found.experiment_id], page_token=page)
            runs, page = [*runs, *answer], answer.token or ""
        return runs
    except (MlflowException, OSError) as error:
        what = f"MLflow run {run_id}" if run_id is not None else f"--experiment {experiment}"
        raise UsageError(f"{what} is not available at {tracking_uri} ({one_line(error)})") from error


def _in_ended_runs(runs: Sequence[Run], tracking_uri: str, keep_last: int) -> Iterator[_Find]:
    """Yield the folders of runs that have ended; active runs may still need theirs."""
    for run in runs:
        if run.info.status == "RUNNING":
            _logger.info(
                f"skipped run {run.info.run_id}: it is running, or was killed: give its output folder"
            )
    yield from _in_runs([run for run in runs if run.info.status != "RUNNING"], tracking_uri, keep_last)


def _in_runs(runs: Sequence[Run], tracking_uri: str, keep_last: int) -> Iterator[_Find]:
    client = open_client(tracking_uri)
    for run in runs:
        run_id = run.info.run_id
        there = {
            parent: [item.path for item in client.list_artifacts(run_id, parent)]
            for parent in ("checkpoints", "models")
        }
        left: set[str] = set()
        if "resumed_at_steps" in run.data.tags:  # only a resumed run may have returned to an earlier step
            left = _left_behind(run_id, tracking_uri, [path for paths in there.values() for path in paths])
        for parent, paths in there.items():
            past = outdated([path for path in paths if path not in left], parent, keep=keep_last)
            for artifact_path in [path for path in paths if path in {*past, *left}]:
                yield _Find(
                    f"runs:/{run_id}/{artifact_path}",
                    _num_bytes(client, run_id, artifact_path),
                    partial(_delete, client, run_id, artifact_path),
                )


def _delete(client: MlflowClient, run_id: str, artifact_path: str) -> None:
    """Delete an artifact folder, and the LoggedModels of epochs whose model is no longer there."""
    delete_artifacts(client, run_id, artifact_path)
    if artifact_path.startswith("models/"):
        left = {item.path for item in client.list_artifacts(run_id, "models")}
        LoggedModels(client, run_id).delete_missing(left)


class _Saved(NamedTuple):
    step: int
    at: datetime
    """Time, with a resolution of a second."""


def _left_behind(run_id: str, tracking_uri: str, artifact_paths: Sequence[str]) -> set[str]:
    """Return the epochs that a run discarded when it resumed from an earlier step that was saved later."""
    with tempfile.TemporaryDirectory() as scratch:
        saved = {
            path: _saved(f"runs:/{run_id}/{path}", tracking_uri, Path(scratch)) for path in artifact_paths
        }
    known = [each for each in saved.values() if each is not None]
    return {
        path
        for path, own in saved.items()
        if "/epoch_" in path and own and any(each.step < own.step and each.at > own.at for each in known)
    }


def _saved(artifact_uri: str, tracking_uri: str, scratch: Path) -> _Saved | None:
    """Return step and time of a checkpoint or model; None if it is incomplete."""
    try:
        if "/models/" in artifact_uri:
            model = yaml.safe_load(
                fetch(f"{artifact_uri}/MLmodel", tracking_uri, scratch).read_text(encoding="utf-8")
            )
            at = datetime.fromisoformat(model["utc_time_created"]).replace(tzinfo=UTC)
            return _Saved(int(model["metadata"]["step"]), at.replace(microsecond=0))
        state = json.loads(
            fetch(f"{artifact_uri}/state.json", tracking_uri, scratch).read_text(encoding="utf-8")
        )
        return _Saved(int(state["step"]), datetime.fromisoformat(state["saved_at"]).astimezone())
    except (MlflowException, OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return None  # the upload was interrupted before


def _num_bytes(client: MlflowClient, run_id: str, artifact_path: str) -> int:
    return sum(
        _num_bytes(client, run_id, item.path) if item.is_dir else int(item.file_size or 0)
        for item in client.list_artifacts(run_id, artifact_path)
    )
