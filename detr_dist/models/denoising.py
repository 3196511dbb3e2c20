"""Contrastive denoising: further queries made of the targets with noise, from which they are recovered.

The library draws the noise on the device, for as many groups as the image with the most objects allows, so
that it depends on how a step is split. Here each image has noise and groups of its own, and padding counts
neither in attention nor in the loss.

Source: Zhang et al., "DINO: DETR with Improved DeNoising Anchor Boxes", 2022; RT-DETR. Departures: the number
of groups depends on the image alone, each image's loss is divided by that number, and padding is not trained
as background.

Shapes: B images, N denoising queries, Q queries, T targets of all images, D positive denoising queries.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

INVERSE_SIGMOID_EPS = 1e-5
"""Margin that the networks keep between coordinates and 0 or 1."""


@dataclass(frozen=True)
class DenoisingSettings:
    """How denoising queries are made."""

    num_queries: int
    """Positive queries per image, about: there are as many negative ones."""
    num_classes: int
    label_noise_ratio: float = 0.5
    """Twice the probability that a query has a random class."""
    box_noise_scale: float = 1.0
    """Largest shift of a corner in halves of the box: up to 1 in positive queries, 1 to 2 in negative."""


class Denoising(NamedTuple):
    """The denoising queries of one micro-batch."""

    labels: Tensor
    """int64 [B, N], with noise; the number of classes where there is no query."""
    boxes_cxcywh: Tensor
    """float32 [B, N, 4], with noise, in fractions of the image."""
    group: Tensor
    """int64 [B, N]: queries see only those of their group; -1 where there is no query."""
    weight: Tensor
    """float32 [B, N]: 1 / number of groups of the image; 0 where there is no query."""
    query: Tensor
    """int64 [D], positions of positive queries in the flattened [B, N]."""
    target: Tensor
    """int64 [D], positions in the targets of the micro-batch."""

    def to(self, device: torch.device) -> "Denoising":
        """Return the same queries on `device`, without waiting for it."""
        pinned = [each.pin_memory() if device.type == "cuda" else each for each in self]
        return Denoising(*(each.to(device, non_blocking=True) for each in pinned))


def denoising_queries(
    settings: DenoisingSettings,
    labels: Tensor,
    boxes_cxcywh: Tensor,
    num_boxes: Sequence[int],
    random_numbers: Sequence[np.random.Generator],
) -> Denoising:
    """Make the queries of a micro-batch on the host, from a generator for each image.

    `labels` [T] and `boxes_cxcywh` [T, 4] are in image order, `num_boxes[b]` of them for image b.
    """
    num_slots = 2 * max(settings.num_queries, *num_boxes)
    shape = (len(num_boxes), num_slots)
    all_labels, boxes = np.full(shape, settings.num_classes), np.zeros((*shape, 4), np.float32)
    group, weight = np.full(shape, -1), np.zeros(shape, np.float32)
    queries, targets, first = [], [], 0
    for image, (count, rng) in enumerate(zip(num_boxes, random_numbers, strict=True)):
        if count:
            num_groups = max(1, settings.num_queries // count)
            used = slice(0, 2 * num_groups * count)
            own = np.tile(np.arange(first, first + count), 2 * num_groups)
            is_positive = np.tile(np.repeat([True, False], count), num_groups)
            all_labels[image, used] = _noisy_labels(labels.numpy()[own], settings, rng)
            boxes[image, used] = _noisy_boxes(boxes_cxcywh.numpy()[own], is_positive, settings, rng)
            group[image, used] = np.repeat(np.arange(num_groups), 2 * count)
            weight[image, used] = 1 / num_groups
            queries.append(image * num_slots + np.flatnonzero(is_positive))
            targets.append(own[is_positive])
        first += count
    positive = [np.concatenate([np.empty(0, np.int64), *each]) for each in (queries, targets)]
    return Denoising(*map(torch.from_numpy, (all_labels, boxes, group, weight, *positive)))


def _noisy_labels(
    labels: NDArray[np.int64], settings: DenoisingSettings, rng: np.random.Generator
) -> NDArray[np.int64]:
    is_replaced = rng.random(len(labels)) < 0.5 * settings.label_noise_ratio
    return np.where(is_replaced, rng.integers(settings.num_classes, size=len(labels)), labels)


def _noisy_boxes(
    boxes_cxcywh: NDArray[np.float32],
    is_positive: NDArray[np.bool_],
    settings: DenoisingSettings,
    rng: np.random.Generator,
) -> NDArray[np.float32]:
    """Shift the corners; where they cross, the box keeps a positive extent."""
    center, size = boxes_cxcywh[:, :2], boxes_cxcywh[:, 2:]
    corners = np.concatenate((center - size / 2, center + size / 2), axis=1)
    extent = rng.random(corners.shape) + ~is_positive[:, None]
    shift = np.where(rng.random(corners.shape) < 0.5, -extent, extent) * settings.box_noise_scale
    corners = np.clip(corners + shift * np.tile(size / 2, 2), 0, 1)
    top_left, bottom_right = corners[:, :2], corners[:, 2:]
    return np.concatenate(((top_left + bottom_right) / 2, abs(bottom_right - top_left)), axis=1)


def take_prepared_queries(network: PreTrainedModel) -> None:
    """Make a network of the library take a `Denoising` in place of labels, and make no queries itself.

    The library calls a function of the network's module, which is wrapped once; other labels are passed on.
    """
    module = sys.modules[type(network).__module__]
    original = getattr(module, _LIBRARYS_NAME)
    if not hasattr(original, "_wrapped"):
        setattr(module, _LIBRARYS_NAME, _prepared_or(original))


_LIBRARYS_NAME = "get_contrastive_denoising_training_group"


def _prepared_or(original: Callable[..., Any]) -> Callable[..., Any]:
    def prepared_or_own(
        targets: Any, num_classes: int, num_queries: int, class_embed: Any, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any, Any, Any]:
        if isinstance(targets, Denoising):
            boxes = targets.boxes_cxcywh.clamp(INVERSE_SIGMOID_EPS, 1 - INVERSE_SIGMOID_EPS)
            mask = _attention_mask(targets.group, num_queries)
            split = {"dn_num_split": [targets.labels.shape[1], num_queries]}
            return class_embed(targets.labels), boxes.logit(), mask, split
        if isinstance(targets, tuple):  # no queries are wanted
            return None, None, None, None
        return original(  # type: ignore[no-any-return]
            targets, num_classes, num_queries, class_embed, *args, **kwargs
        )

    prepared_or_own._wrapped = original  # type: ignore[attr-defined]
    return prepared_or_own


def _attention_mask(group: Tensor, num_queries: int) -> Tensor:
    """Return what is added to attention [B, 1, N + Q, N + Q]: -inf where a query must not see another.

    Denoising queries see their group and the other queries; these see only each other.
    """
    num_images, num_denoising = group.shape
    size = num_denoising + num_queries
    is_hidden = torch.zeros(num_images, size, size, dtype=torch.bool, device=group.device)
    is_hidden[:, num_denoising:, :num_denoising].fill_(True)  # an assignment would copy it from the host
    is_hidden[:, :num_denoising, :num_denoising] = group[:, :, None] != group[:, None, :]
    return torch.zeros(is_hidden.shape, device=group.device).masked_fill_(is_hidden, float("-inf"))[:, None]
