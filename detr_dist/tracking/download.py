"""Artifacts of MLflow as local folders."""

import json
import os
import re
from pathlib import Path

import mlflow.artifacts
from mlflow.exceptions import MlflowException

from detr_dist.errors import UsageError
from detr_dist.text import one_line
from detr_dist.tracking.delivery import patience
from detr_dist.tracking.mlflow import open_client
from detr_dist.tracking.registry import location_of
from detr_dist.tracking.uris import WHERE_SET, client_uri, database_path


def is_run_id(text: str) -> bool:
    return re.fullmatch(r"[0-9a-f]{32}", text) is not None


def is_artifact_uri(text: str) -> bool:
    """Whether this names something in MLflow or in an artifact store, and not a local path."""
    return re.match(r"[a-z0-9+.-]+:/", text) is not None


def download_folder(artifact_uri: str, tracking_uri: str, into: Path) -> Path:
    """The artifact folder as a local one, within `into`.

    Raises:
        UsageError: there is no such artifact, or the server cannot be reached.
    """
    database = database_path(tracking_uri)
    if database is not None and not database.exists():  # MLflow would make an empty one
        raise UsageError(
            f"{artifact_uri}: cannot be fetched, as there is no database {database.absolute()}; correct "
            f"{WHERE_SET}"
        )
    open_client(tracking_uri)
    try:
        path = fetch(artifact_uri, tracking_uri, into)
    except (MlflowException, OSError) as error:
        raise UsageError(
            f"{artifact_uri}: cannot be fetched from MLflow at {tracking_uri} ({one_line(error)}); correct "
            f"it, or {WHERE_SET}"
        ) from error
    if not path.is_dir():
        raise UsageError(f"{artifact_uri}: there is no such folder in MLflow at {tracking_uri}")
    return path


def checkpoint_uris(run_id: str, tracking_uri: str, scratch: Path) -> list[str]:
    """The checkpoints of a run, the one that was saved last first, whatever step a run that went back is at.

    Raises:
        UsageError: there is no such run, or it has none.
    """
    client = open_client(tracking_uri)
    try:
        with patience(timeout_s=20):
            names = [item.path for item in client.list_artifacts(run_id, "checkpoints") if item.is_dir]
    except (MlflowException, OSError) as error:
        raise UsageError(
            f"MLflow run {run_id} is not to be had from {tracking_uri} ({one_line(error)}); correct the "
            "run id, or logging.mlflow_tracking_uri"
        ) from error
    saved_at: dict[str, str] = {}
    for name in names:
        uri = f"runs:/{run_id}/{name}"
        try:
            state = json.loads(fetch(f"{uri}/state.json", tracking_uri, scratch).read_text(encoding="utf-8"))
            saved_at[uri] = str(state["saved_at"])
        except (MlflowException, OSError, ValueError, KeyError, TypeError):
            saved_at[uri] = ""  # the upload did not get that far
    if not saved_at:
        raise UsageError(
            f"MLflow run {run_id} at {tracking_uri} has no checkpoints yet; it cannot be resumed"
        )
    return sorted(saved_at, key=lambda uri: saved_at[uri], reverse=True)


def fetch(artifact_uri: str, tracking_uri: str, into: Path) -> Path:
    """An artifact, file or folder, as a local one within `into`.

    Raises:
        MlflowException, OSError: there is none, or the server cannot be reached.
    """
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    with patience(timeout_s=120):
        if artifact_uri.startswith("models:/"):
            artifact_uri = location_of(artifact_uri, open_client(tracking_uri))
        return Path(
            mlflow.artifacts.download_artifacts(
                artifact_uri=artifact_uri,
                dst_path=str(into),
                tracking_uri=client_uri(tracking_uri),
                registry_uri=client_uri(tracking_uri),
            )
        )
