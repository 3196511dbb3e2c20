"""COCO average precision, computed by faster-coco-eval (equal to pycocotools, and several times faster)."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from numpy.typing import NDArray


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
    def concatenate(cls, parts: Sequence["DetectionRecords"]) -> "DetectionRecords":
        """All parts' rows, ordered by image, so that the order does not depend on who had which image."""
        columns = {
            name: np.concatenate([getattr(part, name) for part in parts])
            for name in ("evaluated_rows", "image_rows", "boxes_xyxy_px", "scores", "labels")
        }
        order = np.argsort(columns["image_rows"], kind="stable")
        for name in ("image_rows", "boxes_xyxy_px", "scores", "labels"):
            columns[name] = columns[name][order]
        columns["evaluated_rows"] = np.sort(columns["evaluated_rows"])
        return cls(**columns)


def average_precision(
    ground_truth: dict[str, Any], records: DetectionRecords, class_names: Sequence[str]
) -> dict[str, float]:
    """`map` over all classes and `<class>_map` for each class that has ground truth, AP at IoU
    0.50:0.05:0.95.

    `ground_truth` is a COCO dictionary with rows of the data set as image ids and class indices as category
    ids.
    """
    truth = COCO(ground_truth)
    boxes = records.boxes_xyxy_px.astype(np.float64)
    rows = np.column_stack(
        [
            records.image_rows,
            boxes[:, :2],
            boxes[:, 2:] - boxes[:, :2],
            records.scores.astype(np.float64),
            records.labels,
        ]
    )
    evaluation = COCOeval_faster(truth, truth.loadRes(rows), iouType="bbox", print_function=_silent)
    evaluation.evaluate()
    evaluation.accumulate()
    # [IoU threshold, recall level, class, area range, detections per image]: all sizes, 100 detections. -1:
    # no truth.
    precision = np.asarray(evaluation.eval["precision"])[:, :, :, 0, -1]
    metrics = {}
    if (precision > -1).any():
        metrics["map"] = float(precision[precision > -1].mean())
    for index, name in enumerate(metric_names(class_names)):
        of_class = precision[:, :, index]
        if (of_class > -1).any():
            metrics[f"{name}_map"] = float(of_class[of_class > -1].mean())
    return metrics


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
