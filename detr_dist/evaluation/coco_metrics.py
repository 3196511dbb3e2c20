"""COCO's average precision and recall, by faster-coco-eval (equal to pycocotools, several times faster)."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from numpy.typing import NDArray

from detr_dist.data.coco import CocoData

MAX_DETECTIONS = 100
"""Of one image and class, the best ones count, as in COCO's own evaluation."""


@dataclass(frozen=True)
class DetectionRecords:
    """Detections of some images as columns, D rows. Nothing of an image's logits or pixels is kept."""

    evaluated_rows: NDArray[np.int64]
    """Rows in the data set of the images that were looked at, with or without detections."""
    image_rows: NDArray[np.int64]
    """[D], which image a detection is in."""
    boxes_xyxy_px: NDArray[np.float32]
    """[D, 4], in pixels of the original image."""
    scores: NDArray[np.float32]
    """[D]."""
    labels: NDArray[np.int64]
    """[D], class indices."""

    @classmethod
    def none(cls) -> "DetectionRecords":
        """Of no image."""
        integers, floats = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32)
        return cls(integers, integers, floats.reshape(0, 4), floats, integers)

    @classmethod
    def concatenate(cls, parts: Sequence["DetectionRecords"]) -> "DetectionRecords":
        """All parts' rows, ordered by image, so that the order does not depend on who had which image."""
        columns = {
            name: np.concatenate([getattr(part, name) for part in parts])
            for name in ("evaluated_rows", "image_rows", "boxes_xyxy_px", "scores", "labels")
        }
        columns["evaluated_rows"] = np.sort(columns["evaluated_rows"])
        return cls(**columns).take(np.argsort(columns["image_rows"], kind="stable"))

    def take(self, rows: NDArray[np.int64]) -> "DetectionRecords":
        """These detections, in this order, of the same images."""
        return replace(
            self,
            image_rows=self.image_rows[rows],
            boxes_xyxy_px=self.boxes_xyxy_px[rows],
            scores=self.scores[rows],
            labels=self.labels[rows],
        )


SIZES = ("small", "medium", "large")
"""Of boxes, by their area in pixels of the original image: under 32 x 32, up to 96 x 96, and over it."""


@dataclass(frozen=True)
class CocoFigures:
    """COCO's AP and AR."""

    metrics: dict[str, float]
    """By name; those without any truth to compute them from are absent."""
    ap_by_size: NDArray[np.float64]
    """[C, 3], AP of each class for boxes of each of `SIZES`; nan without any such box."""


def coco_figures(data: CocoData, records: DetectionRecords) -> CocoFigures:
    """COCO's figures of all detections on `data`.

    AP at IoU 0.50:0.05:0.95: `map` over all classes, `<class>_map` of each, `map_small`, `map_medium` and
    `map_large` of boxes of that size; `map_50` and `map_75` at these IoUs; `mar_1`, `mar_10` and `mar_100`,
    the average recall with so many detections of each image and class.
    """
    truth = COCO(data.to_coco_dict())
    boxes = records.boxes_xyxy_px.astype(np.float64)
    rows = np.column_stack(
        [
            data.image_ranks[records.image_rows],
            boxes[:, :2],
            boxes[:, 2:] - boxes[:, :2],
            records.scores.astype(np.float64),
            records.labels,
        ]
    )
    evaluation = COCOeval_faster(truth, truth.loadRes(rows), iouType="bbox", print_function=_silent)
    evaluation.evaluate()
    evaluation.accumulate()
    # [IoU, recall level, class, size, limit of detections] and the same without recall levels; -1: no truth.
    precision = np.asarray(evaluation.eval["precision"])
    recall = np.asarray(evaluation.eval["recall"])
    of_all = precision[:, :, :, 0, -1]
    figures = {"map": of_all, "map_50": of_all[0], "map_75": of_all[5]}
    figures |= {f"map_{size}": precision[:, :, :, i, -1] for i, size in enumerate(SIZES, start=1)}
    for index, limit in enumerate((1, 10, MAX_DETECTIONS)):
        figures[f"mar_{limit}"] = recall[:, :, 0, index]
    for index, name in enumerate(metric_names(data.class_names)):
        figures[f"{name}_map"] = of_all[:, :, index]
    means = {name: _mean_of_known(values) for name, values in figures.items()}
    ap_by_size = [
        [_mean_of_known(precision[:, :, label, size, -1]) for size in range(1, 1 + len(SIZES))]
        for label in range(data.num_classes)
    ]
    return CocoFigures(
        {name: mean for name, mean in means.items() if not np.isnan(mean)}, np.array(ap_by_size)
    )


def _mean_of_known(values: NDArray[np.float64]) -> float:
    """nan if there is none."""
    known = values[values > -1]
    return float(known.mean()) if len(known) else np.nan


def coco_results(data: CocoData, records: DetectionRecords) -> list[dict[str, Any]]:
    """Detections as pycocotools' `loadRes` reads them, with the ids of the data set's own JSON."""
    boxes = records.boxes_xyxy_px.astype(np.float64)
    boxes[:, 2:] -= boxes[:, :2]
    columns = (
        data.image_ids[records.image_rows].tolist(),
        np.array(data.category_ids)[records.labels].tolist(),
        boxes.tolist(),
        records.scores.tolist(),
    )
    keys = ("image_id", "category_id", "bbox", "score")
    return [dict(zip(keys, row, strict=True)) for row in zip(*columns, strict=True)]


def metric_names(class_names: Sequence[str]) -> list[str]:
    """Each class name as it stands in metric names: lower case, anything but letters, digits and _ replaced
    by _.

    A name that another class has already gets its class index appended.
    """
    names: list[str] = []
    for index, class_name in enumerate(class_names):
        name = re.sub(r"\W+", "_", class_name.lower()).strip("_") or "class"
        while name in names:
            name = f"{name}_{index}"
        names.append(name)
    return names


def _silent(*_: object) -> None:
    """faster-coco-eval reports its phases otherwise."""
