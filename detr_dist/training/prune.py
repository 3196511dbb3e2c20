"""Deletes old checkpoints and epoch models, on disk and in MLflow; `best`, `last` and the best model stay."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from detr_dist.errors import UsageError
from detr_dist.tracking.delivery import delete_artifacts, one_line, patience
from detr_dist.tracking.download import is_run_id
from detr_dist.tracking.folder_lock import locked
from detr_dist.tracking.mlflow import open_client, say
from detr_dist.tracking.outbox import Address, outdated
from detr_dist.training.checkpoint import outdated_checkpoints
from detr_dist.training.durable import remove_folder

_TIMEOUT_S = 60


@dataclass(frozen=True)
class _Find:
    """A folder that may go."""

    name: str
    num_bytes: int
    delete: Callable[[], None]


def prune(
    targets: Sequence[str], *, experiment: str | None, tracking_uri: str, keep_last: int, delete: bool
) -> None:
    """Say what is older than the newest `keep_last` checkpoints and epoch models of each target (an output
    folder with its MLflow run, or the id of a run) and of every run of `experiment`; with `delete` delete it.

    Raises:
        UsageError: a target is neither, or MLflow cannot be reached.
        DataError: a run is at work in an output folder.
    """
    if not targets and experiment is None:
        raise UsageError("nothing to prune: give output folders, MLflow run ids or --experiment")
    with ExitStack() as held, patience(_TIMEOUT_S):
        finds: list[_Find] = []
        for target in targets:
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
        for find in finds:
            if delete:
                find.delete()
            say(f"{'deleted ' if delete else ''}{find.num_bytes / 2**20:10.1f} MiB  {find.name}")
    total = f"{len(finds)} folders, {sum(find.num_bytes for find in finds) / 2**20:.1f} MiB"
    say(f"{total} deleted" if delete else f"{total} could go; nothing is deleted without --delete")


def _in_output(folder: Path, keep_last: int) -> Iterator[_Find]:
    checkpoints_dir, outboxes = folder / "checkpoints", sorted(folder.glob("outbox/*/run.json"))
    if not checkpoints_dir.is_dir() and not outboxes:
        raise UsageError(f"{folder}: holds neither checkpoints nor an outbox; give the --output-dir of a run")
    for checkpoint in outdated_checkpoints(checkpoints_dir, keep_last):
        num_bytes = sum(path.stat().st_size for path in checkpoint.iterdir())
        yield _Find(str(checkpoint), num_bytes, partial(remove_folder, checkpoint))
    for path in outboxes:
        address = Address(**json.loads(path.read_text()))
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
        raise UsageError(f"{what} is not to be had from {tracking_uri} ({one_line(error)})") from error


def _in_ended_runs(runs: Sequence[Run], tracking_uri: str, keep_last: int) -> Iterator[_Find]:
    """Of a run that is going on, only its own process knows what it still needs."""
    for run in runs:
        if run.info.status == "RUNNING":
            say(f"passed over run {run.info.run_id}: it is running, or was killed: give its output folder")
    yield from _in_runs([run for run in runs if run.info.status != "RUNNING"], tracking_uri, keep_last)


def _in_runs(runs: Sequence[Run], tracking_uri: str, keep_last: int) -> Iterator[_Find]:
    client = open_client(tracking_uri)
    for run_id in (run.info.run_id for run in runs):
        for parent in ("checkpoints", "models"):
            there = [item.path for item in client.list_artifacts(run_id, parent)]
            for artifact_path in outdated(there, parent, keep=keep_last):
                yield _Find(
                    f"runs:/{run_id}/{artifact_path}",
                    _num_bytes(client, run_id, artifact_path),
                    partial(delete_artifacts, client, run_id, artifact_path),
                )


def _num_bytes(client: MlflowClient, run_id: str, artifact_path: str) -> int:
    return sum(
        _num_bytes(client, run_id, item.path) if item.is_dir else int(item.file_size or 0)
        for item in client.list_artifacts(run_id, artifact_path)
    )
