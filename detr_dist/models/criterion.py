"""The set prediction loss of the DETR family: all layers and images at once, normalised by given counts.

Shapes: L decoder layers, B images, Q queries, C class columns, T targets of all images, M matched pairs per
layer.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from detr_dist.boxes import cxcywh_to_xyxy, giou
from detr_dist.models.matcher import ClassKind, CostWeights, match


@dataclass(frozen=True)
class LossSettings:
    """How a family of networks matches and weighs; every weight multiplies a mean over the optimizer step."""

    kind: ClassKind
    """`softmax`: cross entropy, "no object" last. `sigmoid`: focal loss, every class on its own."""
    cost_class: float
    cost_bbox: float
    cost_giou: float
    weight_ce: float
    weight_bbox: float
    weight_giou: float
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


class Losses(NamedTuple):
    """One micro-batch's share: summed over the micro-batches and processes of a step, the published loss."""

    loss: Tensor
    """Weighted sum over all decoder layers, with gradient."""
    loss_ce: Tensor
    """Classification loss of the last layer, unweighted, without gradient; so are the next two."""
    loss_bbox: Tensor
    loss_giou: Tensor
    finite: bool
    """Whether all predictions were finite. If not, neither losses nor gradients mean anything."""


class SetCriterion:
    """Matches predictions with targets and gives the share of the loss that this micro-batch contributes.

    Holds no tensors, runs no collective, and waits for the device once (in the matcher). Maths is in float32
    whatever the autocast. A micro-batch without any box still gives every prediction a gradient (zero for the
    boxes), so that all processes reduce the same parameters.

    Source: Carion et al., "End-to-End Object Detection with Transformers", 2020, section 3.1 and appendix A.2
    (softmax); Zhu et al., "Deformable DETR", 2021, and Lin et al., "Focal Loss for Dense Object Detection",
    2017 (sigmoid). Departure: the denominators are those of the whole optimizer step instead of one
    micro-batch of one process.
    """

    def __init__(self, settings: LossSettings) -> None:
        self.settings = settings
        self._costs = CostWeights(settings.kind, settings.cost_class, settings.cost_bbox, settings.cost_giou)

    def __call__(
        self,
        outputs: dict[str, Tensor],
        labels: Tensor,
        boxes_cxcywh: Tensor,
        num_boxes: list[int],
        counts: StepCounts,
    ) -> Losses:
        """The losses of one micro-batch's predictions against its targets.

        `outputs` holds `pred_logits` [L, B, Q, C] and `pred_boxes` [L, B, Q, 4]. `labels` [T] and
        `boxes_cxcywh` [T, 4] are in image order, `num_boxes[b]` of them for image b. No image may have more
        than Q: the matcher would leave some out while the softmax denominator counts them all.

        Raises ValueError if the shapes disagree with the settings or with each other.
        """
        self._check_shapes(outputs["pred_logits"], labels, num_boxes)
        with torch.autocast(labels.device.type, enabled=False):
            logits, boxes = outputs["pred_logits"].float(), outputs["pred_boxes"].float()
            boxes_cxcywh = boxes_cxcywh.float()
            found = match(logits, boxes, labels, boxes_cxcywh, num_boxes, weights=self._costs)
            num_images, num_queries = logits.shape[1:3]
            matched = (found.layer * num_images + found.image) * num_queries + found.query
            ce = self._class_loss(logits, matched, labels[found.target])
            bbox, giou_loss = box_losses(boxes, boxes_cxcywh, matched, found.target)
            ce = ce / self._ce_denominator(counts, num_queries)
            bbox, giou_loss = bbox / max(counts.num_boxes, 1.0), giou_loss / max(counts.num_boxes, 1.0)
            settings = self.settings
            total = settings.weight_ce * ce + settings.weight_bbox * bbox + settings.weight_giou * giou_loss
        last_ce, last_bbox, last_giou = (layers[-1].detach() for layers in (ce, bbox, giou_loss))
        return Losses(total.sum(), last_ce, last_bbox, last_giou, found.finite)

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

    def _class_loss(self, logits: Tensor, matched: Tensor, matched_labels: Tensor) -> Tensor:
        if self.settings.kind == "softmax":
            return cross_entropy(logits, matched, matched_labels, self.settings.eos_coef)
        return focal_loss(logits, matched, matched_labels, self.settings.focal_alpha)

    def _ce_denominator(self, counts: StepCounts, num_queries: int) -> float:
        if self.settings.kind == "sigmoid":
            return max(counts.num_boxes, 1.0)
        # The summed class weights of all queries: eos_coef each, and 1 where one answers for a box.
        eos_coef = self.settings.eos_coef
        return eos_coef * num_queries * counts.num_images + (1 - eos_coef) * counts.num_boxes


def cross_entropy(logits: Tensor, matched: Tensor, matched_labels: Tensor, eos_coef: float) -> Tensor:
    """Sums [L] of the cross entropy of all queries of logits [L, B, Q, C].

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
    """Sums [L] of the focal loss, gamma 2, of all queries and classes of logits [L, B, Q, C].

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


def box_losses(boxes: Tensor, boxes_cxcywh: Tensor, matched: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Sums [L] of the L1 and of the generalised IoU loss of boxes [L, B, Q, 4] with targets [T, 4].

    `matched` [L, M] are positions in the flattened [L, B, Q], `target` [L, M] in the targets. Without any
    pair both sums are zeros that still depend on `boxes`.
    """
    found = boxes.flatten(0, 2).index_select(0, matched.flatten()).view(*matched.shape, 4)
    wanted = boxes_cxcywh[target]
    distance = (found - wanted).abs().flatten(1).sum(1)
    overlap = giou(cxcywh_to_xyxy(found), cxcywh_to_xyxy(wanted))
    return distance, (1 - overlap).sum(1)
