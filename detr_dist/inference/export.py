"""`detr-dist export`: any model that can be named, as a folder that needs nothing of ours."""

from dataclasses import dataclass
from pathlib import Path

from detr_dist.config import LoggingConfig
from detr_dist.errors import DetrDistError, UsageError
from detr_dist.inference.trained import fetch_model, tracking_uri_as_option
from detr_dist.models.onnx import check_onnx_packages, write_onnx
from detr_dist.storage import check_new, describe_disk_error, new_folder
from detr_dist.text import one_line
from detr_dist.tracking.artifacts import register_artifact, run_of, upload_model
from detr_dist.tracking.packaging import write_model
from detr_dist.tracking.store import open_client, patience
from detr_dist.tracking.uris import is_artifact_uri

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
    with tracking_uri_as_option():
        _check(options)
        is_version_of_run = _write(options)
        if options.register_as is not None:
            _register(options, options.register_as, is_version_of_run=is_version_of_run)


def _check(options: ExportOptions) -> None:
    """What can be known to be wrong before anything is loaded."""
    check_new("--output-dir", options.output_dir)
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
    model = fetch_model(options.model, options.tracking_uri)
    network = model.network
    run_id = model.metadata.get("run_id")
    if is_artifact_uri(options.model):
        run_id = run_of(options.model, open_client(options.tracking_uri)) or run_id
    metadata = model.metadata | {"source": options.model, "run_id": run_id}
    folder = options.output_dir.resolve()
    lines = [f"{options.output_dir}: {network.config.model_type} as MLflow model and transformers folder"]
    try:
        with new_folder(folder) as partial:
            write_model(network, partial, data=model.config.data, metadata=metadata)
            if options.onnx:
                difference = write_onnx(network, partial / "model.onnx")
                lines.append(
                    f"{options.output_dir / 'model.onnx'}: largest difference to torch {difference:.1e}"
                )
    except DetrDistError:
        raise
    except Exception as error:  # of a full disk each library says it in its own kind
        raise DetrDistError(
            f"--output-dir {options.output_dir}: cannot be written "
            f"({describe_disk_error(error, folder.parent)})"
        ) from error
    print("\n".join(lines), flush=True)
    return model.is_mlflow_model and options.model.startswith("runs:/")


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
