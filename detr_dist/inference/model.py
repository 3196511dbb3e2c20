"""A trained model, wherever it is, with what is known of it."""

import json
import logging
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from transformers import AutoImageProcessor, PreTrainedModel
from transformers.image_utils import PILImageResampling
from transformers.utils import logging as transformers_logging

from detr_dist.config import Config, DataConfig, load_config, override_config
from detr_dist.distributed import HostGroup
from detr_dist.environment import uses_cpu
from detr_dist.errors import UsageError
from detr_dist.evaluation.thresholds import known_thresholds
from detr_dist.models.build import load_network, trained_detector
from detr_dist.models.detector import (
    Detector,
    Normalization,
    class_names_of,
    keep_normalization,
    normalization_by,
)
from detr_dist.text import list_names, one_line
from detr_dist.training.checkpoint import STATE, Checkpoint
from detr_dist.training.sources import FoundModel, find_model

TRACKING_URI_KEY = "logging.mlflow_tracking_uri"
KEYS_WITH_EFFECT = (
    "data.",
    "evaluation.score_threshold",
    TRACKING_URI_KEY,
    "training.batch_size",
    "training.channels_last",
    "training.deterministic",
    "training.mixed_precision",
    "training.tf32",
)
DEFAULT_THRESHOLD = 0.5
"""Of a class for which a model brings none."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainedModel:
    """A network that detects objects, with how it was trained."""

    network: PreTrainedModel
    """On the CPU, in evaluation mode."""
    config: Config
    """The one it was trained with; for a model from elsewhere the defaults, with its own image sizes."""
    metadata: dict[str, Any]
    """Epoch, step, metrics and so on, as far as they are known."""
    is_mlflow_model: bool
    """Whether its folder is an MLflow model."""

    @property
    def class_names(self) -> tuple[str, ...]:
        return class_names_of(self.network.config)

    def thresholds_or_default(self) -> tuple[list[float], list[str]]:
        """Return the least score of a detection of each class that the last evaluation in training found, and
        a line on the classes without one, which get the default."""
        known = self.metadata.get("thresholds") or {}
        unknown = [name for name in self.class_names if known.get(name) is None]
        line = f"the model brings no threshold for {list_names(unknown)}: {DEFAULT_THRESHOLD} is used"
        values = [DEFAULT_THRESHOLD if name in unknown else known[name] for name in self.class_names]
        return values, [line] if unknown else []

    def settings(self, overrides: Sequence[str]) -> Config:
        """Return the configuration it was trained with, as far as this host can follow it, with
        `section.key=value` overrides."""
        config = self.config
        if config.training.mixed_precision == "fp16" and uses_cpu():
            config = override_config(config, ["training.mixed_precision=no"])
        return override_config(config, overrides)

    def detector(self, config: Config) -> Detector:
        """Return the network, ready to predict with `config`, which is its own or derived from that."""
        return trained_detector(self.network, config.model, channels_last=config.training.channels_last)


def load_model(reference: str, tracking_uri: str, host: HostGroup | None = None) -> TrainedModel:
    """Load the model that `reference` names (see `find_model`).

    Collective with `host`: one process of each node finds and downloads it.

    Raises:
        UsageError: there is no such model, or it cannot be used here.
        CheckpointError: the checkpoint is incomplete or corrupt.
    """
    with tempfile.TemporaryDirectory(prefix="detr_dist_") as scratch:
        if host is None:
            return _open(reference, find_model(reference, tracking_uri, Path(scratch)))
        found = host.once_per_machine(lambda: find_model(reference, tracking_uri, Path(scratch)))
        model = _open(reference, found)
        host.gather_rows([0.0])  # the files stay until every process has read them
    return model


def keys_of(overrides: Sequence[str]) -> list[str]:
    """Return the keys of `section.key=value` overrides."""
    return [each.partition("=")[0] for each in overrides]


def tracking_uri_for(given: str, overrides: Sequence[str]) -> str:
    """Return the tracking URI among the overrides, else the given one."""
    pairs = zip(keys_of(overrides), overrides, strict=True)
    own = [override for key, override in pairs if key == TRACKING_URI_KEY]
    return load_config(None, own).logging.mlflow_tracking_uri if own else given


def warn_of_no_effect(overrides: Sequence[str]) -> None:
    """Log a warning for each override that changes nothing about what a trained model does."""
    for key in keys_of(overrides):
        if not key.startswith(KEYS_WITH_EFFECT):
            _logger.warning(f"{key}: has no effect here")


def _open(reference: str, found: FoundModel) -> TrainedModel:
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    network = load_network(reference, found.location)
    mlmodel = Path(found.location) / "MLmodel"
    if found.checkpoint is not None:
        facts = found.checkpoint.facts
        return TrainedModel(network, facts.config, _metadata_of(found.checkpoint), mlmodel.exists())
    metadata: dict[str, Any] = {}
    if mlmodel.exists():
        metadata = yaml.safe_load(mlmodel.read_text(encoding="utf-8")).get("metadata") or {}
    try:
        config = Config.model_validate(metadata.get("config") or {})
    except ValidationError:
        _logger.warning(
            f"{reference}: its settings are those of another version of this package; the defaults are used"
        )
        config = Config()
    edges, normalization = _preprocessing(reference, found.location)
    keep_normalization(network.config, normalization)
    config = config.model_copy(update={"data": config.data.model_copy(update=edges)})
    return TrainedModel(network, config, metadata, mlmodel.exists())


def _preprocessing(reference: str, location: str) -> tuple[dict[str, int], Normalization]:
    """Return the edges that images are resized to, and how their pixels are normalized.

    Raises:
        UsageError: its images are prepared in a way that this package does not have.
    """
    try:
        processor = AutoImageProcessor.from_pretrained(location, trust_remote_code=False)
        if not processor.do_resize:
            raise ValueError("do_resize is false")
        edges = {edge: int(processor.size[edge]) for edge in ("shortest_edge", "longest_edge")}
        DataConfig.model_validate(edges)
        normalization = normalization_by(processor)
    except Exception as error:  # the library raises many kinds, and pydantic another
        raise UsageError(
            f"{reference}: its preprocessor_config.json does not say shortest_edge and longest_edge of an "
            f"image, or prepares it as cannot be done here ({one_line(error)}); give another model, or "
            "the checkpoint that it comes from"
        ) from error
    if processor.resample != PILImageResampling.BILINEAR:
        _logger.warning(f"{reference}: its images are not resized bilinearly elsewhere, but here")
    return edges, normalization


def _metadata_of(checkpoint: Checkpoint) -> dict[str, Any]:
    state, facts = checkpoint.state, checkpoint.facts
    is_best = state.best_step == state.step
    return {
        "epoch": math.ceil(json.loads((checkpoint.folder / STATE).read_text(encoding="utf-8"))["epoch"]),
        "step": state.step,
        "val_map": state.best_map if is_best else None,
        "is_best": is_best,
        "metrics": state.metrics if is_best else {},
        "thresholds": known_thresholds(state.metrics, facts.class_names),
        "config": facts.config.model_dump(mode="json"),
        "run_id": facts.mlflow_run_id,
    }
