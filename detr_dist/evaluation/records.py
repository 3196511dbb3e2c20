"""What a detector found in the images of a data set, as columns."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detr_dist.data.coco import CocoData


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


def coco_results(data: CocoData, records: DetectionRecords) -> list[dict[str, Any]]:
    """Detections as pycocotools' `loadRes` reads them, with the ids of the data set's own JSON; without those
    of classes that it does not list."""
    is_listed = np.array([category_id is not None for category_id in data.category_ids])
    records = records.take(np.flatnonzero(is_listed[records.labels]))
    category_ids = np.array([category_id or 0 for category_id in data.category_ids], dtype=np.int64)
    boxes = records.boxes_xyxy_px.astype(np.float64)
    boxes[:, 2:] -= boxes[:, :2]
    columns = (
        data.image_ids[records.image_rows].tolist(),
        category_ids[records.labels].tolist(),
        boxes.tolist(),
        records.scores.tolist(),
    )
    keys = ("image_id", "category_id", "bbox", "score")
    return [dict(zip(keys, row, strict=True)) for row in zip(*columns, strict=True)]
