"""An Accelerate tracker that writes one MLflow run through `MlflowClient`, from the main process only."""

import getpass
import logging
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker
from mlflow import MlflowClient
from mlflow.utils import request_utils

from detr_dist.config import LoggingConfig
from detr_dist.data.coco import CocoData
from detr_dist.errors import StopRequested, UsageError
from detr_dist.redaction import redact, redact_value
from detr_dist.text import one_line
from detr_dist.tracking.delivery import Delivery, DeliveryThread, acceptable, is_away, patience
from detr_dist.tracking.outbox import Address, Outbox, OutboxReader
from detr_dist.tracking.store import find_or_make_experiment, locked_store, refuse_deleted, unless_busy
from detr_dist.tracking.uris import (
    WHERE_SET,
    absolute_uri,
    check_escapes,
    client_uri,
    database_path,
    is_database,
    is_file_store,
    local_location,
)

# A scheduler that has asked a run to stop gives it some tens of seconds.
_PATIENCE_AT_THE_END_S = 20.0

# The launcher kills what is left of a run some 30 s after it has lost a process.
_PATIENCE_AFTER_LOSS_S = 6.0

# Seconds that a request may take before it counts as failed, where nothing is uploaded.
_TIMEOUT_S = 20


class MLflowTracker(GeneralTracker):  # type: ignore[misc]  # accelerate has no types
    """One MLflow run. What is logged goes to an outbox on disk, and from there to MLflow in the background.

    Build it on the main process only, and `open` it before anything is logged. A new run needs its server;
    one that goes on where it was tracked before (`run_id` at `known_uri`) does not, and delivers later.

    Raises:
        UsageError: the tracking URI cannot be used.
    """

    name = "mlflow"
    requires_logging_directory = False

    def __init__(
        self, config: LoggingConfig, *, run_id: str | None = None, known_uri: str | None = None
    ) -> None:
        """Begin a run, or go on with `run_id`."""
        super().__init__()
        self.uri = config.mlflow_tracking_uri
        self.client = open_client(self.uri)
        self._outbox: Outbox | None = None
        self._thread: DeliveryThread | None = None
        self._ending = threading.Lock()
        try:
            with patience(_TIMEOUT_S):
                if run_id is None:
                    self.run_id = self._begin(config)
                else:
                    self.run_id = run_id
                    self._find(is_known=known_uri is not None and redact(known_uri) == redact(self.uri))
        except UsageError:
            raise
        except Exception as error:  # each kind of store raises its own
            raise UsageError(
                f"logging.mlflow_tracking_uri {self.uri}: cannot begin a run there ({one_line(error)}); "
                "correct it, or set logging.mlflow=false"
            ) from error

    def _begin(self, config: LoggingConfig) -> str:
        experiment_id = find_or_make_experiment(self.client, config.mlflow_experiment_name)
        tags = {name: acceptable(value) for name, value in _source_tags().items()}
        run = unless_busy(
            lambda: self.client.create_run(experiment_id, run_name=config.mlflow_run_name, tags=tags)
        )
        return str(run.info.run_id)

    def _find(self, *, is_known: bool) -> None:
        """Make sure that the run is there to go on with."""
        try:
            run = unless_busy(lambda: self.client.get_run(self.run_id))
        except Exception as error:  # each kind of store raises its own
            if is_known and is_away(error):
                say(
                    f"warning: MLflow at {self.uri} cannot be reached ({one_line(error)}); run {self.run_id} "
                    "goes on all the same, and what is logged is delivered later"
                )
                return
            raise UsageError(
                f"logging.mlflow_tracking_uri {self.uri}: MLflow run {self.run_id}, to which the checkpoint "
                f"belongs, is not to be had there ({one_line(error)}); start its server, give the URI it was "
                "tracked at, or set logging.mlflow=false"
            ) from error
        refuse_deleted(unless_busy(lambda: self.client.get_experiment(run.info.experiment_id)))
        if run.info.lifecycle_stage != "active":
            raise UsageError(
                f"MLflow run {self.run_id}, to which the checkpoint belongs, was deleted; bring it back with "
                f"`mlflow runs restore --run-id {self.run_id}`, or set logging.mlflow=false"
            )

    def open(self, folder: Path) -> None:
        """Begin to deliver from the outbox in `folder`, first what an earlier process left there."""
        outbox = Outbox(folder / self.run_id, Address(absolute_uri(self.uri), self.run_id))
        reader = OutboxReader(outbox.folder)
        self._outbox = outbox
        self._thread = DeliveryThread(Delivery(reader, self.client, say), say)

    @property
    def outbox(self) -> Outbox:
        assert self._outbox is not None, "open it first"
        return self._outbox

    @property
    def tracker(self) -> MlflowClient:
        return self.client

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Log the params that the run does not have yet: MLflow refuses to change one."""
        self.outbox.append("params", values={name: str(value) for name, value in values.items()})

    def log(self, values: dict[str, float], step: int | None = None, **_: Any) -> None:
        self.outbox.append(
            "metrics",
            step=step or 0,
            at_ms=int(time.time() * 1000),
            values={name: float(value) for name, value in values.items()},
        )

    def set_tags(self, tags: dict[str, str]) -> None:
        self.outbox.append("tags", values=tags)

    def note_resume(self, step: int, changes: Sequence[str]) -> None:
        """The run is running again; its tags tell where it went on, and with what that was different
        before."""
        self.outbox.append("resumption", step=step, changes=[*changes])

    def log_datasets(self, datasets: dict[str, CocoData]) -> None:
        """Note the data sets of the run, by what they serve (`train`, `validation`)."""
        for context, data in datasets.items():
            self.outbox.append(
                "dataset",
                context=context,
                name=_as_text(data.annotations_path.parent.name),
                digest=data.fingerprint()[:32],
                source=_as_text(local_location(data.annotations_path)),
                profile={"num_images": len(data), "num_boxes": len(data.box_classes)},
            )

    def register_model(self, name: str) -> None:
        """Make the model of the run a new version of `name` in the registry, with the alias `best`."""
        self.outbox.append("registration", name=name)

    def log_folder(self, folder: Path, artifact_path: str, *, last: str | None = None) -> None:
        """Upload the files of `folder` as artifacts below `artifact_path`; with `last` that file after all
        others. The files themselves must not change any more; the folder may go."""
        self.outbox.append_folder(folder, artifact_path, last=last)

    def keep_newest(self, parent: str, newest: int, keep: int) -> None:
        """Of the folders `parent`/epoch_<N> up to N = `newest`, delete all but the last `keep`."""
        self.outbox.append_retention(parent, newest, keep)

    def log_file(self, path: Path) -> None:
        """Upload a small file as it is now."""
        self.outbox.append_file(path)

    def end(
        self, status: str, error: str | None = None, *, patience_s: float = _PATIENCE_AT_THE_END_S
    ) -> None:
        """Close the run as FINISHED, FAILED or KILLED, once all that was logged has been delivered; waits for
        that, but not for ever. The first call counts."""
        if not self._ending.acquire(blocking=False):
            return
        if self._thread is None:
            with patience(_TIMEOUT_S):
                if error is not None:
                    self.client.set_tag(self.run_id, "error", acceptable(redact(error)))
                self.client.set_terminated(self.run_id, status)
            return
        self.outbox.append("status", status=status, error=error)
        num_left = self._thread.end(patience_s=patience_s)
        folder = self.outbox.folder
        self.outbox.close()
        close_connections(self.client)
        if num_left:
            say(
                f"warning: {num_left} records are not in MLflow yet ({self.uri}); they are kept in "
                f"{folder}, and `detr-dist sync {folder.parent.parent}` delivers them"
            )

    def finish(self) -> None:
        """Accelerate calls this whatever happened, so it says nothing about success; `end` does."""


def say(line: str) -> None:
    print(redact(line), flush=True)


def open_client(uri: str) -> MlflowClient:
    """A client of the tracking store at `uri`.

    Raises:
        UsageError: there can be none.
    """
    _prepare_store(uri)
    try:
        with patience(_TIMEOUT_S), locked_store(uri):
            return MlflowClient(tracking_uri=client_uri(uri))
    except Exception as error:  # each kind of store raises its own
        raise UsageError(
            f"tracking URI {uri}: cannot be used ({one_line(error)}); correct {WHERE_SET}, or train with "
            "logging.mlflow=false"
        ) from error


def close_connections(client: MlflowClient) -> None:
    """Close what MLflow keeps open for a next call. It has no public way, and where its inside has changed
    they stay open until the process ends."""
    with suppress(ImportError, AttributeError):
        request_utils._cached_get_request_session.cache_clear()
    with suppress(AttributeError):
        client._tracking_client.store._dispose_engine()


@contextmanager
def run_status(tracker: MLflowTracker | None) -> Iterator[None]:
    """Close the MLflow run with what became of it."""
    try:
        yield
    except BaseException as error:
        if tracker is not None:
            _close_unfinished(tracker, error)
        raise
    if tracker is not None:
        tracker.end("FINISHED")


def close_after_loss(tracker: MLflowTracker | None, reason: str) -> None:
    """Close the MLflow run as FAILED within seconds, whatever the main thread waits for."""
    if tracker is not None:
        tracker.end("FAILED", reason, patience_s=_PATIENCE_AFTER_LOSS_S)


def _close_unfinished(tracker: MLflowTracker, error: BaseException) -> None:
    try:
        if isinstance(error, (KeyboardInterrupt, StopRequested)):
            tracker.end("KILLED")
        else:
            tracker.end("FAILED", f"{type(error).__name__}: {error}")
    except Exception as trouble:  # must not hide what went wrong first
        say(f"warning: MLflow run {tracker.run_id} could not be closed: {one_line(trouble)}")


def way_to_see(uri: str) -> str:
    """Where the runs of a store are to be seen, or with which command."""
    shown = redact(uri)
    if is_database(uri):
        credentials = " with its credentials" if shown != uri else ""
        return f"with: mlflow ui --backend-store-uri {shlex.quote(shown)}{credentials}"
    if is_file_store(uri):
        return f"with: MLFLOW_ALLOW_FILE_STORE=true mlflow ui --backend-store-uri {shlex.quote(uri)}"
    return f"at {shown}"


def _prepare_store(uri: str) -> None:
    for noisy in ("alembic", "mlflow.store.db.utils"):  # dozens of lines when a database is made
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").addFilter(_has_no_traceback)  # the error itself is reported
    check_escapes(uri)
    database = database_path(uri)
    if database is not None:
        folder = database.absolute().parent
        if not os.access(folder, os.W_OK):  # SQLAlchemy would try for minutes
            raise UsageError(
                f"tracking URI {uri}: no folder {folder} that can be written to; correct {WHERE_SET}"
            )
    if is_file_store(uri) and "MLFLOW_ALLOW_FILE_STORE" not in os.environ:
        os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
        print(
            f"MLflow keeps file stores such as {uri} only with MLFLOW_ALLOW_FILE_STORE=true, set for this "
            "run; set it for `mlflow ui` too, or use scripts/start_mlflow_ui.sh"
        )


def _has_no_traceback(record: logging.LogRecord) -> bool:
    return not record.exc_info


def _source_tags() -> dict[str, str]:
    tags = {
        "mlflow.source.name": sys.argv[0],
        "mlflow.source.type": "LOCAL",
        "launch_command": shlex.join([sys.executable, *redact_value(sys.argv)]),
    }
    try:
        tags["mlflow.user"] = getpass.getuser()
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        )
        tags["mlflow.source.git.commit"] = commit.stdout.strip()
    except (OSError, subprocess.SubprocessError, KeyError):
        pass  # no git, no repository, no such user: nothing to record
    return {name: _as_text(value) for name, value in tags.items()}


def _as_text(argument: str) -> str:
    """What came from the command line or the file system, without Python's escapes for what is not of the
    locale: no server takes those."""
    return argument.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
