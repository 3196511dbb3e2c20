"""A trained detector, wherever it is, with what is known of it."""

import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from transformers import AutoImageProcessor, PreTrainedModel
from transformers.image_utils import PILImageResampling
from transformers.utils import logging as transformers_logging

from detr_dist.config import Config, DataConfig, load_config, override_config
from detr_dist.environment import uses_cpu
from detr_dist.errors import UsageError
from detr_dist.evaluation.operating_point import known_thresholds
from detr_dist.models.build import load_network, trained_detector
from detr_dist.models.detector import Detector, class_names_of
from detr_dist.models.normalization import Normalization, keep_normalization, normalization_by
from detr_dist.text import list_names, one_line
from detr_dist.training.checkpoint import STATE, Checkpoint
from detr_dist.training.sources import FoundModel, find_model

WITH_EFFECT = (
    "data.",
    "evaluation.score_threshold",
    "logging.mlflow_tracking_uri",
    "training.batch_size",
    "training.channels_last",
    "training.deterministic",
    "training.mixed_precision",
    "training.tf32",
)
DEFAULT_THRESHOLD = 0.5
"""Of a class for which a model brings none."""


@dataclass(frozen=True)
class TrainedModel:
    network: PreTrainedModel
    """On the CPU, in evaluation mode."""
    config: Config
    """By which it was trained; of a model from elsewhere the defaults, with its own image sizes."""
    metadata: dict[str, Any]
    """Epoch, step, metrics and so on, as far as they are known."""
    is_mlflow_model: bool
    """Whether it lies there as an MLflow model."""

    @property
    def class_names(self) -> tuple[str, ...]:
        return class_names_of(self.network.config)

    @property
    def thresholds(self) -> list[float | None]:
        """The least score of a detection that counts, of each class, as the last evaluation in training
        found it; None where none is known."""
        known = self.metadata.get("thresholds") or {}
        return [known.get(name) for name in self.class_names]

    def thresholds_or_default(self) -> tuple[list[float], list[str]]:
        """Thresholds of all classes, and a line to say where the model does not know one."""
        thresholds = self.thresholds
        unknown = [name for name, known in zip(self.class_names, thresholds, strict=True) if known is None]
        line = f"the model brings no threshold for {list_names(unknown)}: {DEFAULT_THRESHOLD} is taken"
        values = [DEFAULT_THRESHOLD if known is None else known for known in thresholds]
        return values, [line] if unknown else []

    def settings(self, overrides: Sequence[str]) -> Config:
        """Those that it was trained by, as far as this machine can follow them, with `section.key=value`
        overrides."""
        config = self.config
        if config.training.mixed_precision == "fp16" and uses_cpu():
            config = override_config(config, ["training.mixed_precision=no"])
        return override_config(config, overrides)

    def detector(self, config: Config) -> Detector:
        """The network, ready to predict as `config` says, which is its own or made from that."""
        return trained_detector(self.network, config.model, channels_last=config.training.channels_last)


def fetch_model(reference: str, tracking_uri: str) -> TrainedModel:
    """The model that `reference` names (see `find_model`).

    Raises:
        UsageError: there is no such model, or it cannot be used here.
        CheckpointError: the checkpoint is not whole.
    """
    with tempfile.TemporaryDirectory(prefix="detr_dist_") as scratch:
        return open_model(reference, find_model(reference, tracking_uri, Path(scratch)))


def open_model(reference: str, found: FoundModel) -> TrainedModel:
    """Load what was found for `reference`.

    Raises:
        UsageError: it cannot be used here.
    """
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    network = load_network(reference, found.location)
    mlmodel = Path(found.location) / "MLmodel"
    if found.checkpoint is not None:
        config, metadata = found.checkpoint.facts.config, _metadata_of(found.checkpoint)
    else:
        metadata = (
            yaml.safe_load(mlmodel.read_text(encoding="utf-8")).get("metadata") or {}
            if mlmodel.exists()
            else {}
        )
        try:
            config = Config.model_validate(metadata.get("config") or {})
        except ValidationError:
            print(
                f"warning: {reference}: its settings are those of another version of this package, and are "
                "not followed: the defaults are",
                flush=True,
            )
            config = Config()
        edges, normalization = _preprocessing(reference, found.location)
        keep_normalization(network.config, normalization)
        config = config.model_copy(update={"data": config.data.model_copy(update=edges)})
    return TrainedModel(network, config, metadata, mlmodel.exists())


@contextmanager
def tracking_uri_as_option() -> Iterator[None]:
    """Errors name the option --tracking-uri, where training would name the setting."""
    try:
        yield
    except UsageError as error:
        raise UsageError(
            str(error)
            .replace("logging.mlflow_tracking_uri", "--tracking-uri")
            .replace(", or set logging.mlflow=false", "")
        ) from error


def tracking_uri_for(given: str, overrides: Sequence[str]) -> str:
    """The one that the overrides name, else the given one. The other overrides are for the model's own
    settings."""
    own = [each for each in overrides if each.startswith("logging.mlflow_tracking_uri=")]
    return load_config(None, own).logging.mlflow_tracking_uri if own else given


def overrides_without_effect(overrides: Sequence[str]) -> list[str]:
    """A line for each override that changes nothing about what a trained model does."""
    keys = [each.partition("=")[0] for each in overrides]
    return [f"warning: {key}: has no effect here" for key in keys if not key.startswith(WITH_EFFECT)]


def _preprocessing(reference: str, location: str) -> tuple[dict[str, int], Normalization]:
    """Return the edges that images are resized to, and how their pixels are normalized.

    Raises:
        UsageError: its images are prepared in a way that this package has not.
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
        print(f"warning: {reference}: its images are not resized bilinearly elsewhere, but here", flush=True)
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
