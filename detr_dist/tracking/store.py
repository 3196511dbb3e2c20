"""MLflow's stores: opening them with time-outs, and creating them from several runs at once, as sweeps do."""

import errno
import logging
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import TypeVar

from filelock import FileLock
from filelock import Timeout as LockTimeout
from mlflow import MlflowClient
from mlflow.entities import Experiment
from mlflow.exceptions import MlflowException
from mlflow.utils import request_utils

from detr_dist.errors import UsageError
from detr_dist.text import one_line
from detr_dist.tracking.uris import (
    WHERE_SET,
    artifact_location,
    check_escapes,
    client_uri,
    is_file_store,
    store_path,
)

# Creating a database takes seconds. If the lock's holder hangs, continuing without the lock is better.
_LOCK_PATIENCE_S = 120.0

# SQLite itself waits for 20 s, but if two runs would wait for each other, one of them fails at once.
_BUSY_PATIENCE_S = 60.0
_LONGEST_PAUSE_S = 2.0

_TIMEOUT_S = 20

EXPERIMENT_KIND = {"mlflow.experimentKind": "custom_model_development"}
"""The tag by which MLflow's UI takes an experiment for one of training, not of agents."""

MAX_TAG_LENGTH = 5000
"""Maximum length of a tag's value in MLflow's API."""

_logger = logging.getLogger(__name__)

T = TypeVar("T")


def open_client(uri: str) -> MlflowClient:
    """Return a client of the tracking store at `uri`, which is created if it is on this host.

    Raises:
        UsageError: the store cannot be used.
    """
    for noisy in ("alembic", "mlflow.store.db.utils"):  # they log dozens of lines when a database is created
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").addFilter(_has_no_traceback)  # the error itself is reported
    check_escapes(uri)
    path = store_path(uri)
    if is_file_store(uri):
        _allow_file_store(uri)
    elif path is not None and not os.access(path.parent, os.W_OK):  # SQLAlchemy would try for minutes
        raise UsageError(
            f"tracking URI {uri}: no folder {path.parent} that can be written to; correct {WHERE_SET}"
        )
    try:
        with patience(_TIMEOUT_S), locked_store(uri):
            return MlflowClient(tracking_uri=client_uri(uri))
    except Exception as error:  # each kind of store raises its own types
        raise UsageError(
            f"tracking URI {uri}: cannot be used ({one_line(error)}); correct {WHERE_SET}, or train with "
            "logging.mlflow=false"
        ) from error


def _has_no_traceback(record: logging.LogRecord) -> bool:
    return not record.exc_info


def _allow_file_store(uri: str) -> None:
    if "MLFLOW_ALLOW_FILE_STORE" not in os.environ:
        os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
        _logger.info(
            f"MLflow keeps file stores such as {uri} only with MLFLOW_ALLOW_FILE_STORE=true, set for this "
            "run; set it for `mlflow ui` too, or use scripts/start_mlflow_ui.sh"
        )


def close_connections(client: MlflowClient) -> None:
    """Close the connections that MLflow keeps open for the next call.

    There is no public way; with other MLflow internals they stay open until the process ends.
    """
    with suppress(ImportError, AttributeError):
        request_utils._cached_get_request_session.cache_clear()
    with suppress(AttributeError):
        client._tracking_client.store._dispose_engine()


@contextmanager
def patience(timeout_s: int) -> Iterator[None]:
    """Make MLflow's HTTP requests fail after `timeout_s` seconds without retries, unless the user set limits.

    MLflow reads these limits only from the environment, which must not be changed while other threads may
    read it: not from a background thread, nor while one trains.
    """
    names = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": str(timeout_s)}
    mine = {name: value for name, value in names.items() if name not in os.environ}
    os.environ.update(mine)
    try:
        yield
    finally:
        for name in mine:
            os.environ.pop(name, None)


@contextmanager
def locked_store(uri: str) -> Iterator[None]:
    """Lock a store on disk against processes on any node while it is created or changed.

    Uses a lock file beside the store. Servers need none, and file systems without locks get none.
    """
    path = store_path(uri)
    with ExitStack() as held:
        if path is not None:
            lock = FileLock(path.with_name(f"{path.name}.lock"), timeout=_LOCK_PATIENCE_S)
            with suppress(LockTimeout, OSError, NotImplementedError):
                held.enter_context(lock)
        yield


def is_away(error: Exception) -> bool:
    """Return whether the server cannot be reached or has an internal error, so that a retry makes sense."""
    return not isinstance(error, MlflowException) or error.get_http_status_code() in (429, *range(500, 600))


def is_refusal(error: MlflowException) -> bool:
    """Return whether the server refuses the request itself, so that a retry is pointless."""
    is_too_long = isinstance(error.__context__, OSError) and error.__context__.errno == errno.ENAMETOOLONG
    # A file store uses names as file names.
    return is_too_long or error.error_code in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")


def unless_busy(request: Callable[[], T]) -> T:
    """Return the result of `request`; retry for a minute while the database is busy with other runs.

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
        time.sleep(pause_s * random.uniform(0.5, 1.5))  # random, so that runs do not retry simultaneously
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def unless_exists(create: Callable[[], object]) -> None:
    """Call `create`, and ignore the error that another run has created it already."""
    try:
        unless_busy(create)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def find_or_make_experiment(client: MlflowClient, name: str) -> str:
    """Return the id of the experiment of that name, which is created if it does not exist.

    Raises:
        UsageError: it was deleted; the message has the command that restores it.
    """
    experiment = unless_busy(lambda: client.get_experiment_by_name(name))
    if experiment is None:
        location = artifact_location(client.tracking_uri)
        with locked_store(client.tracking_uri):
            unless_exists(lambda: client.create_experiment(name, location, EXPERIMENT_KIND))
        experiment = unless_busy(lambda: client.get_experiment_by_name(name))
        assert experiment is not None
    refuse_deleted(experiment)
    return str(experiment.experiment_id)


def refuse_deleted(experiment: Experiment) -> None:
    """Raise UsageError, with the way to restore it, if an experiment was deleted."""
    if experiment.lifecycle_stage != "active":
        raise UsageError(
            f"logging.mlflow_experiment_name {experiment.name}: this experiment was deleted; restore it with "
            f"`mlflow experiments restore --experiment-id {experiment.experiment_id}` (and "
            "MLFLOW_TRACKING_URI set to its store), or give another name"
        )


def acceptable(text: str, limit: int = MAX_TAG_LENGTH) -> str:
    """Return the start of a text that MLflow's stores accept: at most `limit` characters, valid UTF-8.

    Python represents undecodable bytes of file names and arguments by surrogates, which servers refuse.
    """
    with suppress(UnicodeEncodeError):
        text = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return text.encode(errors="replace").decode()[:limit]
