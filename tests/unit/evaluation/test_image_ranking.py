"""The order of the hardest images, and what makes them hard."""

import numpy as np
import pytest

from detr_dist.evaluation.image_ranking import class_importance, rank_by_errors, rank_by_uncertainty
from detr_dist.evaluation.thresholds import operating_points

PLAYER, BALL = 0, 1
NAMES = ["player", "ball"]
BIG, SMALL = (10, 10, 40, 80), (200, 200, 8, 8)
ON_BIG, ON_SMALL, ELSEWHERE = (10, 10, 50, 90), (200, 200, 208, 208), (300, 300, 340, 380)


def test_images_with_rare_small_objects_that_were_not_found_come_first(new_scene) -> None:
    boxes = [(image, PLAYER, BIG, False) for image in range(5)] * 3 + [
        (image, BALL, SMALL, False) for image in (2, 4)
    ]
    found = [(image, PLAYER, 0.9, ON_BIG) for image in (1, 2, 3, 4)] * 3
    detections = [*found, (4, BALL, 0.9, ON_SMALL), (3, BALL, 0.8, ELSEWHERE)]
    data, records = new_scene(5, NAMES, boxes, detections)
    ranked = rank_by_errors(data, operating_points(data, records, 0.5).matches)
    assert [image.row for image in ranked[:2]] == [2, 0]  # a ball, then three players
    assert [image.row for image in ranked] == [2, 0, 3]  # then a false ball; the others are without errors
    assert [each.kind for each in ranked[0].objects] == ["false negative"]
    assert ranked[0].objects[0].box_xyxy_px == (200, 200, 208, 208)
    (false_ball,) = ranked[2].objects
    assert (false_ball.kind, false_ball.label) == ("false positive", BALL)
    assert false_ball.weight == pytest.approx(0.8 * ranked[0].objects[0].weight)


def test_each_error_of_an_image_has_its_kind(new_scene) -> None:
    boxes = [(0, PLAYER, BIG, False), (0, BALL, SMALL, False), (0, PLAYER, (300, 10, 40, 80), True)]
    detections = [
        (0, PLAYER, 0.9, ON_BIG),
        (0, PLAYER, 0.8, ON_BIG),
        (0, PLAYER, 0.7, ON_SMALL),
        (0, PLAYER, 0.6, ELSEWHERE),
        (0, PLAYER, 0.6, (305, 20, 330, 80)),
    ]
    data, records = new_scene(1, NAMES, boxes, detections)
    (image,) = rank_by_errors(data, operating_points(data, records, 0.5).matches)
    kinds = [(each.kind, NAMES[each.label]) for each in image.objects]
    assert kinds == [("misclassified", "ball"), ("duplicate", "player"), ("false positive", "player")]


def test_without_annotations_scores_near_the_threshold_come_first(new_scene) -> None:
    detections = [
        (0, PLAYER, 0.95, ON_BIG),
        (1, PLAYER, 0.55, ON_BIG),
        (2, PLAYER, 0.5, ON_BIG),
        (3, BALL, 0.19, ON_SMALL),
        (4, BALL, 0.22, ON_SMALL),
        (5, PLAYER, 0.05, ON_BIG),
    ]
    data, records = new_scene(6, NAMES, [], detections)
    ranked = rank_by_uncertainty(data, records, np.array([0.5, 0.2]))
    assert [image.row for image in ranked] == [4, 3, 2, 1]
    assert {each.kind for image in ranked for each in image.objects} == {"uncertain"}


def test_the_weight_of_a_class_is_how_rare_and_small_it_is() -> None:
    labels, sides = np.array([0, 0, 0, 0, 1]), np.array([50, 70, 50, 70, 10.0])
    assert class_importance(3, labels, sides).tolist() == [1, 4 * 6, 4 * 6]
    assert class_importance(2, labels[:0], sides[:0]).tolist() == [1, 1]
