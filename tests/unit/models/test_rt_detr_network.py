"""A network of RT-DETR: split micro-batches, published weights, and heads under two names."""

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.data import TINY_CONFIG
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForObjectDetection

from detr_dist.config import ModelConfig, TrainingConfig
from detr_dist.data.sampling import Purpose, random_numbers
from detr_dist.models.build import build_detector, load_network
from detr_dist.models.criterion import SetCriterion, StepCounts
from detr_dist.models.denoising import denoising_queries
from detr_dist.models.detector import Detector, plain_network
from detr_dist.training.optim import build_optimizer

ARCHITECTURES = ["rt_detr", "rt_detr_v2"]
COUNTS = [2, 0, 1, 3, 0, 0, 4, 1]


def step(detector: Detector, edges: list[int]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Train on eight images in micro-batches between `edges`; return summed losses and gradients."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 255, (8, 3, 64, 96), dtype=torch.uint8, generator=generator)
    sizes_hw = torch.tensor([[64, 96], [50, 70]] * 4)
    labels = torch.randint(2, (sum(COUNTS),), generator=generator)
    boxes = 0.2 + 0.4 * torch.rand(sum(COUNTS), 4, generator=generator)
    counts = StepCounts(sum(COUNTS), len(COUNTS))
    criterion = SetCriterion(detector.loss_settings)
    detector.zero_grad()
    losses: dict[str, Tensor] = {}
    for first, last in pairwise(edges):
        objects = slice(sum(COUNTS[:first]), sum(COUNTS[:last]))
        targets = labels[objects], boxes[objects], COUNTS[first:last]
        rngs = [random_numbers(Purpose.DENOISE, 0, 5, place) for place in range(first, last)]
        denoising = denoising_queries(detector.denoising, *targets, rngs)
        outputs = detector(images[first:last], sizes_hw[first:last], True, denoising)
        found = criterion(outputs, *targets, counts, denoising)
        found.total.backward()
        for name, value in found.logged.items():
            losses[name] = losses.get(name, 0) + value
    gradients = {name: p.grad for name, p in detector.named_parameters() if p.requires_grad}
    assert None not in gradients.values()
    return losses, gradients


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_losses_and_gradients_do_not_depend_on_the_micro_batches(tiny_detector, architecture: str) -> None:
    detector = tiny_detector(architecture).train()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        # A new network samples exactly at the centres of cells, where bilinear sampling has no gradient.
        for parameter in detector.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    norms = [module for module in detector.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    step(detector, [0, 8])
    for norm in norms:
        norm.eval()  # in training its statistics are those of a micro-batch, whatever the loss does
    losses, gradients = step(detector, [0, 8])
    assert losses.keys() == {"loss", "loss_vfl", "loss_bbox", "loss_giou"}
    for edges in ([0, 4, 8], [0, 2, 4, 6, 8], [0, 4, 6, 7, 8]):  # images 4 and 5 have no box
        found, found_gradients = step(detector, edges)
        for name, value in losses.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
        largest = max(float(each.abs().max()) for each in gradients.values())
        for name, value in gradients.items():
            # Sums in another order, in float32.
            assert (found_gradients[name] - value).abs().max() < 1e-5 * largest, name


def published(folder: Path, kind: str, **options: Any) -> nn.Module:
    """Save a network of transformers alone, whose classes are `cat` and `dog`."""
    backbone = TINY_CONFIG["model"]["backbone"] | {"out_features": ["stage2", "stage3", "stage4"]}
    shape = {"encoder_layers": 1, "decoder_layers": 3, "encoder_attention_heads": 4}
    widths = {"d_model": 32, "encoder_hidden_dim": 32, "decoder_in_channels": [32] * 3, "num_queries": 10}
    names = {"id2label": {0: "cat", 1: "dog"}, "label2id": {"cat": 0, "dog": 1}}
    config = AutoConfig.for_model(
        kind, backbone_config=backbone, decoder_attention_heads=4, **shape, **widths, **names, **options
    )
    torch.manual_seed(0)
    network = AutoModelForObjectDetection.from_config(config)
    network.save_pretrained(folder)
    return network


@pytest.mark.parametrize("class_names", [["player", "ball"], ["a", "b", "c"], ["cat", "dog"]])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_published_weights_are_kept_but_for_the_heads_of_other_classes(
    tmp_path: Path, architecture: str, class_names: list[str]
) -> None:
    before = published(tmp_path, architecture).state_dict()
    config = ModelConfig(model_architecture=architecture, pretrained=str(tmp_path))
    after = build_detector(config, class_names).network.state_dict()
    heads = {name for name in before if "class_embed" in name or "enc_score_head" in name}
    biases = {name for name in heads if name.endswith("bias")}
    changed = {
        name
        for name, value in before.items()
        if not name.endswith("num_batches_tracked")
        and (value.shape != after[name].shape or not torch.equal(value, after[name]))
    }
    # A new bias may have the value of the published one.
    assert changed - biases == (set() if class_names == ["cat", "dog"] else heads - biases)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_heads_with_two_names_stay_one_in_copies_files_and_the_optimizer(
    tiny_detector, two_images, tmp_path: Path, architecture: str
) -> None:
    detector = tiny_detector(architecture).eval()
    plain_network(detector).save_pretrained(tmp_path)
    loaded = load_network("it", str(tmp_path))
    for network in (detector.network, copy.deepcopy(detector).network, loaded):
        for name in ("class_embed", "bbox_embed"):
            inner = getattr(network.model.decoder, name)
            top = getattr(network, name, inner)  # RT-DETR's have one name in recent versions
            for mine, yours in zip(top.parameters(), inner.parameters(), strict=True):
                assert mine is yours
        first, second = (network.model.decoder.class_embed[layer].weight for layer in (0, 1))
        assert first is not second  # each layer has a head of its own
    groups = build_optimizer(detector, TrainingConfig()).param_groups
    trained = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(trained) == len(set(trained))
    assert set(trained) == {id(p) for p in detector.network.parameters() if p.requires_grad}
    expected = detector.network.state_dict()
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_a_new_network_begins_with_its_anchors_and_with_batch_norm_that_passes_on(
    tiny_detector, two_images
) -> None:
    network = tiny_detector("rt_detr_v2").network
    norms = [each for each in network.model.encoder.modules() if isinstance(each, nn.BatchNorm2d)]
    assert norms
    assert all((norm.weight == 1).all() and (norm.bias == 0).all() for norm in norms)
    embedding = network.model.denoising_class_embed.weight
    assert (embedding[-1] == 0).all()  # of padding
    assert 0.5 < float(embedding[:-1].detach().std()) < 1.5
    boxes = tiny_detector("rt_detr_v2").train()(*two_images, is_padded=False)["pred_boxes"]
    sizes = boxes[..., 2:].detach()
    anchors = torch.tensor([0.05, 0.1, 0.2])
    assert (sizes[..., None] - anchors).abs().min(-1).values.max() < 1e-5


def test_denoising_switched_off_needs_no_queries(tiny_detector, two_images) -> None:
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    detector = tiny_detector("rt_detr_v2", config_overrides=heads | {"num_denoising": 0}).train()
    assert detector.denoising is None
    outputs = detector(*two_images)
    sum(each.square().sum() for each in outputs.values()).backward()
    without = [name for name, p in detector.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
