"""Trained models: loading them from anywhere, and predicting."""

import json
import logging
import math
import os
import tempfile
from collections.abc import Generator, Iterable, Sequence
from contextlib import ExitStack, closing
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor
from transformers import AutoImageProcessor, PreTrainedModel
from transformers.image_utils import PILImageResampling

from detr_dist.config import Config, DataConfig, override_config, specific_tiles
from detr_dist.data.coco import CocoData
from detr_dist.data.loading import check_room, shared_memory_need
from detr_dist.distributed import HostGroup, check_launch_settings, is_group_open
from detr_dist.environment import find_device_problem, restored_environment, set_environment, uses_cpu
from detr_dist.errors import DataError, UsageError
from detr_dist.evaluation.detections import DetectionRecords, Detections
from detr_dist.evaluation.image_pass import ImagePass, Predicted
from detr_dist.evaluation.thresholds import known_thresholds
from detr_dist.extensions import FAMILIES
from detr_dist.inference.images import ONE_IMAGE, OneImage, as_data_set
from detr_dist.inference.overrides import EXTENSIONS_KEY, import_overrides, keys_of, tracking_uri_for
from detr_dist.models.build import load_network, quiet_transformers, trained_detector
from detr_dist.models.detector import (
    Detector,
    Normalization,
    class_names_of,
    keep_normalization,
    normalization_by,
)
from detr_dist.models.families import family_of
from detr_dist.models.image_sizes import check_image_sizes
from detr_dist.numerics import resolve_precision
from detr_dist.resize import settings_of
from detr_dist.serving.precision import temporary_numerics
from detr_dist.serving.settings import DEFAULT_THRESHOLD, thresholds_of
from detr_dist.text import list_names, one_line
from detr_dist.training.checkpoint import STATE, Checkpoint
from detr_dist.training.sources import FoundModel, find_model

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class TrainedModel:
    """A network that detects objects, with the settings and metadata of its training."""

    reference: str
    """The reference it was loaded by."""
    network: PreTrainedModel = field(repr=False)
    """The network as it was saved, on the CPU in evaluation mode; predictions use a copy."""
    config: Config = field(repr=False)
    """The training configuration; for a model from elsewhere the defaults, with its own image sizes."""
    metadata: dict[str, Any] = field(repr=False)
    """Epoch, step, metrics and so on, if they are known."""
    is_mlflow_model: bool
    """Whether its folder is an MLflow model."""
    tracking_uri: str | None = None
    """Where MLflow was when it was loaded."""
    _detectors: dict[str, Detector] = field(default_factory=dict, init=False, repr=False)
    """The most recent detector, by device and settings."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Name of each class, in the order of the network's outputs."""
        return class_names_of(self.network.config)

    @overload
    def predict(  # type: ignore[overload-overlap]  # a str is an iterable of str
        self, images: OneImage, *, threshold: float | None = None, overrides: Sequence[str] = ()
    ) -> Detections: ...

    @overload
    def predict(
        self, images: Iterable[OneImage], *, threshold: float | None = None, overrides: Sequence[str] = ()
    ) -> list[Detections]: ...

    def predict(
        self,
        images: OneImage | Iterable[OneImage],
        *,
        threshold: float | None = None,
        overrides: Sequence[str] = (),
    ) -> Detections | list[Detections]:
        """Find objects in one image, or in several, with the same results as `detr-dist predict`.

        Runs on the GPU if there is one; the network stays there for the next call. Files and Pillow images
        are rotated by their EXIF data unless `data.exif` is `ignore`; boxes are in the rotated image.

        Args:
            images: A path, a Pillow image, an array uint8 [H, W] or [H, W, 3 or 4] in RGB, a tensor uint8
                [3, H, W], or an iterable of such images.
            threshold: Minimum score of a detection; None: the one of each class that training found and saved
                with the model, else 0.5.
            overrides: `section.key=value`, e.g. `training.batch_size=16`.

        Returns:
            The detections of the image; a list of them for an iterable.

        Raises:
            DataError: a file cannot be read.
            UsageError: something is not an image, or an override is wrong.
        """
        if isinstance(images, ONE_IMAGE):
            return self.predict([images], threshold=threshold, overrides=overrides)[0]
        import_overrides(overrides)
        config = self.prediction_settings(overrides)
        data, pixels = as_data_set(images, self.class_names, config.data.exif)
        least_scores = self.least_scores(config, threshold, overrides)
        parts = [DetectionRecords.none()]
        with closing(self.find_objects(data, config, pixels)) as all_predicted:
            for predicted in all_predicted:
                if predicted.unreadable:
                    raise DataError(min(predicted.unreadable.values()))
                parts.append(predicted.records.at_least(least_scores))
        records = DetectionRecords.concatenate(parts)
        return [records.of_image(row, self.class_names) for row in range(len(data))]

    def find_objects(
        self, data: CocoData, config: Config, pixels: dict[int, Tensor] | None = None
    ) -> Generator[Predicted]:
        """Yield the predictions for the images of `data` by batch, in this process. Close the generator.

        While this process trains, the settings of torch are those of the training.

        Args:
            data: The images; their boxes are not used.
            config: From `prediction_settings`.
            pixels: Images that are in no file, as uint8 [3, H, W] by row.
        """
        if len(data) <= config.training.batch_size:  # starting loader processes would take longer
            config = config.model_copy(update={"data": config.data.model_copy(update={"num_workers": 0})})
        check_room(shared_memory_need(config, data, train=False))
        with ExitStack() as restoring:
            if not is_group_open():  # in a callback, another thread may be training meanwhile
                restoring.enter_context(restored_environment())
                restoring.enter_context(temporary_numerics(config.training))
                set_environment(stacks_dir=None)
            device = _device()
            images = ImagePass(data, config, device, pixels=pixels)
            with closing(images.run(self.detector(config, device))) as all_predicted:
                yield from all_predicted

    def least_scores(
        self, config: Config, threshold: float | None, overrides: Sequence[str]
    ) -> NDArray[np.float64]:
        """Return the minimum score of a detection for each class, [C].

        That is `threshold`, else the one among the overrides, else those saved with the model.
        """
        configured = config.evaluation.score_threshold
        if threshold is None and "evaluation.score_threshold" in keys_of(overrides) and configured != "auto":
            threshold = configured
        if threshold is None:
            thresholds, lines = self.thresholds_or_default()
            for line in lines:
                _logger.info(line)
            return np.array(thresholds)
        if not (isinstance(threshold, int | float | np.number) and 0 <= threshold <= 1):
            raise UsageError(f"threshold {threshold!r}: a least score is a number from 0 to 1")
        return np.full(len(self.class_names), threshold)

    def thresholds_or_default(self) -> tuple[list[float], list[str]]:
        """Return each class's threshold from the last evaluation in training, and messages for the user.

        Classes without a threshold get the default, and are named in a message.
        """
        known = self.metadata.get("thresholds") or {}
        unknown = [name for name in self.class_names if known.get(name) is None]
        line = f"the model brings no threshold for {list_names(unknown)}: {DEFAULT_THRESHOLD} is used"
        return list(thresholds_of(self.class_names, known)), [line] if unknown else []

    def settings(self, overrides: Sequence[str]) -> Config:
        """Return the training configuration, adapted to this host, with `section.key=value` overrides.

        Nothing that it names is imported, so that its transforms and callbacks may be missing.

        Raises:
            UsageError: an override is wrong, or the network does not take images of these sizes.
        """
        if self.config.training.mixed_precision == "fp16" and uses_cpu():
            overrides = ["training.mixed_precision=no", *overrides]
        config = override_config(self.config, overrides, only_known_names=False)
        specific_tiles(config)  # refuses `auto`
        check_image_sizes(config.data, family_of(self.network.config), self.network.config, train=False)
        return config

    def prediction_settings(self, overrides: Sequence[str]) -> Config:
        """Return `settings` with the precision resolved for this process alone."""
        config = resolve_precision(self.settings(overrides))
        check_launch_settings(config.training.mixed_precision)
        return config

    def detector(self, config: Config, device: torch.device) -> Detector:
        """Return a copy of the network on the device, ready to predict with `config`.

        `config` is the model's own or derived from it. The copy is kept until a different one is requested.
        """
        key = f"{device} {config.training.channels_last} {config.model.model_dump_json()}"
        if key not in self._detectors:
            self._detectors.clear()
            channels_last = config.training.channels_last
            detector = trained_detector(deepcopy(self.network), config.model, channels_last=channels_last)
            self._detectors[key] = detector.to(device)
        return self._detectors[key]


def _device() -> torch.device:
    """Return the accelerator that this process uses, or the CPU.

    Raises:
        UsageError: the requested GPUs are not available.
    """
    problem = find_device_problem()
    if problem is not None:
        raise UsageError(problem)
    found = None if uses_cpu() else torch.accelerator.current_accelerator()
    if found is None:
        return torch.device("cpu")
    return torch.device(found.type, torch.accelerator.current_device_index())


def load_model(reference: str | os.PathLike[str], *, tracking_uri: str | None = None) -> TrainedModel:
    """Load a trained model.

    The extensions of its training are not imported: register a family of your own before.

    Args:
        reference: A model's or checkpoint's folder, a run's id (its best model), `runs:/RUN_ID/model`,
            `models:/NAME/VERSION`, `models:/NAME@ALIAS`, or a hub id.
        tracking_uri: URI of MLflow's runs and registry; None: the environment's MLFLOW_TRACKING_URI, else
            `sqlite:///mlflow.db`.

    Raises:
        UsageError: there is no such model, or it cannot be used here.
        CheckpointError: the checkpoint is incomplete or corrupt.
    """
    return open_model(os.fspath(reference), tracking_uri_for(tracking_uri))


def open_model(reference: str, tracking_uri: str, host: HostGroup | None = None) -> TrainedModel:
    """Load a trained model.

    With `host` this is collective, and one process of each node finds and downloads the model.
    """
    with tempfile.TemporaryDirectory(prefix="detr_dist_") as scratch:
        find = partial(find_model, reference, tracking_uri, Path(scratch))
        found = find() if host is None else host.once_per_node(find)
        with quiet_transformers(only_errors=True):
            model = _read(reference, found)
        if host is not None:
            host.gather_rows([0.0])  # the files stay until every process has read them
    return replace(model, tracking_uri=tracking_uri)


def _read(reference: str, found: FoundModel) -> TrainedModel:
    mlmodel, metadata = Path(found.location) / "MLmodel", dict[str, Any]()
    if found.checkpoint is not None:
        config, metadata = found.checkpoint.facts.config, _metadata_of(found.checkpoint)
    else:
        if mlmodel.exists():
            metadata = yaml.safe_load(mlmodel.read_text(encoding="utf-8")).get("metadata") or {}
        config = _config_of(reference, metadata)
    _check_family(reference, config)
    network = load_network(reference, found.location)
    if found.checkpoint is None:
        resize, normalization = _preprocessing(reference, found.location)
        keep_normalization(network.config, normalization)
        config = config.model_copy(update={"data": config.data.model_copy(update=resize)})
    return TrainedModel(reference, network, config, metadata, mlmodel.exists())


def _config_of(reference: str, metadata: dict[str, Any]) -> Config:
    try:
        return Config.model_validate(metadata.get("config") or {})
    except ValidationError:
        _logger.warning(
            f"{reference}: its settings are those of another version of this package; the defaults are used"
        )
        return Config()


def _check_family(reference: str, config: Config) -> None:
    """Refuse a family that is not registered, because loading a model never imports its extensions.

    Raises:
        UsageError: the family is unknown; the message names the extensions of the training.
    """
    family, extensions = config.model.model_architecture, config.training.extensions
    if family not in FAMILIES.names:
        trained_with = f"(it was trained with {', '.join(extensions)}) " if extensions else ""
        raise UsageError(
            f"{reference}: is of the family {family!r}, which is not registered; import the module that "
            f"registers it first {trained_with}or give it as {EXTENSIONS_KEY}=[...]"
        )


def _preprocessing(reference: str, location: str) -> tuple[dict[str, Any], Normalization]:
    """Return the settings by which images are resized, and the normalization of their pixels.

    Raises:
        UsageError: the model prepares images in a way that this package does not support.
    """
    try:
        processor = AutoImageProcessor.from_pretrained(location, trust_remote_code=False)
        if not processor.do_resize:
            raise ValueError("do_resize is false")
        resize = settings_of(processor.size)
        DataConfig.model_validate(resize)
        normalization = normalization_by(processor)
    except Exception as error:  # the library and pydantic raise many types
        raise UsageError(
            f"{reference}: its preprocessor_config.json does not specify shortest_edge and longest_edge, or "
            f"height and width, or prepares images in an unsupported way ({one_line(error)}); give another "
            "model, or the checkpoint that it comes from"
        ) from error
    if processor.resample != PILImageResampling.BILINEAR:
        _logger.warning(
            f"{reference}: other programs do not resize its images bilinearly, but this package does"
        )
    return resize, normalization


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
