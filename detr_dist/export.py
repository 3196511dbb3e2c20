"""`detr-dist export`: any model that can be named, as a folder that needs nothing of ours."""

import json
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoImageProcessor
from transformers.utils import logging as transformers_logging

from detr_dist.config import DataConfig, LoggingConfig
from detr_dist.errors import DetrDistError, UsageError
from detr_dist.models.build import load_network
from detr_dist.models.detector import IMAGE_MEAN, IMAGE_STD
from detr_dist.models.onnx import check_onnx_packages, write_onnx
from detr_dist.tracking.delivery import one_line, patience
from detr_dist.tracking.download import is_artifact_uri
from detr_dist.tracking.mlflow import open_client
from detr_dist.tracking.packaging import write_model
from detr_dist.tracking.registry import register_artifact, run_of, upload_model
from detr_dist.training.checkpoint import STATE, Checkpoint
from detr_dist.training.durable import failure_on_disk, new_folder
from detr_dist.training.sources import FoundModel, find_model

_UPLOAD_TIMEOUT_S = 300


@dataclass(frozen=True)
class ExportOptions:
    model: str
    output_dir: Path
    tracking_uri: str
    onnx: bool = False
    register_as: str | None = None
    alias: str | None = None


def export(options: ExportOptions) -> None:
    """Write the model that `options` names into a new folder, and register it where that is asked for.

    Raises:
        DetrDistError: with one clear line; but for the registry there is a whole folder or none.
    """
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        _check(options)
        is_version_of_run = _write(options)
        if options.register_as is not None:
            _register(options, options.register_as, is_version_of_run=is_version_of_run)
    except UsageError as error:  # where training says which setting is wrong
        raise UsageError(
            str(error)
            .replace("logging.mlflow_tracking_uri", "--tracking-uri")
            .replace(", or set logging.mlflow=false", "")
        ) from error


def _check(options: ExportOptions) -> None:
    """What can be known to be wrong before anything is loaded."""
    folder = options.output_dir
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UsageError(f"--output-dir {folder}: is there already; delete it or give another")
    if options.alias is not None and options.register_as is None:
        raise UsageError("--alias is for a registered model; give --register-as NAME too, or leave it out")
    if options.register_as is not None and (not options.register_as or set(options.register_as) & set("/:")):
        raise UsageError(
            f"--register-as {options.register_as!r}: a name in the registry is not empty and has no / or :"
        )
    if options.onnx:
        check_onnx_packages()
    if options.register_as is not None:
        open_client(options.tracking_uri)


def _write(options: ExportOptions) -> bool:
    """Write the folder; says whether the source is a run's MLflow model, which can be registered as it is."""
    with tempfile.TemporaryDirectory(prefix="detr_dist_") as scratch:
        found = find_model(options.model, options.tracking_uri, Path(scratch))
        network = load_network(options.model, found.location)
        data, metadata = _image_sizes(options.model, found), _metadata(options, found)
        is_mlflow_model = (Path(found.location) / "MLmodel").exists()
    folder = options.output_dir.resolve()
    lines = [f"{options.output_dir}: {network.config.model_type} as MLflow model and transformers folder"]
    try:
        with new_folder(folder) as partial:
            write_model(network, partial, data=data, metadata=metadata)
            if options.onnx:
                difference = write_onnx(network, partial / "model.onnx")
                lines.append(
                    f"{options.output_dir / 'model.onnx'}: largest difference to torch {difference:.1e}"
                )
    except DetrDistError:
        raise
    except Exception as error:  # of a full disk each library says it in its own kind
        raise DetrDistError(
            f"--output-dir {options.output_dir}: cannot be written ({failure_on_disk(error, folder.parent)})"
        ) from error
    print("\n".join(lines), flush=True)
    return is_mlflow_model and options.model.startswith("runs:/")


def _image_sizes(reference: str, found: FoundModel) -> DataConfig:
    """The edges that images are resized to."""
    if found.checkpoint is not None:
        return found.checkpoint.facts.config.data
    try:
        processor = AutoImageProcessor.from_pretrained(found.location, trust_remote_code=False)
        sizes = DataConfig(
            shortest_edge=processor.size["shortest_edge"], longest_edge=processor.size["longest_edge"]
        )
        colours = tuple(processor.image_mean), tuple(processor.image_std)
    except Exception as error:  # the library raises many kinds, and pydantic another
        raise UsageError(
            f"{reference}: its preprocessor_config.json does not say shortest_edge and longest_edge of an "
            f"image ({one_line(error)[:200]}); export another model, or the checkpoint that it comes from"
        ) from error
    if colours != (IMAGE_MEAN, IMAGE_STD):
        raise UsageError(
            f"{reference}: its preprocessor_config.json has another image_mean or image_std than ImageNet's; "
            "such a model cannot be exported"
        )
    return sizes


def _metadata(options: ExportOptions, found: FoundModel) -> dict[str, Any]:
    """What is known of the model, and where it comes from."""
    if found.checkpoint is not None:
        known = _metadata_of(found.checkpoint)
    else:
        path = Path(found.location) / "MLmodel"
        known = yaml.safe_load(path.read_text()).get("metadata") or {} if path.exists() else {}
    run_id = known.get("run_id")
    if is_artifact_uri(options.model):
        run_id = run_of(options.model, open_client(options.tracking_uri)) or run_id
    return known | {"source": options.model, "run_id": run_id}


def _metadata_of(checkpoint: Checkpoint) -> dict[str, Any]:
    state, facts = checkpoint.state, checkpoint.facts
    is_best = state.best_step == state.step
    return {
        "epoch": math.ceil(json.loads((checkpoint.folder / STATE).read_text())["epoch"]),
        "step": state.step,
        "val_map": state.best_map if is_best else None,
        "is_best": is_best,
        "metrics": state.metrics if is_best else {},
        "config": facts.config.model_dump(mode="json"),
        "run_id": facts.mlflow_run_id,
    }


def _register(options: ExportOptions, name: str, *, is_version_of_run: bool) -> None:
    client = open_client(options.tracking_uri)
    try:
        with patience(_UPLOAD_TIMEOUT_S):
            if is_version_of_run:
                run_id, _, artifact_path = options.model.removeprefix("runs:/").partition("/")
            else:
                experiment = LoggingConfig().mlflow_experiment_name
                run_id = upload_model(client, options.output_dir, experiment=experiment, source=options.model)
                artifact_path = "model"
            version = register_artifact(client, name, run_id, artifact_path)
            if options.alias is not None:
                client.set_registered_model_alias(name, options.alias, version.version)
    except Exception as error:  # each kind of store raises its own
        raise DetrDistError(
            f"--register-as {name}: MLflow at {options.tracking_uri} refuses ({one_line(error)}); the export "
            f"in {options.output_dir} is whole: give it as --model to register it"
        ) from error
    alias = f", alias {options.alias}" if options.alias is not None else ""
    print(f"{name} version {version.version}{alias}: models:/{name}/{version.version}", flush=True)
