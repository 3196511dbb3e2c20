from itertools import permutations

import pytest
import torch
from torch import Tensor

from detr_dist.boxes import cxcywh_to_xyxy, giou
from detr_dist.models.matcher import Block, ClassKind, CostWeights, Matches, match_blocks

KINDS: list[ClassKind] = ["softmax", "sigmoid"]
NUM_LAYERS, NUM_CLASSES = 3, 5


def weights(kind: ClassKind) -> CostWeights:
    return CostWeights(kind, cost_class=2.0, cost_bbox=5.0, cost_giou=2.0)


def predictions(kind: ClassKind, num_images: int, num_queries: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_images)
    shape = (NUM_LAYERS, num_images, num_queries)
    pred_logits = 2 * torch.randn(*shape, NUM_CLASSES + (kind == "softmax"), generator=generator)
    return pred_logits, 0.1 + 0.4 * torch.rand(*shape, 4, generator=generator)


def targets(num_boxes: list[int]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(num_boxes))
    labels = torch.randint(NUM_CLASSES, (sum(num_boxes),), generator=generator)
    return labels, 0.1 + 0.4 * torch.rand(sum(num_boxes), 4, generator=generator)


def match(
    logits: Tensor,
    boxes: Tensor,
    labels: Tensor,
    targets: Tensor,
    num_boxes: list[int],
    *,
    weights: CostWeights,
) -> Matches:
    (found,) = match_blocks([Block(logits, boxes, labels)], targets, num_boxes, weights=weights)
    return found


def pairs_of(matches: Matches) -> set[tuple[int, int, int, int]]:
    """Return layer, image, query and target of every pair."""
    return set(zip(*(index.flatten().tolist() for index in matches[:4]), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_every_image_gets_as_many_pairs_as_queries_or_targets_allow(kind: ClassKind) -> None:
    num_boxes, num_queries = [4, 0, 10, 1, 13], 10
    matches = match(*predictions(kind, 5, num_queries), *targets(num_boxes), num_boxes, weights=weights(kind))
    first_target = [0, 4, 4, 14, 15]
    for layer in range(NUM_LAYERS):
        for image, count in enumerate(num_boxes):
            mine = [pair for pair in pairs_of(matches) if pair[:2] == (layer, image)]
            queries, found = {pair[2] for pair in mine}, {pair[3] for pair in mine}
            assert len(mine) == len(queries) == len(found) == min(num_queries, count)
            assert queries <= set(range(num_queries))
            assert found <= set(range(first_target[image], first_target[image] + count))


def slow_cost(kind: ClassKind, logits: Tensor, box: Tensor, label: int, target_box: Tensor) -> float:
    """Return the published cost of one query with one target, in float64."""
    logits, box, target_box = logits.double(), box.double(), target_box.double()
    if kind == "softmax":
        class_cost = -logits.softmax(-1)[label]
    else:
        prob = logits.sigmoid()[label]
        class_cost = -0.25 * (1 - prob) ** 2 * prob.log() + 0.75 * prob**2 * (1 - prob).log()
    overlap = giou(cxcywh_to_xyxy(box), cxcywh_to_xyxy(target_box))
    return (2 * class_cost + 5 * (box - target_box).abs().sum() - 2 * overlap).item()


@pytest.mark.parametrize("kind", KINDS)
def test_no_other_assignment_costs_less(kind: ClassKind) -> None:
    num_boxes, num_queries = [3, 2], 5
    pred_logits, pred_boxes = predictions(kind, 2, num_queries)
    labels, boxes = targets(num_boxes)
    matches = match(pred_logits, pred_boxes, labels, boxes, num_boxes, weights=weights(kind))
    for layer in range(NUM_LAYERS):
        for image, mine in enumerate((range(3), range(3, 5))):
            cost = {
                (query, target): slow_cost(
                    kind,
                    pred_logits[layer, image, query],
                    pred_boxes[layer, image, query],
                    int(labels[target]),
                    boxes[target],
                )
                for query in range(num_queries)
                for target in mine
            }
            found = sum(cost[pair[2:]] for pair in pairs_of(matches) if pair[:2] == (layer, image))
            choices = permutations(range(num_queries), len(mine))
            best = min(sum(cost[pair] for pair in zip(queries, mine, strict=True)) for queries in choices)
            # Found with float32 costs of size 10: two assignments closer than 1e-5 are equally good.
            assert found == pytest.approx(best, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_matches_do_not_depend_on_the_rest_of_the_batch(kind: ClassKind) -> None:
    num_boxes = [4, 0, 7, 1]
    pred_logits, pred_boxes = predictions(kind, 4, 12)
    labels, boxes = targets(num_boxes)
    batched = pairs_of(match(pred_logits, pred_boxes, labels, boxes, num_boxes, weights=weights(kind)))
    alone, start = set(), 0
    for image, count in enumerate(num_boxes):
        one, mine = slice(image, image + 1), slice(start, start + count)
        matches = match(
            pred_logits[:, one], pred_boxes[:, one], labels[mine], boxes[mine], [count], weights=weights(kind)
        )
        alone |= {(layer, image, query, target + start) for layer, _, query, target in pairs_of(matches)}
        start += count
    assert batched == alone


@pytest.mark.parametrize("kind", KINDS)
def test_a_crowd_of_equal_boxes_and_predictions_still_matches_one_to_one(kind: ClassKind) -> None:
    num_columns = NUM_CLASSES + (kind == "softmax")
    pred_logits, pred_boxes = torch.zeros(1, 2, 20, num_columns), torch.full((1, 2, 20, 4), 0.5)
    labels, boxes = torch.zeros(34, dtype=torch.int64), torch.full((34, 4), 0.5)
    matches = match(pred_logits, pred_boxes, labels, boxes, [20, 14], weights=weights(kind))
    again = match(pred_logits, pred_boxes, labels, boxes, [20, 14], weights=weights(kind))
    assert len({pair[1:3] for pair in pairs_of(matches)}) == 34
    assert sorted(matches.target.flatten().tolist()) == list(range(34))
    assert pairs_of(matches) == pairs_of(again)


def test_an_exact_prediction_is_preferred() -> None:
    pred_logits, pred_boxes = predictions("softmax", 1, 30)
    labels, boxes = targets([3])
    pred_boxes[:, 0, [21, 7, 13]] = boxes
    pred_logits[:, 0, [21, 7, 13], labels] = 9.0
    matches = match(pred_logits, pred_boxes, labels, boxes, [3], weights=weights("softmax"))
    in_each_layer = {
        (layer, 0, query, i) for layer in range(NUM_LAYERS) for i, query in enumerate((21, 7, 13))
    }
    assert pairs_of(matches) == in_each_layer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["logits", "boxes"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_non_finite_prediction_is_reported(kind: ClassKind, where: str, value: float) -> None:
    pred_logits, pred_boxes = predictions(kind, 2, 10)
    (pred_logits if where == "logits" else pred_boxes)[1, 0, 3] = value
    labels, boxes = targets([9, 0])
    matches = match(pred_logits, pred_boxes, labels, boxes, [9, 0], weights=weights(kind))
    assert not matches.finite
    assert sorted(matches.target[1].tolist()) == list(range(9))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["logits", "boxes"])
def test_a_prediction_without_a_cost_is_matched_last(kind: ClassKind, where: str) -> None:
    pred_logits, pred_boxes = predictions(kind, 1, 10)
    (pred_logits if where == "logits" else pred_boxes)[1, 0, 3] = float("nan")
    labels, boxes = targets([9])
    matches = match(pred_logits, pred_boxes, labels, boxes, [9], weights=weights(kind))
    assert sorted(matches.query[1].tolist()) == [0, 1, 2, 4, 5, 6, 7, 8, 9]


@pytest.mark.parametrize("where", ["logits", "boxes"])
def test_non_finite_predictions_are_reported_even_without_boxes(where: str) -> None:
    pred_logits, pred_boxes = predictions("softmax", 2, 10)
    labels, boxes = targets([0, 0])
    assert match(pred_logits, pred_boxes, labels, boxes, [0, 0], weights=weights("softmax")).finite
    (pred_logits if where == "logits" else pred_boxes)[0, 1, 4, 2] = float("nan")
    matches = match(pred_logits, pred_boxes, labels, boxes, [0, 0], weights=weights("softmax"))
    assert not matches.finite
    assert matches.query.shape == (NUM_LAYERS, 0)


def test_an_assignment_is_made_even_if_all_predictions_are_non_finite() -> None:
    pred_logits, pred_boxes = predictions("sigmoid", 2, 10)
    labels, boxes = targets([4, 2])
    nothing = torch.full_like(pred_boxes, float("nan"))
    matches = match(pred_logits, nothing, labels, boxes, [4, 2], weights=weights("sigmoid"))
    assert not matches.finite
    assert sorted(matches.target[0].tolist()) == list(range(6))
