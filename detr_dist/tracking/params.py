"""The params of a run: every configuration key that is set, and values that depend on the data."""

import json
import platform
import re
from pathlib import Path
from typing import Any

from detr_dist.config import Config
from detr_dist.data.coco import CocoData
from detr_dist.data.concatenation import parts_of
from detr_dist.data.formats.annotations import SPLIT_OF_NAME
from detr_dist.data.loading import num_loader_processes
from detr_dist.data.repeat_factors import samples_of_parts
from detr_dist.data.sampling import EpochSamples, StepPlan
from detr_dist.models.detector import Detector
from detr_dist.redaction import redact_value

_UNPREFIXED = {"data", "model", "training"}
"""Sections whose keys are params without a prefix. Keys of other sections are prefixed by the section."""

_WITHIN_DATA_SETS = {*SPLIT_OF_NAME, "annotations", "images", "imagesets", "labels"}
"""Folders that data sets of all kinds have, in lower case."""


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
    config: Config,
    detector: Detector,
    train: CocoData,
    val: CocoData,
    plan: StepPlan,
    samples: EpochSamples | None,
) -> dict[str, Any]:
    """Return the params of a run, without unset keys."""
    shape = detector.family.shape_of(detector.network.config) | {"num_queries": detector.num_queries}
    params = config_params(config) | {
        "backbone": _backbone_of(config, detector),
        "num_classes": len(train.class_names),
        "class_names": ", ".join(train.class_names),
        **shape,
        "train_samples": len(train),
        "val_samples": len(val),
        "samples_per_epoch": plan.num_samples,
        "steps_per_epoch": plan.steps_per_epoch,
        "train_sources": _sources(train, samples),
        "num_workers": num_loader_processes(config.data.num_workers),
        "num_processes": plan.num_processes,
        "global_batch_size": plan.global_batch_size,
        "python_version": platform.python_version(),
    }
    return {name: redact_value(value) for name, value in params.items() if value is not None}


def run_name(config: Config, detector: Detector, train: CocoData, output_dir: Path) -> str:
    """Return a name for a run: architecture, backbone, data set and output folder, without repetitions.

    Charts of several runs have only names in their legends, and the output folder is what runs do not share.
    """
    data = dict.fromkeys(name for name in map(_data_set_of, parts_of(train)) if name is not None)
    names = (
        config.model.model_architecture,
        _backbone_of(config, detector),
        *data,
        output_dir.absolute().name,
    )
    return "-".join(name for name in dict.fromkeys(names) if name)


def _data_set_of(data: CocoData) -> str | None:
    """Return the name of the folder of a data set, above those for its splits, images and annotations."""
    path = data.annotations_path.absolute()
    for folder in (path, *path.parents) if path.is_dir() else path.parents:
        if re.fullmatch(r"[0-9a-f]{32}", folder.name):  # an unpacked .zip
            return None
        if folder.name and folder.name.lower() not in _WITHIN_DATA_SETS:
            return folder.name
    return None


def _backbone_of(config: Config, detector: Detector) -> str:
    backbone = config.model.backbone
    if backbone is None:
        own = detector.network.config.backbone_config
        backbone = getattr(own, "backbone", None) or own.model_type
    return str(backbone if isinstance(backbone, str) else backbone.get("model_type", "custom"))


def _sources(train: CocoData, samples: EpochSamples | None) -> str | None:
    """Return images, and samples of an epoch, of each of several sources, as JSON."""
    parts = parts_of(train)
    counts = zip(parts, samples_of_parts(train, samples), strict=True)
    of_parts = {
        str(part.annotations_path): {"images": len(part), "samples_per_epoch": count}
        for part, count in counts
    }
    return json.dumps(of_parts) if len(parts) > 1 else None
