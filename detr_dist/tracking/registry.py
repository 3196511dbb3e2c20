"""Versions of registered models, and the alias `best`, which only a better model on the same data gets."""

import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from detr_dist.tracking.artifacts import register_artifact
from detr_dist.tracking.store import acceptable, is_away, locked_store, unless_busy

ALIAS = "best"
MODEL = "model"
"""Path of a run's best model among its artifacts."""

_logger = logging.getLogger(__name__)


def register_best(client: MlflowClient, name: str, run_id: str, facts: Mapping[str, Any]) -> None:
    """Register a run's best model as a version of `name`, and set the alias if it is better.

    Args:
        client: MLflow's client.
        name: The registered model, which is created if necessary.
        run_id: The run.
        facts: Tags of the version, such as `step`, `val_map` and `validation_data`.
    """
    known = client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'")
    # Not those of epochs, which a person may have registered.
    versions = [each for each in known if each.source and each.source.rstrip("/").endswith(f"/{MODEL}")]
    if versions:  # delivered before a crash, but not noted, or the run was resumed
        version = versions[0]
    else:
        version = register_artifact(client, name, run_id, MODEL)
    tags = {key: acceptable(str(value)) for key, value in facts.items() if value is not None}
    for key, value in tags.items():
        unless_busy(partial(client.set_model_version_tag, name, version.version, key, value))
    if "val_map" in tags:
        text = (
            f"Epoch {tags['epoch']}, step {tags['step']} of run {run_id}: val_map "
            f"{float(tags['val_map']):.4f} on {tags['validation_data']}"
        )
        client.update_model_version(name, version.version, text)
    with locked_store(client.tracking_uri):
        holder = _holder(client, name)
        obstacle = None if holder is None else _reason_to_keep(holder, str(version.version), tags)
        if holder is None or obstacle is None:
            client.set_registered_model_alias(name, ALIAS, version.version)
            return
    _logger.info(
        f"{name} version {version.version} is registered; the alias {ALIAS} stays at version "
        f"{holder.version}, {obstacle}"
    )


def _holder(client: MlflowClient, name: str) -> ModelVersion | None:
    """Return the version that has the alias now."""
    try:
        return client.get_model_version_by_alias(name, ALIAS)
    except MlflowException as error:
        if is_away(error):
            raise
        return None


def _reason_to_keep(holder: ModelVersion, version: str, tags: Mapping[str, str]) -> str | None:
    """Return why the alias stays with its holder; None if the new version is better on the same data."""
    if str(holder.version) == version:
        return None
    theirs, data = holder.tags.get("val_map"), holder.tags.get("validation_data")
    if theirs is None or data is None or "val_map" not in tags:
        return "whose val_map is not known"
    if data != tags.get("validation_data"):
        return f"which was validated on other data ({data})"
    if float(tags["val_map"]) <= float(theirs):
        return f"whose val_map {float(theirs):.4f} is not lower"
    return None
