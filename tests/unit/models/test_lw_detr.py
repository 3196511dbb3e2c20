"""LW-DETR and RF-DETR: groups of queries as rows, the loss of the paper, and images of the right size."""

import copy
import functools
import itertools
import math
from collections.abc import Callable
from pathlib import Path

import mlflow
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig

from detr_dist.config import Config, DataConfig, ModelConfig
from detr_dist.errors import UsageError
from detr_dist.inference.onnx import write_onnx
from detr_dist.models.build import build_detector, load_network, trained_detector
from detr_dist.models.criterion import LossSettings, SetCriterion, StepCounts
from detr_dist.models.detector import Detector, plain_network
from detr_dist.models.families import find_family
from detr_dist.models.optimizations import recompute_activations
from detr_dist.tracking.packaging import write_model

ARCHITECTURES = ["lw_detr", "rf_detr"]
NUM_QUERIES, NUM_GROUPS, NUM_LAYERS = 6, 3, 2
NUM_ROWS = NUM_GROUPS * (NUM_LAYERS + 1)
SIZES_HW = torch.tensor([[64, 64]] * 4)


@pytest.fixture
def build(tiny_detector) -> Callable[..., Detector]:
    """Return a function that builds a tiny network with two decoder layers."""
    return functools.partial(tiny_detector, num_decoder_layers=NUM_LAYERS)


@pytest.fixture(params=ARCHITECTURES)
def detector(build, request: pytest.FixtureRequest) -> Detector:
    return build(request.param)


@pytest.fixture
def images() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 255, (4, 3, 64, 64), dtype=torch.uint8, generator=generator)


def targets(num_boxes: list[int]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(2, (sum(num_boxes),), generator=generator)
    return labels, 0.2 + 0.4 * torch.rand(sum(num_boxes), 4, generator=generator)


def gradients(detector: Detector) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in detector.named_parameters() if p.requires_grad}


# The loss against slow references.


def iou_of(first: list[float], second: list[float]) -> tuple[float, float]:
    """Return IoU and generalised IoU of two boxes, cxcywh."""
    x1, y1, x2, y2 = (
        first[0] - first[2] / 2,
        first[1] - first[3] / 2,
        first[0] + first[2] / 2,
        first[1] + first[3] / 2,
    )
    u1, v1, u2, v2 = (
        second[0] - second[2] / 2,
        second[1] - second[3] / 2,
        second[0] + second[2] / 2,
        second[1] + second[3] / 2,
    )
    both = max(0.0, min(x2, u2) - max(x1, u1)) * max(0.0, min(y2, v2) - max(y1, v1))
    either = first[2] * first[3] + second[2] * second[3] - both
    hull = (max(x2, u2) - min(x1, u1)) * (max(y2, v2) - min(y1, v1))
    return both / either, both / either - (hull - either) / hull


def best_assignment(logits: Tensor, boxes: Tensor, labels: Tensor, wanted: Tensor) -> tuple[int, ...]:
    """Try every assignment of queries to targets: return the query of each target."""
    cost = [[0.0] * len(logits) for _ in range(len(labels))]
    for t, q in itertools.product(range(len(labels)), range(len(logits))):
        p = 1 / (1 + math.exp(-float(logits[q, labels[t]])))
        present = -0.25 * (1 - p) ** 2 * math.log(p + 1e-8)
        absent = -0.75 * p**2 * math.log(1 - p + 1e-8)
        distance = sum(abs(float(a - b)) for a, b in zip(boxes[q], wanted[t], strict=True))
        giou = iou_of(boxes[q].tolist(), wanted[t].tolist())[1]
        cost[t][q] = 2 * (present - absent) + 5 * distance - 2 * giou
    choices = itertools.permutations(range(len(logits)), len(labels))
    return min(choices, key=lambda queries: sum(cost[t][q] for t, q in enumerate(queries)))


def reference_loss(
    logits: Tensor, boxes: Tensor, labels: Tensor, wanted: Tensor, num_boxes: list[int]
) -> Tensor:
    """Compute LW-DETR's loss of [L, B, G * Q, ...] one group, image, query and class at a time.

    Each group is matched alone; the sums over all groups are divided by G times the number of boxes.
    """
    total = torch.zeros((), dtype=torch.float64)
    starts = [0, *itertools.accumulate(num_boxes)]
    for layer, group in itertools.product(range(len(logits)), range(NUM_GROUPS)):
        queries = slice(group * NUM_QUERIES, (group + 1) * NUM_QUERIES)
        for b in range(len(num_boxes)):
            own = slice(starts[b], starts[b + 1])
            x, box = logits[layer, b, queries].double(), boxes[layer, b, queries].double()
            chosen = best_assignment(x.detach(), box.detach(), labels[own], wanted[own])
            p = x.sigmoid()
            for q, c in itertools.product(range(NUM_QUERIES), range(x.shape[1])):
                if q in chosen and c == int(labels[own][chosen.index(q)]):
                    iou = iou_of(box[q].tolist(), wanted[own][chosen.index(q)].tolist())[0]
                    t = max(0.01, float(p[q, c].detach()) ** 0.25 * iou**0.75)
                    total = total - t * p[q, c].log() - (1 - t) * (1 - p[q, c]).log()
                else:
                    total = total - p[q, c] ** 2 * (1 - p[q, c]).log()
            for t, q in enumerate(chosen):
                goal = wanted[own][t].double()
                total = total + 5 * (box[q] - goal).abs().sum()
                total = total + 2 * (1 - generalised_iou(box[q], goal))
    return total / (NUM_GROUPS * sum(num_boxes))


def generalised_iou(first: Tensor, second: Tensor) -> Tensor:
    low = torch.maximum(first[:2] - first[2:] / 2, second[:2] - second[2:] / 2)
    high = torch.minimum(first[:2] + first[2:] / 2, second[:2] + second[2:] / 2)
    both = (high - low).clamp(min=0).prod()
    either = first[2:].prod() + second[2:].prod() - both
    low = torch.minimum(first[:2] - first[2:] / 2, second[:2] - second[2:] / 2)
    high = torch.maximum(first[:2] + first[2:] / 2, second[:2] + second[2:] / 2)
    hull = (high - low).prod()
    return both / either - (hull - either) / hull


def outputs_of(num_images: int) -> dict[str, Tensor]:
    """Return what a network passes to its loss: layers [L, B, G * Q, ...] and proposals, with gradients."""
    generator = torch.Generator().manual_seed(3)
    shape = (NUM_LAYERS, num_images, NUM_GROUPS * NUM_QUERIES)

    def drawn(*size: int) -> Tensor:
        return torch.rand(*size, generator=generator)

    return {
        "outputs_class": (4 * drawn(*shape, 2) - 2).requires_grad_(),
        "outputs_coord": (0.1 + 0.5 * drawn(*shape, 4)).requires_grad_(),
        "enc_outputs_class": (4 * drawn(*shape[1:], 2) - 2).requires_grad_(),
        "enc_outputs_coord": (0.1 + 0.5 * drawn(*shape[1:], 4)).requires_grad_(),
    }


def settings_of(architecture: str) -> LossSettings:
    config = AutoConfig.for_model(architecture, num_labels=2, num_queries=NUM_QUERIES)
    return find_family(architecture).loss_settings(config)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loss_and_gradients_equal_those_of_the_papers_definition(architecture: str) -> None:
    num_boxes = [2, 0, 3]
    labels, wanted = targets(num_boxes)
    outputs = outputs_of(len(num_boxes))
    config = AutoConfig.for_model(architecture, num_queries=NUM_QUERIES)
    rows = find_family(architecture).rows(config=config, **outputs)
    criterion = SetCriterion(settings_of(architecture))
    assert criterion.settings.weights == {"ia_bce": 1, "bbox": 5, "giou": 2}
    found = criterion(rows, labels, wanted, num_boxes, StepCounts(5, 3)).total
    found.backward()
    got = {name: value.grad.clone() for name, value in outputs.items()}
    for value in outputs.values():
        value.grad = None
    expected = sum(
        reference_loss(outputs[kind + "_class"], outputs[kind + "_coord"], labels, wanted, num_boxes)
        if kind == "outputs"
        else reference_loss(
            outputs[kind + "_class"][None], outputs[kind + "_coord"][None], labels, wanted, num_boxes
        )
        for kind in ("outputs", "enc_outputs")
    )
    expected.backward()
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    for name, value in outputs.items():  # float32 against float64
        assert torch.allclose(got[name], value.grad, rtol=1e-5, atol=1e-6), name


def test_the_class_loss_stays_finite_for_certain_predictions() -> None:
    """In probabilities the logarithm would be infinite from a logit of 17 in float32."""
    outputs = outputs_of(1)
    rows = find_family("lw_detr").rows(
        config=AutoConfig.for_model("lw_detr", num_queries=NUM_QUERIES),
        **outputs | {"outputs_class": (outputs["outputs_class"].detach() * 100).requires_grad_()},
    )
    labels, wanted = targets([2])
    loss = SetCriterion(settings_of("lw_detr"))(rows, labels, wanted, [2], StepCounts(2, 1))
    assert loss.finite
    assert torch.isfinite(loss.total)


@pytest.mark.parametrize("num_boxes", [[2, 0, 1, 0, 0, 3, 6, 1], [0, 0, 2, 0, 0, 0, 0, 0]])
def test_the_loss_is_the_same_for_every_split_into_micro_batches(num_boxes: list[int]) -> None:
    labels, wanted = targets(num_boxes)
    outputs = outputs_of(len(num_boxes))
    config = AutoConfig.for_model("lw_detr", num_queries=NUM_QUERIES)
    criterion, rows = SetCriterion(settings_of("lw_detr")), find_family("lw_detr").rows
    counts = StepCounts(sum(num_boxes), len(num_boxes))

    def loss(first: int, last: int) -> Tensor:
        part = {
            name: value[first:last] if name.startswith("enc") else value[:, first:last]
            for name, value in outputs.items()
        }
        own = slice(sum(num_boxes[:first]), sum(num_boxes[:last]))
        return criterion(
            rows(config=config, **part), labels[own], wanted[own], num_boxes[first:last], counts
        ).total

    results = []
    for size in (8, 4, 2, 1):
        for value in outputs.values():
            value.grad = None
        losses = [loss(first, first + size) for first in range(0, 8, size)]
        torch.stack(losses).sum().backward()
        results.append((sum(losses).detach(), {name: value.grad for name, value in outputs.items()}))
    for total, grads in results[1:]:  # another order of float32 sums
        assert torch.allclose(total, results[0][0], rtol=1e-5)
        for name, grad in grads.items():
            assert torch.allclose(grad, results[0][1][name], rtol=1e-5, atol=1e-7), name


# The networks.


def test_groups_become_rows_and_the_first_group_comes_last(detector: Detector, images: Tensor) -> None:
    outputs = detector.train()(images, SIZES_HW, False)
    assert outputs["pred_logits"].shape == (NUM_ROWS, 4, NUM_QUERIES, 2)
    assert outputs["pred_boxes"].shape == (NUM_ROWS, 4, NUM_QUERIES, 4)
    assert outputs["row_weights"].tolist() == pytest.approx([1 / NUM_GROUPS] * NUM_ROWS)
    with torch.no_grad():
        detector.train()
        library = detector.network(pixel_values=(images - detector.mean) / detector.std)
    assert library.pred_boxes.shape == (4, NUM_GROUPS * NUM_QUERIES, 4)
    assert torch.allclose(outputs["pred_boxes"][-1], library.pred_boxes[:, :NUM_QUERIES], atol=1e-5)
    assert torch.allclose(outputs["pred_boxes"][-2], library.pred_boxes[:, NUM_QUERIES : 2 * NUM_QUERIES])
    encoder = library.enc_outputs_coord_logits
    assert torch.allclose(outputs["pred_boxes"][NUM_GROUPS - 1], encoder[:, :NUM_QUERIES], atol=1e-5)
    outputs = detector.eval()(images, SIZES_HW, False)
    assert outputs["pred_boxes"].shape == (NUM_LAYERS + 1, 4, NUM_QUERIES, 4)
    assert "row_weights" not in outputs


@pytest.mark.parametrize("num_boxes", [[2, 0, 1, 6], [0, 0, 0, 0]])
def test_every_trainable_parameter_gets_a_gradient(
    detector: Detector, images: Tensor, num_boxes: list[int]
) -> None:
    outputs = detector.train()(images, SIZES_HW, False)
    labels, wanted = targets(num_boxes)
    SetCriterion(detector.loss_settings)(
        outputs, labels, wanted, num_boxes, StepCounts(9, 4)
    ).total.backward()
    assert [name for name, grad in gradients(detector).items() if grad is None] == []  # DDP would wait
    frozen = {name.split("backbone.backbone.")[-1] for name, p in detector.named_parameters()} - {
        name.split("backbone.backbone.")[-1] for name in gradients(detector)
    }
    assert frozen
    assert all(name.startswith("encoder.layer.3.") or name == "embeddings.mask_token" for name in frozen)


def test_a_network_learns(detector: Detector, images: Tensor) -> None:
    num_boxes = [2, 0, 1, 1]
    labels, wanted = targets(num_boxes)
    optimizer = torch.optim.AdamW(detector.train().parameters(), 5e-3)
    criterion, losses = SetCriterion(detector.loss_settings), []
    for _ in range(60):
        outputs = detector(images, SIZES_HW, False)
        loss = criterion(outputs, labels, wanted, num_boxes, StepCounts(4, 4)).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5])


@pytest.mark.parametrize("size_hw", [(64, 64), (64, 96)])
def test_evaluation_predicts_the_same_as_the_library(detector: Detector, size_hw: tuple[int, int]) -> None:
    if detector.family.square_only and size_hw[0] != size_hw[1]:
        size_hw = (96, 96)
    images = torch.randint(0, 255, (2, 3, *size_hw), dtype=torch.uint8)
    for _ in range(3):
        detector.train()(images, torch.tensor([size_hw] * 2), False)  # moves statistics of batch norm
    height, width = size_hw
    sizes_hw = torch.tensor([[height, width], [height - 8, width - 24]])
    mask = torch.zeros(2, *size_hw)
    mask[0], mask[1, : height - 8, : width - 24] = 1, 1
    plain = plain_network(detector)
    pixels = (images - detector.mean) / detector.std * mask[:, None]
    with torch.no_grad():
        expected = plain(pixel_values=pixels, pixel_mask=mask)
        found = detector.eval()(images, sizes_hw)
    # Another order of float32 sums: the library computes the last layer by itself.
    assert torch.allclose(found["pred_logits"][-1], expected.logits, atol=1e-5)
    assert torch.allclose(found["pred_boxes"][-1], expected.pred_boxes, atol=1e-5)


def test_a_saved_network_predicts_the_same_when_reloaded(
    detector: Detector, images: Tensor, tmp_path: Path
) -> None:
    detector.train()(images, SIZES_HW, False)
    plain_network(detector).save_pretrained(tmp_path)
    loaded = trained_detector(load_network("it", str(tmp_path)), ModelConfig(), channels_last=False)
    assert loaded.family == detector.family
    assert loaded.loss_settings == detector.loss_settings
    expected, found = (each.eval()(images, SIZES_HW, False) for each in (detector, loaded))
    assert all(torch.allclose(found[name], expected[name], atol=1e-6) for name in expected)
    assert gradients(loaded).keys() == gradients(detector).keys()


def test_fine_tuning_replaces_the_class_heads_of_every_group(detector: Detector, tmp_path: Path) -> None:
    name = detector.family.name
    for weight in detector.parameters():
        nn.init.constant_(weight, 7.0)
    plain_network(detector).save_pretrained(tmp_path)
    config = ModelConfig(model_architecture=name, pretrained=str(tmp_path))
    tuned = build_detector(config, ["a", "b", "c", "d"])
    renewed = {key.rpartition(".")[0] for key, p in tuned.named_parameters() if not (p == 7).all()}
    heads = {f"network.model.enc_out_class_embed.{group}" for group in range(NUM_GROUPS)}
    assert renewed == heads | {"network.class_embed"}
    assert tuned.network.class_embed.out_features == 4
    other = {"lw_detr": "rf_detr", "rf_detr": "lw_detr"}[name]
    with pytest.raises(UsageError, match=rf"is a {name}, not a {other}; set model\.model_architecture"):
        build_detector(config.model_copy(update={"model_architecture": other}), ["a", "b"])


def test_a_new_network_begins_as_in_the_papers(detector: Detector, build) -> None:
    model = detector.network.model
    assert not model.reference_point_embed.weight.any()
    assert not detector.network.bbox_embed.layers[-1].weight.any()
    heads = [detector.network.class_embed, *model.enc_out_class_embed]
    assert all(torch.allclose(head.bias, -torch.tensor(2.0).log()) for head in heads)
    assert detector.network.config.dropout == 0
    assert build(detector.family.name, dropout=0.1).network.config.dropout == 0.1


# Options and sizes.


def test_options_and_backbones_of_other_families_are_refused(build) -> None:
    for name in ARCHITECTURES:
        with pytest.raises(UsageError, match=rf"model\.num_encoder_layers: {name} has no such option"):
            build(name, num_encoder_layers=3)
        with pytest.raises(UsageError, match=rf"model\.backbone: {name} cannot have resnet50, only .* leave"):
            build(name, backbone="resnet50")
        with pytest.raises(UsageError, match=rf"{name} cannot have resnet, only a backbone of its own"):
            build(name, backbone={"model_type": "resnet"})
        with pytest.raises(UsageError, match=r"timm has no pretrained weights.*pretrained_backbone to false"):
            build(name, pretrained_backbone=True)


def test_an_unset_backbone_is_the_familys_own(build) -> None:
    for name, own in (("lw_detr", ("lw_detr_vit", 192)), ("rf_detr", ("rf_detr_dinov2", 384))):
        config = build(name, backbone=None, num_queries=300).network.config.backbone_config
        assert (config.model_type, config.hidden_size) == own


@pytest.mark.parametrize(
    ("architecture", "size_hw", "refusal"),
    [
        ("lw_detr", (64, 96), None),
        ("rf_detr", (64, 64), None),
        ("lw_detr", (64, 104), "^lw_detr takes images with sides that are multiples of 16, not .* 64 x 104"),
        ("rf_detr", (72, 72), "^rf_detr takes square images with sides that are multiples of 16, not"),
        ("rf_detr", (64, 96), "^rf_detr takes square images with sides that are multiples of 16, not"),
        ("lw_detr", (16, 16), "^images of this size have 4 positions, fewer than the 6 queries"),
        ("rf_detr", (16, 16), "^images of this size have 4 positions, fewer than the 6 queries"),
    ],
)
def test_images_of_a_wrong_size_are_refused_with_one_line(
    build, architecture: str, size_hw: tuple[int, int], refusal: str | None
) -> None:
    detector = build(architecture).eval()
    batch = torch.zeros(1, 3, *size_hw, dtype=torch.uint8), torch.tensor([size_hw])
    if refusal is None:
        assert detector(*batch)["pred_boxes"].isfinite().all()
        return
    with pytest.raises(UsageError, match=refusal):
        detector(*batch)


@torch.no_grad()
def test_windows_of_lw_detr_are_those_of_the_image_in_any_shape(build) -> None:
    """With windowed attention alone, a changed pixel changes the features of its own window only."""
    tiny = build("lw_detr").network.config.backbone_config.to_diff_dict()
    layers = {"window_block_indices": [0, 1, 2, 3], "out_features": ["stage4"], "out_indices": [4]}
    backbone = tiny | layers
    body = build("lw_detr", backbone=backbone).eval().network.model.backbone.backbone
    pixels = torch.zeros(1, 3, 64, 96)
    changed = pixels.clone()
    changed[..., 60, 10] = 5.0  # in the window at the bottom left: rows 32 to 63, columns 0 to 47
    before, after = (body(each).feature_maps[0][0] for each in (pixels, changed))
    differs = (before != after).any(0)
    assert differs.shape == (8, 12)
    assert differs[4:, :6].all()
    assert differs.sum() == 4 * 6


# Precision and memory.


@pytest.mark.parametrize("train", [False, True], ids=["evaluation", "training"])
def test_predictions_under_bf16_are_not_rounded_to_bf16(detector: Detector, train: bool) -> None:
    for name, weight in detector.network.named_parameters():
        if "bbox" in name and weight.ndim == 2:
            nn.init.normal_(weight, std=0.6 * weight.shape[1] ** -0.5)
    images = torch.arange(512).remainder(251).to(torch.uint8).expand(1, 3, 512, 512)
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        with torch.no_grad(), torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            found[dtype] = detector.train(train)(images, torch.tensor([[512, 512]]), False)
    outputs = found[torch.bfloat16]
    for name in ("pred_logits", "pred_boxes"):
        assert outputs[name].dtype == torch.float32
        assert (outputs[name] == outputs[name].bfloat16()).float().mean() < 0.05, name
    boxes, exact = (each["pred_boxes"][-1] for each in (outputs, found[torch.float32]))
    assert exact.std() > 2 / 512  # or any constant would do
    moved = (boxes - exact).abs() * 512  # a few queries start from another of two equally good proposals
    assert moved.median() < 0.3


def test_recomputed_activations_give_the_same_gradients(detector: Detector, images: Tensor) -> None:
    frugal = copy.deepcopy(detector)
    recompute_activations(frugal.network)
    num_boxes = [2, 0, 1, 1]
    labels, wanted = targets(num_boxes)

    def learn(each: Detector) -> dict[str, Tensor | None]:
        outputs = each.train()(images, SIZES_HW, False)
        SetCriterion(each.loss_settings)(
            outputs, labels, wanted, num_boxes, StepCounts(4, 4)
        ).total.backward()
        return gradients(each)

    expected, found = learn(detector), learn(frugal)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())  # type: ignore[arg-type]


def test_onnxruntime_equals_torch_at_any_size_that_the_family_takes(
    detector: Detector, tmp_path: Path
) -> None:
    network = plain_network(detector)
    assert write_onnx(network, tmp_path / "model.onnx") < 1e-5  # compared at several sizes


def test_its_mlflow_model_predicts_the_same(detector: Detector, tmp_path: Path) -> None:
    network = plain_network(detector)
    config = Config(data=DataConfig(resize="square", shortest_edge=64))
    write_model(network, tmp_path / "model", config=config, metadata={})
    loaded = mlflow.pytorch.load_model(str(tmp_path / "model"))
    pixels = torch.rand(1, 3, 64, 64)
    assert torch.equal(loaded(pixel_values=pixels).pred_boxes, network(pixel_values=pixels).pred_boxes)
