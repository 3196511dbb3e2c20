"""Terms of the loss for boxes whose edges are predicted as distributions, as in D-FINE.

Each edge of a box is the edge of a reference box, shifted by the mean of a distribution over N bins. Bin n
stands for the shift W(n), in units of the reference box's size / reg_scale; bins are narrow around shift 0.

Source: Peng et al., "D-FINE: Redefine Regression Task in DETRs as Fine-grained Distribution Refinement",
ICLR 2025, and its code.

Shapes: L rows, of which the last D have distributions, B images, Q queries, M pairs, N bins.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from detr_dist.boxes import cxcywh_to_xyxy
from detr_dist.extensions import register_loss
from detr_dist.models.losses import Edges, LossSettings, Matched

_TEMPERATURE = 5.0
_SMALLEST_UNIT = 1e-16


@register_loss("fgl")
def fine_grained_localization_loss(matched: Matched) -> Tensor:
    """Return the cross entropy [L] of the bins around each target edge, weighted by the predicted box's IoU.

    It is normalized as the other terms of boxes are.
    """
    if matched.edges is None:
        return matched.logits.new_zeros(len(matched.logits))
    num_rows, pairs = len(matched.edges.logits), matched.boxes
    log_prob = _by_edge(matched.edges).flatten(0, 2)[_own_positions(matched)].log_softmax(-1)
    with torch.no_grad():
        place = pairs.position[-num_rows:] % matched.logits[0, :, :, 0].numel()
        reference = matched.edges.reference_boxes_cxcywh.flatten(0, 1)[place]
        shift = _shift(reference, pairs.target_boxes_cxcywh[-num_rows:], matched.settings.reg_scale)
        bin_shifts = _bin_shifts(log_prob, matched.settings)
        left, right_share = _bins_around(shift, bin_shifts)
        weight = pairs.iou if pairs.weight is None else pairs.iou * pairs.weight
    at_left, at_right = (log_prob.gather(-1, bin[..., None])[..., 0] for bin in (left, left + 1))
    losses = -torch.lerp(at_left, at_right, right_share).sum(-1)
    loss = (losses * weight[-num_rows:]).sum(1) / matched.counts.num_boxes_or_one
    return F.pad(loss, (len(matched.logits) - num_rows, 0))


@register_loss("ddf")
def decoupled_distillation_loss(matched: Matched) -> Tensor:
    """Return the distance [L] of each row's distributions from the last row's, which do not learn by it.

    Matched queries count by their IoU, others by the last row's score; then the means over each kind of an
    image's queries by the root of their number. Departure: these are means over one image, and then over the
    step's images, instead of means over all queries of a micro-batch.
    """
    if matched.edges is None:
        return matched.logits.new_zeros(len(matched.logits))
    log_prob = (_by_edge(matched.edges) / _TEMPERATURE).log_softmax(-1)
    student, teacher = log_prob[:-1], log_prob[-1:].detach()
    distance = _TEMPERATURE**2 * (teacher.exp() * (teacher - student)).sum(-1).mean(-1)
    with torch.no_grad():
        weight = _query_weights(matched)[:-1]
    loss = (distance * weight).flatten(1).sum(1) / max(matched.counts.num_images, 1.0)
    return F.pad(loss, (len(matched.logits) - len(log_prob), 1))


def matched_share(matched: Matched) -> Tensor:
    """Return how much matched queries count in each image's distillation [B], from 0 (none) to 1."""
    num_matched, num_others = _num_queries(matched)
    matched_root, other_root = num_matched[-1].sqrt(), num_others[-1].sqrt()
    return matched_root / (matched_root + other_root).clamp(min=1)


def _query_weights(matched: Matched) -> Tensor:
    """Return the weight [D, B, Q] of each query in the distillation."""
    assert matched.edges is not None
    share = matched_share(matched) if matched.edges.share is None else matched.edges.share
    num_matched, num_others = (number.clamp(min=1) for number in _num_queries(matched))
    is_matched = _is_matched(matched)
    weight = torch.where(is_matched, (share / num_matched)[..., None], ((1 - share) / num_others)[..., None])
    if (does_count := _does_count(matched)) is not None:
        weight = weight * does_count
    score = matched.logits[-1].sigmoid().amax(-1).expand(weight.shape)
    iou = matched.boxes.iou[-len(weight) :]
    return weight * score.flatten().index_put((_own_positions(matched),), iou).view(weight.shape)


def _num_queries(matched: Matched) -> tuple[Tensor, Tensor]:
    """Return the numbers [D, B] of matched and of other queries of each row and image."""
    is_matched = _is_matched(matched)
    num_matched = is_matched.sum(-1)
    if (does_count := _does_count(matched)) is None:
        return num_matched, is_matched.shape[-1] - num_matched
    return num_matched, does_count.sum(-1) - num_matched


def _does_count(matched: Matched) -> Tensor | None:
    """Return whether each query counts at all, bool [B, Q] or [D, B, Q]; None if all do."""
    assert matched.edges is not None
    weight = matched.query_weight
    if weight is None:
        return None
    return (weight if weight.ndim == 2 else weight[-len(matched.edges.logits) :]) > 0


def _is_matched(matched: Matched) -> Tensor:
    """Return bool [D, B, Q]."""
    assert matched.edges is not None
    shape = matched.edges.logits.shape[:3]
    found = torch.zeros(shape.numel(), dtype=torch.bool, device=matched.logits.device)
    found = found.index_fill_(0, _own_positions(matched).flatten(), True).view(shape)
    if matched.query_weight is None or matched.query_weight.ndim == 2:
        return found
    return found & (matched.query_weight[-len(found) :] > 0)  # without queries of ignored regions


def _own_positions(matched: Matched) -> Tensor:
    """Return the positions [D, M] of the pairs' predictions in the flattened [D, B, Q]."""
    assert matched.edges is not None
    num_rows, num_without = len(matched.edges.logits), len(matched.logits) - len(matched.edges.logits)
    return matched.boxes.position[-num_rows:] - num_without * matched.logits[0, :, :, 0].numel()


def _by_edge(edges: Edges) -> Tensor:
    """Return the logits [D, B, Q, 4, N]."""
    return edges.logits.view(*edges.logits.shape[:-1], 4, -1)


def _bin_shifts(logits: Tensor, settings: LossSettings) -> Tensor:
    """Return W [N], ascending, for logits [..., N], on their device."""
    half = logits.shape[-1] // 2
    limit = abs(settings.up * settings.reg_scale)
    growth = (limit + 1) ** (1 / (half - 1))
    step = torch.arange(-half, half + 1, device=logits.device)
    size = torch.where(step.abs() < half, growth ** step.abs() - 1, 2 * limit)
    return size * step.sign()


def _shift(reference_cxcywh: Tensor, target_cxcywh: Tensor, reg_scale: float) -> Tensor:
    """Return by how many units each edge of the targets lies outside of the reference box's, [..., 4]."""
    scale = abs(reg_scale)
    center, size = reference_cxcywh.split(2, -1)
    top_left, bottom_right = cxcywh_to_xyxy(target_cxcywh).split(2, -1)
    unit = size / scale + _SMALLEST_UNIT
    return torch.cat(((center - top_left) / unit, (bottom_right - center) / unit), -1) - 0.5 * scale


def _bins_around(shift: Tensor, bin_shifts: Tensor) -> tuple[Tensor, Tensor]:
    """Return the bin below each shift, and the weight in [0, 1] of the next bin."""
    shift = shift.maximum(bin_shifts[0]).minimum(bin_shifts[-1])
    left = (torch.searchsorted(bin_shifts, shift, right=True) - 1).clamp(0, len(bin_shifts) - 2)
    below, above = bin_shifts[left], bin_shifts[left + 1]
    return left, (shift - below) / (above - below)
