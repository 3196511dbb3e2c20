"""`detr-dist export`: any model that can be named, as a folder that needs nothing of this package."""

from pathlib import Path

from detr_dist.config import LoggingConfig
from detr_dist.errors import DetrDistError, UsageError
from detr_dist.inference.model import TrainedModel, load_model
from detr_dist.inference.onnx import check_onnx_packages, write_onnx
from detr_dist.storage import check_new, describe_disk_error, new_folder
from detr_dist.text import one_line
from detr_dist.tracking.artifacts import register_artifact, run_of, upload_model
from detr_dist.tracking.packaging import write_model
from detr_dist.tracking.store import open_client, patience
from detr_dist.tracking.uris import is_artifact_uri

_UPLOAD_TIMEOUT_S = 300


def export_model(
    reference: str,
    output_dir: Path,
    *,
    tracking_uri: str,
    onnx: bool = False,
    register_as: str | None = None,
    alias: str | None = None,
) -> None:
    """Write the model that `reference` names into a new folder, and register it where that is asked for.

    Raises:
        DetrDistError: with one clear line. The folder is complete or absent; if only the registry fails, it
            is complete.
    """
    check_new("--output-dir", output_dir)
    if alias is not None and register_as is None:
        raise UsageError("--alias is for a registered model; give --register-as NAME too, or leave it out")
    if register_as is not None:
        if not register_as or set(register_as) & set("/:"):
            raise UsageError(
                f"--register-as {register_as!r}: a name in the registry is not empty and has no / or :"
            )
        open_client(tracking_uri)
    if onnx:
        check_onnx_packages()
    model = load_model(reference, tracking_uri)
    _write(model, reference, output_dir, tracking_uri=tracking_uri, onnx=onnx)
    if register_as is not None:
        is_model_of_run = model.is_mlflow_model and reference.startswith("runs:/")  # and has its files there
        uri = reference if is_model_of_run else None
        _register(output_dir, register_as, alias, uri=uri, source=reference, tracking_uri=tracking_uri)


def _write(model: TrainedModel, reference: str, output_dir: Path, *, tracking_uri: str, onnx: bool) -> None:
    run_id = model.metadata.get("run_id")
    if is_artifact_uri(reference):
        run_id = run_of(reference, open_client(tracking_uri)) or run_id
    metadata = model.metadata | {"source": reference, "run_id": run_id}
    folder = output_dir.resolve()
    lines = [f"{output_dir}: {model.network.config.model_type} as MLflow model and transformers folder"]
    try:
        with new_folder(folder) as partial:
            write_model(
                model.network,
                partial,
                data=model.config.data,
                metadata=metadata,
            )
            if onnx:
                difference = write_onnx(model.network, partial / "model.onnx")
                lines.append(f"{output_dir / 'model.onnx'}: largest difference to torch {difference:.1e}")
    except DetrDistError:
        raise
    except Exception as error:  # of a full disk each library says it in its own kind
        raise DetrDistError(
            f"--output-dir {output_dir}: cannot be written ({describe_disk_error(error, folder.parent)})"
        ) from error
    print("\n".join(lines), flush=True)


def _register(
    output_dir: Path, name: str, alias: str | None, *, uri: str | None, source: str, tracking_uri: str
) -> None:
    """Register the model at `uri`, `runs:/RUN_ID/PATH`, or else upload the folder and register that."""
    client = open_client(tracking_uri)
    try:
        with patience(_UPLOAD_TIMEOUT_S):
            if uri is not None:
                run_id, _, artifact_path = uri.removeprefix("runs:/").partition("/")
            else:
                experiment = LoggingConfig().mlflow_experiment_name
                run_id = upload_model(client, output_dir, experiment=experiment, source=source)
                artifact_path = "model"
            version = register_artifact(client, name, run_id, artifact_path)
            if alias is not None:
                client.set_registered_model_alias(name, alias, version.version)
    except Exception as error:  # each kind of store raises its own
        raise DetrDistError(
            f"--register-as {name}: MLflow at {tracking_uri} refuses ({one_line(error)}); the export in "
            f"{output_dir} is complete: give it as --model to register it"
        ) from error
    suffix = f", alias {alias}" if alias is not None else ""
    print(f"{name} version {version.version}{suffix}: models:/{name}/{version.version}", flush=True)
