"""The loss of D-FINE against the definitions of the paper, computed pair by pair."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from detr_dist.models.criterion import LossSettings, SetCriterion, StepCounts
from detr_dist.models.denoising import Denoising, DenoisingSettings, denoising_queries

SETTINGS = LossSettings(
    kind="sigmoid",
    weights={"vfl": 1.0, "bbox": 5.0, "giou": 2.0, "fgl": 0.15, "ddf": 1.5},
    num_classes=3,
    union=True,
    up=0.6,
    reg_scale=3.0,
)
NUM_QUERIES, NUM_BINS, NUM_LAYERS = 10, 33, 3
DENOISING = DenoisingSettings(num_queries=8, num_classes=3)
NOT_BOXES = ("pred_logits", "edge_logits", "denoising_logits", "denoising_edge_logits")


class Sample:
    """Random predictions of D-FINE with gradients, their targets and denoising queries."""

    def __init__(self, num_boxes: list[int]) -> None:
        generator = torch.Generator().manual_seed(3)
        num_images, num_denoising = len(num_boxes), 2 * DENOISING.num_queries

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        def boxes(*shape: int) -> Tensor:
            return 0.15 + 0.35 * torch.rand(*shape, 4, generator=generator)

        self.outputs = {}
        for prefix, rows, queries in (
            ("pred", NUM_LAYERS + 2, NUM_QUERIES),
            ("denoising", NUM_LAYERS + 1, num_denoising),
        ):
            edges = "" if prefix == "pred" else "denoising_"
            self.outputs |= {
                f"{prefix}_logits": normal(rows, num_images, queries, 3),
                f"{prefix}_boxes": boxes(rows, num_images, queries),
                f"{edges}edge_logits": normal(NUM_LAYERS, num_images, queries, 4 * NUM_BINS),
                f"{edges}reference_boxes": boxes(num_images, queries),
            }
        self.labels = torch.randint(3, (sum(num_boxes),), generator=generator)
        self.boxes = boxes(sum(num_boxes))
        self.num_boxes = num_boxes

    def denoising(self, first: int, last: int) -> Denoising:
        start, stop = sum(self.num_boxes[:first]), sum(self.num_boxes[:last])
        noise = [np.random.default_rng(image) for image in range(first, last)]
        found = self.labels[start:stop], self.boxes[start:stop]
        return denoising_queries(DENOISING, *found, self.num_boxes[first:last], noise)

    def loss(self, first: int, last: int, settings: LossSettings) -> Tensor:
        """Return the part of images `first` to `last` - 1 of the loss of all."""
        start, stop = sum(self.num_boxes[:first]), sum(self.num_boxes[:last])
        outputs = {
            name: each[first:last] if name.endswith("reference_boxes") else each[:, first:last]
            for name, each in self.outputs.items()
        }
        counts = StepCounts(sum(self.num_boxes), len(self.num_boxes))
        targets = self.labels[start:stop], self.boxes[start:stop], self.num_boxes[first:last]
        return SetCriterion(settings)(outputs, *targets, counts, self.denoising(first, last)).total

    def with_gradients(self) -> None:
        for name, each in self.outputs.items():
            self.outputs[name] = each.detach().clone().requires_grad_(not name.endswith("reference_boxes"))

    def gradients(self) -> dict[str, Tensor]:
        return {name: each.grad for name, each in self.outputs.items() if each.requires_grad}


def corners(box: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, y, width, height = box
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def overlap_of(box: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Return IoU and generalized IoU."""
    (left, top, right, bottom), (left2, top2, right2, bottom2) = corners(box), corners(other)
    width = (torch.minimum(right, right2) - torch.maximum(left, left2)).clamp(min=0)
    height = (torch.minimum(bottom, bottom2) - torch.maximum(top, top2)).clamp(min=0)
    union = box[2] * box[3] + other[2] * other[3] - width * height
    hull_width = torch.maximum(right, right2) - torch.minimum(left, left2)
    hull = hull_width * (torch.maximum(bottom, bottom2) - torch.minimum(top, top2))
    return width * height / union, width * height / union - (hull - union) / hull


def bins(up: float, scale: float) -> list[float]:
    """Return W(n) of the paper's equation 3 with the constants of its section 4.1."""
    limit, last = up * scale, NUM_BINS - 1
    values = []
    for n in range(NUM_BINS):
        size = (limit + 1) ** (abs(n - last / 2) * 2 / (last - 2)) - 1
        values.append(math.copysign(2 * limit if n in (0, last) else size, n - last / 2))
    return values


def fgl_of(logits: Tensor, reference: Tensor, box: Tensor, target: Tensor) -> Tensor:
    left, top, right, bottom = (float(each) for each in corners(target))
    x, y, width, height = (float(each) for each in reference)
    scale, shifts = SETTINGS.reg_scale, bins(SETTINGS.up, SETTINGS.reg_scale)
    outside = [
        (x - left) / width * scale - scale / 2,
        (y - top) / height * scale - scale / 2,
        (right - x) / width * scale - scale / 2,
        (bottom - y) / height * scale - scale / 2,
    ]
    loss = logits.new_zeros(())
    for edge, shift in enumerate(outside):
        log_prob = logits[edge * NUM_BINS : (edge + 1) * NUM_BINS].log_softmax(0)
        if shift <= shifts[0]:
            loss = loss - log_prob[0]
        elif shift >= shifts[-1]:
            loss = loss - log_prob[-1]
        else:
            n = max(i for i in range(NUM_BINS - 1) if shifts[i] <= shift)
            right_share = (shift - shifts[n]) / (shifts[n + 1] - shifts[n])
            loss = loss - (1 - right_share) * log_prob[n] - right_share * log_prob[n + 1]
    return overlap_of(box, target)[0].detach() * loss


def ddf_of(student: Tensor, teacher: Tensor, weights: list[float], matched: set[int], roots) -> Tensor:
    """Return the distance of the distributions of one image's queries."""
    losses: dict[bool, list[Tensor]] = {True: [], False: []}
    for query, weight in enumerate(weights):
        for edge in range(4):
            part = slice(edge * NUM_BINS, (edge + 1) * NUM_BINS)
            wanted = (teacher[query, part].detach() / 5).softmax(0)
            found = (student[query, part] / 5).softmax(0)
            losses[query in matched].append(weight * 25 * (wanted * (wanted / found).log()).sum())
    total = sum(root * torch.stack(losses[kind]).mean() for kind, root in roots.items() if losses[kind])
    return total / sum(roots.values())


def vfl_of(logits: Tensor, boxes: Tensor, labels: Tensor, targets: Tensor, pairs) -> Tensor:
    loss = logits.new_zeros(())
    of_query = dict(pairs)
    for query, row in enumerate(logits):
        for column, logit in enumerate(row):
            prob, target = logit.sigmoid(), torch.zeros(())
            weight = 0.75 * prob.detach() ** 2
            if query in of_query and labels[of_query[query]] == column:
                target = weight = overlap_of(boxes[query], targets[of_query[query]])[0].detach()
            loss = loss - weight * (target * prob.log() + (1 - target) * (1 - prob).log())
    return loss


def mal_of(logits: Tensor, boxes: Tensor, labels: Tensor, targets: Tensor, pairs) -> Tensor:
    loss = logits.new_zeros(())
    of_query = dict(pairs)
    for query, row in enumerate(logits):
        for column, logit in enumerate(row):
            prob, target = logit.sigmoid(), torch.zeros(())
            weight = prob.detach() ** 1.5
            if query in of_query and labels[of_query[query]] == column:
                target = overlap_of(boxes[query], targets[of_query[query]])[0].detach() ** 1.5
                weight = torch.ones(())
            loss = loss - weight * (target * prob.log() + (1 - target) * (1 - prob).log())
    return loss


def assigned(logits: Tensor, boxes: Tensor, labels: Tensor, targets: Tensor) -> list[tuple[int, int]]:
    cost = np.zeros((len(logits), len(targets)))
    for query in range(len(logits)):
        for target in range(len(targets)):
            prob = logits[query, labels[target]].sigmoid()
            present, absent = -0.25 * (1 - prob) ** 2 * prob.log(), -0.75 * prob**2 * (1 - prob).log()
            distance = (boxes[query] - targets[target]).abs().sum()
            giou = overlap_of(boxes[query], targets[target])[1]
            cost[query, target] = 2 * (present - absent) + 5 * distance - 2 * giou
    return list(zip(*(each.tolist() for each in linear_sum_assignment(cost)), strict=True))


def union_of(matches: list[list[tuple[int, int]]]) -> list[tuple[int, int]]:
    counted = Counter(pair for row in matches for pair in row)
    union = []
    for query in sorted({query for query, _ in counted}):
        most = max(count for pair, count in counted.items() if pair[0] == query)
        union.append((query, min(t for (q, t), count in counted.items() if (q, count) == (query, most))))
    return union


def published_loss(sample: Sample, class_term: str) -> Tensor:
    """Return the loss of one image, with the published normalization."""
    class_loss = {"vfl": vfl_of, "mal": mal_of}[class_term]
    labels, targets = sample.labels, sample.boxes
    of = {name: each[0] if each.ndim == 3 else each[:, 0] for name, each in sample.outputs.items()}
    with torch.no_grad():
        rows = zip(of["pred_logits"], of["pred_boxes"], strict=True)
        matches = [assigned(logits, boxes, labels, targets) for logits, boxes in rows]
    union = union_of(matches)
    roots = {True: math.sqrt(len(union)), False: math.sqrt(NUM_QUERIES - len(union))}
    denoising = sample.denoising(0, 1)
    known = list(zip(denoising.query.tolist(), denoising.target.tolist(), strict=True))

    def losses(main: str, edges: str, class_pairs, pairs, num_class: int, num: int) -> Iterator[Tensor]:
        logits, boxes = of[f"{main}_logits"], of[f"{main}_boxes"]
        edge_logits, reference = of[f"{edges}edge_logits"], of[f"{edges}reference_boxes"]
        scores = [float(each.sigmoid().max()) for each in logits[-1].detach()]
        for row in range(len(logits)):
            yield class_loss(logits[row], boxes[row], labels, targets, class_pairs[row]) / num_class
            weights = list(scores)
            for query, target in pairs:
                box = boxes[row, query]
                iou, giou = overlap_of(box, targets[target])
                weights[query] = float(iou.detach())
                yield 5 * (box - targets[target]).abs().sum() / num + 2 * (1 - giou) / num
                layer = row - (len(logits) - NUM_LAYERS)
                if layer >= 0:
                    found = edge_logits[layer, query]
                    yield 0.15 * fgl_of(found, reference[query], box, targets[target]) / num
            if 0 <= layer < NUM_LAYERS - 1:
                matched = {query for query, _ in pairs}
                yield 1.5 * ddf_of(edge_logits[layer], edge_logits[-1], weights, matched, roots)

    all_known = [known] * (NUM_LAYERS + 1)
    return torch.stack(
        [
            *losses("pred", "", matches, union, len(targets), len(union)),
            *losses("denoising", "denoising_", all_known, known, len(known), len(known)),
        ]
    ).sum()


@pytest.mark.parametrize("class_term", ["vfl", "mal"])
def test_the_loss_of_one_image_equals_the_published_one(class_term: str) -> None:
    sample = Sample([4])
    sample.with_gradients()
    weights = {class_term: 1.0, **{k: v for k, v in SETTINGS.weights.items() if k != "vfl"}}
    found = sample.loss(0, 1, replace(SETTINGS, weights=weights))
    found.backward()
    gradients = sample.gradients()
    sample.with_gradients()
    expected = published_loss(sample, class_term)
    expected.backward()
    # 1e-5 of the largest value: both compute in float32, in another order.
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, gradient in sample.gradients().items():
        difference = (gradients[name] - gradient).abs().max()
        assert difference <= 1e-5 * gradient.abs().max(), name


@pytest.mark.parametrize("union", [True, False])
@pytest.mark.parametrize("size", [4, 2, 1])
def test_the_loss_does_not_depend_on_the_split_into_micro_batches(size: int, union: bool) -> None:
    sample, settings = Sample([3, 0, 8, 1, 0, 0, 5, 2]), replace(SETTINGS, union=union)
    results = []
    for step in (8, size):
        sample.with_gradients()
        loss = torch.stack([sample.loss(i, i + step, settings) for i in range(0, 8, step)]).sum()
        loss.backward()
        results.append((loss.item(), sample.gradients()))
    (expected, gradients), (found, found_gradients) = results
    assert found == pytest.approx(expected, rel=1e-5)
    for name, gradient in gradients.items():
        assert torch.allclose(found_gradients[name], gradient, rtol=1e-5, atol=1e-7), name


def test_a_query_takes_its_most_frequent_target_and_the_first_of_equals() -> None:
    from detr_dist.models.matcher import _union

    rows = [[(0, 1), (3, 0)], [(0, 0), (3, 1)], [(3, 1), (5, 0)]]  # targets in the order of the matcher
    pairs = np.zeros((4, 3, 3), np.int64)
    for layer, row in enumerate(rows):
        for index, (query, target) in enumerate(row):
            pairs[1:, layer, index] = 0, query, target
        pairs[1:, layer, 2] = 2, 7, 2  # the third image's only target; the second has none
    found = _union(pairs, num_images=3, num_queries=8, device=torch.device("cpu"))
    assert found.place.tolist() == [0, 3, 5, 23]
    assert found.target.tolist() == [0, 1, 0, 2]
    assert found.weight.tolist() == pytest.approx([2 / 3, 2 / 3, 2 / 3, 1])


def test_without_boxes_all_predictions_have_finite_gradients() -> None:
    sample = Sample([0, 0])
    sample.with_gradients()
    sample.loss(0, 2, SETTINGS).backward()
    for name, gradient in sample.gradients().items():
        assert gradient is not None, name
        assert bool(gradient.isfinite().all()), name


def test_boxes_turned_inside_out_have_a_finite_loss() -> None:
    sample = Sample([4])
    sample.outputs["pred_boxes"][..., 2:] *= -1
    sample.with_gradients()
    for term in ("vfl", "mal", "ia_bce"):
        loss = sample.loss(0, 1, replace(SETTINGS, weights={**SETTINGS.weights, term: 1.0}))
        assert bool(loss.isfinite())
