"""Ignored regions: their queries are neither objects nor background, in any term of the loss."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from detr_dist.boxes import IgnoredRegions, cxcywh_to_xyxy, giou, iou
from detr_dist.models.criterion import LossSettings, SetCriterion, StepCounts
from detr_dist.models.denoising import DenoisingSettings, denoising_queries
from detr_dist.models.matcher import Block, ClassKind, match_blocks

NUM_LAYERS, NUM_QUERIES, NUM_CLASSES = 3, 7, 4
NUM_BOXES, NUM_IGNORED = [2, 0, 3, 6, 9], [1, 2, 0, 3, 2]
"""The last two images have more regions than queries are left: one and none."""
NUM_LEFT = [1, 2, 0, 1, 0]

SETTINGS: dict[str, dict[str, Any]] = {
    "softmax": {"kind": "softmax", "weights": {"ce": 1.5, "bbox": 5.0, "giou": 2.0}},
    "focal": {"kind": "sigmoid", "weights": {"ce": 1.5, "bbox": 5.0, "giou": 2.0}},
    "vfl": {"kind": "sigmoid", "weights": {"vfl": 1.0, "bbox": 5.0, "giou": 2.0}},
    "mal": {"kind": "sigmoid", "weights": {"mal": 1.0, "bbox": 5.0, "giou": 2.0}},
    "ia_bce": {"kind": "sigmoid", "weights": {"ia_bce": 1.0, "bbox": 5.0, "giou": 2.0}},
}


def settings_of(name: str, **others: Any) -> LossSettings:
    return LossSettings(num_classes=NUM_CLASSES, **(SETTINGS[name] | others))


def boxes(generator: torch.Generator, *shape: int) -> Tensor:
    return 0.1 + 0.5 * torch.rand(*shape, 4, generator=generator)


class Problem:
    """Predictions in float64 for a slow reference, targets, and ignored regions."""

    def __init__(self, kind: ClassKind, num_boxes: list[int], num_ignored: list[int]) -> None:
        generator = torch.Generator().manual_seed(5)
        shape = (NUM_LAYERS, len(num_boxes), NUM_QUERIES)
        logits = torch.randn(*shape, NUM_CLASSES + (kind == "softmax"), generator=generator)
        self.logits, self.boxes = 2 * logits, boxes(generator, *shape)
        self.labels = torch.randint(NUM_CLASSES, (sum(num_boxes),), generator=generator)
        self.targets, self.num_boxes = boxes(generator, sum(num_boxes)), num_boxes
        ignored = torch.randint(NUM_CLASSES, (sum(num_ignored),), generator=generator)
        self.ignored = IgnoredRegions(ignored, boxes(generator, sum(num_ignored)), num_ignored)

    @property
    def counts(self) -> StepCounts:
        num_matched = [min(NUM_QUERIES, count) for count in self.num_boxes]
        left = [NUM_QUERIES - count for count in num_matched]
        num_ignored = sum(map(min, self.ignored.num_boxes, left))
        return StepCounts(sum(num_matched), len(self.num_boxes), num_ignored=num_ignored)

    def of_image(self, image: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return labels and boxes of an image's targets and of its ignored regions."""
        targets = self.labels.split(self.num_boxes)[image], self.targets.split(self.num_boxes)[image]
        labels, regions, num_ignored = self.ignored
        return *targets, labels.split(num_ignored)[image], regions.split(num_ignored)[image]


def slow_cost(settings: LossSettings, logits: Tensor, box: Tensor, label: Tensor, target: Tensor) -> float:
    if settings.kind == "softmax":
        of_class = -logits.softmax(0)[label]
    else:
        prob = logits[label].sigmoid()
        of_class = -0.25 * (1 - prob) ** 2 * prob.log() + 0.75 * prob**2 * (1 - prob).log()
    overlap = giou(cxcywh_to_xyxy(box), cxcywh_to_xyxy(target))
    costs = settings.cost_class * of_class + settings.cost_bbox * (box - target).abs().sum()
    return float(costs - settings.cost_giou * overlap)


def slow_assignment(
    settings: LossSettings, logits: Tensor, boxes: Tensor, labels: Tensor, targets: Tensor, queries: list[int]
) -> dict[int, int]:
    """Return the target of each query that gets one of the targets of an image."""
    costs = [
        [slow_cost(settings, logits[q], boxes[q], label, box) for q in queries]
        for label, box in zip(labels, targets, strict=True)
    ]
    target, chosen = linear_sum_assignment(np.array(costs).reshape(len(labels), len(queries)))
    return {queries[column]: int(row) for row, column in zip(target, chosen, strict=True)}


def class_loss(settings: LossSettings, logits: Tensor, label: int | None, overlap: Tensor | None) -> Tensor:
    """Return the class loss of one query, by the papers' formulas."""
    if settings.kind == "softmax":
        wanted = NUM_CLASSES if label is None else label
        return -logits.log_softmax(0)[wanted] * (settings.eos_coef if label is None else 1)
    loss = logits.new_zeros(())
    for column, logit in enumerate(logits):
        prob, is_present = logit.sigmoid(), column == label
        quality = overlap if is_present else logits.new_zeros(())
        assert quality is not None
        if "ce" in settings.weights:
            alpha = settings.focal_alpha if is_present else 1 - settings.focal_alpha
            right = prob if is_present else 1 - prob
            loss = loss - alpha * (1 - right) ** 2 * right.log()
            continue
        if "ia_bce" in settings.weights:
            if is_present:
                mixed = prob.detach() ** settings.focal_alpha * quality ** (1 - settings.focal_alpha)
                mixed = mixed.clamp(min=0.01)
                loss = loss - mixed * prob.log() - (1 - mixed) * (1 - prob).log()
            else:
                loss = loss - prob**2 * (1 - prob).log()
            continue
        if "vfl" in settings.weights:
            wanted, weight = quality, quality if is_present else settings.vfl_alpha * prob.detach() ** 2
        else:
            wanted = quality**settings.mal_gamma
            weight = torch.ones(()) if is_present else prob.detach() ** settings.mal_gamma
        loss = loss - weight * (wanted * prob.log() + (1 - wanted) * (1 - prob).log())
    return loss


def slow_loss(settings: LossSettings, given: Problem, logits: Tensor, boxes: Tensor) -> Tensor:
    """Return the loss of a batch, query by query; those of ignored regions are left out."""
    num_images, num_matched, num_left = len(given.num_boxes), 0, 0
    of_classes = of_boxes = of_overlaps = logits.new_zeros(())
    for layer in range(NUM_LAYERS):
        num_matched = num_left = 0
        for image in range(num_images):
            labels, targets, ignored, regions = given.of_image(image)
            mine = logits[layer, image], boxes[layer, image]
            values = [each.detach().float() for each in mine]
            matched = slow_assignment(settings, *values, labels, targets, [*range(NUM_QUERIES)])
            others = [query for query in range(NUM_QUERIES) if query not in matched]
            left = slow_assignment(settings, *values, ignored, regions, others)
            num_matched, num_left = num_matched + len(matched), num_left + len(left)
            for query in set(range(NUM_QUERIES)) - left.keys():
                label, overlap = None, None
                if (index := matched.get(query)) is not None:
                    label, target = int(labels[index]), targets[index].double()
                    corners = cxcywh_to_xyxy(mine[1][query]), cxcywh_to_xyxy(target)
                    overlap = iou(*corners).detach()
                    of_boxes = of_boxes + (mine[1][query] - target).abs().sum()
                    of_overlaps = of_overlaps + 1 - giou(*corners)
                of_classes = of_classes + class_loss(settings, mine[0][query], label, overlap)
    assert num_left == sum(NUM_LEFT)
    denominator: float = num_matched
    if settings.kind == "softmax":
        num_background = num_images * NUM_QUERIES - num_matched - num_left
        denominator = num_matched + settings.eos_coef * num_background
    name = next(iter(settings.weights))
    return (
        settings.weights[name] * of_classes / denominator
        + (settings.weights["bbox"] * of_boxes + settings.weights["giou"] * of_overlaps) / num_matched
    )


@pytest.mark.parametrize("name", SETTINGS)
def test_losses_and_gradients_equal_a_slow_reference(name: str) -> None:
    settings = settings_of(name)
    given = Problem(settings.kind, NUM_BOXES, NUM_IGNORED)
    ours = [each.clone().requires_grad_() for each in (given.logits, given.boxes)]
    outputs = dict(zip(("pred_logits", "pred_boxes"), ours, strict=True))
    targets = given.labels, given.targets, given.num_boxes
    found = SetCriterion(settings)(outputs, *targets, given.counts, ignored=given.ignored).total
    found.backward()
    slow = [each.double().requires_grad_() for each in (given.logits, given.boxes)]
    expected = slow_loss(settings, given, *slow)
    expected.backward()
    # float32 sums of some hundred terms.
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    for one, other in zip(ours, slow, strict=True):
        assert one.grad is not None
        assert other.grad is not None
        largest = other.grad.abs().max().item()
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=0, atol=1e-5 * largest)
        assert torch.equal(one.grad == 0, other.grad == 0)  # exactly the queries of ignored regions
    num_without = (ours[0].grad == 0).all(-1).sum()  # type: ignore[union-attr]
    assert num_without == NUM_LAYERS * sum(NUM_LEFT)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_targets_are_assigned_as_without_ignored_regions(kind: ClassKind) -> None:
    settings = settings_of("softmax" if kind == "softmax" else "focal")
    given = Problem(kind, NUM_BOXES, NUM_IGNORED)
    block = Block(given.logits, given.boxes, given.labels)
    how: dict[str, Any] = {"weights": settings, "with_union": True}
    (alone,) = match_blocks([block], given.targets, given.num_boxes, **how)
    block = block._replace(ignored_labels=given.ignored.labels)
    (found,) = match_blocks([block], given.targets, given.num_boxes, **how, ignored=given.ignored)
    for one, other in zip(alone[:4], found[:4], strict=True):
        assert torch.equal(one, other)
    assert alone.ignored is None
    assert found.ignored is not None
    assert found.ignored.shape == (NUM_LAYERS, sum(NUM_LEFT))
    matched = (found.layer * len(NUM_BOXES) + found.image) * NUM_QUERIES + found.query
    assert not set(matched.flatten().tolist()) & set(found.ignored.flatten().tolist())
    # In each row, the pairs of an image that count do so as much as its pairs in that row alone.
    assert alone.union is not None
    assert found.union is not None
    assert torch.equal(alone.union.place, found.union.place)
    for layer, ignored in enumerate(
        found.ignored - torch.arange(NUM_LAYERS)[:, None] * given.logits[0, ..., 0].numel()
    ):
        weight, is_ignored = found.union.weight[layer], torch.isin(found.union.place, ignored)
        assert torch.equal(weight == 0, is_ignored)
        for image, count in enumerate(given.num_boxes):
            mine = weight[found.union.place // NUM_QUERIES == image]
            assert mine.sum().item() == pytest.approx(min(count, NUM_QUERIES), rel=1e-6)
    assert ((found.union.weight == 0).any(0) & (found.union.weight > 0).any(0)).any()  # in some rows


def predictions_of_d_fine(generator: torch.Generator, num_images: int, num_queries: int) -> dict[str, Tensor]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    found = {
        "proposal_logits": normal(1, num_images, 11, 1),
        "proposal_boxes": boxes(generator, 1, num_images, 11),
    }
    for prefix, edges, queries in (("pred", "", num_queries), ("denoising", "denoising_", 8)):
        found |= {
            f"{prefix}_logits": normal(NUM_LAYERS, num_images, queries, NUM_CLASSES),
            f"{prefix}_boxes": boxes(generator, NUM_LAYERS, num_images, queries),
            f"{edges}edge_logits": normal(NUM_LAYERS - 1, num_images, queries, 4 * 9),
            f"{edges}reference_boxes": boxes(generator, num_images, queries),
        }
    return found


OF_D_FINE = {"bbox": 5.0, "giou": 2.0, "fgl": 0.15, "ddf": 1.5}


@pytest.mark.parametrize("union", [False, True])
@pytest.mark.parametrize("name", ["focal", "vfl", "mal", "ia_bce"])
def test_a_query_of_an_ignored_region_counts_as_if_it_did_not_exist(name: str, union: bool) -> None:
    """One query of each image predicts its ignored region exactly in all rows, the others are elsewhere."""
    classes = {key: value for key, value in SETTINGS[name]["weights"].items() if key not in OF_D_FINE}
    settings = settings_of(name, weights=classes | OF_D_FINE, union=union)
    generator = torch.Generator().manual_seed(2)
    outputs = predictions_of_d_fine(generator, 3, NUM_QUERIES)
    labels, targets, num_boxes = torch.tensor([1, 0, 3]), boxes(generator, 3), [2, 0, 1]
    regions = torch.tensor([[0.9, 0.05, 0.1, 0.06]]).expand(3, 4)
    query, proposal = 4, 6
    outputs["pred_boxes"][:, :, query] = outputs["proposal_boxes"][:, :, proposal] = regions[0]
    outputs["pred_logits"][:, :, query] = -3
    outputs["proposal_logits"][:, :, proposal] = -3
    rngs = [np.random.default_rng(image) for image in range(3)]
    denoising = denoising_queries(DenoisingSettings(4, NUM_CLASSES), labels, targets, num_boxes, rngs)
    counts = StepCounts(3, 3)
    without = {
        key: each
        if key.startswith("denoising")
        else torch.cat((each[..., :at, :], each[..., at + 1 :, :]), dim=-2)
        for key, each in outputs.items()
        for at in [proposal if key.startswith("proposal") else query]
    }
    with_gradients = [
        {key: each.clone().requires_grad_() for key, each in given.items()} for given in (outputs, without)
    ]
    criterion = SetCriterion(settings)
    ignored = IgnoredRegions(torch.tensor([0, 2, 1]), regions, [1, 1, 1])
    found = criterion(with_gradients[0], labels, targets, num_boxes, counts, denoising, ignored)
    expected = criterion(with_gradients[1], labels, targets, num_boxes, counts, denoising)
    assert found.logged.keys() == expected.logged.keys()
    for key, value in expected.logged.items():
        assert found.logged[key].item() == pytest.approx(value.item(), rel=1e-5), key
    for each in (found, expected):
        each.total.backward()
    for key, each in with_gradients[1].items():
        if key.endswith("reference_boxes"):
            continue
        grad = with_gradients[0][key].grad
        assert grad is not None
        assert each.grad is not None
        at = proposal if key.startswith("proposal") else query
        if not key.startswith("denoising"):
            assert (grad[..., at, :] == 0).all(), key
            grad = torch.cat((grad[..., :at, :], grad[..., at + 1 :, :]), dim=-2)
        largest = each.grad.abs().max().item()
        torch.testing.assert_close(grad, each.grad, rtol=0, atol=1e-5 * largest, msg=key)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("class_weights", [None, [1.0, 3.0, 1.0, 0.5]])
def test_losses_of_micro_batches_sum_to_that_of_the_batch(
    name: str, class_weights: list[float] | None
) -> None:
    settings = settings_of(name)
    given = Problem(settings.kind, NUM_BOXES[:4], NUM_IGNORED[:4])
    counts = given.counts
    if class_weights is not None:
        counts = replace(counts, class_weight=float(torch.tensor(class_weights)[given.labels].sum()))
    criterion = SetCriterion(settings, class_weights=class_weights)

    def loss(first: int, last: int) -> Tensor:
        start, stop = (sum(given.num_boxes[:image]) for image in (first, last))
        outputs = {"pred_logits": given.logits[:, first:last], "pred_boxes": given.boxes[:, first:last]}
        targets = given.labels[start:stop], given.targets[start:stop], given.num_boxes[first:last]
        labels, regions, num_ignored = given.ignored
        start, stop = (sum(num_ignored[:image]) for image in (first, last))
        part = IgnoredRegions(labels[start:stop], regions[start:stop], num_ignored[first:last])
        return criterion(outputs, *targets, counts, ignored=part if sum(part.num_boxes) else None).total

    whole = loss(0, 4).item()
    assert loss(0, 2).item() + loss(2, 4).item() == pytest.approx(whole, rel=1e-5)
    assert sum(loss(image, image + 1).item() for image in range(4)) == pytest.approx(whole, rel=1e-5)


def test_without_targets_the_region_still_takes_a_query() -> None:
    given = Problem("sigmoid", [0, 0], [1, 0])
    logits = given.logits.clone().requires_grad_()
    outputs = {"pred_logits": logits, "pred_boxes": given.boxes}
    targets = given.labels, given.targets, given.num_boxes
    SetCriterion(settings_of("focal"))(
        outputs, *targets, given.counts, ignored=given.ignored
    ).total.backward()
    assert logits.grad is not None
    assert (logits.grad == 0).all(-1).sum((1, 2)).tolist() == [1] * NUM_LAYERS
