"""RT-DETR learns from what its paper defines, recomputed here slowly, box by box."""

from itertools import permutations
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from detr_dist.models.criterion import Losses, LossSettings, SetCriterion, StepCounts
from detr_dist.models.denoising import Denoising, DenoisingSettings, denoising_queries
from detr_dist.models.families.rt_detr import encoder_and_decoder_rows, look_forward_twice

NUM_LAYERS, NUM_QUERIES, NUM_CLASSES = 3, 5, 4
SETTINGS = LossSettings(
    kind="sigmoid", weights={"vfl": 1.0, "bbox": 5.0, "giou": 2.0}, num_classes=NUM_CLASSES
)


class Objects(NamedTuple):
    """Targets of some images."""

    labels: Tensor
    boxes_cxcywh: Tensor
    num_boxes: list[int]

    @property
    def per_image(self) -> list[list[tuple[int, Tensor]]]:
        """Class and box in float64 of the objects of each image."""
        split = zip(self.labels.split(self.num_boxes), self.boxes_cxcywh.split(self.num_boxes), strict=True)
        return [list(zip(labels.tolist(), boxes.double(), strict=True)) for labels, boxes in split]


class Raw(NamedTuple):
    """What the modules of a network compute, before boxes are refined."""

    logits: Tensor
    """[B, L, N + Q, C]."""
    offsets: Tensor
    """[B, L, N + Q, 4], by which layers move the logits of boxes."""
    start: Tensor
    """[B, N + Q, 4], logits of the boxes that enter the decoder; without gradient."""
    proposal_logits: Tensor
    """[B, Q, C]."""
    proposal_boxes: Tensor
    """[B, Q, 4]."""

    def copy(self, dtype: torch.dtype) -> "Raw":
        """Return the same numbers with gradients of their own."""
        return Raw(*(each.detach().to(dtype).requires_grad_() for each in self))


def objects(num_boxes: list[int]) -> Objects:
    generator = torch.Generator().manual_seed(1)
    total = sum(num_boxes)
    labels = torch.randint(NUM_CLASSES, (total,), generator=generator)
    return Objects(labels, 0.3 + 0.3 * torch.rand(total, 4, generator=generator), num_boxes)


def noisy(targets: Objects, num_queries: int) -> Denoising:
    settings = DenoisingSettings(num_queries=num_queries, num_classes=NUM_CLASSES)
    rngs = [np.random.default_rng(image) for image in range(len(targets.num_boxes))]
    return denoising_queries(settings, *targets, rngs)


def raw_outputs(num_images: int, num_denoising: int) -> Raw:
    generator = torch.Generator().manual_seed(2)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(num_images, *shape, generator=generator)

    total = num_denoising + NUM_QUERIES
    return Raw(
        normal(NUM_LAYERS, total, NUM_CLASSES),
        normal(NUM_LAYERS, total, 4, scale=0.3),
        normal(total, 4, scale=0.5),
        normal(NUM_QUERIES, NUM_CLASSES),
        normal(NUM_QUERIES, 4, scale=0.5).sigmoid(),
    )


def logit(probability: Tensor) -> Tensor:
    return (probability / (1 - probability)).log()


def corners(box: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, y, width, height = box.unbind()
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def overlaps(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return IoU and generalised IoU of two boxes (Rezatofighi et al., 2019)."""
    left, top, right, bottom = corners(a)
    left_b, top_b, right_b, bottom_b = corners(b)
    width = torch.minimum(right, right_b) - torch.maximum(left, left_b)
    height = torch.minimum(bottom, bottom_b) - torch.maximum(top, top_b)
    intersection = width.clamp(min=0) * height.clamp(min=0)
    union = a[2] * a[3] + b[2] * b[3] - intersection
    hull = (torch.maximum(right, right_b) - torch.minimum(left, left_b)) * (
        torch.maximum(bottom, bottom_b) - torch.minimum(top, top_b)
    )
    return intersection / union, intersection / union - (hull - union) / hull


def varifocal(x: Tensor, quality: Tensor | None) -> Tensor:
    """Return the loss of one logit: of an object with this IoU, or of none (Zhang et al., 2021, equation 2).

    As in RT-DETR, alpha is 0.75, gamma 2, and the factor of an absent class is a constant.
    """
    log_p, log_not_p = F.logsigmoid(x), F.logsigmoid(-x)
    if quality is None:
        return -0.75 * x.detach().sigmoid() ** 2 * log_not_p
    return -quality * (quality * log_p + (1 - quality) * log_not_p)


def losses_of(logits: Tensor, boxes: Tensor, matched: dict[int, tuple[int, Tensor]]) -> Tensor:
    """Return the loss of an image's queries in one row, before any division; `matched` are their objects."""
    total = torch.zeros((), dtype=torch.float64)
    for query in range(len(logits)):
        label, target = matched.get(query, (None, None))
        if target is not None:
            iou, giou = overlaps(boxes[query], target)
            total = total + 5 * (boxes[query] - target).abs().sum() + 2 * (1 - giou)
        for column in range(NUM_CLASSES):
            quality = iou.detach() if column == label else None
            total = total + varifocal(logits[query, column], quality)
    return total


def best_match(
    logits: Tensor, boxes: Tensor, wanted: list[tuple[int, Tensor]]
) -> dict[int, tuple[int, Tensor]]:
    """Try every assignment of queries to objects."""
    costs: dict[tuple[int, int], float] = {}
    for query in range(len(logits)):
        for index, (label, target) in enumerate(wanted):
            p = float(logits[query, label].detach().sigmoid())
            present = 0.25 * (1 - p) ** 2 * -np.log(p + 1e-8)
            absent = 0.75 * p**2 * -np.log(1 - p + 1e-8)
            distance = float((boxes[query].detach() - target).abs().sum())
            overlap = float(overlaps(boxes[query].detach(), target)[1])
            costs[query, index] = 2 * (present - absent) + 5 * distance - 2 * overlap
    candidates = permutations(range(len(logits)), len(wanted))
    best = min(candidates, key=lambda queries: sum(costs[q, index] for index, q in enumerate(queries)))
    return {query: wanted[index] for index, query in enumerate(best)}


def published_loss(raw: Raw, targets: Objects, num_denoising_queries: int) -> Tensor:
    """Return the loss of a step of one micro-batch, as published but for padding and groups per image."""
    num_boxes = max(len(targets.labels), 1)
    total = torch.zeros((), dtype=torch.float64)
    first = raw.logits.shape[2] - NUM_QUERIES
    for image, wanted in enumerate(targets.per_image):
        rows = [(raw.proposal_logits[image], raw.proposal_boxes[image])]
        noisy_rows = []
        reference = raw.start[image].detach()
        for layer in range(NUM_LAYERS):
            # A layer's loss reaches the layer before through the boxes that it refines, no further.
            boxes = (raw.offsets[image, layer] + reference).sigmoid()
            logits = raw.logits[image, layer]
            rows.append((logits[first:], boxes[first:]))
            noisy_rows.append((logits[:first], boxes[:first]))
            own = raw.offsets[image, layer] + reference.detach()
            reference = logit(own.sigmoid())
        for logits, boxes in rows:
            total = total + losses_of(logits, boxes, best_match(logits, boxes, wanted)) / num_boxes
        if not wanted:
            continue
        num_groups = max(1, num_denoising_queries // len(wanted))
        for logits, boxes in noisy_rows:
            loss = torch.zeros((), dtype=torch.float64)
            for group in range(num_groups):
                start = group * 2 * len(wanted)
                slots = slice(start, start + 2 * len(wanted))
                loss = loss + losses_of(logits[slots], boxes[slots], dict(enumerate(wanted)))
            total = total + loss / num_groups / num_boxes
    return total


def our_loss(raw: Raw, targets: Objects, denoising: Denoising) -> Losses:
    """Refine boxes as the library does, without gradients between layers, and compute the loss."""
    reference, boxes = raw.start.detach(), []
    for layer in range(NUM_LAYERS):
        refined = (raw.offsets[:, layer] + reference).sigmoid()
        boxes.append(refined)
        reference = logit(refined.detach())
    rows = encoder_and_decoder_rows(
        outputs_class=raw.logits,
        outputs_coord=torch.stack(boxes, 1),
        enc_topk_logits=raw.proposal_logits,
        enc_topk_bboxes=raw.proposal_boxes,
        denoising_meta_values={"dn_num_split": [denoising.labels.shape[1], NUM_QUERIES]},
    )
    counts = StepCounts(len(targets.labels), len(targets.num_boxes))
    return SetCriterion(SETTINGS)(rows, *targets, counts, denoising)


@pytest.mark.parametrize("num_boxes", [[2, 0, 3], [1], [3, 4], [0, 0]])
def test_loss_and_gradients_equal_a_slow_recomputation(num_boxes: list[int]) -> None:
    targets = objects(num_boxes)
    denoising = noisy(targets, 3)
    given = raw_outputs(len(num_boxes), denoising.labels.shape[1])
    ours, theirs = given.copy(torch.float32), given.copy(torch.float64)
    found, expected = our_loss(ours, targets, denoising), published_loss(theirs, targets, 3)
    found.total.backward()
    expected.backward()
    # Sums of up to a thousand terms in float32.
    torch.testing.assert_close(found.total.double(), expected, rtol=1e-5, atol=1e-5)
    for name, one, other in zip(Raw._fields, ours, theirs, strict=True):
        if name != "start":
            wanted = torch.zeros_like(other) if other.grad is None else other.grad
            torch.testing.assert_close(one.grad.double(), wanted, rtol=1e-4, atol=1e-5, msg=name)


def test_boxes_of_a_layer_also_train_the_layer_before_and_no_other() -> None:
    offsets = (0.5 * torch.randn(4, 2, 6, 4, dtype=torch.float64)).requires_grad_()
    start = torch.randn(2, 6, 4, dtype=torch.float64)
    reference, library = start, []
    for layer in offsets:
        library.append((layer + reference).sigmoid())
        reference = logit(library[-1].detach())
    found = look_forward_twice(torch.stack(library))
    torch.testing.assert_close(found, torch.stack(library), rtol=0, atol=1e-12)
    weights = torch.randn(found.shape, dtype=torch.float64)
    for row in range(4):
        (grad,) = torch.autograd.grad((weights[row] * found[row]).sum(), offsets, retain_graph=True)
        through = (weights[row] * found[row] * (1 - found[row])).detach()
        for layer in range(4):
            expected = through if layer in (row - 1, row) else torch.zeros_like(through)
            torch.testing.assert_close(grad[layer], expected, rtol=1e-8, atol=1e-12)
