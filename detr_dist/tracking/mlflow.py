"""An Accelerate tracker that writes one MLflow run through `MlflowClient`, from the main process only."""

import getpass
import logging
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag

from detr_dist.config import LoggingConfig
from detr_dist.errors import UsageError

# Limits of MLflow's API.
_MAX_PARAMS_PER_BATCH = 100
_MAX_PARAM_LENGTH = 6000


class MLflowTracker(GeneralTracker):  # type: ignore[misc]  # accelerate has no types
    """One MLflow run. Build it on the main process only.

    Raises:
        UsageError: the tracking URI cannot be used.
    """

    name = "mlflow"
    requires_logging_directory = False

    def __init__(self, config: LoggingConfig) -> None:
        super().__init__()
        self.uri = config.mlflow_tracking_uri
        _prepare_store(self.uri)
        try:
            with _impatience():
                self.client = MlflowClient(tracking_uri=self.uri)
                experiment = self.client.get_experiment_by_name(config.mlflow_experiment_name)
                if experiment is None:
                    experiment_id = self.client.create_experiment(config.mlflow_experiment_name)
                else:
                    experiment_id = experiment.experiment_id
                run = self.client.create_run(
                    experiment_id, run_name=config.mlflow_run_name, tags=_source_tags()
                )
        except Exception as error:  # each kind of store raises its own
            reason = " ".join(str(error).split())[:500]
            raise UsageError(
                f"logging.mlflow_tracking_uri {self.uri}: cannot begin a run there ({reason}); correct it, "
                "or set logging.mlflow=false"
            ) from error
        self.run_id = run.info.run_id

    @property
    def tracker(self) -> MlflowClient:
        return self.client

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        params = [Param(name, str(value)[:_MAX_PARAM_LENGTH]) for name, value in values.items()]
        for start in range(0, len(params), _MAX_PARAMS_PER_BATCH):
            self.client.log_batch(self.run_id, params=params[start : start + _MAX_PARAMS_PER_BATCH])

    def log(self, values: dict[str, float], step: int | None = None, **_: Any) -> None:
        now_ms = int(time.time() * 1000)
        self.client.log_batch(
            self.run_id,
            metrics=[Metric(name, float(value), now_ms, step or 0) for name, value in values.items()],
        )

    def set_tags(self, tags: dict[str, str]) -> None:
        self.client.log_batch(self.run_id, tags=[RunTag(name, value) for name, value in tags.items()])

    def log_folder(self, folder: Path, artifact_path: str) -> None:
        """Upload the files of `folder` as artifacts below `artifact_path`."""
        self.client.log_artifacts(self.run_id, str(folder), artifact_path)

    def log_file(self, path: Path, artifact_path: str | None = None) -> None:
        self.client.log_artifact(self.run_id, str(path), artifact_path)

    def end(self, status: str) -> None:
        """Close the run as FINISHED, FAILED or KILLED."""
        self.client.set_terminated(self.run_id, status)

    def finish(self) -> None:
        """Accelerate calls this whatever happened, so it says nothing about success; `end` does."""


def is_file_store(uri: str) -> bool:
    """Whether MLflow keeps this tracking URI as plain files: file:... or a path without a scheme."""
    return uri.startswith("file:") or "://" not in uri


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
