"""Distributed evaluation: every process evaluates its own images, every image counts exactly once."""

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from numpy.typing import NDArray
from torch import Tensor

from detr_dist.config import Config
from detr_dist.data.coco import CocoData
from detr_dist.distributed import HostGroup
from detr_dist.errors import DetrDistError, StopRequested, as_one_line
from detr_dist.evaluation.coco_metrics import CocoMetrics, compute_coco_metrics
from detr_dist.evaluation.detections import DetectionRecords, Detections
from detr_dist.evaluation.error_analysis import ErrorAnalysis, analyse_errors
from detr_dist.evaluation.image_pass import ImagePass, ViewTargets
from detr_dist.evaluation.small_objects import small_object_metrics
from detr_dist.evaluation.thresholds import OperatingPoints, Thresholds, operating_points
from detr_dist.models.class_weights import class_weight_of_boxes, class_weights_of
from detr_dist.models.criterion import SetCriterion, StepCounts
from detr_dist.models.detector import Detector
from detr_dist.models.matcher import num_ignored_queries
from detr_dist.text import printable

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Truth:
    """M annotated objects of one image, including crowds."""

    boxes_xyxy_px: NDArray[np.float64]
    """[M, 4], in pixels of the image as it is stored."""
    labels: NDArray[np.int64]
    """[M], class indices."""
    iscrowd: NDArray[np.bool_]
    """[M]."""
    areas: NDArray[np.float64]
    """[M], in square pixels, as annotated."""


@dataclass(frozen=True, eq=False)
class Details:
    """The detections and annotations behind the metrics of an evaluation, for plots and custom metrics.

    `for row in range(len(details)): metric(details.detections(row), details.truth(row))`
    """

    data: CocoData
    """N images and their boxes, with `image_path(row)`, `image_ids` and `class_names`."""
    records: DetectionRecords
    """All detections, without any threshold."""
    coco: CocoMetrics
    operating_points: OperatingPoints

    @cached_property
    def errors(self) -> ErrorAnalysis:
        """The errors by kind, and the AP that each kind costs."""
        return analyse_errors(self.data, self.records)

    def __len__(self) -> int:
        return len(self.data)

    def detections(self, row: int) -> Detections:
        """Return all detections in the image of this row of the data set, without any threshold."""
        return self.records.of_image(row, self.data.class_names)

    def truth(self, row: int) -> Truth:
        """Return the annotations of the image of this row."""
        rows = self.data.box_rows(row)
        boxes = self.data.boxes_xywh_px[rows].copy()
        boxes[:, 2:] += boxes[:, :2]
        data = self.data
        return Truth(boxes, data.box_classes[rows], data.iscrowd[rows], data.areas[rows])


@dataclass(frozen=True)
class Scores:
    """The result of an evaluation."""

    metrics: dict[str, float]
    """Metrics by their names in MLflow without `val_`, the same on every process; docs/evaluation.md."""
    details: Details | None
    """Detections and annotations, on the main process only."""


class _Part(NamedTuple):
    """The result for one process's images."""

    records: DetectionRecords
    losses: dict[str, float]  # contributions to each loss; empty without images
    finite: bool  # whether all predictions were finite


class Evaluator:
    """Scores a detector on one data set, any number of times, until it is asked to stop."""

    def __init__(
        self,
        data: CocoData,
        config: Config,
        processes: Accelerator | PartialState,
        host: HostGroup,
        *,
        thresholds: Sequence[float | None] | None = None,
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> None:
        """Prepare the data; `thresholds`, one for each class, replace `evaluation.score_threshold`."""
        self.data = data
        self._images = ImagePass(
            data,
            config,
            processes.device,
            num_processes=host.num_processes,
            process_index=host.process_index,
        )
        self._stop_requested = stop_requested
        self._thresholds: Thresholds = config.evaluation.score_threshold if thresholds is None else thresholds
        self._size_bands = config.evaluation.size_bands
        self._loss = config.loss
        self._host = host

    @cached_property
    def _targets(self) -> ViewTargets:
        return self._images.targets()  # the same at every evaluation

    def evaluate(self, detector: Detector) -> Scores:
        """Return the detector's scores on the data set.

        Collective. The detector must hold the same weights and statistics on every process; its training or
        evaluation mode is restored.

        Raises:
            StopRequested: on every process, if any of them was asked to stop during the evaluation.
        """
        was_training = detector.training
        detector.eval()
        part: _Part | DetrDistError
        try:
            part = self._detect(detector)
        except DetrDistError as error:
            part = error
        except Exception as error:  # anything else would leave the other processes waiting
            part = DetrDistError(as_one_line(error))
        detector.train(was_training)
        parts = self._host.gather_objects(part)
        scores: Scores | None = None
        with self._host.failing_together():
            if self._host.is_main_process:
                scores = self._score(parts)
        metrics = self._host.broadcast(scores.metrics if scores is not None else None)
        return Scores(metrics, scores.details if scores is not None else None)

    def _score(self, parts: list[_Part | DetrDistError]) -> Scores:
        complete: list[_Part] = []
        for part in parts:
            if isinstance(part, DetrDistError):
                raise part
            complete.append(part)
        records = DetectionRecords.concatenate([part.records for part in complete])
        losses: Counter[str] = Counter()
        for each in complete:
            losses.update(each.losses)
        if not np.array_equal(records.evaluated_rows, np.arange(len(self.data))):
            raise AssertionError("an image was evaluated twice or never")
        if not all(each.finite for each in complete):
            raise DetrDistError(
                "predictions on the validation images are not finite: the weights contain NaN or Inf; lower "
                "training.learning_rate or set training.gradient_clip"
            )
        broken = ", ".join(f"val_{name}" for name, loss in losses.items() if not np.isfinite(loss))
        if broken:
            raise DetrDistError(
                f"the predictions on the validation images are finite, but NaN or Inf is {broken}; correct "
                "that term of the loss, or remove it from loss.weights"
            )
        coco = compute_coco_metrics(self.data, records)
        points = operating_points(self.data, records, self._thresholds)
        details = Details(self.data, records, coco, points)
        # Where classes are called `x` and `x_center`, the AP of the latter keeps the name that both have.
        metrics = small_object_metrics(self.data, records, points.classes, self._size_bands)
        metrics |= details.errors.metrics(self.data.class_names)
        metrics |= coco.metrics | points.metrics(self.data.class_names)
        metrics |= losses
        return Scores(metrics, details)

    @torch.no_grad()
    def _detect(self, detector: Detector) -> _Part:
        """Detect in this process's images, and sum their contributions to the losses."""
        class_weights = class_weights_of(self._loss.class_weights, detector.class_names)
        criterion = SetCriterion(detector.loss_settings, self._loss.weights, class_weights)
        counts = self._counts(detector.num_queries, class_weights)
        parts, finite = [DetectionRecords.none()], True
        losses_of_batches: dict[str, list[Tensor]] = defaultdict(list)
        with closing(self._images.run(detector)) as all_predicted:
            for predicted in all_predicted:
                if self._stop_requested():
                    raise StopRequested("asked to stop during an evaluation")
                for reason in predicted.unreadable.values():
                    _logger.warning(f"{printable(reason)}; it counts as an image without detections")
                batch = predicted.batch
                losses = criterion(
                    predicted.outputs,
                    batch.labels,
                    batch.boxes_cxcywh,
                    batch.num_boxes,
                    counts,
                    ignored=batch.ignored,
                )
                finite = finite and losses.finite
                for name, loss in losses.logged.items():
                    losses_of_batches[name].append(loss)
                parts.append(predicted.records)
        sums = {name: float(torch.stack(each).double().sum()) for name, each in losses_of_batches.items()}
        return _Part(DetectionRecords.concatenate(parts), sums, finite)

    def _counts(self, num_queries: int, class_weights: Sequence[float] | None) -> StepCounts:
        """Return the denominators of the losses on all images, or all their windows.

        A view with more boxes than queries counts as many boxes as queries.
        """
        labels, num_boxes, num_ignored = self._targets
        class_weight = None
        if class_weights is not None:
            class_weight = class_weight_of_boxes(
                labels, num_boxes, num_queries=num_queries, class_weights=class_weights
            )
        return StepCounts(
            num_boxes=float(num_boxes.clip(max=num_queries).sum()),
            num_images=len(num_boxes),
            class_weight=class_weight,
            num_ignored=num_ignored_queries(num_boxes, num_ignored, num_queries=num_queries),
        )
