"""MLflow stores that several runs open, make or change at the same moment, as sweeps and job arrays do."""

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from filelock import FileLock
from filelock import Timeout as LockTimeout
from mlflow import MlflowClient
from mlflow.entities import Experiment
from mlflow.exceptions import MlflowException

from detr_dist.errors import UsageError
from detr_dist.tracking.uris import artifact_location, database_path, is_file_store, local_path

# Making a database takes seconds. If the lock's holder hangs, continuing without the lock is the lesser evil.
_LOCK_PATIENCE_S = 120.0

# SQLite waits for 20 s by itself, but where two runs would wait for each other one of them fails at once.
_BUSY_PATIENCE_S = 60.0
_LONGEST_PAUSE_S = 2.0

T = TypeVar("T")


@contextmanager
def locked_store(uri: str) -> Iterator[None]:
    """Keep other processes, on any node, out of a store on disk while it is made or changed.

    A lock file beside the store does it. Servers need none, and a file system that has no locks gets none.
    """
    path = _lock_path(uri)
    if path is None:
        yield
        return
    lock = FileLock(path)
    try:
        lock.acquire(timeout=_LOCK_PATIENCE_S)
    except (LockTimeout, OSError, NotImplementedError):
        yield
        return
    try:
        yield
    finally:
        lock.release()


def _lock_path(uri: str) -> Path | None:
    store = local_path(uri) if is_file_store(uri) else database_path(uri)
    return store.absolute().with_name(f"{store.name}.lock") if store is not None else None


def unless_busy(request: Callable[[], T]) -> T:
    """What `request` returns, asked again for a minute while the database is busy with other runs.

    Raises:
        MlflowException: it is still busy then, or something else is wrong.
    """
    give_up_at, pause_s = time.monotonic() + _BUSY_PATIENCE_S, 0.05
    while True:
        try:
            return request()
        except MlflowException as error:
            if error.error_code != "TEMPORARILY_UNAVAILABLE" or time.monotonic() > give_up_at:
                raise
        time.sleep(pause_s * random.uniform(0.5, 1.5))  # or they would all come back at the same moment
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def find_or_make_experiment(client: MlflowClient, name: str) -> str:
    """Return the id of the experiment of that name, which is made if there is none.

    Raises:
        UsageError: it was deleted; says how to bring it back.
    """
    experiment = _experiment(client, name)
    if experiment is None:
        with locked_store(client.tracking_uri):
            experiment = _experiment(client, name) or _make_experiment(client, name)
    refuse_deleted(experiment)
    return str(experiment.experiment_id)


def _experiment(client: MlflowClient, name: str) -> Experiment | None:
    return unless_busy(lambda: client.get_experiment_by_name(name))


def _make_experiment(client: MlflowClient, name: str) -> Experiment:
    try:
        experiment_id = unless_busy(
            lambda: client.create_experiment(name, artifact_location(client.tracking_uri))
        )
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        # By a run elsewhere, which a lock on this disk does not stop.
        made_meanwhile = _experiment(client, name)
        if made_meanwhile is None:
            raise
        return made_meanwhile
    return unless_busy(lambda: client.get_experiment(experiment_id))


def refuse_deleted(experiment: Experiment) -> None:
    """Raise UsageError, with the way to bring it back, if an experiment was deleted."""
    if experiment.lifecycle_stage != "active":
        raise UsageError(
            f"logging.mlflow_experiment_name {experiment.name}: this experiment was deleted; bring it back "
            f"with `mlflow experiments restore --experiment-id {experiment.experiment_id}` (and "
            "MLFLOW_TRACKING_URI set to its store), or give another name"
        )
