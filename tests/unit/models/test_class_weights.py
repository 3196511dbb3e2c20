"""Weights of classes in the class loss, compared with a loop over queries."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from detr_dist.errors import UsageError
from detr_dist.models.class_weights import class_weight_of_boxes, class_weights_of
from detr_dist.models.criterion import Losses, LossSettings, SetCriterion, StepCounts
from detr_dist.models.denoising import Denoising, DenoisingSettings, denoising_queries
from detr_dist.models.matcher import Block, match_blocks

NUM_LAYERS, NUM_QUERIES, NUM_CLASSES = 2, 7, 3
NUM_BOXES = [3, 0, 5, 1]
CLASS_WEIGHTS = (0.5, 1.0, 6.0)
CLASS_LOSSES = ["softmax", "ce", "vfl", "mal", "ia_bce"]


def settings_of(class_loss: str) -> LossSettings:
    kind, term = ("softmax", "ce") if class_loss == "softmax" else ("sigmoid", class_loss)
    return LossSettings(kind=kind, weights={term: 2.0, "bbox": 5.0, "giou": 2.0}, num_classes=NUM_CLASSES)


class Problem:
    """Predictions with gradients, their targets, and denoising queries where a family can have them."""

    def __init__(self, class_loss: str, *, with_more_blocks: bool = False) -> None:
        generator = torch.Generator().manual_seed(0)
        self.settings = settings_of(class_loss)
        num_columns = NUM_CLASSES + (class_loss == "softmax")
        self.labels = torch.randint(NUM_CLASSES, (sum(NUM_BOXES),), generator=generator)
        self.boxes = 0.3 + 0.3 * torch.rand(sum(NUM_BOXES), 4, generator=generator)
        self.denoising: Denoising | None = None
        sizes = {"pred": (NUM_LAYERS, NUM_QUERIES)}
        if with_more_blocks:
            denoising = DenoisingSettings(num_queries=6, num_classes=NUM_CLASSES)
            rngs = [np.random.default_rng(image) for image in range(len(NUM_BOXES))]
            self.denoising = denoising_queries(denoising, self.labels, self.boxes, NUM_BOXES, rngs)
            sizes |= {"proposal": (1, 9), "denoising": (NUM_LAYERS, self.denoising.labels.shape[1])}
        self.outputs = {}
        for name, (num_rows, num_queries) in sizes.items():
            shape = num_rows, len(NUM_BOXES), num_queries
            logits = torch.randn(*shape, num_columns, generator=generator)
            self.outputs[f"{name}_logits"] = logits.requires_grad_()
            self.outputs[f"{name}_boxes"] = 0.3 + 0.3 * torch.rand(*shape, 4, generator=generator)

    def loss(self, class_weights: tuple[float, ...] | None) -> Losses:
        counts = StepCounts(sum(NUM_BOXES), len(NUM_BOXES), self.class_weight(class_weights))
        criterion = SetCriterion(self.settings, class_weights=class_weights)
        return criterion(self.outputs, self.labels, self.boxes, NUM_BOXES, counts, self.denoising)

    def class_weight(self, class_weights: tuple[float, ...] | None) -> float | None:
        return None if class_weights is None else sum(class_weights[label] for label in self.labels.tolist())

    def gradients(self, class_weights: tuple[float, ...] | None) -> list[Tensor]:
        """Return the gradient of the class loss with respect to the logits of each block."""
        (term,) = set(self.settings.weights) - {"bbox", "giou"}
        self.settings = replace(self.settings, weights={term: 2.0})
        logits = [each for name, each in self.outputs.items() if name.endswith("logits")]
        return list(torch.autograd.grad(self.loss(class_weights).total, logits))


def slow_class_loss(class_loss: str, problem: Problem, class_weights: tuple[float, ...]) -> Tensor:
    """Return the mean class losses of all layers, from one query and one class at a time."""
    settings, num_images = problem.settings, len(NUM_BOXES)
    logits, boxes = problem.outputs["pred_logits"], problem.outputs["pred_boxes"]
    block = Block(logits.detach(), boxes, problem.labels)
    (found,) = match_blocks([block], problem.boxes, NUM_BOXES, weights=settings, with_union=False)
    losses = []
    for layer in range(NUM_LAYERS):
        pairs = zip(*(each[layer].tolist() for each in (found.image, found.query, found.target)), strict=True)
        target_of = {(image, query): target for image, query, target in pairs}
        loss, denominator = logits.new_zeros(()), 0.0
        for image in range(num_images):
            for query in range(NUM_QUERIES):
                target = target_of.get((image, query))
                row = logits[layer, image, query]
                label = None if target is None else int(problem.labels[target])
                weight = 1.0 if label is None else class_weights[label]
                if class_loss == "softmax":
                    weight = settings.eos_coef if label is None else weight
                    column = NUM_CLASSES if label is None else label
                    loss = loss - weight * row.log_softmax(0)[column]
                    denominator += weight
                    continue
                denominator += 0.0 if label is None else weight
                overlap = 0.0 if target is None else iou_of(boxes[layer, image, query], problem.boxes[target])
                for column in range(NUM_CLASSES):
                    part = one_column(class_loss, settings, row[column], column == label, overlap)
                    loss = loss + weight * part
        losses.append(loss / denominator)
    return torch.stack(losses)


def one_column(
    class_loss: str, settings: LossSettings, logit: Tensor, is_present: bool, overlap: float
) -> Tensor:
    p = logit.sigmoid()
    fixed = float(p.detach())
    if class_loss == "ce":
        alpha = settings.focal_alpha
        return -alpha * (1 - p) ** 2 * p.log() if is_present else -(1 - alpha) * p**2 * (1 - p).log()
    if class_loss == "vfl":
        target, absent = overlap, settings.vfl_alpha * fixed**2
        weight = overlap if is_present else absent
    elif class_loss == "mal":
        target = overlap**settings.mal_gamma
        weight = 1.0 if is_present else fixed**settings.mal_gamma
    else:
        quality = fixed**settings.focal_alpha * overlap ** (1 - settings.focal_alpha)
        target = max(quality, 0.01)
        if not is_present:
            return -(p**2) * (1 - p).log()
        weight = 1.0
    if not is_present:
        target = 0.0
    return -weight * (target * p.log() + (1 - target) * (1 - p).log())


def iou_of(one: Tensor, other: Tensor) -> float:
    sides = []
    for axis in (0, 1):
        low = max(float(each[axis] - each[axis + 2] / 2) for each in (one, other))
        high = min(float(each[axis] + each[axis + 2] / 2) for each in (one, other))
        sides.append(max(high - low, 0.0))
    both = math.prod(sides)
    return both / (float(one[2] * one[3]) + float(other[2] * other[3]) - both)


@pytest.mark.parametrize("class_loss", CLASS_LOSSES)
@pytest.mark.parametrize("class_weights", [CLASS_WEIGHTS, (1.0, 1.0, 1.0)], ids=["weighted", "ones"])
def test_loss_and_gradient_equal_a_loop_over_queries(
    class_loss: str, class_weights: tuple[float, ...]
) -> None:
    problem = Problem(class_loss)
    expected = slow_class_loss(class_loss, problem, class_weights)
    (term,) = set(problem.settings.weights) - {"bbox", "giou"}
    (wanted,) = torch.autograd.grad(2.0 * expected.sum(), problem.outputs["pred_logits"])
    logged = problem.loss(class_weights).logged[f"loss_{term}"]
    # Sums of about a hundred terms in float32.
    torch.testing.assert_close(logged, expected[-1].detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(problem.gradients(class_weights)[0], wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("class_loss", CLASS_LOSSES)
def test_weights_of_one_change_nothing_and_boxes_are_never_weighted(class_loss: str) -> None:
    problem = Problem(class_loss)
    plain, ones, weighted = (problem.loss(each) for each in (None, (1.0, 1.0, 1.0), CLASS_WEIGHTS))
    for term, loss in plain.logged.items():
        # A product with 1 and a sum by query instead of by column, at most.
        torch.testing.assert_close(ones.logged[term], loss, rtol=1e-6, atol=0)
        if term in ("loss_bbox", "loss_giou"):
            assert torch.equal(weighted.logged[term], loss)


@pytest.mark.parametrize("class_loss", CLASS_LOSSES[1:])
def test_proposals_and_denoising_queries_count_by_the_class_of_their_object(class_loss: str) -> None:
    problem = Problem(class_loss, with_more_blocks=True)
    plain, weighted = problem.gradients(None), problem.gradients(CLASS_WEIGHTS)
    class_weight = problem.class_weight(CLASS_WEIGHTS)
    assert class_weight is not None
    for before, after in zip(plain, weighted, strict=True):
        is_used = before.abs().amax(3) > 1e-7
        # Each query's gradient is that without weights, times its weight, over the mean weight of the boxes.
        factors = after.norm(dim=3)[is_used] / before.norm(dim=3)[is_used] * class_weight / sum(NUM_BOXES)
        nearest = (factors[:, None] - torch.tensor(CLASS_WEIGHTS)).abs().min(dim=1).values
        assert nearest.max() < 1e-4  # float32
        assert {round(factor, 3) for factor in factors.tolist()} == set(CLASS_WEIGHTS)


@pytest.mark.parametrize("class_loss", CLASS_LOSSES)
def test_micro_batches_sum_to_the_loss_of_the_batch(class_loss: str) -> None:
    problem = Problem(class_loss)
    complete = problem.loss(CLASS_WEIGHTS)
    counts = StepCounts(sum(NUM_BOXES), len(NUM_BOXES), problem.class_weight(CLASS_WEIGHTS))
    criterion = SetCriterion(problem.settings, class_weights=CLASS_WEIGHTS)
    parts = []
    for first, last in ((0, 1), (1, 2), (2, 4)):
        boxes = slice(sum(NUM_BOXES[:first]), sum(NUM_BOXES[:last]))
        outputs = {name: each[:, first:last] for name, each in problem.outputs.items()}
        own = problem.labels[boxes], problem.boxes[boxes], NUM_BOXES[first:last]
        parts.append(criterion(outputs, *own, counts))
    for term, loss in complete.logged.items():
        found = torch.stack([part.logged[term] for part in parts]).sum()
        torch.testing.assert_close(found, loss, rtol=1e-5, atol=1e-6)  # float32 in another order


def test_a_loss_with_class_weights_needs_their_sum() -> None:
    problem = Problem("ce")
    criterion = SetCriterion(problem.settings, class_weights=CLASS_WEIGHTS)
    with pytest.raises(ValueError, match="counts has no class_weight"):
        criterion(problem.outputs, problem.labels, problem.boxes, NUM_BOXES, StepCounts(9, 4))


def test_weights_follow_the_classes_of_the_data_and_unset_ones_are_1() -> None:
    names = ["player", "ball", "goal keeper"]
    assert class_weights_of({}, names) is None
    assert class_weights_of({"ball": 4.0}, names) == (1.0, 4.0, 1.0)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("Ball", r"did you mean ball\?"),
        ("keeper", r"did you mean goal keeper\?"),
        ("xyz", r"the classes of the data are 'player', 'ball', 'goal keeper'"),
    ],
)
def test_an_unknown_class_is_one_line_with_the_nearest(name: str, hint: str) -> None:
    complaint = rf"^loss\.class_weights: there is no class '{name}'; {hint}$"
    with pytest.raises(UsageError, match=complaint):
        class_weights_of({"ball": 2.0, name: 4.0}, ["player", "ball", "goal keeper"])


def test_the_weight_of_the_boxes_is_a_sum_over_those_that_can_be_matched() -> None:
    labels, num_boxes = [0, 0, 1, 1, 0, 2, 2, 2, 1, 0], [3, 0, 1, 6]
    found = class_weight_of_boxes(labels, num_boxes, num_queries=4, class_weights=(1.0, 3.0, 10.0))
    assert found == pytest.approx((1 + 1 + 3) + 0 + 3 + (1 + 10 + 10 + 10 + 3 + 1) * 4 / 6)
    parts = [
        class_weight_of_boxes(own, counts, num_queries=4, class_weights=(1.0, 3.0, 10.0))
        for own, counts in (([0, 0, 1], [3, 0]), (labels[3:], [1, 6]), ([], [0]))
    ]
    assert sum(parts) == pytest.approx(found)
