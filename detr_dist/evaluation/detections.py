"""Detections: of one image, and of many images as columns."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from detr_dist.data.coco import CocoData
from detr_dist.evaluation.drawing import Mark, class_colour, draw_marks
from detr_dist.serving.exif import turn_to_upright


@dataclass(frozen=True, eq=False)
class Detections:
    """N objects found in one image, by descending score."""

    boxes_xyxy_px: NDArray[np.float32]
    """[N, 4], left, top, right, bottom, in pixels of the image after the rotation by `data.exif`."""
    scores: NDArray[np.float32]
    """[N], in [0, 1]."""
    labels: NDArray[np.int64]
    """[N], class indices."""
    names: tuple[str, ...]
    """[N], class names."""

    def __len__(self) -> int:
        return len(self.scores)

    def draw(self, image: Image.Image) -> Image.Image:
        """Return a copy of the image, in RGB, with the boxes, their classes and scores; the best on top.

        The copy is rotated by the image's EXIF data, as `predict` does by default.
        """
        copy = image.convert("RGB") if image.mode != "RGB" else image.copy()
        turn = turn_to_upright(image)
        copy = copy if turn is None else copy.transpose(turn)
        columns = (self.boxes_xyxy_px.astype(np.float64).tolist(), self.scores, self.labels, self.names)
        marks = [
            Mark((left, top, right, bottom), class_colour(int(label)), f"{name} {score:.2f}")
            for (left, top, right, bottom), score, label, name in zip(*columns, strict=True)
        ]
        draw_marks(copy, marks)
        return copy


@dataclass(frozen=True, eq=False)
class DetectionRecords:
    """D detections in some images, as columns; those of an image by descending score."""

    evaluated_rows: NDArray[np.int64]
    """Rows in the data set of all images that were evaluated, with or without detections."""
    image_rows: NDArray[np.int64]
    """[D]."""
    boxes_xyxy_px: NDArray[np.float32]
    """[D, 4], in pixels of the original image."""
    scores: NDArray[np.float32]
    """[D]."""
    labels: NDArray[np.int64]
    """[D], class indices."""

    @classmethod
    def none(cls) -> "DetectionRecords":
        """Return the records of no image."""
        integers, floats = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32)
        return cls(integers, integers, floats.reshape(0, 4), floats, integers)

    @classmethod
    def concatenate(cls, parts: Sequence["DetectionRecords"]) -> "DetectionRecords":
        """Join the parts, ordered by image: the result does not depend on the split over processes."""
        columns = {
            name: np.concatenate([getattr(part, name) for part in parts])
            for name in ("evaluated_rows", "image_rows", "boxes_xyxy_px", "scores", "labels")
        }
        columns["evaluated_rows"] = np.sort(columns["evaluated_rows"])
        return cls(**columns).take(np.argsort(columns["image_rows"], kind="stable"))

    def take(self, rows: NDArray[np.int64]) -> "DetectionRecords":
        """Return these detections, in this order, of the same images."""
        columns = ("image_rows", "boxes_xyxy_px", "scores", "labels")
        return replace(self, **{name: getattr(self, name)[rows] for name in columns})

    def at_least(self, scores: NDArray[np.float64]) -> "DetectionRecords":
        """Return the detections that reach the minimum score of their class; `scores` [C]."""
        return self.take(np.flatnonzero(self.scores >= scores[self.labels]))

    def of_image(self, row: int, class_names: Sequence[str]) -> Detections:
        """Return the detections of one image; requires that these records are ordered by image."""
        own = slice(*np.searchsorted(self.image_rows, [row, row + 1]))
        labels = self.labels[own]
        names = tuple(class_names[label] for label in labels)
        return Detections(self.boxes_xyxy_px[own], self.scores[own], labels, names)


def coco_results(data: CocoData, records: DetectionRecords) -> list[dict[str, Any]]:
    """Return detections for pycocotools' `loadRes`, with the ids of the data set's own JSON.

    Detections of classes that the JSON does not list are left out.
    """
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
