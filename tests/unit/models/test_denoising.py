"""Denoising queries are a function of the image alone, and influence nothing but their own group."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from detr_dist.boxes import cxcywh_to_xyxy
from detr_dist.data.sampling import Purpose, random_numbers
from detr_dist.models.denoising import Denoising, DenoisingSettings, denoising_queries

NUM_CLASSES = 10
COUNTS = [3, 0, 1, 5, 2, 0, 4, 12]


def queries(num_boxes: list[int], *, num_queries: int = 10, first: int = 0, step: int = 7) -> Denoising:
    """Make the queries of images `first`, `first` + 1 and so on, each with objects of its own."""
    labels, boxes = [], []
    for image, count in enumerate(num_boxes, first):
        generator = torch.Generator().manual_seed(image)
        labels.append(torch.randint(NUM_CLASSES, (count,), generator=generator))
        boxes.append(0.2 + 0.3 * torch.rand(count, 4, generator=generator))
    rngs = [random_numbers(Purpose.DENOISE, 3, step, first + image) for image in range(len(num_boxes))]
    settings = DenoisingSettings(num_queries=num_queries, num_classes=NUM_CLASSES)
    return denoising_queries(settings, torch.cat(labels), torch.cat(boxes), num_boxes, rngs)


def images_of(made: Denoising, num_boxes: list[int]) -> list[dict[str, Tensor]]:
    """Return what each image's queries are, without padding and by its own numbers."""
    found, start = [], 0
    num_slots = made.group.shape[1]
    for image, count in enumerate(num_boxes):
        used = made.group[image] >= 0
        own = made.query // num_slots == image
        assert (made.labels[image, ~used] == NUM_CLASSES).all()
        assert (made.weight[image, ~used] == 0).all()
        found.append(
            {
                "labels": made.labels[image, used],
                "boxes": made.boxes_cxcywh[image, used],
                "group": made.group[image, used],
                "weight": made.weight[image, used],
                "query": made.query[own] - image * num_slots,
                "target": made.target[own] - start,
            }
        )
        start += count
    return found


@pytest.mark.parametrize("edges", [[0, 4, 8], [0, 2, 4, 6, 8], [0, 1, 7, 8], [0, 1, 2, 3, 4, 5, 6, 7, 8]])
def test_an_image_has_the_same_queries_in_any_micro_batch(edges: list[int]) -> None:
    expected = images_of(queries(COUNTS), COUNTS)
    found = [
        image
        for first, last in pairwise(edges)
        for image in images_of(queries(COUNTS[first:last], first=first), COUNTS[first:last])
    ]
    for one, other in zip(found, expected, strict=True):
        for name, value in other.items():
            assert torch.equal(one[name], value), name


def test_each_step_has_its_own_noise() -> None:
    assert not torch.equal(queries(COUNTS, step=7).boxes_cxcywh, queries(COUNTS, step=8).boxes_cxcywh)


@pytest.mark.parametrize(("count", "num_groups"), [(1, 10), (3, 3), (5, 2), (10, 1), (11, 1), (25, 1)])
def test_an_image_has_as_many_groups_as_its_own_objects_allow(count: int, num_groups: int) -> None:
    (image,) = images_of(queries([count]), [count])
    assert (image["weight"] == 1 / num_groups).all()
    for group in range(num_groups):
        slots = torch.nonzero(image["group"] == group).flatten()
        assert len(slots) == 2 * count
        positive = torch.isin(image["query"], slots)
        assert sorted(image["target"][positive].tolist()) == list(range(count))
    assert len(image["group"]) == 2 * count * num_groups
    assert len(image["query"]) == count * num_groups


def test_without_objects_there_are_only_padded_queries() -> None:
    made = queries([0, 0])
    assert made.labels.shape == (2, 20)
    assert (made.labels == NUM_CLASSES).all()
    assert (made.group == -1).all()
    assert len(made.query) == len(made.target) == 0


def many(box: list[float], settings: DenoisingSettings) -> tuple[Denoising, Tensor, Tensor]:
    """Make queries of one object, and return them, which are positive, and their corners."""
    rngs = [np.random.default_rng(0)]
    made = denoising_queries(settings, torch.tensor([4]), torch.tensor([box]), [1], rngs)
    is_positive = torch.zeros(made.group.numel(), dtype=torch.bool)
    is_positive[made.query] = True
    return made, is_positive, cxcywh_to_xyxy(made.boxes_cxcywh[0])


@pytest.mark.parametrize("scale", [1.0, 0.4])
def test_positive_corners_move_less_than_half_a_box_and_negative_ones_more(scale: float) -> None:
    settings = DenoisingSettings(num_queries=4000, num_classes=NUM_CLASSES, box_noise_scale=scale)
    made, is_positive, corners = many([0.5, 0.5, 0.1, 0.2], settings)
    assert (made.boxes_cxcywh[..., 2:] > 0).all()
    half = torch.tensor([0.05, 0.1])
    for low, high, start, stop, reach in (
        (corners[:, 0], corners[:, 2], 0.45, 0.55, scale * half[0]),
        (corners[:, 1], corners[:, 3], 0.4, 0.6, scale * half[1]),
    ):
        # Corners that crossed were put in order: then the lower one was the upper.
        plain = torch.maximum((low - start).abs(), (high - stop).abs())
        crossed = torch.maximum((high - start).abs(), (low - stop).abs())
        assert (plain[is_positive] <= reach + 1e-6).all()
        is_within = [
            torch.minimum((a - start).abs(), (b - stop).abs()) >= reach - 1e-6
            for a, b in ((low, high), (high, low))
        ]
        far = [distance <= 2 * reach + 1e-6 for distance in (plain, crossed)]
        negative = (is_within[0] & far[0]) | (is_within[1] & far[1])
        assert negative[~is_positive].all()
        # Both directions equally often: 4000 draws, 4 standard deviations.
        assert abs(float((low[is_positive] < start).float().mean()) - 0.5) < 0.032


def test_boxes_at_the_edge_stay_in_the_image_with_an_extent() -> None:
    settings = DenoisingSettings(num_queries=2000, num_classes=NUM_CLASSES)
    made, _, corners = many([0.05, 0.97, 0.1, 0.06], settings)
    assert (made.boxes_cxcywh[..., 2:] > 0).all()
    assert corners.min() > -1e-6
    assert corners.max() < 1 + 1e-6


def test_half_of_the_ratio_of_labels_is_drawn_again() -> None:
    settings = DenoisingSettings(num_queries=8000, num_classes=NUM_CLASSES, label_noise_ratio=0.5)
    made, is_positive, _ = many([0.5, 0.5, 0.1, 0.2], settings)
    others = (made.labels[0] != 4).float()
    for kind in (is_positive, ~is_positive):
        # One of ten drawn labels is the same as before. 8000 draws, 4 standard deviations.
        assert float(others[kind].mean()) == pytest.approx(0.25 * 0.9, abs=0.019)
    assert set(made.labels[0].tolist()) == set(range(NUM_CLASSES))
    none = DenoisingSettings(num_queries=100, num_classes=NUM_CLASSES, label_noise_ratio=0.0)
    assert (many([0.5, 0.5, 0.1, 0.2], none)[0].labels == 4).all()


FAMILIES = ["rt_detr", "rt_detr_v2"]


@pytest.fixture
def trained_pair(tiny_detector, two_images, denoising_of):
    """Return a function that gives a network's answers to given queries, as in training."""

    def start(architecture: str):
        options = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_denoising": 5}
        detector = tiny_detector(architecture, config_overrides=options).train()
        with torch.no_grad():
            for parameter in detector.parameters():  # the heads for boxes begin with zeros
                parameter += 0.02 * torch.randn(
                    parameter.shape, generator=torch.Generator().manual_seed(len(parameter))
                )

        @torch.no_grad()
        def answers(denoising: Denoising | None) -> dict[str, Tensor]:
            return detector(*two_images, denoising=denoising)

        return answers, denoising_of(detector)

    return start


@pytest.mark.parametrize("architecture", FAMILIES)
def test_predictions_are_those_without_denoising(trained_pair, architecture: str) -> None:
    answers, denoising = trained_pair(architecture)
    expected, found = answers(None), answers(denoising)
    assert expected.keys() == {"pred_logits", "pred_boxes"}
    for name, value in expected.items():
        # Attention over masked queries rounds differently.
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_padding_and_other_groups_do_not_influence_an_answer(trained_pair, architecture: str) -> None:
    answers, denoising = trained_pair(architecture)
    expected = answers(denoising)
    group_sizes = [(denoising.group[1] == group).sum().item() for group in (-1, 0, 1)]
    assert group_sizes == [2, 4, 4]
    for group in (-1, 1):
        changed = denoising._replace(
            labels=denoising.labels.clone(), boxes_cxcywh=denoising.boxes_cxcywh.clone()
        )
        where = denoising.group == group
        where[0] = False
        changed.labels[where] = 1 - denoising.labels[where].clamp(max=1)
        changed.boxes_cxcywh[where] = torch.tensor([0.4, 0.3, 0.5, 0.2])
        found = answers(changed)
        for name in ("pred_logits", "pred_boxes"):
            assert torch.equal(found[name], expected[name]), name
        for name in ("denoising_logits", "denoising_boxes"):
            assert torch.equal(found[name][:, ~where], expected[name][:, ~where]), name
            assert not torch.allclose(found[name][:, where], expected[name][:, where], atol=1e-3), name


def test_an_untrained_network_answers_with_the_boxes_it_was_given_on_any_canvas(
    tiny_detector, two_images, denoising_of
) -> None:
    detector = tiny_detector("rt_detr_v2").train()
    denoising = denoising_of(detector)
    found = detector(*two_images, denoising=denoising)["denoising_boxes"]
    used = denoising.group >= 0
    for row in found:
        # Boxes are fractions of the image, and the second image fills a part of the canvas.
        torch.testing.assert_close(row[used], denoising.boxes_cxcywh[used], rtol=0, atol=2e-5)
