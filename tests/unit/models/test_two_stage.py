"""Deformable DETR with two stages: the encoder's proposals are trained, for every split of a batch."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DeformableDetrConfig

from detr_dist.config import ModelConfig
from detr_dist.errors import UsageError
from detr_dist.models.build import build_detector, load_network, trained_detector
from detr_dist.models.criterion import Losses, SetCriterion, StepCounts
from detr_dist.models.detector import Detector, plain_network
from detr_dist.models.families import num_queries_of

OVERRIDES = {
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "two_stage": True,
    "with_box_refine": True,
}
NUM_BOXES = [2, 0, 0, 1, 0, 3, 6, 0]
NUM_POSITIONS = 8 * 12 + 4 * 6 + 2 * 3 + 1 * 2


@pytest.fixture
def detector(tiny_detector) -> Detector:
    detector = tiny_detector("deformable_detr", config_overrides=OVERRIDES)
    for head in detector.network.bbox_embed:  # as after training
        nn.init.normal_(head.layers[-1].weight, std=0.1)
    return detector


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    """Return 8 images of several sizes on one canvas."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 255, (8, 3, 64, 96), dtype=torch.uint8, generator=generator)
    return images, torch.tensor([[64, 96], [50, 70], [64, 64], [40, 96]] * 2)


def targets(num_boxes: list[int]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(2, (sum(num_boxes),), generator=generator)
    return labels, 0.2 + 0.4 * torch.rand(sum(num_boxes), 4, generator=generator)


def loss_of(
    detector: Detector, images: Tensor, sizes_hw: Tensor, num_boxes: list[int], own: slice = slice(None)
) -> Losses:
    labels, wanted = targets(NUM_BOXES)
    criterion, counts = SetCriterion(detector.loss_settings), StepCounts(sum(NUM_BOXES), len(NUM_BOXES))
    return criterion(detector(images, sizes_hw), labels[own], wanted[own], num_boxes, counts)


def test_every_position_proposes_a_box_for_objects_of_any_class(detector: Detector, batch) -> None:
    outputs = detector.train()(*batch)
    assert outputs["pred_boxes"].shape == (3, 8, 6, 4)
    assert outputs["proposal_logits"].shape == (1, 8, NUM_POSITIONS, 2)
    assert outputs["proposal_boxes"].shape == (1, 8, NUM_POSITIONS, 4)
    assert all(value.isfinite().all() for value in outputs.values())
    assert detector.num_queries == 6


def test_the_loss_of_proposals_is_that_of_one_more_layer_with_one_class(detector: Detector, batch) -> None:
    with torch.no_grad():
        outputs = detector.train()(*batch)
        labels, wanted = targets(NUM_BOXES)
        criterion, counts = SetCriterion(detector.loss_settings), StepCounts(sum(NUM_BOXES), 8)
        total = criterion(outputs, labels, wanted, NUM_BOXES, counts).total
        decoder = {"pred_logits": outputs["pred_logits"], "pred_boxes": outputs["pred_boxes"]}
        encoder = {"pred_logits": outputs["proposal_logits"], "pred_boxes": outputs["proposal_boxes"]}
        without = criterion(decoder, labels, wanted, NUM_BOXES, counts).total
        alone = criterion(encoder, torch.zeros_like(labels), wanted, NUM_BOXES, counts).total
    assert float(total) == pytest.approx(float(without + alone), rel=1e-5)


@pytest.mark.parametrize("has_boxes", [True, False])
def test_every_parameter_gets_a_finite_gradient(detector: Detector, batch, has_boxes: bool) -> None:
    num_boxes = NUM_BOXES if has_boxes else [0] * 8
    loss_of(detector.train(), *batch, num_boxes, slice(sum(num_boxes))).total.backward()
    learning = [(name, p) for name, p in detector.named_parameters() if p.requires_grad]
    assert [name for name, p in learning if p.grad is None] == []
    assert all(p.grad.isfinite().all() for _, p in learning)


def test_gradients_are_the_same_for_every_split_into_micro_batches(tiny_detector, batch) -> None:
    detector = tiny_detector("deformable_detr", config_overrides=OVERRIDES, freeze_batch_norm=True, dropout=0)
    images, sizes_hw = batch
    results = []
    for size in (8, 4, 2):
        copied = copy.deepcopy(detector).train()
        total = 0.0
        for first in range(0, 8, size):
            own = slice(sum(NUM_BOXES[:first]), sum(NUM_BOXES[: first + size]))
            part = slice(first, first + size)
            loss = loss_of(copied, images[part], sizes_hw[part], NUM_BOXES[part], own).total
            loss.backward()
            total += float(loss.detach())
        grads = [p.grad.flatten() for p in copied.parameters() if p.requires_grad]
        results.append((total, torch.cat(grads)))
    for total, grads in results[1:]:
        assert total == pytest.approx(results[0][0], rel=1e-5)
        assert (grads - results[0][1]).norm() < 1e-5 * results[0][1].norm()  # another order of float32 sums


def test_a_two_stage_network_learns(detector: Detector, batch) -> None:
    optimizer = torch.optim.AdamW(detector.train().parameters(), 1e-3)
    losses = []
    for _ in range(30):
        loss = loss_of(detector, *batch, NUM_BOXES).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-3:]) < 0.75 * sum(losses[:3])


@torch.no_grad()
def test_the_transformers_network_predicts_the_same_and_is_reloaded(
    detector: Detector, batch, tmp_path: Path
) -> None:
    images, sizes_hw = batch
    plain = plain_network(detector)
    mask = torch.zeros(8, 64, 96)
    for i, (height, width) in enumerate(sizes_hw.tolist()):
        mask[i, :height, :width] = 1
    pixels = (images - detector.mean) / detector.std
    expected = plain(pixel_values=pixels * mask[:, None], pixel_mask=mask)
    found = detector.eval()(*batch)
    assert torch.allclose(found["pred_logits"][-1], expected.logits, atol=1e-5)
    assert torch.allclose(found["pred_boxes"][-1], expected.pred_boxes, atol=1e-5)
    plain.save_pretrained(tmp_path)
    loaded = trained_detector(load_network("it", str(tmp_path)), ModelConfig(), channels_last=False)
    again = loaded(*batch)
    assert all(torch.allclose(again[name], found[name], atol=1e-5) for name in found)
    config = ModelConfig(model_architecture="deformable_detr", pretrained=str(tmp_path))
    tuned = build_detector(config, ["a", "b", "c"])
    assert tuned(*batch)["proposal_logits"].shape == (1, 8, NUM_POSITIONS, 3)
    assert torch.equal(
        tuned.network.bbox_embed[0].layers[0].weight, detector.network.bbox_embed[0].layers[0].weight
    )


def test_bf16_does_not_round_predictions(detector: Detector) -> None:
    images = torch.arange(1333).remainder(251).to(torch.uint8).expand(1, 3, 96, 1333)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = detector.eval()(images, torch.tensor([[96, 1200]]))
    for name, values in outputs.items():
        inside = values[(values != 0) & (values != 1)]
        assert values.dtype == torch.float32, name
        assert (inside == inside.bfloat16()).float().mean() < 0.05, name


def test_without_refined_boxes_two_stages_are_refused(tiny_detector) -> None:
    with pytest.raises(UsageError, match=r"two_stage is True, with_box_refine must be True"):
        tiny_detector("deformable_detr", config_overrides={**OVERRIDES, "with_box_refine": False})


@pytest.mark.parametrize(
    "settings",
    [
        {"num_queries": 7},
        {"num_queries": 3, "config_overrides": {"two_stage_num_proposals": 7}},
        {"config_overrides": {"two_stage_num_proposals": 7}},
    ],
)
def test_the_number_of_proposals_is_known_without_building_the_network(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    overrides = {"two_stage": True, "with_box_refine": True, **settings.get("config_overrides", {})}
    model = {"model_architecture": "deformable_detr", **settings, "config_overrides": overrides}
    assert num_queries_of(ModelConfig.model_validate(model)) == 7
    options = {"num_queries": 300, "two_stage_num_proposals": 7, "two_stage": True, "with_box_refine": True}
    DeformableDetrConfig(**options).save_pretrained(tmp_path)
    fine_tuned = {"model_architecture": "deformable_detr", "pretrained": str(tmp_path)}
    assert num_queries_of(ModelConfig.model_validate(fine_tuned)) == 7
