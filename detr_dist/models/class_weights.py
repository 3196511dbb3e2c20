"""Weights of classes in the class loss (`loss.class_weights`), and their sums over boxes."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from detr_dist.errors import UsageError
from detr_dist.text import hint_of_class


def class_weights_of(weights: Mapping[str, float], class_names: Sequence[str]) -> tuple[float, ...] | None:
    """Return the weight of each class, 1 for those without one; None if no class has a weight.

    Raises:
        UsageError: a weight belongs to no class; the message names the nearest one.
    """
    for name in weights:
        if name not in class_names:
            hint = hint_of_class(name, class_names)
            raise UsageError(f"loss.class_weights: there is no class {name!r}; {hint}")
    return tuple(weights.get(name, 1.0) for name in class_names) if weights else None


def class_weight_of_boxes(
    labels: ArrayLike, num_boxes: ArrayLike, *, num_queries: int, class_weights: Sequence[float]
) -> float:
    """Return the sum of the class weights of all boxes that can be matched.

    `labels` are in image order, `num_boxes[b]` of them for image b. Which boxes of an image with more than
    `num_queries` are matched depends on the predictions; it counts `num_queries` boxes of average weight.
    """
    counts = np.asarray(num_boxes, dtype=np.int64)
    images = np.repeat(np.arange(len(counts)), counts)
    of_boxes = np.asarray(class_weights, dtype=np.float64)[np.asarray(labels, dtype=np.int64)]
    of_images = np.bincount(images, of_boxes, minlength=len(counts))
    return float((of_images * (num_queries / counts.clip(min=num_queries))).sum())
