"""Export of any model to a folder that can be used without this package."""

import logging
from contextlib import ExitStack
from pathlib import Path

from detr_dist.config import LoggingConfig
from detr_dist.distributed import is_group_open
from detr_dist.environment import check_single_process, restored_environment, set_environment
from detr_dist.errors import DetrDistError, UsageError
from detr_dist.inference.model import TrainedModel, load_model
from detr_dist.inference.onnx import check_onnx_packages, write_onnx
from detr_dist.inference.overrides import tracking_uri_for
from detr_dist.models.build import quiet_transformers
from detr_dist.storage import check_new, describe_disk_error, new_folder
from detr_dist.text import one_line
from detr_dist.tracking.artifacts import register_artifact, run_of, upload_model
from detr_dist.tracking.packaging import write_model
from detr_dist.tracking.store import open_client, patience
from detr_dist.tracking.uris import is_artifact_uri

_UPLOAD_TIMEOUT_S = 300

_logger = logging.getLogger(__name__)


def export(
    model: TrainedModel | str | Path,
    output_dir: str | Path,
    *,
    onnx: bool = False,
    register_as: str | None = None,
    alias: str | None = None,
    tracking_uri: str | None = None,
) -> Path:
    """Write a model into a new folder from which MLflow and transformers load it without this package.

    Args:
        model: A loaded model, or a reference for `load_model`.
        output_dir: The folder to make; it must not exist, or be empty.
        onnx: Write `model.onnx` as well, for images of any number and size.
        register_as: Name in MLflow's registry under which to register it as a new version.
        alias: Alias to set on the new version.
        tracking_uri: URI of MLflow's store; None: where the model was loaded from, else as for `load_model`.

    Returns:
        The folder.

    Raises:
        DetrDistError: with one clear line. The folder is complete or absent; if only the registry fails, it
            is complete.
    """
    output_dir = Path(output_dir)
    if tracking_uri is None and isinstance(model, TrainedModel):
        tracking_uri = model.tracking_uri
    tracking_uri = tracking_uri_for(tracking_uri)
    if not is_group_open():  # inside a training, the main process may export
        check_single_process("export")
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
    if not isinstance(model, TrainedModel):
        model = load_model(model, tracking_uri=tracking_uri)
    _write(model, output_dir, tracking_uri=tracking_uri, onnx=onnx)
    if register_as is not None:
        _register(model, output_dir, register_as, alias, tracking_uri)
    return output_dir


def _write(model: TrainedModel, output_dir: Path, *, tracking_uri: str, onnx: bool) -> None:
    reference, run_id = model.reference, model.metadata.get("run_id")
    if is_artifact_uri(reference):
        run_id = run_of(reference, open_client(tracking_uri)) or run_id
    metadata = model.metadata | {"source": reference, "run_id": run_id}
    folder = output_dir.resolve()
    lines = [f"{output_dir}: {model.network.config.model_type} as MLflow model and transformers folder"]
    try:
        with ExitStack() as restoring:
            if not is_group_open():
                restoring.enter_context(restored_environment())
                set_environment(stacks_dir=None)  # transformers may import DeepSpeed, which warns without it
            restoring.enter_context(quiet_transformers(only_errors=True))
            partial = restoring.enter_context(new_folder(folder))
            write_model(model.network, partial, config=model.config, metadata=metadata)
            if onnx:
                difference = write_onnx(model.network, partial / "model.onnx")
                lines.append(f"{output_dir / 'model.onnx'}: largest difference to torch {difference:.1e}")
    except DetrDistError:
        raise
    except Exception as error:  # each library reports a full disk by its own type
        raise DetrDistError(
            f"--output-dir {output_dir}: cannot be written ({describe_disk_error(error, folder.parent)})"
        ) from error
    for line in lines:
        _logger.info(line)


def _register(model: TrainedModel, output_dir: Path, name: str, alias: str | None, tracking_uri: str) -> None:
    """Register a run's model artifact; for any other model, upload the folder and register that."""
    client, reference = open_client(tracking_uri), model.reference
    try:
        with patience(_UPLOAD_TIMEOUT_S):
            if model.is_mlflow_model and reference.startswith("runs:/"):
                run_id, _, artifact_path = reference.removeprefix("runs:/").partition("/")
            else:
                experiment = LoggingConfig().mlflow_experiment_name
                run_id = upload_model(client, output_dir, experiment=experiment, source=reference)
                artifact_path = "model"
            version = register_artifact(client, name, run_id, artifact_path)
            if alias is not None:
                client.set_registered_model_alias(name, alias, version.version)
    except Exception as error:  # each kind of store raises its own types
        raise DetrDistError(
            f"--register-as {name}: MLflow at {tracking_uri} refuses ({one_line(error)}); the export in "
            f"{output_dir} is complete: give it as --model to register it"
        ) from error
    suffix = f", alias {alias}" if alias is not None else ""
    _logger.info(f"{name} version {version.version}{suffix}: models:/{name}/{version.version}")
