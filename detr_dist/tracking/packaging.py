"""A trained network as a folder that MLflow, transformers and our own commands can load."""

import json
import logging
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlflow.pytorch
from mlflow import pyfunc
from mlflow.models import Model
from mlflow.models.model import MLMODEL_FILE_NAME
from transformers import (
    ConditionalDetrImageProcessor,
    DeformableDetrImageProcessor,
    DetrImageProcessor,
    PreTrainedModel,
)

from detr_dist.config import DataConfig
from detr_dist.models.normalization import normalization_of
from detr_dist.redaction import redact_value

REQUIRED_PACKAGES = ("torch", "torchvision", "transformers", "timm")
"""What loading the model needs; this package is not among them."""

_IMAGE_PROCESSORS = {"detr": DetrImageProcessor, "deformable_detr": DeformableDetrImageProcessor}


def write_model(
    network: PreTrainedModel,
    folder: Path,
    *,
    data: DataConfig,
    metadata: dict[str, Any],
) -> None:
    """Write `network`, a plain transformers module, into the new folder `folder`.

    It holds an MLflow PyTorch model (for `mlflow.pytorch.load_model`) and beside it `config.json`,
    `model.safetensors` and `preprocessor_config.json` (for `from_pretrained` and pipelines).
    """
    # MLflow warns at each pickle. It keeps an ordinary module that can be trained on, and is for MLflow's
    # users only: our own commands read the safetensors file.
    logging.getLogger("mlflow.pytorch").setLevel(logging.ERROR)
    model = Model()
    mlflow.pytorch.save_model(
        network,
        str(folder),
        mlflow_model=model,
        serialization_format="pickle",
        pip_requirements=[f"{package}=={version(package)}" for package in REQUIRED_PACKAGES],
        metadata=redact_value(json.loads(json.dumps(metadata))),
    )
    # MLflow's wrapper, which would serve the model, wants one tensor as the output; a detector has several.
    del model.flavors[pyfunc.FLAVOR_NAME]
    model.save(str(folder / MLMODEL_FILE_NAME))
    network.save_pretrained(folder)
    _image_processor(network, data).save_pretrained(folder)


def _image_processor(network: PreTrainedModel, data: DataConfig) -> Any:
    """The library's processor of this architecture (DAB-DETR is published with Conditional DETR's), which
    does what we do."""
    normalization = normalization_of(network.config)
    processor_class = _IMAGE_PROCESSORS.get(network.config.model_type, ConditionalDetrImageProcessor)
    return processor_class(
        size={"shortest_edge": data.shortest_edge, "longest_edge": data.longest_edge},
        image_mean=list(normalization.mean),
        image_std=list(normalization.std),
    )
