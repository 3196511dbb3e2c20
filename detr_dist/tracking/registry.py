"""MLflow's registry of models: new versions, and which run a version comes from."""

import re
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.utils.uri import append_to_uri_path

from detr_dist.redaction import redact_value
from detr_dist.tracking.store import find_or_make_experiment, locked_store, unless_busy


def run_of(reference: str, client: MlflowClient) -> str | None:
    """The run that `runs:/...` or a version in the registry, `models:/...`, belongs to, if it is known."""
    if match := re.match("runs:/([^/]+)/", reference):
        return match[1]
    if match := re.fullmatch("models:/([^/@]+)/?@(.+)", reference):
        return client.get_model_version_by_alias(match[1], match[2]).run_id or None
    if match := re.fullmatch(r"models:/([^/@]+)/(\d+)", reference):
        return client.get_model_version(match[1], match[2]).run_id or None
    return None


def location_of(reference: str, client: MlflowClient) -> str:
    """Return the artifact URI of `models:/NAME/VERSION` or `models:/NAME@ALIAS`; other references stay.

    MLflow itself asks the process's default registry for them, whichever it is given.
    """
    if match := re.fullmatch("models:/([^/@]+)@([^/]+)", reference):
        version = client.get_model_version_by_alias(match[1], match[2]).version
    elif match := re.fullmatch(r"models:/([^/@]+)/(\d+)/?", reference):
        version = match[2]
    else:
        return reference
    return client.get_model_version_download_uri(match[1], version)


def register_artifact(client: MlflowClient, name: str, run_id: str, artifact_path: str) -> ModelVersion:
    """Make a model that a run has as artifact a new version of `name`; a new name is made."""
    source = append_to_uri_path(client.get_run(run_id).info.artifact_uri, artifact_path)
    with locked_store(client.tracking_uri):  # the next number is free until another run takes it
        try:
            unless_busy(lambda: client.create_registered_model(name))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        # The files are there already: no need to wait, and to be told so.
        return unless_busy(lambda: client.create_model_version(name, source, run_id, await_creation_for=0))


def upload_model(client: MlflowClient, folder: Path, *, experiment: str, source: str) -> str:
    """Log a model folder as `model/` of a new run, as the registry keeps no files itself; returns its id."""
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
