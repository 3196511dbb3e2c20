"""The params of a run: every configuration key that is set, and values that depend on the data."""

import json
import platform
from typing import Any

from detr_dist.config import Config
from detr_dist.data.coco import CocoData
from detr_dist.data.loading import num_loader_processes
from detr_dist.models.detector import Detector
from detr_dist.redaction import redact_value

_UNPREFIXED = {"data", "model", "training"}
"""Sections whose keys are params without a prefix. Keys of other sections are prefixed by the section."""


def config_params(config: Config) -> dict[str, Any]:
    """Return all settings without credentials, by their names in MLflow."""
    return {
        key if section in _UNPREFIXED else f"{section}_{key}": _as_param(value)
        for section, settings in config.model_dump(mode="json").items()
        for key, value in settings.items()
    }


def _as_param(value: Any) -> Any:
    """Convert a mapping to JSON and a list to its values; empty ones count as unset."""
    if isinstance(value, dict):
        return json.dumps(value)
    return (", ".join(map(str, value)) or None) if isinstance(value, list) else value


def run_params(
    config: Config, detector: Detector, train: CocoData, val: CocoData, num_processes: int
) -> dict[str, Any]:
    """Return the params of a run, without unset keys."""
    training, backbone = config.training, config.model.backbone
    if backbone is None:
        own = detector.network.config.backbone_config
        backbone = getattr(own, "backbone", None) or own.model_type
    shape = detector.family.shape_of(detector.network.config) | {"num_queries": detector.num_queries}
    params = config_params(config) | {
        "backbone": backbone if isinstance(backbone, str) else backbone.get("model_type", "custom"),
        "num_classes": len(train.class_names),
        "class_names": ", ".join(train.class_names),
        **shape,
        "train_samples": len(train),
        "val_samples": len(val),
        "num_workers": num_loader_processes(config.data.num_workers),
        "num_processes": num_processes,
        "global_batch_size": training.batch_size * num_processes * training.gradient_accumulation_steps,
        "python_version": platform.python_version(),
    }
    return {name: redact_value(value) for name, value in params.items() if value is not None}
