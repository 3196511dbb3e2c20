"""An Accelerate tracker that writes one MLflow run through `MlflowClient`, from the main process only."""

import getpass
import logging
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException

from detr_dist.config import LoggingConfig
from detr_dist.errors import StopRequested, UsageError

# Limits of MLflow's API.
_MAX_PARAMS_PER_BATCH = 100
_MAX_PARAM_LENGTH = 6000
_MAX_TAG_LENGTH = 5000


class MLflowTracker(GeneralTracker):  # type: ignore[misc]  # accelerate has no types
    """One MLflow run. Build it on the main process only.

    Raises:
        UsageError: the tracking URI cannot be used.
    """

    name = "mlflow"
    requires_logging_directory = False

    def __init__(self, config: LoggingConfig, *, run_id: str | None = None) -> None:
        """Begin a run, or go on with `run_id`: what that one has of a metric is not logged a second time."""
        super().__init__()
        self.uri = config.mlflow_tracking_uri
        self.client = open_client(self.uri)
        self._known_params: set[str] = set()
        self._logged_until: dict[str, int] = {}
        try:
            with _impatience():
                self.run_id = self._begin(config) if run_id is None else self._go_on(run_id)
        except UsageError:
            raise
        except Exception as error:  # each kind of store raises its own
            raise UsageError(
                f"logging.mlflow_tracking_uri {self.uri}: cannot begin a run there ({one_line(error)}); "
                "correct it, or set logging.mlflow=false"
            ) from error

    def _begin(self, config: LoggingConfig) -> str:
        name = config.mlflow_experiment_name
        experiment = self.client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment else self.client.create_experiment(name)
        run = self.client.create_run(experiment_id, run_name=config.mlflow_run_name, tags=_source_tags())
        return str(run.info.run_id)

    def _go_on(self, run_id: str) -> str:
        try:
            run = self.client.get_run(run_id)
        except MlflowException as error:
            raise UsageError(
                f"logging.mlflow_tracking_uri {self.uri}: MLflow run {run_id}, to which the checkpoint "
                f"belongs, is not to be had there ({one_line(error)}); give the URI it was tracked at, or "
                "set logging.mlflow=false"
            ) from error
        if run.info.lifecycle_stage != "active":
            raise UsageError(
                f"MLflow run {run_id}, to which the checkpoint belongs, was deleted; bring it back with "
                f"`mlflow runs restore --run-id {run_id}`, or set logging.mlflow=false"
            )
        self.client.update_run(run_id, status="RUNNING")
        if "error" in run.data.tags:
            self.client.delete_tag(run_id, "error")
        self._known_params = set(run.data.params)
        # The latest entry of a metric is the one with its highest step.
        self._logged_until = {metric.key: metric.step for metric in run.to_proto().data.metrics}
        return run_id

    @property
    def tracker(self) -> MlflowClient:
        return self.client

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Log the params that the run does not have yet: MLflow refuses to change one."""
        params = [
            Param(name, str(value)[:_MAX_PARAM_LENGTH])
            for name, value in values.items()
            if name not in self._known_params
        ]
        for start in range(0, len(params), _MAX_PARAMS_PER_BATCH):
            self.client.log_batch(self.run_id, params=params[start : start + _MAX_PARAMS_PER_BATCH])

    def log(self, values: dict[str, float], step: int | None = None, **_: Any) -> None:
        now_ms, at = int(time.time() * 1000), step or 0
        metrics = [
            Metric(name, float(value), now_ms, at)
            for name, value in values.items()
            if at > self._logged_until.get(name, -1)
        ]
        if metrics:
            self.client.log_batch(self.run_id, metrics=metrics)

    def set_tags(self, tags: dict[str, str]) -> None:
        self.client.log_batch(self.run_id, tags=[RunTag(name, value) for name, value in tags.items()])

    def note_resume(self, step: int, changes: Sequence[str]) -> None:
        """Leave in the run's tags where it went on, and with what that was different before."""
        tags = self.client.get_run(self.run_id).data.tags
        noted = {
            "resumed_at_steps": [str(step)],
            "resumed_with": [f"step {step}: {each}" for each in changes],
        }
        self.set_tags(
            {
                name: "; ".join([*filter(None, [tags.get(name)]), *lines])[:_MAX_TAG_LENGTH]
                for name, lines in noted.items()
                if lines
            }
        )

    def log_folder(self, folder: Path, artifact_path: str, *, last: str | None = None) -> None:
        """Upload the files of `folder` as artifacts below `artifact_path`; with `last` that file after all
        others."""
        if last is None:
            self.client.log_artifacts(self.run_id, str(folder), artifact_path)
            return
        for path in sorted(folder.iterdir(), key=lambda path: path.name == last):
            self.client.log_artifact(self.run_id, str(path), artifact_path)

    def log_file(self, path: Path, artifact_path: str | None = None) -> None:
        self.client.log_artifact(self.run_id, str(path), artifact_path)

    def end(self, status: str) -> None:
        """Close the run as FINISHED, FAILED or KILLED."""
        self.client.set_terminated(self.run_id, status)

    def finish(self) -> None:
        """Accelerate calls this whatever happened, so it says nothing about success; `end` does."""


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


def _close_unfinished(tracker: MLflowTracker, error: BaseException) -> None:
    try:
        if isinstance(error, (KeyboardInterrupt, StopRequested)):
            tracker.end("KILLED")
        else:
            tracker.set_tags({"error": f"{type(error).__name__}: {error}"[:5000]})
            tracker.end("FAILED")
    except Exception as trouble:  # must not hide what went wrong first
        reason = " ".join(str(trouble).split())
        print(f"warning: MLflow run {tracker.run_id} could not be closed: {reason}", flush=True)


def is_file_store(uri: str) -> bool:
    """Whether MLflow keeps this tracking URI as plain files: file:... or a path without a scheme."""
    return uri.startswith("file:") or "://" not in uri


def open_client(uri: str) -> MlflowClient:
    """A client of the tracking store at `uri`.

    Raises:
        UsageError: there can be none.
    """
    _prepare_store(uri)
    try:
        with _impatience():
            return MlflowClient(tracking_uri=uri)
    except Exception as error:  # each kind of store raises its own
        raise UsageError(
            f"logging.mlflow_tracking_uri {uri}: cannot be used ({one_line(error)}); correct it, or set "
            "logging.mlflow=false"
        ) from error


def one_line(error: Exception) -> str:
    """What an error of MLflow says, on one line of bearable length."""
    return " ".join(str(error).split())[:500]


def _prepare_store(uri: str) -> None:
    for noisy in ("alembic", "mlflow.store.db.utils"):  # dozens of lines when a database is made
        logging.getLogger(noisy).setLevel(logging.WARNING)
    if uri.startswith("sqlite:///"):
        folder = Path(uri.removeprefix("sqlite:///")).absolute().parent
        if not os.access(folder, os.W_OK):  # SQLAlchemy would try for minutes
            raise UsageError(
                f"logging.mlflow_tracking_uri {uri}: no folder {folder} that can be written to; correct it"
            )
    if is_file_store(uri) and os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true") == "true":
        print(
            f"MLflow keeps file stores such as {uri} only with MLFLOW_ALLOW_FILE_STORE=true, set for this "
            "run; set it for `mlflow ui` too, or use scripts/start_mlflow_ui.sh"
        )


@contextmanager
def _impatience() -> Iterator[None]:
    """While a run is opened a server that does not answer is an error within seconds, not minutes."""
    names = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update({name: value for name, value in names.items() if before[name] is None})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]


def _source_tags() -> dict[str, str]:
    tags = {
        "mlflow.source.name": sys.argv[0],
        "mlflow.source.type": "LOCAL",
        "launch_command": shlex.join([sys.executable, *sys.argv]),
    }
    try:
        tags["mlflow.user"] = getpass.getuser()
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        )
        tags["mlflow.source.git.commit"] = commit.stdout.strip()
    except (OSError, subprocess.SubprocessError, KeyError):
        pass  # no git, no repository, no such user: nothing to record
    return tags
