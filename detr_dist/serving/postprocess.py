"""Conversion of the network's outputs to boxes in pixels of the original image, with scores and labels.

Shapes: L decoder layers, B images, Q queries, C class columns, K detections per image.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .settings import ClassKind

MAX_DETECTIONS = 300
"""Maximum detections per image with sigmoid classes, where one query may count for several classes."""


@dataclass(frozen=True, slots=True)
class RankedDetections:
    """K detections per image by descending score; equal scores keep the order of queries, then classes."""

    boxes_xyxy_px: Tensor
    """float32 [B, K, 4], in pixels of the original image and clipped to it."""
    scores: Tensor
    """float32 [B, K] in [0, 1]."""
    labels: Tensor
    """int64 [B, K], 0 to num_classes - 1."""


@torch.no_grad()
def postprocess(outputs: dict[str, Tensor], original_sizes_hw: Tensor, kind: ClassKind) -> RankedDetections:
    """Return the detections of the last decoder layer, for all images, without waiting for the device.

    `outputs` holds `pred_logits` [L, B, Q, C] and `pred_boxes` [L, B, Q, 4] (cxcywh in [0, 1]);
    `original_sizes_hw` [B, 2] is each image's height and width before any resizing. Softmax: the best class
    that is not "no object" for every query, K = Q. Sigmoid: the best `MAX_DETECTIONS` of all pairs of query
    and class. No threshold is applied.
    """
    logits, boxes = outputs["pred_logits"][-1].float(), outputs["pred_boxes"][-1].float()
    with torch.autocast(logits.device.type, enabled=False):
        scores, query, labels = _rank_softmax(logits) if kind == "softmax" else _rank_sigmoid(logits)
        ranked = cxcywh_to_xyxy(boxes).gather(1, query[..., None].expand(-1, -1, 4))
        size_wh = original_sizes_hw.to(boxes).flip(-1)
        limits = torch.cat((size_wh, size_wh), dim=-1)[:, None]
        return RankedDetections((ranked * limits).clamp(min=0).minimum(limits), scores, labels)


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Convert boxes [..., 4] from centre and size to corners; a negative size counts as 0."""
    center, size = boxes[..., :2], boxes[..., 2:]
    half = 0.5 * size.clamp(min=0)
    return torch.cat((center - half, center + half), dim=-1)


def _rank_softmax(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return scores, queries and labels, each [B, Q], best first."""
    best, labels = logits.softmax(-1)[..., :-1].max(-1)
    scores, query = best.sort(dim=-1, descending=True, stable=True)
    return scores, query, labels.gather(1, query)


def _rank_sigmoid(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return scores, queries and labels, each [B, K], best first; `topk` would break ties arbitrarily."""
    scores, position = logits.sigmoid().flatten(1).sort(dim=-1, descending=True, stable=True)
    scores, position = scores[:, :MAX_DETECTIONS], position[:, :MAX_DETECTIONS]
    return scores, position // logits.shape[-1], position % logits.shape[-1]
