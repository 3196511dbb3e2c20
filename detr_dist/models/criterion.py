"""The set prediction loss of the DETR family: all layers and images at once, normalised by given counts.

Shapes: L decoder layers (or other rows of predictions of a family), B images, Q queries, C class columns,
T targets of all images, M matched pairs per layer.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from detr_dist.boxes import IgnoredRegions
from detr_dist.errors import DetrDistError, UsageError, as_one_line
from detr_dist.extensions import LOSSES
from detr_dist.models.denoising import Denoising
from detr_dist.models.distribution import matched_share
from detr_dist.models.losses import Edges, LossSettings, LossTerm, Matched, Pairs, StepCounts
from detr_dist.models.matcher import Block, Matches, match_blocks

__all__ = ["LossSettings", "LossTerm", "Losses", "Matched", "SetCriterion", "StepCounts"]

_OF_EDGES = frozenset({"fgl", "ddf"})
_OF_EVERY_BLOCK = frozenset({"ce", "vfl", "mal", "ia_bce", "bbox", "giou"}) | _OF_EDGES
"""Terms that are computed for proposals and denoising queries as well; terms of users are not."""
_LOGGED_AS_SUM = frozenset({"ddf"})
"""Terms that are logged as their sum over all rows: the last row has none."""


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

    def __init__(
        self,
        settings: LossSettings,
        weights: Mapping[str, float] | None = None,
        class_weights: Sequence[float] | None = None,
    ) -> None:
        """Let `weights` (`loss.weights`) override those of the settings; added terms of weight 0 are skipped.

        With `class_weights`, one for each class, the class loss of a query that is matched with an object
        counts by the weight of its class, and `StepCounts.class_weight` must be their sum over the boxes.

        Raises:
            UsageError: a weight belongs to no term or to one of other families, or two terms would be logged
                under one name.
        """
        added = {
            name: weight for name, weight in (weights or {}).items() if weight or name in settings.weights
        }
        for name in _OF_EDGES.intersection(added) - set(settings.weights):
            raise UsageError(
                f"loss.weights.{name}: only families that predict edges as distributions, such as d_fine, "
                "have this term; leave it out"
            )
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
        self.class_weights = None if class_weights is None else tuple(class_weights)
        self._class_weights = None if class_weights is None else torch.tensor(class_weights)
        self._so_far: Tensor | None = None

    def __call__(
        self,
        outputs: dict[str, Tensor],
        labels: Tensor,
        boxes_cxcywh: Tensor,
        num_boxes: list[int],
        counts: StepCounts,
        denoising: Denoising | None = None,
        ignored: IgnoredRegions | None = None,
    ) -> Losses:
        """Return the losses of one micro-batch's predictions against its targets.

        `outputs` holds `pred_logits` [L, B, Q, C] and `pred_boxes` [L, B, Q, 4], and what else the family
        has: `row_weights` [L]; `proposal_logits` [1, B, S, C] and `proposal_boxes`, in which every object is
        of class 0; `denoising_logits` [L', B, N, C] and `denoising_boxes`, the answers to `denoising`;
        `edge_logits` [D, B, Q, 4 * bins] and `reference_boxes` [B, Q, 4] of the last D rows, and the same of
        denoising queries as `denoising_edge_logits` and `denoising_reference_boxes`.
        `labels` [T] and `boxes_cxcywh` [T, 4] are in image order, `num_boxes[b]` of them for image b. Of an
        image with more than Q the most expensive targets stay unmatched, and `counts` holds only Q of it.
        In each row, each of the `ignored` regions has one of the queries that are left, by the same costs:
        these queries count nothing in any term, and have no gradient.

        Raises:
            ValueError: the shapes disagree with the settings or with each other.
        """
        self._check_shapes(outputs["pred_logits"], labels, num_boxes)
        if self.class_weights is not None and counts.class_weight is None:
            raise ValueError("counts has no class_weight, which a loss with class weights is divided by")
        weights, terms = self.settings.weights, self._terms
        with torch.autocast(labels.device.type, enabled=False):
            boxes_cxcywh = boxes_cxcywh.float()
            finite, (main, *further) = self._match(
                outputs, labels, boxes_cxcywh, num_boxes, counts, ignored=ignored
            )
            if denoising is not None and "denoising_logits" in outputs:
                further.append(self._denoised(outputs, labels, boxes_cxcywh, denoising, main))
            rows = {name: _computed(name, term, main) for name, term in terms.items()}
            row_weights = outputs.get("row_weights", 1.0)
            parts = [weights[name] * (loss * row_weights).sum() for name, loss in rows.items()]
            checked = {name: loss.detach() for name, loss in rows.items()}
            for matched in further:
                for name in filter(_OF_EVERY_BLOCK.__contains__, terms):
                    loss = terms[name](matched).sum()
                    parts.append(weights[name] * loss)
                    checked[name] = checked[name] + loss.detach()
            total = reduce(torch.add, parts)
        logged = {"loss": total.detach()}
        for name, loss in rows.items():
            logged[f"loss_{_short(name)}"] = (loss.sum() if name in _LOGGED_AS_SUM else loss[-1]).detach()
        if not finite:
            return Losses(total, logged, finite=False, broken_terms=self.broken_terms())
        stacked = torch.stack([*checked.values()])
        self._so_far = stacked if self._so_far is None else self._so_far + stacked  # NaN and Inf stay
        return Losses(total, logged, finite=True)

    def _match(
        self,
        outputs: dict[str, Tensor],
        labels: Tensor,
        boxes_cxcywh: Tensor,
        num_boxes: list[int],
        counts: StepCounts,
        *,
        ignored: IgnoredRegions | None,
    ) -> tuple[bool, list[Matched]]:
        """Return whether all predictions are finite, and the matched rows first, then proposals if any."""
        every_label = (labels,) if ignored is None else (labels, ignored.labels)
        blocks = [Block(outputs["pred_logits"].float(), outputs["pred_boxes"].float(), *every_label)]
        if "proposal_logits" in outputs:
            proposals = outputs["proposal_logits"].float(), outputs["proposal_boxes"].float()
            blocks.append(Block(*proposals, *map(torch.zeros_like, every_label)))
        weights, class_weight = self.settings, self._class_weight(labels)
        found = match_blocks(
            blocks, boxes_cxcywh, num_boxes, weights=weights, with_union=weights.union, ignored=ignored
        )
        main, *further = (
            self._matched(block, each, boxes_cxcywh, counts, class_weight)
            for block, each in zip(blocks, found, strict=True)
        )
        if "edge_logits" in outputs:
            main = replace(main, edges=_edges(outputs, ""))
        return found[0].finite, [main, *further]

    def _class_weight(self, labels: Tensor) -> Tensor | None:
        """Return the weight of each target's class, of the same shape; None without class weights."""
        if self._class_weights is None:
            return None
        self._class_weights = self._class_weights.to(labels.device)  # copied once
        return self._class_weights[labels]

    def _matched(
        self,
        block: Block,
        found: Matches,
        boxes_cxcywh: Tensor,
        counts: StepCounts,
        class_weight: Tensor | None,
    ) -> Matched:
        num_rows, num_images, num_queries = block.logits.shape[:3]
        pair = (found.layer * num_images + found.image) * num_queries + found.query
        pooled: Pairs | None = None
        if found.union is not None:
            first = torch.arange(num_rows, device=pair.device)[:, None] * (num_images * num_queries)
            position, target = first + found.union.place, boxes_cxcywh[found.union.target]
            pooled = Pairs(
                position,
                _gathered(block.boxes_cxcywh, position),
                target.expand(num_rows, -1, -1),
                found.union.weight.expand(num_rows, -1),
            )
        return Matched(
            logits=block.logits,
            pair=pair,
            labels=block.labels[found.target],
            boxes_cxcywh=_gathered(block.boxes_cxcywh, pair),
            target_boxes_cxcywh=boxes_cxcywh[found.target],
            counts=counts,
            settings=self.settings,
            query_weight=None if found.ignored is None else _zero_at(found.ignored, block.logits),
            class_weight=None if class_weight is None else class_weight[found.target],
            box_pairs=pooled,
        )

    def _denoised(
        self,
        outputs: dict[str, Tensor],
        labels: Tensor,
        boxes_cxcywh: Tensor,
        denoising: Denoising,
        main: Matched,
    ) -> Matched:
        """Pair the answers to denoising queries with the objects that these queries were made of."""
        logits, boxes = outputs["denoising_logits"].float(), outputs["denoising_boxes"].float()
        num_rows = len(logits)
        first = torch.arange(num_rows, device=logits.device)[:, None] * denoising.weight.numel()
        pair = first + denoising.query
        predicted, target = _gathered(boxes, pair), boxes_cxcywh[denoising.target].expand(num_rows, -1, -1)
        weight = denoising.weight.flatten()[denoising.query].expand(num_rows, -1)
        target_labels = labels[denoising.target].expand(num_rows, -1)
        return Matched(
            logits=logits,
            pair=pair,
            labels=target_labels,
            boxes_cxcywh=predicted,
            target_boxes_cxcywh=target,
            counts=main.counts,
            settings=self.settings,
            query_weight=denoising.weight,
            class_weight=self._class_weight(target_labels),
            box_pairs=Pairs(pair, predicted, target, weight),
            edges=None if main.edges is None else _edges(outputs, "denoising_", matched_share(main)),
        )

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


def _edges(outputs: Mapping[str, Tensor], prefix: str, share: Tensor | None = None) -> Edges:
    """Return the distributions of the main or, with their prefix, the denoising queries."""
    logits, boxes = outputs[f"{prefix}edge_logits"], outputs[f"{prefix}reference_boxes"]
    return Edges(logits.float(), boxes.float().detach(), share)


def _zero_at(positions: Tensor, logits: Tensor) -> Tensor:
    """Return the weights [L, B, Q] of all queries of logits [L, B, Q, C]: 0 at these positions, else 1."""
    weights = logits.new_ones(logits.shape[:3])
    weights.view(-1).index_fill_(0, positions.flatten(), 0.0)
    return weights


def _gathered(boxes: Tensor, position: Tensor) -> Tensor:
    """Return the boxes [L, M, 4] at positions [L, M] of the flattened boxes [L, B, Q, 4]."""
    return boxes.flatten(0, 2).index_select(0, position.flatten()).view(*position.shape, 4)


def _short(name: str) -> str:
    """Return the registered name of a term, or the last part of a path to one."""
    return re.split("[.:]", name)[-1]
