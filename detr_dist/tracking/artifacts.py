"""Models and checkpoints in MLflow: downloads, deletion, and versions in the registry."""

import json
import re
from pathlib import Path

import mlflow.artifacts
from mlflow import MlflowClient
from mlflow.entities import LoggedModel
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.store.artifact.utils.models import get_model_name_and_version
from mlflow.utils.uri import append_to_uri_path

from detr_dist.errors import UsageError
from detr_dist.redaction import redact_value
from detr_dist.text import one_line
from detr_dist.tracking.logged_models import URI_TAG
from detr_dist.tracking.store import (
    find_or_make_experiment,
    locked_store,
    open_client,
    patience,
    unless_busy,
    unless_exists,
)
from detr_dist.tracking.uris import WHERE_SET, client_uri, database_path


def download_folder(artifact_uri: str, tracking_uri: str, into: Path) -> Path:
    """Download an artifact folder into a folder within `into`, and return that.

    Raises:
        UsageError: there is no such artifact, or the server cannot be reached.
    """
    database = database_path(tracking_uri)
    if database is not None and not database.exists():  # MLflow would create an empty one
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


def fetch(artifact_uri: str, tracking_uri: str, into: Path) -> Path:
    """Download an artifact, file or folder, into a path within `into`, and return that.

    Raises:
        MlflowException, OSError: it does not exist, or the server cannot be reached.
    """
    with patience(timeout_s=120):
        if artifact_uri.startswith("models:/"):
            artifact_uri = _location_of(artifact_uri, open_client(tracking_uri))
        return Path(
            mlflow.artifacts.download_artifacts(
                artifact_uri=artifact_uri,
                dst_path=str(into),
                tracking_uri=client_uri(tracking_uri),
                registry_uri=client_uri(tracking_uri),
            )
        )


def checkpoint_uris(run_id: str, tracking_uri: str, scratch: Path) -> list[str]:
    """Return the URIs of a run's checkpoints, the one that was saved last first, whatever its step.

    Raises:
        UsageError: there is no such run, or it has no checkpoints.
    """
    client = open_client(tracking_uri)
    try:
        with patience(timeout_s=20):
            names = [item.path for item in client.list_artifacts(run_id, "checkpoints") if item.is_dir]
    except (MlflowException, OSError) as error:
        raise UsageError(
            f"MLflow run {run_id} is not available at {tracking_uri} ({one_line(error)}); correct the "
            f"run id, or {WHERE_SET}"
        ) from error
    if not names:
        raise UsageError(
            f"MLflow run {run_id} at {tracking_uri} has no checkpoints yet; it cannot be resumed"
        )
    uris = [f"runs:/{run_id}/{name}" for name in names]
    return sorted(uris, key=lambda uri: _saved_at(uri, tracking_uri, scratch), reverse=True)


def _saved_at(checkpoint_uri: str, tracking_uri: str, scratch: Path) -> str:
    try:
        state = fetch(f"{checkpoint_uri}/state.json", tracking_uri, scratch).read_text(encoding="utf-8")
        return str(json.loads(state)["saved_at"])
    except (MlflowException, OSError, ValueError, KeyError, TypeError):
        return ""  # the upload was interrupted before


def delete_artifacts(client: MlflowClient, run_id: str, artifact_path: str) -> None:
    """Delete a folder of a run's artifacts, for which `MlflowClient` has no method."""
    artifact_uri = client.get_run(run_id).info.artifact_uri
    get_artifact_repository(artifact_uri, tracking_uri=client.tracking_uri).delete_artifacts(artifact_path)


def _version_of(reference: str, client: MlflowClient) -> tuple[str, str] | None:
    """Return name and version of `models:/NAME/VERSION` or `models:/NAME@ALIAS`; None for all others."""
    if re.fullmatch("models:/[^/@]+[/@]{1,2}[^/@]+/?", reference) is None:
        return None
    name, version = get_model_name_and_version(client, reference.rstrip("/").replace("/@", "@"))
    return str(name), str(version)


def _location_of(reference: str, client: MlflowClient) -> str:
    """Return the artifact URI of a version in the registry, or of the model of an epoch by its id.

    MLflow itself would use the process's default registry, whichever it is given. Other references stay
    unchanged.
    """
    if (model := _logged_model(reference, client)) is not None:
        return str(model.tags.get(URI_TAG, reference))
    version = _version_of(reference, client)
    return client.get_model_version_download_uri(*version) if version is not None else reference


def _logged_model(reference: str, client: MlflowClient) -> LoggedModel | None:
    """Return the LoggedModel of `models:/MODEL_ID`; None for all others."""
    match = re.fullmatch("models:/(m-[0-9a-f]{32})/?", reference)
    return client.get_logged_model(match[1]) if match else None


def run_of(reference: str, client: MlflowClient) -> str | None:
    """Return the run that `runs:/...`, a version in the registry or a LoggedModel belongs to, if known."""
    if match := re.match("runs:/([^/]+)/", reference):
        return match[1]
    if (model := _logged_model(reference, client)) is not None:
        return model.source_run_id or None
    version = _version_of(reference, client)
    return (client.get_model_version(*version).run_id or None) if version is not None else None


def register_artifact(client: MlflowClient, name: str, run_id: str, artifact_path: str) -> ModelVersion:
    """Register a run's model artifact as a new version of `name`, which is created if necessary."""
    source = append_to_uri_path(client.get_run(run_id).info.artifact_uri, artifact_path)
    with locked_store(client.tracking_uri):  # the next number is free until another run takes it
        unless_exists(lambda: client.create_registered_model(name))
        # The files are uploaded already: no need to wait for them.
        return unless_busy(lambda: client.create_model_version(name, source, run_id, await_creation_for=0))


def upload_model(client: MlflowClient, folder: Path, *, experiment: str, source: str) -> str:
    """Log a model folder as `model/` of a new run, as the registry stores no files; return the run id."""
    experiment_id = find_or_make_experiment(client, experiment)
    tags = {"source": redact_value(source)}
    run = unless_busy(lambda: client.create_run(experiment_id, run_name="export", tags=tags))
    run_id = str(run.info.run_id)
    try:
        client.log_artifacts(run_id, str(folder), "model")
    except BaseException:
        client.set_terminated(run_id, "FAILED")
        raise
    client.set_terminated(run_id, "FINISHED")
    return run_id
