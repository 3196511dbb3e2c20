"""How often training images appear in an epoch: rare classes more often, and sources by their weights."""

import math
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from detr_dist.config import Config
from detr_dist.data.coco import CocoData
from detr_dist.data.columns import counted
from detr_dist.data.concatenation import parts_of, weights_of
from detr_dist.data.sampling import SAMPLE, EpochSamples, samples_by_weight
from detr_dist.errors import UsageError

_IMAGES_AT_A_TIME = 100_000


def epoch_samples(data: CocoData, config: Config, step_size: int) -> EpochSamples | None:
    """Return the samples of every epoch; None if each image is one.

    There are as many as images, counted with their repeats, but only complete optimizer steps of `step_size`
    images, so that the part of each source is exact in what is trained.

    Raises:
        UsageError: a source is so light that it has no sample in an epoch.
    """
    threshold, weights, parts = config.data.repeat_rare, weights_of(data), parts_of(data)
    if threshold is None and weights is None:
        return None
    factors = np.ones(len(data)) if threshold is None else repeat_factors(data, threshold)
    num_samples = math.ceil(factors.sum())
    num_samples -= num_samples % step_size if num_samples >= step_size else 0  # too few are refused later
    starts = np.cumsum([len(part) for part in parts])[:-1]
    of_parts = np.split(factors, starts)
    counts = samples_by_weight(num_samples, weights or [float(each.sum()) for each in of_parts])
    for part, count in zip(parts, counts, strict=True):
        if count == 0:
            raise UsageError(
                f"--train-dir: none of the {num_samples} samples of an epoch would be from "
                f"{part.annotations_path}; give it a larger weight, or leave it out"
            )
    return EpochSamples.of(of_parts, counts, config.training.seed)


def samples_of_parts(data: CocoData, samples: EpochSamples | None) -> list[int]:
    """Return how many samples of every epoch are from each of `parts_of(data)`."""
    num_images = [len(part) for part in parts_of(data)]
    if samples is None:
        return num_images
    ends: list[int] = (samples.ends[np.cumsum(num_images) - 1] // SAMPLE).tolist()
    return [end - start for start, end in pairwise([0, *ends])]


def describe_samples(data: CocoData, config: Config, samples: EpochSamples | None) -> Iterator[str]:
    """Yield lines on sources and rare classes, if there are any."""
    parts, counts = parts_of(data), samples_of_parts(data, samples)
    if len(parts) > 1:
        for part, count in zip(parts, counts, strict=True):
            yield (
                f"source {part.annotations_path}: {counted(len(part), 'image')}, "
                f"{count / sum(counts):.1%} of every epoch ({counted(count, 'sample')})"
            )
    if config.data.repeat_rare is not None:
        factors = class_factors(data, config.data.repeat_rare)
        rare = np.flatnonzero(factors > 1)
        of_rare = ", ".join(f"{data.class_names[index]} x {factors[index]:.2f}" for index in rare)
        what = "no class is rarer than that, so no image is repeated"
        if of_rare:
            what = f"{of_rare}; {counted(len(data), 'image')} are {counted(sum(counts), 'sample')} an epoch"
        yield f"data.repeat_rare {config.data.repeat_rare:g}: {what}"


def repeat_factors(data: CocoData, threshold: float) -> NDArray[np.float64]:
    """Return how often each image should appear, [N]: 1, or more if one of its classes is rare.

    A class in a fraction f of the images has the factor max(1, sqrt(threshold / f)), an image the largest of
    its classes. With weights of sources, f is the fraction in an epoch without repeats.

    Source: Gupta et al., "LVIS: A Dataset for Large Vocabulary Instance Segmentation", CVPR 2019.
    """
    of_class = class_factors(data, threshold)
    factors = np.ones(len(data))
    for rows, classes in _classes_of_images(data):
        np.maximum.at(factors, rows, of_class[classes])
    return factors


def class_factors(data: CocoData, threshold: float) -> NDArray[np.float64]:
    """Return how often the images of each class should appear, [C]; 1 for a class without boxes."""
    weights, parts = weights_of(data), parts_of(data)
    of_images = np.ones(len(data))
    if weights is not None:
        each = np.array(weights) / [len(part) for part in parts]
        of_images = np.repeat(each, [len(part) for part in parts])
    totals = np.zeros(data.num_classes)
    for rows, classes in _classes_of_images(data):
        totals += np.bincount(classes, of_images[rows], minlength=data.num_classes)
    frequencies = np.where(totals > 0, totals, np.inf) / of_images.sum()
    factors: NDArray[np.float64] = np.maximum(1.0, np.sqrt(threshold / frequencies))
    return factors


def _classes_of_images(data: CocoData) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yield the rows and classes of all pairs of an image and a class in it, without crowds.

    A part of the images at a time, as tens of millions of boxes would need gigabytes.
    """
    for first in range(0, len(data), _IMAGES_AT_A_TIME):
        offsets = data.box_offsets[first : first + _IMAGES_AT_A_TIME + 1]
        boxes = slice(int(offsets[0]), int(offsets[-1]))
        rows = np.repeat(np.arange(first, first + len(offsets) - 1), np.diff(offsets))
        pairs = rows * data.num_classes + data.box_classes[boxes]
        yield np.divmod(np.unique(pairs[~data.iscrowd[boxes]]), data.num_classes)
