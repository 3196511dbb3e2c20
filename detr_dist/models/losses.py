"""The terms of the set prediction loss: classes and boxes of all rows and images at once.

Shapes: L rows of predictions (decoder layers, or others of a family), B images, Q queries, C class columns,
M matched pairs per row.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from detr_dist.boxes import cxcywh_to_xyxy, giou, iou
from detr_dist.extensions import register_loss
from detr_dist.models.matcher import CostWeights


@dataclass(frozen=True, kw_only=True)
class LossSettings(CostWeights):
    """Weights and constants of loss and matching of a family of networks."""

    weights: Mapping[str, float]
    """Weight of each term by its registered name; it multiplies a mean over the optimizer step. Other terms
    are not computed."""
    num_classes: int
    """Number of classes without "no object"."""
    eos_coef: float = 0.1
    """Weight of "no object" in the cross entropy, above 0; softmax only."""
    focal_alpha: float = 0.25
    """Weight in the focal loss of the class that is present, in (0, 1); the others have 1 - focal_alpha. In
    the IoU-aware loss the exponent of the probability; the IoU has 1 - focal_alpha."""
    vfl_alpha: float = 0.75
    """Weight in the varifocal loss of the classes that are absent."""
    mal_gamma: float = 1.5
    """Exponent of IoU and probability in the matchability-aware loss."""
    union: bool = False
    """Whether the box terms of every row compare the pairs that are matched in any row."""
    up: float = 0.5
    """Largest shift of an edge that its distribution can describe, about, in sizes of the box."""
    reg_scale: float = 4.0
    """How much wider the outer bins of these distributions are than the inner ones."""


@dataclass(frozen=True)
class StepCounts:
    """The denominators of the losses: sums over all micro-batches and processes of the optimizer step."""

    num_boxes: float
    """Boxes that can be matched: of each image at most as many as there are queries."""
    num_images: float
    class_weight: float | None = None
    """Sum of the weights of these boxes' classes; None without `loss.class_weights`."""
    num_ignored: float = 0.0
    """Queries that are assigned to ignored regions: of each image at most as many as the boxes leave."""

    @property
    def num_boxes_or_one(self) -> float:
        """The denominator of a mean over boxes; 1 if there are none."""
        return max(self.num_boxes, 1.0)

    @property
    def class_weight_or_one(self) -> float:
        """The denominator of a mean over boxes that is weighted by class; 1 if there are none."""
        if self.class_weight is None or self.num_boxes == 0:
            return self.num_boxes_or_one
        return self.class_weight


@dataclass(frozen=True)
class Pairs:
    """M pairs per row of a predicted and a target box, whose distance is a loss."""

    position: Tensor
    """int64 [L, M], of the predictions in the flattened [L, B, Q]."""
    boxes_cxcywh: Tensor
    """[L, M, 4], predicted. Depends on all predictions even if M is 0."""
    target_boxes_cxcywh: Tensor
    """[L, M, 4]."""
    weight: Tensor | None = None
    """[L, M], by which each pair counts in a sum over the pairs; None: 1."""

    def sum(self, losses: Tensor) -> Tensor:
        """Return the sums [L] of losses [L, M], weighted."""
        return (losses if self.weight is None else losses * self.weight).sum(1)

    @cached_property
    def iou(self) -> Tensor:
        """IoU [L, M] of predicted and target boxes, without gradient."""
        with torch.no_grad():
            return iou(cxcywh_to_xyxy(self.boxes_cxcywh), cxcywh_to_xyxy(self.target_boxes_cxcywh))


@dataclass(frozen=True)
class Edges:
    """Where the D last rows predict the edges of their boxes, as distributions relative to reference boxes.

    An edge's bins are N shifts; see `detr_dist.models.distribution`.
    """

    logits: Tensor
    """[D, B, Q, 4 * N]: left, top, right, bottom."""
    reference_boxes_cxcywh: Tensor
    """[B, Q, 4], without gradient."""
    share: Tensor | None = None
    """[B], how much matched queries count in an image's distillation; None: by their number."""


@dataclass(frozen=True)
class Matched:
    """Predictions of one micro-batch, float32, and the targets that they are matched with.

    Pair m of row l matches query `pair[l, m]` with a target of class `labels[l, m]`. There are as many
    pairs as boxes in the micro-batch, at most Q of each image, possibly none.
    """

    logits: Tensor
    """[L, B, Q, C]."""
    pair: Tensor
    """int64 [L, M], positions of the matched predictions in the flattened [L, B, Q]."""
    labels: Tensor
    """int64 [L, M], classes of the targets."""
    boxes_cxcywh: Tensor
    """[L, M, 4], predicted. Depends on all predictions even if M is 0."""
    target_boxes_cxcywh: Tensor
    """[L, M, 4]."""
    counts: StepCounts
    """Boxes and images of the complete optimizer step, over all micro-batches and processes."""
    settings: LossSettings
    query_weight: Tensor | None = None
    """[B, Q] or [L, B, Q], by which each query counts in a sum over all queries; None: 1. It is 0 for queries
    that are assigned to ignored regions (`data.tiles`)."""
    class_weight: Tensor | None = None
    """[L, M], by which the class loss of each matched query counts; None: 1."""
    box_pairs: Pairs | None = None
    """The pairs of the box terms, where they differ from the pairs above; see `boxes`."""
    edges: Edges | None = None
    """Distributions of the boxes' edges, in families that have them."""

    @cached_property
    def boxes(self) -> Pairs:
        """The pairs whose boxes are compared: those of the family, or the pairs above."""
        return self.box_pairs or Pairs(self.pair, self.boxes_cxcywh, self.target_boxes_cxcywh)

    @cached_property
    def iou(self) -> Tensor:
        """IoU [L, M] of predicted and target boxes, without gradient."""
        with torch.no_grad():
            return iou(cxcywh_to_xyxy(self.boxes_cxcywh), cxcywh_to_xyxy(self.target_boxes_cxcywh))

    def per_box(self, losses: Tensor) -> Tensor:
        """Return the sums [L] of class losses [L, B, Q, C] of all queries, divided by the step's boxes.

        With `loss.class_weights`, a matched query and its box count by the weight of their class.
        """
        if self.query_weight is not None:
            losses = losses * self.query_weight[..., None]
        if self.class_weight is not None:
            losses = self.by_class(losses.sum(3))
        return losses.flatten(1).sum(1) / self.counts.class_weight_or_one

    def by_class(self, losses: Tensor) -> Tensor:
        """Return losses [L, B, Q], those of matched queries multiplied by the weight of their class."""
        if self.class_weight is None:
            return losses
        weight = losses.new_ones(losses.numel())
        weight.index_put_((self.pair.flatten(),), self.class_weight.flatten())
        return losses * weight.view_as(losses)


LossTerm = Callable[[Matched], Tensor]
"""A term of the loss, registered by `register_loss(name)`, weighted by `loss.weights.<name>` and logged as
`train_loss_<name>` and `val_loss_<name>` without that weight.

It returns float [L], for each layer its mean over the optimizer step: a sum over the pairs, or over all
queries, of this micro-batch alone, divided by numbers from `matched.counts`, never by a number of its own
micro-batch. Then the training is the same on any number of processes, with or without accumulation. A term
must also be finite. Without pairs it must still depend on the predictions: return an empty sum, not a
constant."""


@register_loss("ce")
def class_loss(matched: Matched) -> Tensor:
    """Return the mean classification loss [L] of all queries over the optimizer step.

    Softmax: cross entropy with "no object" last; the denominator is the sum of the weights of all queries (1
    for matched ones, or their weight in `loss.class_weights`, 0 for those of ignored regions, else eos_coef).
    Sigmoid: focal loss, for every class independently; the denominator is the number of boxes, weighted
    likewise.
    """
    settings, counts = matched.settings, matched.counts
    if settings.kind == "sigmoid":
        return matched.per_box(focal_loss(matched.logits, matched.pair, matched.labels, settings.focal_alpha))
    losses = cross_entropy(matched.logits, matched.pair, matched.labels, settings.eos_coef)
    if matched.query_weight is not None:
        losses = losses * matched.query_weight
    num_queries, eos_coef = matched.logits.shape[2], settings.eos_coef
    denominator = eos_coef * num_queries * counts.num_images + (1 - eos_coef) * counts.num_boxes
    denominator -= eos_coef * counts.num_ignored
    if counts.class_weight is not None:
        denominator += counts.class_weight - counts.num_boxes
    return matched.by_class(losses).flatten(1).sum(1) / denominator


@register_loss("vfl")
def varifocal_loss(matched: Matched) -> Tensor:
    """Return the varifocal loss [L]: the target of a matched query's class is its IoU.

    Source: Zhang et al., "VarifocalNet", CVPR 2021; RT-DETR.
    """
    target, is_present = _iou_targets(matched, exponent=1.0)
    weight = matched.settings.vfl_alpha * matched.logits.detach().sigmoid().square()
    weight = torch.where(is_present, target, weight)
    return matched.per_box(_bce(matched.logits, target, weight))


@register_loss("mal")
def matchability_aware_loss(matched: Matched) -> Tensor:
    """Return the matchability-aware loss [L]: as varifocal loss, but poor matches keep their full weight.

    Source: Huang et al., "DEIM: DETR with Improved Matching for Fast Convergence", CVPR 2025.
    """
    gamma = matched.settings.mal_gamma
    target, is_present = _iou_targets(matched, exponent=gamma)
    weight = torch.where(is_present, 1.0, matched.logits.detach().sigmoid() ** gamma)
    return matched.per_box(_bce(matched.logits, target, weight))


@register_loss("ia_bce")
def iou_aware_bce_loss(matched: Matched) -> Tensor:
    """Return the IoU-aware binary cross entropy [L]: the target mixes IoU and probability.

    Source: Cai et al., "Align-DETR", 2023; LW-DETR. Departure: computed from logits, so that it stays finite.
    """
    logits, alpha = matched.logits, matched.settings.focal_alpha
    flat = logits.flatten()
    present = _columns(matched)
    quality = flat.detach()[present].sigmoid() ** alpha * matched.iou.flatten() ** (1 - alpha)
    quality = quality.clamp(min=0.01)
    positive = torch.zeros_like(flat).index_put((present,), quality)
    negative = (flat.sigmoid().square()).index_put((present,), 1 - quality)
    losses = negative * F.softplus(flat) + positive * F.softplus(-flat)
    return matched.per_box(losses.view_as(logits))


@register_loss("bbox")
def bbox_loss(matched: Matched) -> Tensor:
    """Return the mean L1 distance [L] of the boxes of the optimizer step, in fractions of the image."""
    pairs = matched.boxes
    distance = (pairs.boxes_cxcywh - pairs.target_boxes_cxcywh).abs().sum(2)
    return pairs.sum(distance) / matched.counts.num_boxes_or_one


@register_loss("giou")
def giou_loss(matched: Matched) -> Tensor:
    """Return the mean of 1 - generalised IoU [L] of the boxes of the optimizer step."""
    pairs = matched.boxes
    overlap = giou(cxcywh_to_xyxy(pairs.boxes_cxcywh), cxcywh_to_xyxy(pairs.target_boxes_cxcywh))
    return pairs.sum(1 - overlap) / matched.counts.num_boxes_or_one


def cross_entropy(logits: Tensor, matched: Tensor, matched_labels: Tensor, eos_coef: float) -> Tensor:
    """Return the cross entropy [L, B, Q] of all queries of logits [L, B, Q, C].

    Queries that are not matched should predict "no object", column C - 1. `matched` [L, M] are positions in
    the flattened [L, B, Q], `matched_labels` [L, M] their classes.
    """
    num_columns = logits.shape[-1]
    classes = matched.new_full((logits.shape[:-1].numel(),), num_columns - 1)
    classes[matched.flatten()] = matched_labels.flatten()
    class_weight = logits.new_ones(num_columns)
    class_weight[-1:].fill_(eos_coef)  # an assignment would copy it from the host, which waits
    losses = F.cross_entropy(logits.flatten(0, 2), classes, class_weight, reduction="none")
    return losses.view(logits.shape[:-1])


def focal_loss(logits: Tensor, matched: Tensor, matched_labels: Tensor, alpha: float) -> Tensor:
    """Return the focal loss [L, B, Q, C], gamma 2, of logits of this shape.

    `matched` [L, M] are positions in the flattened [L, B, Q], `matched_labels` [L, M] the classes present
    there.
    """
    present = (matched * logits.shape[-1] + matched_labels).flatten()
    sign, weight = logits.new_ones(logits.shape), logits.new_full(logits.shape, 1 - alpha)
    sign.view(-1).index_fill_(0, present, -1.0)
    weight.view(-1).index_fill_(0, present, alpha)
    # The loss of a present class with logit x is that of an absent class with -x: one formula serves both.
    wrong = logits * sign
    return wrong.sigmoid().square() * F.softplus(wrong) * weight


def _columns(matched: Matched) -> Tensor:
    """Return the positions [L * M] of the classes present, in the flattened [L, B, Q, C]."""
    return (matched.pair * matched.logits.shape[-1] + matched.labels).flatten()


def _iou_targets(matched: Matched, *, exponent: float) -> tuple[Tensor, Tensor]:
    """Return the targets and which classes are present, both [L, B, Q, C]: IoU ** exponent there, else 0."""
    present = _columns(matched)
    target = matched.logits.new_zeros(matched.logits.shape)
    target.view(-1).index_put_((present,), matched.iou.flatten() ** exponent)
    is_present = torch.zeros_like(target, dtype=torch.bool)  # contiguous, as target is
    is_present.view(-1).index_fill_(0, present, True)
    return target, is_present


def _bce(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, target, weight, reduction="none")
