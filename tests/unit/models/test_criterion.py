from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.loss.loss_deformable_detr import DeformableDetrForObjectDetectionLoss
from transformers.loss.loss_for_object_detection import ForObjectDetectionLoss

from detr_dist.errors import UsageError
from detr_dist.extensions import LOSSES
from detr_dist.models.criterion import Losses, LossSettings, Matched, SetCriterion, StepCounts
from detr_dist.models.matcher import ClassKind

KINDS: list[ClassKind] = ["softmax", "sigmoid"]
NUM_LAYERS, NUM_QUERIES, NUM_CLASSES = 4, 25, 6
MIXED = [5, 0, 12, 1, 0, 7]


def settings(kind: ClassKind) -> LossSettings:
    return LossSettings(
        kind=kind,
        cost_class=1.0 if kind == "softmax" else 2.0,
        cost_bbox=5.0,
        cost_giou=2.0,
        weights={"ce": 1.0, "bbox": 5.0, "giou": 2.0},
        eos_coef=0.1,
        focal_alpha=0.25,
        num_classes=NUM_CLASSES,
    )


def reweighted(kind: ClassKind, **weights: float) -> LossSettings:
    return SetCriterion(settings(kind), weights).settings


@dataclass
class Problem:
    """Predictions that collect gradients, and their targets."""

    logits: Tensor
    boxes: Tensor
    labels: Tensor
    boxes_cxcywh: Tensor
    num_boxes: list[int]

    @property
    def counts(self) -> StepCounts:
        return StepCounts(num_boxes=sum(self.num_boxes), num_images=len(self.num_boxes))

    def loss(self, loss_settings: LossSettings, counts: StepCounts | None = None) -> Losses:
        outputs = {"pred_logits": self.logits, "pred_boxes": self.boxes}
        criterion = SetCriterion(loss_settings)
        return criterion(outputs, self.labels, self.boxes_cxcywh, self.num_boxes, counts or self.counts)

    def fresh(self) -> "Problem":
        """Return the same problem with its own gradients."""
        logits, boxes = (value.detach().clone().requires_grad_() for value in (self.logits, self.boxes))
        return replace(self, logits=logits, boxes=boxes)


def problem(kind: ClassKind, num_boxes: list[int], seed: int = 0) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    shape = (NUM_LAYERS, len(num_boxes), NUM_QUERIES)
    logits = 2 * torch.randn(*shape, NUM_CLASSES + (kind == "softmax"), generator=generator)
    boxes = 0.05 + 0.6 * torch.rand(*shape, 4, generator=generator)
    labels = torch.randint(NUM_CLASSES, (sum(num_boxes),), generator=generator)
    boxes_cxcywh = 0.05 + 0.6 * torch.rand(sum(num_boxes), 4, generator=generator)
    return Problem(logits.requires_grad_(), boxes.requires_grad_(), labels, boxes_cxcywh, num_boxes)


def images(batch: Problem, first: int, last: int) -> Problem:
    """Return the micro-batch of images `first` to `last` - 1, which passes its gradients to the batch."""
    start, stop = sum(batch.num_boxes[:first]), sum(batch.num_boxes[:last])
    return Problem(
        batch.logits[:, first:last],
        batch.boxes[:, first:last],
        batch.labels[start:stop],
        batch.boxes_cxcywh[start:stop],
        batch.num_boxes[first:last],
    )


def library_losses(loss_settings: LossSettings, given: Problem) -> tuple[Tensor, dict[str, Tensor]]:
    config = SimpleNamespace(
        class_cost=loss_settings.cost_class,
        bbox_cost=loss_settings.cost_bbox,
        giou_cost=loss_settings.cost_giou,
        bbox_loss_coefficient=loss_settings.weights["bbox"],
        giou_loss_coefficient=loss_settings.weights["giou"],
        eos_coefficient=loss_settings.eos_coef,
        focal_alpha=loss_settings.focal_alpha,
        num_labels=loss_settings.num_classes,
        auxiliary_loss=True,
        decoder_layers=NUM_LAYERS,
    )
    per_image = zip(
        given.labels.split(given.num_boxes), given.boxes_cxcywh.split(given.num_boxes), strict=True
    )
    targets = [{"class_labels": labels, "boxes": boxes} for labels, boxes in per_image]
    published: Any = ForObjectDetectionLoss
    if loss_settings.kind == "sigmoid":
        published = DeformableDetrForObjectDetectionLoss
    loss, parts, _ = published(
        given.logits[-1], targets, torch.device("cpu"), given.boxes[-1], config, given.logits, given.boxes
    )
    return loss, parts


def grads(given: Problem) -> tuple[Tensor, Tensor]:
    assert given.logits.grad is not None
    assert given.boxes.grad is not None
    return given.logits.grad, given.boxes.grad


def assert_same(found: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    """Compare to `tolerance` of the largest value: float32 sums of a few hundred terms in another order."""
    largest = expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * largest)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_boxes", [MIXED, [20] * 4, [0, 0, 3], [1], [0, 0], [NUM_QUERIES, 2]])
def test_losses_and_gradients_equal_those_of_transformers(kind: ClassKind, num_boxes: list[int]) -> None:
    for seed in range(3):
        ours = problem(kind, num_boxes, seed)
        library = ours.fresh()
        losses = ours.loss(settings(kind))
        losses.total.backward()
        expected, parts = library_losses(settings(kind), library)
        expected.backward()
        assert_same(losses.total.detach(), expected.detach())
        assert_same(losses.logged["loss_ce"], parts["loss_ce"].detach())
        assert_same(losses.logged["loss_bbox"], parts["loss_bbox"].detach())
        assert_same(losses.logged["loss_giou"], parts["loss_giou"].detach())
        assert losses.finite
        for found, wanted in zip(grads(ours), grads(library), strict=True):
            assert_same(found, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_every_setting_has_the_same_effect_as_in_transformers(kind: ClassKind) -> None:
    unusual = LossSettings(
        kind=kind,
        cost_class=3.0,
        cost_bbox=0.5,
        cost_giou=4.0,
        weights={"ce": 1.0, "bbox": 0.7, "giou": 3.0},
        eos_coef=0.4,
        focal_alpha=0.6,
        num_classes=NUM_CLASSES,
    )
    given = problem(kind, MIXED)
    assert_same(given.loss(unusual).total, library_losses(unusual, given)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_the_class_weight_multiplies_only_the_class_loss(kind: ClassKind) -> None:
    given = problem(kind, MIXED)
    once, thrice = settings(kind), reweighted(kind, ce=3.0)
    no_ce = reweighted(kind, ce=0.0)
    ce = given.loss(once).total - given.loss(no_ce).total
    # Differences of losses about 10 times larger lose a digit.
    assert_same(given.loss(thrice).total - given.loss(no_ce).total, 3 * ce, tolerance=1e-5)
    assert torch.equal(given.loss(thrice).logged["loss_ce"], given.loss(once).logged["loss_ce"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cuts", [[3], [1, 2, 4], [1, 2, 3, 4, 5]])
def test_micro_batch_losses_sum_to_the_loss_of_the_batch(kind: ClassKind, cuts: list[int]) -> None:
    batch = problem(kind, MIXED)
    split = batch.fresh()
    expected = batch.loss(settings(kind))
    expected.total.backward()
    edges = [0, *cuts, len(MIXED)]
    parts = []
    for first, last in pairwise(edges):
        part = images(split, first, last).loss(settings(kind), batch.counts)
        part.total.backward()
        parts.append(part)
    assert_same(torch.stack([part.total.detach() for part in parts]).sum(), expected.total.detach())
    assert_same(torch.stack([part.logged["loss_ce"] for part in parts]).sum(), expected.logged["loss_ce"])
    assert_same(torch.stack([part.logged["loss_bbox"] for part in parts]).sum(), expected.logged["loss_bbox"])
    assert_same(torch.stack([part.logged["loss_giou"] for part in parts]).sum(), expected.logged["loss_giou"])
    for found, wanted in zip(grads(split), grads(batch), strict=True):
        assert_same(found, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_without_any_box_gives_every_prediction_a_gradient(kind: ClassKind) -> None:
    given = problem(kind, [0, 0, 0])
    losses = given.loss(settings(kind))
    losses.total.backward()
    logits_grad, boxes_grad = grads(given)
    assert losses.logged["loss_bbox"] == losses.logged["loss_giou"] == 0
    assert losses.logged["loss_ce"] > 0
    assert (logits_grad != 0).any(-1).all()
    assert (boxes_grad == 0).all()
    assert losses.finite


@pytest.mark.parametrize("kind", KINDS)
def test_decoder_layers_do_not_influence_each_other(kind: ClassKind) -> None:
    together = problem(kind, MIXED)
    losses = together.loss(settings(kind))
    losses.total.backward()
    total = torch.zeros(())
    for layer in range(NUM_LAYERS):
        alone = replace(
            together, logits=together.logits[layer, None], boxes=together.boxes[layer, None]
        ).fresh()
        own = alone.loss(settings(kind))
        own.total.backward()
        total += own.total.detach()
        for found, wanted in zip(grads(alone), grads(together), strict=True):
            assert_same(found[0], wanted[layer])
    assert_same(losses.total.detach(), total)
    assert_same(losses.logged["loss_ce"], own.logged["loss_ce"])
    assert_same(losses.logged["loss_bbox"], own.logged["loss_bbox"])
    assert_same(losses.logged["loss_giou"], own.logged["loss_giou"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["logits", "boxes"])
@pytest.mark.parametrize("num_boxes", [MIXED, [0] * 6])
def test_non_finite_predictions_are_reported(kind: ClassKind, where: str, num_boxes: list[int]) -> None:
    given = problem(kind, num_boxes)
    with torch.no_grad():
        getattr(given, where)[1, 4, 3, 0] = float("nan")  # image 4 has no box
    assert not given.loss(settings(kind)).finite


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_computed_in_float32_under_autocast(kind: ClassKind) -> None:
    given = problem(kind, MIXED)
    half = replace(
        given, logits=given.logits.detach().bfloat16(), boxes=given.boxes.detach().bfloat16()
    ).fresh()
    full = replace(half, logits=half.logits.float(), boxes=half.boxes.float()).fresh()
    expected = full.loss(settings(kind))
    expected.total.backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = half.loss(settings(kind))
    losses.total.backward()
    assert losses.total.dtype == torch.float32
    assert losses == expected  # the same operations on the same numbers
    for found, wanted in zip(grads(half), grads(full), strict=True):
        assert torch.equal(found, wanted.bfloat16())


@pytest.mark.parametrize("kind", KINDS)
def test_predictions_may_have_any_memory_layout(kind: ClassKind) -> None:
    given = problem(kind, MIXED)
    transposed = [
        value.detach().transpose(0, 1).contiguous().transpose(0, 1) for value in (given.logits, given.boxes)
    ]
    assert not transposed[0].is_contiguous()
    assert replace(given, logits=transposed[0], boxes=transposed[1]).loss(settings(kind)) == given.loss(
        settings(kind)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_box_without_extent_keeps_loss_and_gradients_finite(kind: ClassKind) -> None:
    given = problem(kind, MIXED)
    with torch.no_grad():
        given.boxes[..., 2:] = 0
        given.boxes_cxcywh[0, 2:] = 0
        given.boxes[:, 0, 0] = given.boxes_cxcywh[0]
    losses = given.loss(settings(kind))
    losses.total.backward()
    assert losses.total.isfinite()
    assert all(value.isfinite().all() for value in grads(given))


class HostReads(TorchDispatchMode):
    """Records the operations that make the host wait for a value on the device."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique")

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name.startswith(self.WAITING):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
def test_the_host_reads_no_scalar_from_the_device(kind: ClassKind) -> None:
    given = problem(kind, MIXED)
    with HostReads() as reads:
        given.loss(settings(kind)).total.backward()
    assert reads.found == []
    with HostReads() as reads:
        library_losses(settings(kind), given)
    assert reads.found  # the library does, so the count works


@pytest.mark.parametrize("kind", KINDS)
def test_mismatched_shapes_are_refused(kind: ClassKind) -> None:
    given = problem(kind, MIXED)
    with pytest.raises(ValueError, match="class columns"):
        given.loss(replace(settings(kind), num_classes=NUM_CLASSES + 1))
    with pytest.raises(ValueError, match="num_boxes"):
        replace(given, num_boxes=[25]).loss(settings(kind))


def test_a_configured_weight_overrides_the_default_or_is_an_error() -> None:
    given = problem("softmax", MIXED)
    plain, heavier = (given.loss(each) for each in (settings("softmax"), reweighted("softmax", giou=7.0)))
    once = given.loss(reweighted("softmax", ce=0.0, bbox=0.0, giou=1.0)).total
    # Differences of losses about 10 times larger lose a digit.
    assert_same(heavier.total - plain.total, 5 * once, tolerance=1e-5)
    with pytest.raises(UsageError, match=r"loss\.weights\.gio.*ce, bbox, giou"):
        reweighted("softmax", gio=1.0)


def test_two_terms_that_would_be_logged_under_one_name_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("terms.bbox", "one.own", "two.py:own"):
        monkeypatch.setitem(LOSSES._objects, name, center_distance)
    for names in (["bbox", "terms.bbox"], ["one.own", "two.py:own"]):
        complaint = f"^loss.weights: {names[0]} and {names[1]} would both be logged as loss_"
        with pytest.raises(UsageError, match=complaint):
            reweighted("softmax", **dict.fromkeys(names, 1.0))
    reweighted("softmax", **{"bbox": 1.0, "terms.bbox": 0.0, "one.own": 1.0})


def center_distance(matched: Matched) -> Tensor:
    """Return the distance of box centres, as a term that a user writes."""
    difference = matched.boxes_cxcywh[..., :2] - matched.target_boxes_cxcywh[..., :2]
    return difference.norm(dim=-1).sum(1) / matched.counts.num_boxes_or_one


@pytest.fixture
def own_term(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Matched], Any]], None]:
    """Return a function that registers a term `own` for the test."""
    return lambda term: monkeypatch.setitem(LOSSES._objects, "own", term)


@pytest.mark.parametrize("cuts", [[0, 6], [0, 1, 2, 6]], ids=["at once", "in three micro-batches"])
def test_a_custom_term_is_weighted_logged_and_summed_over_micro_batches(own_term, cuts) -> None:
    own_term(center_distance)
    batch = problem("softmax", MIXED)
    plain = batch.loss(settings("softmax"))
    parts = [
        images(batch, *span).loss(reweighted("softmax", own=0.5), batch.counts) for span in pairwise(cuts)
    ]
    summed = {name: sum(part.logged[name] for part in parts) for name in parts[0].logged}
    assert list(summed) == ["loss", "loss_ce", "loss_bbox", "loss_giou", "loss_own"]
    found = match_of(batch)
    assert_same(summed["loss_own"], center_distance(found)[-1])
    assert_same(summed["loss"], plain.total.detach() + 0.5 * center_distance(found).sum())


def match_of(given: Problem) -> Matched:
    """Return the matches that the criterion passes to each term."""
    seen: list[Matched] = []

    def look(matched: Matched) -> Tensor:
        seen.append(matched)
        return center_distance(matched)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(LOSSES._objects, "look", look)
        given.loss(reweighted("softmax", look=1.0))
    return seen[0]


def test_a_term_needs_a_weight_and_is_zero_without_boxes(own_term) -> None:
    own_term(center_distance)
    assert "own" not in reweighted("softmax", own=0.0).weights
    empty = problem("softmax", [0, 0]).loss(reweighted("softmax", own=1.0))
    assert empty.logged["loss_own"] == 0
    empty.total.backward()


@pytest.mark.parametrize(
    ("term", "returned"),
    [(lambda matched: matched.logits.mean(), r"\(\)"), (lambda matched: 0.5, "float")],
    ids=["one number for all layers", "no tensor"],
)
def test_a_term_with_a_wrong_return_value_fails_with_one_line(own_term, term, returned: str) -> None:
    own_term(term)
    with pytest.raises(UsageError, match=rf"^loss\.weights\.own: .*\({NUM_LAYERS},\).*returned {returned}$"):
        problem("softmax", [2]).loss(reweighted("softmax", own=1.0))


def test_a_term_that_raises_is_named(own_term) -> None:
    own_term(lambda matched: {}["two\nlines"])
    with pytest.raises(UsageError, match=r"^loss\.weights\.own: the term failed: KeyError.*lines") as raised:
        problem("softmax", [2]).loss(reweighted("softmax", own=1.0))
    assert isinstance(raised.value.__cause__, KeyError)
    assert "\n" not in str(raised.value)


def test_a_term_that_runs_out_of_memory_is_not_blamed(own_term) -> None:
    def greedy(matched: Matched) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    own_term(greedy)
    with pytest.raises(torch.OutOfMemoryError):
        problem("softmax", [2]).loss(reweighted("softmax", own=1.0))


def test_a_term_that_was_not_finite_before_the_predictions_is_named(own_term) -> None:
    own_term(lambda matched: (center_distance(matched) * 0).log() - float("inf"))
    criterion = SetCriterion(reweighted("softmax", own=1.0))
    for predictions, expected in ((problem("softmax", [2]), ()), (problem("softmax", [0]), ("own",))):
        if expected:
            predictions.boxes.data.fill_(float("nan"))
        losses = criterion(
            {"pred_logits": predictions.logits, "pred_boxes": predictions.boxes},
            predictions.labels,
            predictions.boxes_cxcywh,
            predictions.num_boxes,
            predictions.counts,
        )
        assert (losses.finite, losses.broken_terms) == (not expected, expected)
        assert criterion.broken_terms() == ("own",)  # also while the predictions are finite
