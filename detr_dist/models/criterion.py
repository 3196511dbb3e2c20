"""The set prediction loss of the DETR family: all layers and images at once, normalised by given counts.

Shapes: L decoder layers (or other rows of predictions of a family), B images, Q queries, C class columns,
T targets of all images, M matched pairs per layer.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from detr_dist.boxes import cxcywh_to_xyxy, giou
from detr_dist.errors import DetrDistError, UsageError, as_one_line
from detr_dist.extensions import LOSSES, register_loss
from detr_dist.models.matcher import CostWeights, match


@dataclass(frozen=True, kw_only=True)
class LossSettings(CostWeights):
    """Kind of class loss, and weights of loss and matching, of a family of networks.

    The class loss with softmax is cross entropy with "no object" last; with sigmoid it is focal loss, for
    every class independently.
    """

    weights: Mapping[str, float]
    """Weight of each term by its registered name; it multiplies a mean over the optimizer step. Other terms
    are not computed."""
    num_classes: int
    """Number of classes without "no object"."""
    eos_coef: float = 0.1
    """Weight of "no object" in the cross entropy, above 0; softmax only."""
    focal_alpha: float = 0.25
    """Weight of the class that is present, in (0, 1); the others have 1 - focal_alpha. Sigmoid only."""


@dataclass(frozen=True)
class StepCounts:
    """The denominators of the losses: sums over all micro-batches and processes of the optimizer step."""

    num_boxes: float
    """Boxes that can be matched: of each image at most as many as there are queries."""
    num_images: float

    @property
    def num_boxes_or_one(self) -> float:
        """The denominator of a mean over boxes; 1 if there are none."""
        return max(self.num_boxes, 1.0)


@dataclass(frozen=True, slots=True)
class Matched:
    """Predictions of one micro-batch, float32, and the targets that they are matched with.

    Pair m of layer l matches query `pair[l, m]` with a target of class `labels[l, m]`. There are as many
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


LossTerm = Callable[[Matched], Tensor]
"""A term of the loss, registered by `register_loss(name)`, weighted by `loss.weights.<name>` and logged as
`train_loss_<name>` and `val_loss_<name>` without that weight.

It returns float [L], for each layer its mean over the optimizer step: a sum over the pairs, or over all
queries, of this micro-batch alone, divided by numbers from `matched.counts`, never by a number of its own
micro-batch. Then the training is the same on any number of processes, with or without accumulation. A term
must also be finite. Without pairs it must still depend on the predictions: return an empty sum, not a
constant."""


class Losses(NamedTuple):
    """One micro-batch's part of the loss; the sum over a step's micro-batches and processes is the loss."""

    total: Tensor
    """Weighted sum over all terms and decoder layers, with gradient."""
    logged: dict[str, Tensor]
    """`loss`, which is `total`, and `loss_<term>` of the last layer, unweighted; all without gradient."""
    finite: bool
    """Whether all predictions were finite. If not, losses and gradients are meaningless."""
    broken_terms: tuple[str, ...] = ()
    """If predictions are not finite, the terms that had been NaN or Inf before."""


class SetCriterion:
    """Matches predictions with targets, and computes this micro-batch's part of the loss.

    Runs no collective, and waits for the device once (in the matcher). Computes in float32 whatever the
    autocast. A micro-batch without any box still gives every prediction a gradient (zero for the boxes), so
    that all processes reduce the same parameters.

    Source: Carion et al., "End-to-End Object Detection with Transformers", 2020, section 3.1 and appendix A.2
    (softmax); Zhu et al., "Deformable DETR", 2021, and Lin et al., "Focal Loss for Dense Object Detection",
    2017 (sigmoid). Departure: the denominators are those of the optimizer step instead of one
    micro-batch of one process.
    """

    def __init__(self, settings: LossSettings, weights: Mapping[str, float] | None = None) -> None:
        """Let `weights` (`loss.weights`) override those of the settings; added terms of weight 0 are skipped.

        Raises:
            UsageError: a weight belongs to no term, or two terms would be logged under one name.
        """
        added = {
            name: weight for name, weight in (weights or {}).items() if weight or name in settings.weights
        }
        self.settings = replace(settings, weights={**settings.weights, **added})
        self._terms: dict[str, LossTerm] = {
            name: LOSSES.find(name, f"loss.weights.{name}") for name in self.settings.weights
        }
        terms_by_log_name: dict[str, str] = {}
        for name in self._terms:
            other = terms_by_log_name.setdefault(_short(name), name)
            if other != name:
                raise UsageError(
                    f"loss.weights: {other} and {name} would both be logged as loss_{_short(name)}"
                )
        self._so_far: Tensor | None = None

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
        `boxes_cxcywh` [T, 4] are in image order, `num_boxes[b]` of them for image b. Of an image with more
        than Q the most expensive targets stay unmatched, and `counts` holds only Q of it.

        Raises:
            ValueError: the shapes disagree with the settings or with each other.
        """
        self._check_shapes(outputs["pred_logits"], labels, num_boxes)
        with torch.autocast(labels.device.type, enabled=False):
            logits, boxes = outputs["pred_logits"].float(), outputs["pred_boxes"].float()
            boxes_cxcywh = boxes_cxcywh.float()
            found = match(logits, boxes, labels, boxes_cxcywh, num_boxes, weights=self.settings)
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
            layers = {name: _computed(name, term, matched) for name, term in self._terms.items()}
            weights = self.settings.weights
            total = reduce(torch.add, [weights[name] * loss for name, loss in layers.items()]).sum()
        logged = {"loss": total.detach()}
        logged |= {f"loss_{_short(name)}": loss[-1].detach() for name, loss in layers.items()}
        if not found.finite:
            return Losses(total, logged, finite=False, broken_terms=self.broken_terms())
        terms = torch.stack([*layers.values()]).detach()
        self._so_far = terms if self._so_far is None else self._so_far + terms  # NaN and Inf stay
        return Losses(total, logged, finite=True)

    def broken_terms(self) -> tuple[str, ...]:
        """Return the terms that were NaN or Inf in any micro-batch so far. Waits for the device."""
        if self._so_far is None:
            return ()
        are_finite = self._so_far.isfinite().all(1).tolist()
        return tuple(name for name, is_finite in zip(self._terms, are_finite, strict=True) if not is_finite)

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


def _computed(name: str, term: LossTerm, matched: Matched) -> Tensor:
    """Compute a term, and check that it returns one number for each layer."""
    try:
        loss = term(matched)
    except (DetrDistError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # users' code may raise anything
        raise UsageError(f"loss.weights.{name}: the term failed: {as_one_line(error)}") from error
    num_layers = len(matched.logits)
    found = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
    if found != (num_layers,):
        raise UsageError(
            f"loss.weights.{name}: the term must return a tensor of shape ({num_layers},), one number "
            f"for each decoder layer, and returned {found}"
        )
    return loss.float()


def _short(name: str) -> str:
    """Return the registered name of a term, or the last part of a path to one."""
    return re.split("[.:]", name)[-1]


@register_loss("ce")
def class_loss(matched: Matched) -> Tensor:
    """Return the mean classification loss [L] of all queries over the optimizer step.

    The denominator is, for softmax, the sum of the class weights (1 for matched queries, else eos_coef), and
    for sigmoid the number of boxes.
    """
    settings, counts = matched.settings, matched.counts
    if settings.kind == "sigmoid":
        loss = focal_loss(matched.logits, matched.pair, matched.labels, settings.focal_alpha)
        return loss / counts.num_boxes_or_one
    loss = cross_entropy(matched.logits, matched.pair, matched.labels, settings.eos_coef)
    num_queries, eos_coef = matched.logits.shape[2], settings.eos_coef
    return loss / (eos_coef * num_queries * counts.num_images + (1 - eos_coef) * counts.num_boxes)


@register_loss("bbox")
def bbox_loss(matched: Matched) -> Tensor:
    """Return the mean L1 distance [L] of the boxes of the optimizer step, in fractions of the image."""
    distance = (matched.boxes_cxcywh - matched.target_boxes_cxcywh).abs().flatten(1).sum(1)
    return distance / matched.counts.num_boxes_or_one


@register_loss("giou")
def giou_loss(matched: Matched) -> Tensor:
    """Return the mean of 1 - generalised IoU [L] of the boxes of the optimizer step."""
    overlap = giou(cxcywh_to_xyxy(matched.boxes_cxcywh), cxcywh_to_xyxy(matched.target_boxes_cxcywh))
    return (1 - overlap).sum(1) / matched.counts.num_boxes_or_one


def cross_entropy(logits: Tensor, matched: Tensor, matched_labels: Tensor, eos_coef: float) -> Tensor:
    """Return the sums [L] of the cross entropy of all queries of logits [L, B, Q, C].

    Queries that are not matched should predict "no object", column C - 1. `matched` [L, M] are positions in
    the flattened [L, B, Q], `matched_labels` [L, M] their classes.
    """
    num_layers, num_columns = logits.shape[0], logits.shape[-1]
    classes = matched.new_full((logits.shape[:-1].numel(),), num_columns - 1)
    classes[matched.flatten()] = matched_labels.flatten()
    class_weight = logits.new_ones(num_columns)
    class_weight[-1:].fill_(eos_coef)  # an assignment would copy it from the host, which waits
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
    # The loss of a present class with logit x is that of an absent class with -x: one formula serves both.
    wrong = logits * sign
    return (wrong.sigmoid().square() * F.softplus(wrong) * weight).flatten(1).sum(1)
