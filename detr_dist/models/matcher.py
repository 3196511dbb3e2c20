"""Matching of queries and targets: the best assignment for each decoder layer and image.

Shapes: L decoder layers, B images, Q queries, C class columns, T targets and I ignored regions of all images,
M matched pairs and K queries of ignored regions per layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import isfinite
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from detr_dist.boxes import IgnoredRegions, cxcywh_to_xyxy, giou
from detr_dist.serving.settings import ClassKind as ClassKind

# The published matcher has these constants in its code, whatever the loss uses.
_FOCAL_COST_ALPHA = 0.25
_FOCAL_COST_EPS = 1e-8


@dataclass(frozen=True)
class CostWeights:
    """Weights of class, L1 distance and negative generalised IoU in the cost of a query and a target."""

    kind: ClassKind
    cost_class: float = 2.0
    cost_bbox: float = 5.0
    cost_giou: float = 2.0


class Targets(NamedTuple):
    """Targets of all images in image order: labels [T], boxes [T, 4] and the image of each [T]."""

    labels: Tensor
    boxes_cxcywh: Tensor
    image: Tensor


class UnionPairs(NamedTuple):
    """The pairs of a query and a target that occur in any row, at most one for each query of an image."""

    place: Tensor
    """int64 [M], positions of the queries in the flattened [B, Q], ascending."""
    target: Tensor
    """int64 [M], as in `Matches`."""
    weight: Tensor
    """float32 [M]: with these weights, an image's pairs count as much as its pairs in one row. With ignored
    regions [L, M]: a query that is assigned to one in a row has weight 0 in that row."""


class Matches(NamedTuple):
    """Matched pairs as int64 indices [L, M] on the predictions' device, images in order within each layer.

    In every layer an image with t targets has min(Q, t) pairs, and no query and no target occurs twice in it.
    """

    layer: Tensor
    image: Tensor
    query: Tensor
    target: Tensor
    """Position in the targets of the batch, 0 to T - 1."""
    finite: bool
    """Whether every logit and every box coordinate of the predictions was finite."""
    union: UnionPairs | None
    """The pairs of all layers together, if they were wanted."""
    ignored: Tensor | None = None
    """int64 [L, K], positions in the flattened [L, B, Q] of the queries that are assigned to ignored regions;
    None without such regions."""


class Block(NamedTuple):
    """Predictions with one number of queries, float32, and the labels that they should have."""

    logits: Tensor
    """[L, B, Q, C]."""
    boxes_cxcywh: Tensor
    """[L, B, Q, 4]."""
    labels: Tensor
    """int64 [T], of the targets of all images in image order."""
    ignored_labels: Tensor | None = None
    """int64 [I], the same of ignored regions, if there are any."""


@torch.no_grad()
def match_blocks(
    blocks: Sequence[Block],
    boxes_cxcywh: Tensor,
    num_boxes: list[int],
    *,
    weights: CostWeights,
    with_union: bool = False,
    ignored: IgnoredRegions | None = None,
) -> list[Matches]:
    """Find the assignment of minimum cost between queries and targets, for each block, layer and image.

    `boxes_cxcywh` [T, 4] holds the targets of all images in image order, `num_boxes[b]` of them for image b.
    Costs that are not finite count as the largest float, so such pairs are chosen only if nothing else is
    left. In an image with more targets than queries the most expensive targets stay unmatched. The remaining
    queries are then assigned to the `ignored` regions in the same way.

    Makes one copy from the device (waits for the forward pass) and small ones to it.

    Source: Carion et al., "End-to-End Object Detection with Transformers", 2020, section 3.1; for sigmoid
    classes Zhu et al., "Deformable DETR", 2021, appendix A.4 and its code.
    """
    device = boxes_cxcywh.device
    image = _image_of_each(num_boxes, device)
    costs = [_pair_costs(block, Targets(block.labels, boxes_cxcywh, image), weights) for block in blocks]
    if ignored is not None:
        image = _image_of_each(ignored.num_boxes, device)
        costs += [
            _pair_costs(block, Targets(block.ignored_labels, ignored.boxes_cxcywh, image), weights)
            for block in blocks
            if block.ignored_labels is not None
        ]
    # aminmax propagates NaN: four numbers of each block in the same copy show whether all were finite.
    extremes = [extreme for block in blocks for values in block[:2] for extreme in values.aminmax()]
    flat = torch.cat((torch.stack(extremes), *(cost.flatten() for cost in costs)))
    on_host = _to_host(flat)
    finite = all(isfinite(value) for value in on_host[: len(extremes)])
    ends = [*accumulate((cost.numel() for cost in costs), initial=len(extremes))]
    of_blocks = [
        on_host[start:stop].reshape(cost.shape)
        for cost, (start, stop) in zip(costs, pairwise(ends), strict=True)
    ]
    found: list[Matches] = []
    for index, cost in enumerate(of_blocks[: len(blocks)]):
        pairs = _assign(cost, num_boxes)
        layer, image_of_pair, query, target = _to_device(torch.from_numpy(pairs), device)
        left = None
        if ignored is not None:
            left = _assign_left(of_blocks[len(blocks) + index], pairs, ignored.num_boxes)
        shape = {"num_images": len(num_boxes), "num_queries": cost.shape[2]}
        union = _union(pairs, **shape, device=device, ignored=left) if with_union else None
        of_ignored = None if left is None else _to_device(torch.from_numpy(left), device)
        found.append(Matches(layer, image_of_pair, query, target, finite, union, of_ignored))
    return found


def _image_of_each(num_boxes: list[int], device: torch.device) -> Tensor:
    """Return the image of each box, for boxes in image order."""
    return _to_device(torch.from_numpy(np.repeat(np.arange(len(num_boxes)), num_boxes)), device)


def _to_host(values: Tensor) -> NDArray[np.float32]:
    """Copy to the host: the only place where a micro-batch waits for its device."""
    copy: NDArray[np.float32] = values.cpu().numpy()
    return copy


def _to_device(host: Tensor, device: torch.device) -> Tensor:
    """Copy to the device, from pinned memory, so that the host need not wait for the device."""
    if device.type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True)


def _pair_costs(block: Block, targets: Targets, weights: CostWeights) -> Tensor:
    """Return finite costs [L, T, Q] of every target with the queries of its own image."""
    pred_logits, pred_boxes = block.logits, block.boxes_cxcywh
    # Queries last and coordinates separate, [L, T, 4, Q]: all operations run over contiguous memory.
    boxes = pred_boxes.transpose(2, 3).index_select(1, targets.image)
    distance = (boxes - targets.boxes_cxcywh[:, :, None]).abs_().sum(2)
    corners = cxcywh_to_xyxy(pred_boxes).transpose(2, 3).index_select(1, targets.image)
    overlap = giou(corners.transpose(2, 3), cxcywh_to_xyxy(targets.boxes_cxcywh)[:, None])
    cost = weights.cost_class * _class_costs(pred_logits, targets, weights.kind)
    cost.add_(distance, alpha=weights.cost_bbox).sub_(overlap, alpha=weights.cost_giou)
    largest = torch.finfo(cost.dtype).max
    return cost.nan_to_num_(nan=largest, posinf=largest, neginf=largest)


def _class_costs(pred_logits: Tensor, targets: Targets, kind: ClassKind) -> Tensor:
    """Return class costs [L, T, Q], computed only for the labels that occur."""
    if kind == "softmax":
        return -pred_logits.softmax(-1).transpose(2, 3)[:, targets.image, targets.labels]
    prob = pred_logits.transpose(2, 3)[:, targets.image, targets.labels].sigmoid()
    if_absent = (1 - _FOCAL_COST_ALPHA) * prob.square() * -(1 - prob + _FOCAL_COST_EPS).log()
    if_present = _FOCAL_COST_ALPHA * (1 - prob).square() * -(prob + _FOCAL_COST_EPS).log()
    return if_present - if_absent


def _assign(cost: NDArray[np.float32], num_boxes: list[int]) -> NDArray[np.int64]:
    """Return layer, image, query and target [4, L, M] of the best pairs, from costs [L, T, Q]."""
    num_layers, _, num_queries = cost.shape
    spans = [span for span in pairwise(accumulate(num_boxes, initial=0)) if span[0] < span[1]]
    num_pairs = [min(num_queries, count) for count in num_boxes]
    pairs = np.empty((4, num_layers, sum(num_pairs)), dtype=np.int64)
    pairs[0] = np.arange(num_layers)[:, None]
    pairs[1] = np.repeat(np.arange(len(num_boxes)), num_pairs)
    for layer in range(num_layers):
        filled = 0
        for start, stop in spans:
            target, query = linear_sum_assignment(cost[layer, start:stop])
            into = slice(filled, filled + len(query))
            pairs[2, layer, into] = query
            pairs[3, layer, into] = target + start
            filled += len(query)
    return pairs


def _assign_left(
    cost: NDArray[np.float32], pairs: NDArray[np.int64], num_ignored: list[int]
) -> NDArray[np.int64]:
    """Return the queries [L, K] of the ignored regions, from costs [L, I, Q], without those in `pairs`.

    They are positions in the flattened [L, B, Q].
    """
    num_layers, _, num_queries = cost.shape
    is_left = np.ones((num_layers, len(num_ignored), num_queries), dtype=bool)
    is_left[tuple(pairs[:3])] = False
    spans = enumerate(pairwise(accumulate(num_ignored, initial=0)))
    with_regions = [(image, *span) for image, span in spans if span[0] < span[1]]
    found = [np.zeros(0, dtype=np.int64)]
    for layer in range(num_layers):
        for image, start, stop in with_regions:
            queries = np.flatnonzero(is_left[layer, image])
            _, chosen = linear_sum_assignment(cost[layer, start:stop][:, queries])
            found.append((layer * len(num_ignored) + image) * num_queries + queries[chosen])
    return np.concatenate(found).reshape(num_layers, -1)


def num_ignored_queries(num_boxes: ArrayLike, num_ignored: ArrayLike, *, num_queries: int) -> int:
    """Return how many queries the ignored regions of some images get in each row: those that are left."""
    num_left = (num_queries - np.asarray(num_boxes)).clip(min=0)
    return int(np.minimum(num_ignored, num_left).sum())


def _union(
    pairs: NDArray[np.int64],
    *,
    num_images: int,
    num_queries: int,
    device: torch.device,
    ignored: NDArray[np.int64] | None = None,
) -> UnionPairs:
    """Return the pairs of all layers of `pairs` [4, L, M]: each query with its most frequent target.

    Of equally frequent targets a query has the first. `ignored` [L, K] are positions of queries that count
    nothing in their layer.

    Source: Peng et al., "D-FINE", ICLR 2025 (GO-LSD), and its code. Departures: ties are defined, and means
    over pairs are those of one image instead of the batch, because their number depends on predictions.
    """
    _, image, query, target = pairs.reshape(4, -1)
    num_targets = target.max(initial=0) + 1
    codes, count = np.unique((image * num_queries + query) * num_targets + target, return_counts=True)
    place, target = np.divmod(codes, num_targets)
    order = np.lexsort((target, -count, place))
    _, first = np.unique(place[order], return_index=True)
    place, target = place[order[first]], target[order[first]]
    image = place // num_queries
    num_in_row, num_in_union = (np.bincount(each, minlength=num_images) for each in (pairs[1, 0], image))
    if ignored is None:
        weight = (num_in_row / num_in_union.clip(1)).astype(np.float32)[image]
    else:
        counts = np.ones((pairs.shape[1], num_images * num_queries), dtype=np.float32)
        counts.flat[ignored.ravel()] = 0
        counts = counts[:, place]
        num_counting = np.stack([np.bincount(image, each, minlength=num_images) for each in counts])
        weight = counts * (num_in_row / num_counting.clip(1)).astype(np.float32)[:, image]
    return UnionPairs(*(_to_device(torch.from_numpy(each), device) for each in (place, target, weight)))
