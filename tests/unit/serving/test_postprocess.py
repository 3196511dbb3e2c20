import pytest
import torch
from torch import Tensor

from detr_dist.models.matcher import ClassKind
from detr_dist.serving.postprocess import MAX_DETECTIONS, postprocess

KINDS: list[ClassKind] = ["softmax", "sigmoid"]


def random_outputs(
    kind: ClassKind, num_images: int = 3, num_queries: int = 7, num_classes: int = 4
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (2, num_images, num_queries)
    logits = torch.randn(*shape, num_classes + (kind == "softmax"), generator=generator)
    return {"pred_logits": logits, "pred_boxes": torch.rand(*shape, 4, generator=generator)}


def sizes(num_images: int = 3) -> Tensor:
    return torch.tensor([[480, 640], [1080, 1920], [37, 51]])[:num_images]


def test_softmax_gives_the_best_real_class_of_every_query() -> None:
    # Query 0 says class 1 at 0.7; query 1 "no object" at 0.8, then class 0.
    probabilities = torch.tensor([[0.1, 0.7, 0.2], [0.15, 0.05, 0.8]])
    boxes = torch.tensor([[0.5, 0.5, 0.5, 0.25], [0.25, 0.5, 0.5, 0.5]])
    outputs = {"pred_logits": probabilities.log()[None, None], "pred_boxes": boxes[None, None]}
    found = postprocess(outputs, torch.tensor([[80, 160]]), "softmax")
    assert found.labels.tolist() == [[1, 0]]
    # log and softmax in float32 give the probabilities back to a few 1e-7; the boxes are exact in binary.
    torch.testing.assert_close(found.scores, torch.tensor([[0.7, 0.15]]), rtol=0, atol=1e-6)
    assert found.boxes_xyxy_px.tolist() == [[[40.0, 30.0, 120.0, 50.0], [0.0, 20.0, 80.0, 60.0]]]


def test_sigmoid_may_give_several_classes_of_one_query() -> None:
    probabilities = torch.tensor([[0.9, 0.8], [0.1, 0.3]])
    boxes = torch.tensor([[0.5, 0.5, 0.5, 0.25], [0.25, 0.5, 0.5, 0.5]])
    outputs = {"pred_logits": probabilities.logit()[None, None], "pred_boxes": boxes[None, None]}
    found = postprocess(outputs, torch.tensor([[80, 160]]), "sigmoid")
    assert found.labels.tolist() == [[0, 1, 1, 0]]
    # logit and sigmoid in float32 give the probabilities back to a few 1e-7.
    torch.testing.assert_close(found.scores, torch.tensor([[0.9, 0.8, 0.3, 0.1]]), rtol=0, atol=1e-6)
    lefts = found.boxes_xyxy_px[0, :, 0].tolist()
    assert lefts == [40.0, 40.0, 0.0, 0.0]


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_last_layer_counts_and_scores_descend(kind: ClassKind) -> None:
    outputs = random_outputs(kind)
    found = postprocess(outputs, sizes(), kind)
    alone = postprocess({name: value[-1:] for name, value in outputs.items()}, sizes(), kind)
    assert torch.equal(found.boxes_xyxy_px, alone.boxes_xyxy_px)
    assert torch.equal(found.scores, alone.scores)
    assert (found.scores.diff(dim=1) <= 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_detections_do_not_depend_on_the_rest_of_the_batch(kind: ClassKind) -> None:
    outputs = random_outputs(kind)
    together = postprocess(outputs, sizes(), kind)
    for image in range(3):
        one = slice(image, image + 1)
        alone = postprocess({name: value[:, one] for name, value in outputs.items()}, sizes()[one], kind)
        assert torch.equal(together.labels[one], alone.labels)
        # Vectorised exponentials may round differently at the edge of a batch: a few units in the last place.
        torch.testing.assert_close(together.scores[one], alone.scores, rtol=1e-6, atol=0)
        assert torch.equal(together.boxes_xyxy_px[one], alone.boxes_xyxy_px)


@pytest.mark.parametrize("kind", KINDS)
def test_boxes_are_clipped_to_the_original_image(kind: ClassKind) -> None:
    outputs = random_outputs(kind)
    outputs["pred_boxes"][..., 2:] += 0.5
    boxes = postprocess(outputs, sizes(), kind).boxes_xyxy_px
    height, width = sizes().T[:, :, None].float()
    assert (boxes >= 0).all()
    assert (boxes[..., 0::2] <= width[..., None]).all()
    assert (boxes[..., 1::2] <= height[..., None]).all()
    assert (boxes[..., 2] == width).any()
    assert (boxes[..., 3] == height).any()


@pytest.mark.parametrize("kind", KINDS)
def test_equal_scores_keep_the_order_of_queries_and_classes(kind: ClassKind) -> None:
    num_queries, num_columns = 200, 3
    boxes = torch.linspace(0.1, 0.9, num_queries)[:, None].expand(-1, 4)
    outputs = {"pred_logits": torch.zeros(1, 1, num_queries, num_columns), "pred_boxes": boxes[None, None]}
    found = postprocess(outputs, torch.tensor([[1000, 1000]]), kind)
    if kind == "softmax":
        assert found.labels.tolist() == [[0] * num_queries]
    else:
        assert found.labels.tolist() == [[0, 1, 2] * (MAX_DETECTIONS // 3)]
    centers = found.boxes_xyxy_px[0, :, 0::2].mean(-1)
    assert (centers.diff() >= 0).all()


def test_the_number_of_detections_is_bounded_by_queries_and_by_the_limit() -> None:
    assert postprocess(random_outputs("softmax"), sizes(), "softmax").scores.shape == (3, 7)
    assert postprocess(random_outputs("sigmoid"), sizes(), "sigmoid").scores.shape == (3, 7 * 4)
    many = random_outputs("sigmoid", num_queries=100)
    assert postprocess(many, sizes(), "sigmoid").scores.shape == (3, MAX_DETECTIONS)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_outputs_are_processed_in_float32_under_autocast(kind: ClassKind) -> None:
    outputs = {name: value.bfloat16() for name, value in random_outputs(kind).items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = postprocess(outputs, sizes(), kind)
    expected = postprocess({name: value.float() for name, value in outputs.items()}, sizes(), kind)
    assert found.boxes_xyxy_px.dtype == found.scores.dtype == torch.float32
    assert torch.equal(found.boxes_xyxy_px, expected.boxes_xyxy_px)
    assert torch.equal(found.scores, expected.scores)
