"""The hardest images of a data set: those with the worst errors, or with the most uncertain detections."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from detr_dist.data.coco import CocoData
from detr_dist.evaluation.detections import DetectionRecords
from detr_dist.evaluation.thresholds import Matches

FALSE_NEGATIVE, MISCLASSIFIED = "false negative", "misclassified"
FALSE_POSITIVE, DUPLICATE, UNCERTAIN = "false positive", "duplicate", "uncertain"


@dataclass(frozen=True)
class HardObject:
    """A reason why an image is hard."""

    kind: str
    label: int
    """Class index, that of the annotation if there is one."""
    box_xyxy_px: tuple[float, float, float, float]
    score: float | None
    """The score of the detection; None for a false negative."""
    weight: float

    @property
    def is_not_found(self) -> bool:
        """Whether it is an annotated object that was not detected as what it is."""
        return self.kind in (FALSE_NEGATIVE, MISCLASSIFIED)


@dataclass(frozen=True)
class HardImage:
    """An image with its hard objects, objects that were not found first, then by their weight."""

    row: int
    objects: list[HardObject]


def rank_by_errors(data: CocoData, matches: Matches) -> list[HardImage]:
    """Return the images with errors: those first whose annotated objects that were not found weigh most.

    An object weighs more the rarer and smaller its class is. The other errors, weighted by their scores as
    well, decide between images that are equal.
    """
    single = ~data.iscrowd
    sides = np.sqrt(data.boxes_xywh_px[single, 2:].prod(axis=1))
    weights = class_importance(data.num_classes, data.box_classes[single], sides)
    corners = data.boxes_xywh_px.copy()
    corners[:, 2:] += corners[:, :2]
    detections, objects = matches.detections, defaultdict[int, list[HardObject]](list)
    for box in matches.false_negatives.tolist():
        label = int(data.box_classes[box])
        found = HardObject(FALSE_NEGATIVE, label, _corners(corners[box]), None, float(weights[label]))
        objects[int(data.image_rows[box])].append(found)
    for each, box in enumerate(matches.boxes.tolist()):
        if matches.in_crowd[each] or (box >= 0 and data.box_classes[box] == detections.labels[each]):
            continue
        score, place = float(detections.scores[each]), detections.boxes_xyxy_px[each]
        if box >= 0:
            label = int(data.box_classes[box])
            found = HardObject(MISCLASSIFIED, label, _corners(place), score, float(weights[label]))
        else:
            label = int(detections.labels[each])
            kind = DUPLICATE if matches.is_duplicate[each] else FALSE_POSITIVE
            found = HardObject(kind, label, _corners(place), score, score * float(weights[label]))
        objects[int(detections.image_rows[each])].append(found)
    return _ranked(objects.items())


def rank_by_uncertainty(
    data: CocoData, records: DetectionRecords, thresholds: NDArray[np.float64]
) -> list[HardImage]:
    """Return the images with uncertain detections, those first whose detections weigh most.

    A detection is uncertain if its score is nearer to the threshold of its class, [C], than to 0 or 1. It
    weighs most at the threshold, and the more the rarer and smaller its class is among the detections.
    """
    counted = records.at_least(thresholds)
    widths_heights = counted.boxes_xyxy_px[:, 2:] - counted.boxes_xyxy_px[:, :2]
    sides = np.sqrt(widths_heights.astype(np.float64).prod(axis=1).clip(min=0))
    weights = class_importance(data.num_classes, counted.labels, sides)
    middle = thresholds[records.labels]
    reach = np.where(records.scores < middle, middle, 1 - middle) / 2
    distance = np.abs(records.scores - middle)
    objects = defaultdict[int, list[HardObject]](list)
    for row in np.flatnonzero(distance < reach).tolist():
        label, score = int(records.labels[row]), float(records.scores[row])
        weight = float(weights[label] * (1 - distance[row] / reach[row]))
        found = HardObject(UNCERTAIN, label, _corners(records.boxes_xyxy_px[row]), score, weight)
        objects[int(records.image_rows[row])].append(found)
    return _ranked(objects.items())


def class_importance(
    num_classes: int, labels: NDArray[np.int64], sides: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the weight of each class, [C], by how rare and how small its objects are; 1 at least.

    It is the number of objects of the most frequent class by that of the class, times the largest mean side
    of all classes by that of the class. A class without objects weighs as much as the heaviest one.
    """
    counts = np.bincount(labels, minlength=num_classes)
    known = counts > 0
    if not known.any():
        return np.ones(num_classes)
    mean_sides = np.bincount(labels, weights=sides, minlength=num_classes)[known] / counts[known]
    mean_sides = mean_sides.clip(min=1)
    weights = np.ones(num_classes)
    weights[known] = counts.max() / counts[known] * (mean_sides.max() / mean_sides)
    weights[~known] = weights[known].max()
    return weights


def _corners(box: NDArray[np.float64] | NDArray[np.float32]) -> tuple[float, float, float, float]:
    left, top, right, bottom = box.tolist()
    return left, top, right, bottom


def _ranked(objects: Iterable[tuple[int, list[HardObject]]]) -> list[HardImage]:
    images = [
        HardImage(row, sorted(found, key=lambda each: (not each.is_not_found, -each.weight)))
        for row, found in objects
    ]

    def weights(image: HardImage) -> tuple[float, float, int]:
        not_found, others = (
            -sum(each.weight for each in image.objects if each.is_not_found == wanted)
            for wanted in (True, False)
        )
        return not_found, others, image.row

    return sorted(images, key=weights)
