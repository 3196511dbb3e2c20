"""A trained network as a folder that MLflow, transformers and our own commands can load."""

import copyreg
import json
import uuid
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cloudpickle
import torch
import transformers
import yaml
from transformers import PreTrainedModel
from transformers.utils import output_capturing

from detr_dist.config import DataConfig
from detr_dist.models.detector import UNNORMALIZED, normalization_of
from detr_dist.models.families import family_of
from detr_dist.redaction import redact_value
from detr_dist.resize import processor_size

REQUIRED_PACKAGES = ("mlflow", "torch", "torchvision", "transformers", "timm")
"""Packages that are needed to load the model; this package is not one of them."""


def write_model(
    network: PreTrainedModel,
    folder: Path,
    *,
    data: DataConfig,
    metadata: dict[str, Any],
) -> None:
    """Write `network`, a standard transformers module, into the new folder `folder`.

    It holds an MLflow PyTorch model (for `mlflow.pytorch.load_model`) and beside it `config.json`,
    `model.safetensors` and `preprocessor_config.json` (for `from_pretrained` and pipelines).
    """
    _write_for_mlflow(network, folder, redact_value(json.loads(json.dumps(metadata))))
    network.save_pretrained(folder)
    _image_processor(network, data).save_pretrained(folder)


def _write_for_mlflow(network: PreTrainedModel, folder: Path, metadata: dict[str, Any]) -> None:
    """Write the files of `mlflow.pytorch.save_model`, without MLflow and without a `python_function`.

    MLflow's wrapper for serving expects one output tensor, and a detector has several. The pickle contains an
    ordinary module that can be trained further. It is for MLflow's users only: our own commands read the
    safetensors file.
    """
    (folder / "data").mkdir(parents=True)
    _pickle_collector_by_name()
    torch.save(network, folder / "data" / "model.pth", pickle_module=cloudpickle)
    (folder / "data" / "pickle_module_info.txt").write_text("mlflow.pytorch.pickle_module", encoding="utf-8")
    requirements = [f"{package}=={version(package)}" for package in REQUIRED_PACKAGES]
    (folder / "requirements.txt").write_text("\n".join(requirements), encoding="utf-8")
    model = {
        "flavors": {
            "pytorch": {"code": None, "model_data": "data", "pytorch_version": str(torch.__version__)}
        },
        "metadata": metadata,
        "mlflow_version": version("mlflow"),
        "model_size_bytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
        "model_uuid": uuid.uuid4().hex,
        "utc_time_created": str(datetime.now(UTC).replace(tzinfo=None)),
    }
    (folder / "MLmodel").write_text(yaml.safe_dump(model), encoding="utf-8")


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
