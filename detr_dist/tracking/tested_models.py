"""Results of a model on test data, logged to the model's run or to a new one."""

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from mlflow import MlflowClient
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from detr_dist.data.coco import CocoData
from detr_dist.errors import DetrDistError, UsageError
from detr_dist.redaction import redact, redact_value
from detr_dist.text import one_line
from detr_dist.tracking.artifacts import run_of
from detr_dist.tracking.datasets import describe_dataset
from detr_dist.tracking.run_actions import RunActions
from detr_dist.tracking.store import (
    acceptable,
    can_link_data_sets,
    find_or_make_experiment,
    open_client,
    patience,
    unless_busy,
)
from detr_dist.tracking.uris import is_artifact_uri, is_run_id

_TIMEOUT_S = 120
_MAX_METRICS = 1000

_logger = logging.getLogger(__name__)


class ModelOrigin(NamedTuple):
    """A model and what it knows about its training."""

    reference: str
    run_id: str | None
    epoch: int | None
    step: int | None


def log_test(
    model: ModelOrigin,
    metrics: Mapping[str, float],
    data: CocoData,
    plots: Path,
    *,
    tracking_uri: str,
    experiment: str,
) -> str:
    """Log the metrics and plots of a model on test data; return the id of the run that has them.

    That is the model's run; a new one of `experiment` if it is unknown, or below it if it cannot be written.

    Raises:
        DetrDistError: MLflow cannot be reached; nothing else is lost.
    """
    try:
        client = open_client(tracking_uri)
        with patience(_TIMEOUT_S):
            parent = _run_of(model, client)
            if parent is not None:
                try:
                    _log(client, parent, model, metrics, data, plots)
                except MlflowException as error:
                    if error.get_http_status_code() >= 500:
                        raise
                    _logger.warning(f"MLflow run {parent} cannot be written to ({one_line(error)})")
                else:
                    return parent
            run_id = _new_run(client, model, parent, experiment)
            try:
                _log(client, run_id, model, metrics, data, plots)
            except BaseException:
                client.set_terminated(run_id, "FAILED")
                raise
            client.set_terminated(run_id)
            return run_id
    except UsageError:
        raise
    except Exception as error:  # each kind of store raises its own types
        raise DetrDistError(
            f"--log: MLflow at {redact(tracking_uri)} does not take the results ({one_line(error)}); "
            "everything else is written"
        ) from error


def _run_of(model: ModelOrigin, client: MlflowClient) -> str | None:
    """Return the run of the model, if this store has it."""
    run_id = model.reference if is_run_id(model.reference) else None
    if is_artifact_uri(model.reference):
        run_id = run_of(model.reference, client)
    run_id = run_id or model.run_id
    if run_id is None:
        return None
    try:
        return str(client.get_run(run_id).info.run_id)
    except MlflowException as error:
        if error.get_http_status_code() >= 500:
            raise
        return None


def _new_run(client: MlflowClient, model: ModelOrigin, parent: str | None, experiment: str) -> str:
    """Start a run for the results, below the model's own run if there is one."""
    tags = {"source": acceptable(redact_value(model.reference))}
    experiment_id = find_or_make_experiment(client, experiment)
    if parent is not None:
        tags[MLFLOW_PARENT_RUN_ID] = parent
        experiment_id = client.get_run(parent).info.experiment_id
    run = unless_busy(lambda: client.create_run(experiment_id, run_name="evaluate", tags=tags))
    return str(run.info.run_id)


def _log(
    client: MlflowClient,
    run_id: str,
    model: ModelOrigin,
    metrics: Mapping[str, float],
    data: CocoData,
    plots: Path,
) -> None:
    actions, step = RunActions(client, run_id), model.step or 0
    described, at_ms = describe_dataset(data), int(time.time() * 1000)
    links: dict[str, str] = {}
    if can_link_data_sets(client):
        links = {"dataset_name": described["name"], "dataset_digest": described["digest"]}
    model_id = actions.models.find(model.epoch) if model.epoch is not None else None
    if model_id is not None:
        links["model_id"] = model_id
    logged = [Metric(name, value, at_ms, step, **links) for name, value in metrics.items()]
    actions.log_dataset("test", **described)
    for first in range(0, len(logged), _MAX_METRICS):
        client.log_batch(run_id, metrics=logged[first : first + _MAX_METRICS])
    for path in sorted(plots.iterdir()) if plots.exists() else ():
        actions.log_image(path, f"test_{path.stem}", step, at_ms)
