"""The model of an epoch, packed for MLflow and for production from a copy of its weights."""

import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from detr_dist.config import Config
from detr_dist.models.detector import Detector, load_plain_weights, plain_network
from detr_dist.storage import finish_interrupted, new_folder
from detr_dist.tracking.packaging import write_model
from detr_dist.tracking.tracker import Tracker


@dataclass(frozen=True)
class ModelCard:
    """What is said of a model beside its weights."""

    epoch: int
    """Epochs begun, from 1."""
    step: int
    """Optimizer steps done."""
    is_best: bool
    metrics: Mapping[str, float]
    """Of the evaluation at this epoch's end; empty if there was none."""
    thresholds: Mapping[str, float]
    """The least score of a detection that counts, by class name, as the last evaluation found it."""


class ModelPacker:
    """Packs the model of every epoch for MLflow, and the best one into the output folder as well."""

    def __init__(self, detector: Detector, config: Config, output_dir: Path, tracker: Tracker | None) -> None:
        self._network = plain_network(detector)  # a second one on the host, to put each epoch's weights into
        self._config = config
        self._output_dir = output_dir
        self._tracker = tracker

    def pack(self, weights: Mapping[str, Tensor], card: ModelCard) -> None:
        """Write the model whole or not at all, and hand it to the tracker.

        Raises:
            Exception: of a full disk each library says it in its own kind.
        """
        if self._tracker is None and not card.is_best:
            return
        of_epoch = f"models/epoch_{card.epoch}"
        folder = self._output_dir / ("model" if card.is_best else of_epoch)
        load_plain_weights(self._network, weights)
        metadata = {
            "epoch": card.epoch,
            "step": card.step,
            "val_map": card.metrics.get("val_map"),
            "is_best": card.is_best,
            "metrics": dict(card.metrics),
            "thresholds": dict(card.thresholds),
            "config": self._config.model_dump(mode="json"),
        }
        with new_folder(folder) as partial:
            write_model(self._network, partial, data=self._config.data, metadata=metadata)
        if self._tracker is None:
            return
        self._tracker.log_folder(folder, of_epoch)
        if self._config.checkpoint.keep_last is not None:
            self._tracker.keep_newest("models", card.epoch, self._config.checkpoint.keep_last)
        if card.is_best:
            self._tracker.log_folder(folder, "model")
        else:
            shutil.rmtree(folder)
            finish_interrupted(folder.parent, "epoch_*")  # and whatever a kill has left there
            with suppress(OSError):  # something of the user's is there as well
                folder.parent.rmdir()
