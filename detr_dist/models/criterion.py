"""The set prediction loss of the DETR family: all layers and images at once, normalised by given counts.

Shapes: L decoder layers, B images, Q queries, C class columns, T targets of all images, M matched pairs per
layer.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from detr_dist.boxes import cxcywh_to_xyxy, giou
from detr_dist.errors import UsageError
from detr_dist.models.matcher import ClassKind, CostWeights, match


@dataclass(frozen=True)
class LossSettings:
    """How a family of networks matches and weighs."""

    kind: ClassKind
    """`softmax`: cross entropy, "no object" last. `sigmoid`: focal loss, every class on its own."""
    cost_class: float
    cost_bbox: float
    cost_giou: float
    weights: Mapping[str, float]
    """Of each of `LOSS_TERMS`, by its name: multiplies a mean over the optimizer step."""
    eos_coef: float
    """Weight of "no object" in the cross entropy, above 0; softmax only."""
    focal_alpha: float
    """Weight of the class that is present against 1 - focal_alpha for the others, in (0, 1); sigmoid only."""
    num_classes: int
    """Classes without "no object"."""


@dataclass(frozen=True)
class StepCounts:
    """What the losses are divided by: sums over all micro-batches and processes of the optimizer step."""

    num_boxes: float
    num_images: float


@dataclass(frozen=True, slots=True)
class Matched:
    """Predictions of one micro-batch, float32, and the targets that they are matched with."""

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
    settings: LossSettings


class Losses(NamedTuple):
    """One micro-batch's part: summed over the micro-batches and processes of a step, the published loss."""

    total: Tensor
    """Weighted sum over all terms and decoder layers, with gradient."""
    logged: dict[str, Tensor]
    """`loss`, which is `total`, and `loss_<term>` of the last layer, unweighted; all without gradient."""
    finite: bool
    """Whether all predictions were finite. If not, neither losses nor gradients mean anything."""


class SetCriterion:
    """Matches predictions with targets and gives the part of the loss that this micro-batch contributes.

    Holds no tensors, runs no collective, and waits for the device once (in the matcher). Maths is in float32
    whatever the autocast. A micro-batch without any box still gives every prediction a gradient (zero for the
    boxes), so that all processes reduce the same parameters.

    Source: Carion et al., "End-to-End Object Detection with Transformers", 2020, section 3.1 and appendix A.2
    (softmax); Zhu et al., "Deformable DETR", 2021, and Lin et al., "Focal Loss for Dense Object Detection",
    2017 (sigmoid). Departure: the denominators are those of the optimizer step instead of one
    micro-batch of one process.
    """

    def __init__(self, settings: LossSettings, weights: Mapping[str, float] | None = None) -> None:
        """Take `weights` (`loss.weights`) in place of those of the settings.

        Raises:
            UsageError: a weight is of no term.
        """
        for name in weights or {}:
            if name not in LOSS_TERMS:
                raise UsageError(f"loss.weights.{name}: no part of the loss; {', '.join(LOSS_TERMS)} are")
        self.settings = replace(settings, weights={**settings.weights, **(weights or {})})
        self._costs = CostWeights(settings.kind, settings.cost_class, settings.cost_bbox, settings.cost_giou)

    def __call__(
        self,
        outputs: dict[str, Tensor],
        labels: Tensor,
        boxes_cxcywh: Tensor,
        num_boxes: list[int],
        counts: StepCounts,
    ) -> Losses:
        """Return the losses of one micro-batch's predictions against its targets.

        `outputs` holds `pred_logits` [L, B, Q, C] and `pred_boxes` [L, B, Q, 4]. `labels` [T] and
        `boxes_cxcywh` [T, 4] are in image order, `num_boxes[b]` of them for image b. No image may have more
        than Q: the matcher would leave some out while the softmax denominator counts them all.

        Raises:
            ValueError: the shapes disagree with the settings or with each other.
        """
        self._check_shapes(outputs["pred_logits"], labels, num_boxes)
        with torch.autocast(labels.device.type, enabled=False):
            logits, boxes = outputs["pred_logits"].float(), outputs["pred_boxes"].float()
            boxes_cxcywh = boxes_cxcywh.float()
            found = match(logits, boxes, labels, boxes_cxcywh, num_boxes, weights=self._costs)
            num_images, num_queries = logits.shape[1:3]
            pair = (found.layer * num_images + found.image) * num_queries + found.query
            matched = Matched(
                logits=logits,
                pair=pair,
                labels=labels[found.target],
                boxes_cxcywh=boxes.flatten(0, 2).index_select(0, pair.flatten()).view(*pair.shape, 4),
                target_boxes_cxcywh=boxes_cxcywh[found.target],
                counts=counts,
                settings=self.settings,
            )
            layers = {name: term(matched) for name, term in LOSS_TERMS.items()}
            weights = self.settings.weights
            total = reduce(torch.add, [weights[name] * loss for name, loss in layers.items()]).sum()
        logged = {"loss": total.detach()}
        logged |= {f"loss_{name}": loss[-1].detach() for name, loss in layers.items()}
        return Losses(total, logged, found.finite)

    def _check_shapes(self, pred_logits: Tensor, labels: Tensor, num_boxes: list[int]) -> None:
        num_columns = self.settings.num_classes + (self.settings.kind == "softmax")
        _, num_images, _, found_columns = pred_logits.shape
        if found_columns != num_columns:
            raise ValueError(
                f"pred_logits has {found_columns} class columns, the settings need {num_columns}"
            )
        if len(num_boxes) != num_images or sum(num_boxes) != len(labels):
            raise ValueError(
                f"num_boxes {num_boxes} does not fit {num_images} images and {len(labels)} labels"
            )


def class_loss(matched: Matched) -> Tensor:
    """Return the mean classification loss [L] over the optimizer step, of all queries.

    Softmax: over the summed class weights, which are eos_coef for each query and 1 where it is matched.
    Sigmoid: over the boxes.
    """
    settings, counts = matched.settings, matched.counts
    if settings.kind == "sigmoid":
        loss = focal_loss(matched.logits, matched.pair, matched.labels, settings.focal_alpha)
        return loss / max(counts.num_boxes, 1.0)
    loss = cross_entropy(matched.logits, matched.pair, matched.labels, settings.eos_coef)
    num_queries, eos_coef = matched.logits.shape[2], settings.eos_coef
    return loss / (eos_coef * num_queries * counts.num_images + (1 - eos_coef) * counts.num_boxes)


def bbox_loss(matched: Matched) -> Tensor:
    """Return the mean L1 distance [L] of the boxes of the optimizer step, in fractions of the image."""
    distance = (matched.boxes_cxcywh - matched.target_boxes_cxcywh).abs().flatten(1).sum(1)
    return distance / max(matched.counts.num_boxes, 1.0)


def giou_loss(matched: Matched) -> Tensor:
    """Return the mean of 1 - generalised IoU [L] of the boxes of the optimizer step."""
    overlap = giou(cxcywh_to_xyxy(matched.boxes_cxcywh), cxcywh_to_xyxy(matched.target_boxes_cxcywh))
    return (1 - overlap).sum(1) / max(matched.counts.num_boxes, 1.0)


LOSS_TERMS: dict[str, Callable[[Matched], Tensor]] = {
    "ce": class_loss,
    "bbox": bbox_loss,
    "giou": giou_loss,
}
"""What the loss is made of. A term returns its mean over the optimizer step for each decoder layer, [L]; it
is logged as `loss_<name>` and weighted by `loss.weights.<name>`."""


def cross_entropy(logits: Tensor, matched: Tensor, matched_labels: Tensor, eos_coef: float) -> Tensor:
    """Return the sums [L] of the cross entropy of all queries of logits [L, B, Q, C].

    Queries that are not matched are to say "no object", column C - 1. `matched` [L, M] are positions in the
    flattened [L, B, Q], `matched_labels` [L, M] their classes.
    """
    num_layers, num_columns = logits.shape[0], logits.shape[-1]
    classes = matched.new_full((logits.shape[:-1].numel(),), num_columns - 1)
    classes[matched.flatten()] = matched_labels.flatten()
    class_weight = logits.new_ones(num_columns)
    class_weight[-1:].fill_(eos_coef)  # by assignment it would travel from the host, which waits
    losses = F.cross_entropy(logits.flatten(0, 2), classes, class_weight, reduction="none")
    return losses.view(num_layers, -1).sum(1)


def focal_loss(logits: Tensor, matched: Tensor, matched_labels: Tensor, alpha: float) -> Tensor:
    """Return the sums [L] of the focal loss, gamma 2, of all queries and classes of logits [L, B, Q, C].

    `matched` [L, M] are positions in the flattened [L, B, Q], `matched_labels` [L, M] the classes present
    there.
    """
    present = (matched * logits.shape[-1] + matched_labels).flatten()
    sign, weight = logits.new_ones(logits.shape), logits.new_full(logits.shape, 1 - alpha)
    sign.view(-1).index_fill_(0, present, -1.0)
    weight.view(-1).index_fill_(0, present, alpha)
    # A class that is present with logit x is as wrong as an absent one with -x: one formula serves both.
    wrong = logits * sign
    return (wrong.sigmoid().square() * F.softplus(wrong) * weight).flatten(1).sum(1)
