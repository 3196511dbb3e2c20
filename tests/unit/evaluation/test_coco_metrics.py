"""AP and AR equal pycocotools'."""

import contextlib
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from harness.coco_evaluation import evaluated
from harness.data import ground_truth
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detr_dist.data.coco import CocoData
from detr_dist.evaluation.coco_metrics import MAX_NAME_BYTES, SIZES, compute_coco_metrics, metric_names
from detr_dist.evaluation.detections import DetectionRecords, coco_results

# In the order of COCOeval.stats, where the recall by size follows.
STATS = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large", "mar_1", "mar_10", "mar_100")


def reference(data: CocoData, records: DetectionRecords) -> COCOeval:
    evaluation = evaluated(data, records)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.summarize()
    return evaluation


def test_every_metric_equals_pycocotools(scene: tuple[CocoData, DetectionRecords]) -> None:
    data, records = scene
    expected = reference(data, records)
    scores = compute_coco_metrics(data, records)
    metrics = dict(scores.metrics)
    for name, value in zip(STATS, expected.stats[:9], strict=True):
        assert metrics.pop(name) == pytest.approx(value, abs=1e-12), name  # the same sums in float64
    assert list(metrics) == ["player_map", "ball_map", "goal_post_map"]  # the others have no single box
    for index, value in enumerate(metrics.values()):
        of_class = expected.eval["precision"][:, :, index, 0, -1]
        assert value == pytest.approx(of_class.mean(), abs=1e-12)
        for size, ap in enumerate(scores.ap_by_size[index], start=1):
            of_size = expected.eval["precision"][:, :, index, size, -1]
            assert ap == pytest.approx(
                of_size.mean() if (of_size > -1).any() else np.nan, abs=1e-12, nan_ok=True
            )
    assert np.isnan(scores.ap_by_size[3:]).all()
    assert scores.ap_by_size.shape == (data.num_classes, len(SIZES))


def test_pycocotools_gives_the_same_from_files_with_other_ids(
    scene: tuple[CocoData, DetectionRecords], tmp_path: Path
) -> None:
    data, records = scene
    image_ids = np.random.default_rng(0).permutation(2**53 - np.arange(len(data)))  # not in order, and large
    data = replace(data, image_ids=image_ids, category_ids=(7, 3, 20, 9, 1))
    truth = {
        "images": [{"id": i} for i in image_ids.tolist()],
        "categories": [{"id": i} for i in data.category_ids],
        "annotations": [
            each
            | {
                "image_id": int(image_ids[row]),
                "category_id": data.category_ids[each["category_id"]],
            }
            for row, each in zip(data.image_rows, ground_truth(data)["annotations"], strict=True)
        ],
    }
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    (tmp_path / "results.json").write_text(json.dumps(coco_results(data, records)))
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(tmp_path / "truth.json")
        expected = COCOeval(coco, coco.loadRes(str(tmp_path / "results.json")), "bbox")
        expected.evaluate()
        expected.accumulate()
        expected.summarize()
    metrics = compute_coco_metrics(data, records).metrics
    assert [metrics[name] for name in STATS] == pytest.approx(expected.stats[:9].tolist(), abs=1e-12)


@pytest.mark.parametrize(("rank", "ap"), [(100, 1 / 100), (101, 0.0)])
def test_at_most_a_hundred_detections_per_class_and_image_count(new_scene, rank: int, ap: float) -> None:
    right, wrong = (10, 10, 30, 30), (200, 200, 220, 220)
    detections = [(0, 0, 0.9, wrong)] * (rank - 1) + [(0, 0, 0.5, right), (0, 1, 0.1, right)]
    boxes = [(0, label, (10, 10, 20, 20), False) for label in (0, 1)]
    data, records = new_scene(1, ["player", "ball"], boxes, detections)
    metrics = compute_coco_metrics(data, records).metrics
    assert metrics["player_map"] == pytest.approx(ap, abs=1e-12)  # COCO adds 2e-16 to a denominator
    assert metrics["ball_map"] == pytest.approx(1, abs=1e-12)


def test_equal_scores_are_ranked_by_image_id(new_scene) -> None:
    boxes = [(image, 0, (10, 10, 20, 20), False) for image in (0, 1)]
    right, wrong = (10, 10, 30, 30), (200, 200, 220, 220)
    data, records = new_scene(2, ["player"], boxes, [(0, 0, 0.5, wrong), (1, 0, 0.5, right)])
    listed_backwards = replace(data, image_ids=np.array([7, 3]))
    assert compute_coco_metrics(data, records).metrics["map"] == pytest.approx(0.5 * 51 / 101)
    assert compute_coco_metrics(listed_backwards, records).metrics["map"] == pytest.approx(51 / 101)


def test_without_detections_the_score_is_zero(scene: tuple[CocoData, DetectionRecords]) -> None:
    data, records = scene
    metrics = compute_coco_metrics(data, records.take(np.arange(0))).metrics
    assert set(metrics) >= {*STATS, "player_map"}
    assert set(metrics.values()) == {0.0}


def test_metrics_without_ground_truth_are_absent(new_scene) -> None:
    data, records = new_scene(
        2, ["player", "ball"], [(0, 0, (10, 10, 20, 20), False)], [(0, 1, 0.9, (10, 10, 30, 30))]
    )
    metrics = compute_coco_metrics(data, records).metrics
    assert set(metrics) == {*STATS, "player_map"} - {"map_medium", "map_large"}


def test_records_do_not_depend_on_how_images_were_distributed(
    scene: tuple[CocoData, DetectionRecords],
) -> None:
    _, records = scene

    def of(ids: np.ndarray) -> DetectionRecords:
        own = records.take(np.flatnonzero(np.isin(records.image_rows, ids)))
        return DetectionRecords(ids, own.image_rows, own.boxes_xyxy_px, own.scores, own.labels)

    dealt = DetectionRecords.concatenate([of(np.arange(1, 40, 2)), of(np.arange(0, 40, 2))])
    for name in ("evaluated_rows", "image_rows", "boxes_xyxy_px", "scores", "labels"):
        assert np.array_equal(getattr(records, name), getattr(dealt, name)), name


def test_class_names_become_distinct_metric_names() -> None:
    assert metric_names(["RBC", "Goal post!", "ball", "Ball", "%", "a b", "a_b", "a_b_6"]) == [
        "rbc",
        "goal_post",
        "ball",
        "ball_3",
        "class",
        "a_b",
        "a_b_6",
        "a_b_6_7",
    ]


def test_metric_names_are_distinct_and_short_enough_for_mlflow() -> None:
    longest = "x" * MAX_NAME_BYTES
    taken = metric_names(["x" * 240])[0]
    classes = [longest, "x" * 240, "X" * 240, "x" * 241, "é" * 120, "ball", taken, *map(str, range(3000))]
    for names in (metric_names(classes), metric_names(classes[::-1])[::-1]):
        assert len(set(names)) == len(classes)
        assert all(len(f"val_{name}_error_classification_dap".encode()) <= 250 for name in names)
        assert (names[0], names[5]) == (longest, "ball")
    assert metric_names(["ball", "x" * 240])[1] == metric_names(["x" * 240, "ball"])[0]
