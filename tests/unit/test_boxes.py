import pytest
import torch
from torch import Tensor
from torchvision.ops import generalized_box_iou

from detr_dist.boxes import cxcywh_to_xyxy, giou, xyxy_to_cxcywh


def random_boxes_xyxy(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return cxcywh_to_xyxy(0.05 + 0.45 * torch.rand(*shape, 4, generator=generator))


def test_corners_are_half_a_size_from_the_centre() -> None:
    boxes_xyxy = cxcywh_to_xyxy(torch.tensor([[0.5, 0.25, 0.5, 0.125]]))
    # Halves and quarters are exact in binary, so no tolerance.
    assert boxes_xyxy.tolist() == [[0.25, 0.1875, 0.75, 0.3125]]


def test_box_formats_round_trip() -> None:
    boxes_xyxy = random_boxes_xyxy(2, 3, 50)
    # Two roundings of numbers below 1 in float32 are at most 1.2e-7.
    torch.testing.assert_close(cxcywh_to_xyxy(xyxy_to_cxcywh(boxes_xyxy)), boxes_xyxy, rtol=0, atol=2e-7)


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ([0.0, 0.0, 2.0, 2.0], 1.0),  # itself
        ([1.0, 0.0, 3.0, 2.0], 2 / 6),  # half over: the hull is the union
        ([0.0, 0.0, 1.0, 1.0], 1 / 4),  # inside
        ([2.0, 2.0, 4.0, 4.0], -8 / 16),  # meet in a corner: the hull is twice the union
        ([8.0, 0.0, 10.0, 2.0], -12 / 20),  # far away
    ],
)
def test_giou_has_its_textbook_values(other: list[float], expected: float) -> None:
    value = giou(torch.tensor([0.0, 0.0, 2.0, 2.0]), torch.tensor(other))
    assert value.item() == pytest.approx(expected, abs=1e-6)  # a handful of float32 roundings


def test_giou_of_all_pairs_equals_torchvision() -> None:
    a, b = random_boxes_xyxy(30, seed=1), random_boxes_xyxy(20, seed=2)
    # The same formula with its terms in another order: float32 rounding only.
    torch.testing.assert_close(giou(a[:, None], b[None]), generalized_box_iou(a, b), rtol=0, atol=1e-6)


def test_giou_does_not_depend_on_the_memory_layout() -> None:
    a, b = random_boxes_xyxy(30, seed=1), random_boxes_xyxy(30, seed=2)
    assert torch.equal(giou(a.T.contiguous().T, b), giou(a, b))


POINT, LINE, BOX = [0.5, 0.5, 0.5, 0.5], [0.2, 0.5, 0.8, 0.5], [0.1, 0.1, 0.9, 0.9]
INVERTED = [0.9, 0.9, 0.1, 0.1]


def test_boxes_without_extent_give_finite_giou_and_gradients() -> None:
    boxes = torch.tensor([POINT, LINE, BOX, INVERTED, [0.0, 0.0, 0.0, 0.0]])
    a, b = boxes[:, None].clone().requires_grad_(), boxes[None].clone().requires_grad_()
    values = giou(a, b)
    values.sum().backward()
    assert values.isfinite().all()
    assert a.grad is not None
    assert a.grad.isfinite().all()
    assert b.grad is not None
    assert b.grad.isfinite().all()
