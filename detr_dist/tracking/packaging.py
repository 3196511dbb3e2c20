"""A trained network as a folder that MLflow, transformers and our own commands can load."""

import base64
import copyreg
import hashlib
import io
import json
import platform
import shutil
import uuid
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cloudpickle
import torch
import transformers
import yaml
from PIL import Image
from transformers import PreTrainedModel
from transformers.utils import output_capturing

from detr_dist import serving
from detr_dist.config import Config, DataConfig, specific_tiles
from detr_dist.models.build import freezes_batch_norm
from detr_dist.models.detector import UNNORMALIZED, class_names_of, normalization_of
from detr_dist.models.families import family_of
from detr_dist.redaction import redact_value
from detr_dist.resize import processor_size
from detr_dist.serving.settings import ServingSettings, thresholds_of

REQUIRED_PACKAGES = ("mlflow", "torch", "torchvision", "transformers", "timm", "pandas", "pillow")
"""Packages that are needed to load the model; this package is not one of them."""


def write_model(network: PreTrainedModel, folder: Path, *, config: Config, metadata: dict[str, Any]) -> None:
    """Write `network`, a standard transformers module, into the new folder `folder`.

    It holds an MLflow model (for `mlflow.pyfunc`, `mlflow models serve` and `mlflow.pytorch`) and beside it
    `config.json`, `model.safetensors` and `preprocessor_config.json` (for `from_pretrained` and pipelines).
    `config` is that of its training.
    """
    (folder / "data").mkdir(parents=True)
    network.save_pretrained(folder)
    _image_processor(network, config.data).save_pretrained(folder)
    _serving_settings(network, config, metadata.get("thresholds") or {}).write(folder)
    _write_for_mlflow(network, folder, redact_value(json.loads(json.dumps(metadata))))


def _write_for_mlflow(network: PreTrainedModel, folder: Path, metadata: dict[str, Any]) -> None:
    """Write the files of an MLflow model with two flavours, without MLflow's slow `save_model`.

    `python_function` is the package's own room `serving`, copied into the folder, and reads the safetensors
    file. The pickle of the other one contains an ordinary module that can be trained further. It is for
    MLflow's users only: our own commands read the safetensors file.
    """
    _pickle_collector_by_name()
    torch.save(network, folder / "data" / "model.pth", pickle_module=cloudpickle)
    (folder / "data" / "pickle_module_info.txt").write_text("mlflow.pytorch.pickle_module", encoding="utf-8")
    model = {
        "flavors": {
            "python_function": {
                "code": "code",
                "env": _write_environment(folder),
                "loader_module": _write_code(folder / "code"),
                "python_version": platform.python_version(),
            },
            "pytorch": {"code": None, "model_data": "data", "pytorch_version": str(torch.__version__)},
        },
        "metadata": metadata,
        "mlflow_version": version("mlflow"),
        "model_size_bytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
        "model_uuid": uuid.uuid4().hex,
        "saved_input_example_info": _write_example(folder),
        "signature": _signature(),
        "utc_time_created": str(datetime.now(UTC).replace(tzinfo=None)),
    }
    (folder / "MLmodel").write_text(yaml.safe_dump(model), encoding="utf-8")


def _serving_settings(
    network: PreTrainedModel, config: Config, thresholds: dict[str, float | None]
) -> ServingSettings:
    family, normalization = family_of(network.config), normalization_of(network.config)
    data, training, class_names = config.data, config.training, class_names_of(network.config)
    tiles = specific_tiles(config)
    return ServingSettings(
        class_names=class_names,
        thresholds=thresholds_of(class_names, thresholds),
        class_kind=family.loss_kind,
        exif=data.exif,
        resize=data.resize,
        shortest_edge=data.shortest_edge,
        longest_edge=data.longest_edge,
        tiles=None if tiles is None else tiles.grid,
        mean=normalization.mean,
        std=normalization.std,
        batch_size=training.batch_size,
        mixed_precision=training.mixed_precision,
        tf32=training.tf32,
        deterministic=training.deterministic,
        channels_last=training.channels_last,
        thaw_batch_norm=not freezes_batch_norm(config.model),
        float32_modules=family.float32_modules,
        float32_outputs=family.float32_outputs,
    )


def _write_code(folder: Path) -> str:
    """Copy the modules that run the model, and return the name of their package.

    It contains a digest, because one process may load models of several versions.
    """
    modules = sorted(Path(serving.__path__[0]).glob("*.py"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in modules)).hexdigest()
    name = f"detr_dist_serving_{digest[:8]}"
    (folder / name).mkdir(parents=True)
    for path in modules:
        shutil.copyfile(path, folder / name / path.name)
    return name


def _write_environment(folder: Path) -> dict[str, str]:
    """Write what MLflow needs to create an environment for the model, and return the names of its files."""
    # Without the local label of builds such as 2.9.0+cpu, which the package index does not have.
    requirements = [f"{package}=={version(package).partition('+')[0]}" for package in REQUIRED_PACKAGES]
    (folder / "requirements.txt").write_text("\n".join(requirements), encoding="utf-8")
    python = platform.python_version()
    environments = {
        "conda.yaml": {
            "name": "mlflow-env",
            "channels": ["conda-forge"],
            "dependencies": [f"python={python}", "pip", {"pip": requirements}],
        },
        "python_env.yaml": {
            "python": python,
            "build_dependencies": ["pip", "setuptools", "wheel"],
            "dependencies": ["-r requirements.txt"],
        },
    }
    for name, content in environments.items():
        (folder / name).write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return {"conda": "conda.yaml", "virtualenv": "python_env.yaml"}


def _write_example(folder: Path) -> dict[str, str]:
    """Write a request with a small green image, and return MLflow's description of its files."""
    png = io.BytesIO()
    Image.new("RGB", (64, 48), (40, 110, 50)).save(png, "png")
    request = {"columns": ["image"], "data": [[base64.b64encode(png.getvalue()).decode()]]}
    (folder / "input_example.json").write_text(json.dumps(request), encoding="utf-8")
    (folder / "serving_input_example.json").write_text(
        json.dumps({"dataframe_split": request}), encoding="utf-8"
    )
    return {
        "artifact_path": "input_example.json",
        "pandas_orient": "split",
        "serving_input_path": "serving_input_example.json",
        "type": "dataframe",
    }


def _signature() -> dict[str, str]:
    """Return inputs, outputs and parameters as a `ModelSignature` of MLflow writes them, without MLflow."""
    box = {"type": "array", "items": {"type": "double"}, "required": True}
    properties = {
        "label": {"type": "string", "required": True},
        "label_id": {"type": "long", "required": True},
        "score": {"type": "double", "required": True},
        "box": box,
    }
    detections = {"type": "array", "items": {"type": "object", "properties": properties}}
    parameter = {"default": None, "shape": None}
    signature = {
        "inputs": [{"type": "any", "name": "image", "required": True}],
        "outputs": [detections | {"name": "detections", "required": True}],
        "params": [
            {"name": "threshold", "type": "double", **parameter},
            {"name": "max_detections", "type": "long", **parameter},
        ],
    }
    return {key: json.dumps(value) for key, value in signature.items()}


def _pickle_collector_by_name() -> None:
    """Let hooks of transformers be pickled, which vision transformers as backbones have.

    They refer to a context variable of the library, which has no value to pickle, only a name.
    """
    collector = getattr(output_capturing, "_active_collector", None)
    if collector is not None:
        copyreg.pickle(type(collector), lambda _: "_active_collector")


def _image_processor(network: PreTrainedModel, data: DataConfig) -> Any:
    """Return the library's processor of this family, set up to prepare images as this package does."""
    normalization = normalization_of(network.config)
    processor_class = getattr(transformers, family_of(network.config).image_processor)
    return processor_class(
        size=processor_size(data),
        do_normalize=normalization != UNNORMALIZED,
        image_mean=list(normalization.mean),
        image_std=list(normalization.std),
    )
