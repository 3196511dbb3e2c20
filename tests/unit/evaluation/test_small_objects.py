"""The metrics for small objects equal pycocotools, or their definition written as loops."""

from itertools import pairwise

import numpy as np
import pytest
from harness.coco_evaluation import evaluated
from harness.slow_matching import considered, slow_ap, slow_match

from detr_dist.data.coco import CocoData
from detr_dist.evaluation.calibration import calibration_of
from detr_dist.evaluation.coco_metrics import metric_names
from detr_dist.evaluation.detections import DetectionRecords
from detr_dist.evaluation.small_objects import bands, small_object_metrics
from detr_dist.evaluation.thresholds import Curve, operating_points, pooled

Scene = tuple[CocoData, DetectionRecords]
BANDS = (8, 16, 40, 96)


def metrics_of(data: CocoData, records: DetectionRecords, size_bands=BANDS) -> dict[str, float]:
    points = operating_points(data, records, "auto").classes
    return small_object_metrics(data, records, points, size_bands)


def with_means(of_class: dict[str, dict[str, float]], means: dict[str, str]) -> dict[str, float]:
    """Return metrics of classes, and their means by the name that each has without a class."""
    expected = {f"{key}_{name}": value for name, own in of_class.items() for key, value in own.items()}
    return expected | {
        means.get(name, name): float(np.mean(list(own.values())))
        for name, own in of_class.items()
        if own and not name.startswith("threshold")
    }


def coco_precision(data: CocoData, records: DetectionRecords, **params: object) -> np.ndarray:
    """Return pycocotools' precision [T, R, C, A]; -1 without boxes."""
    return evaluated(data, records, **params).eval["precision"][..., -1]


def known(data: CocoData, precision: np.ndarray) -> dict[str, float]:
    """Return the AP of each class with boxes of an area range, from [T, R, C]."""
    names = metric_names(data.class_names)
    return {
        names[label]: float(precision[:, :, label].mean())
        for label in range(data.num_classes)
        if (precision[:, :, label] > -1).any()
    }


def test_ap_in_bands_and_at_low_iou_equals_pycocotools(scene: Scene) -> None:
    data, records = scene
    edges = [0, *(side**2 for side in BANDS), 1e10]
    ranges = [list(each) for each in pairwise(edges)]
    labels = ["lt8", "8_16", "16_40", "40_96", "gt96"]
    of_bands = coco_precision(data, records, areaRng=ranges, areaRngLbl=labels)
    low = coco_precision(data, records, iouThrs=np.array([0.25]), areaRng=[[0, 1e10]], areaRngLbl=["all"])
    of_class = {f"map_{name}": known(data, of_bands[..., i]) for i, name in enumerate(labels)}
    of_class["map_25"] = known(data, low[..., 0])
    expected = with_means(of_class, {})
    metrics = metrics_of(data, records)
    found = {name: value for name, value in metrics.items() if "map_" in name and "center" not in name}
    assert found == pytest.approx(expected, abs=1e-12)  # the same sums in float64
    assert len(expected) > 15


def within_radius(detection: np.ndarray, truth_xywh: np.ndarray, crowd: bool) -> float | None:
    left, top, right, bottom = (float(v) for v in detection)
    x, y, w, h = (float(v) for v in truth_xywh)
    across, down = left + (right - left) / 2 - (x + w / 2), top + (bottom - top) / 2 - (y + h / 2)
    distance = np.hypot(across, down)
    if crowd:
        return -distance if abs(across) <= w / 2 and abs(down) <= h / 2 else None
    return -distance if distance <= max(np.sqrt(w * h) / 2, 5) else None


def test_ap_by_centre_distance_follows_the_definition(scene: Scene) -> None:
    data, records = scene
    outcomes = slow_match(data, records, considered(records), True, within_radius)
    names, own = metric_names(data.class_names), {}
    for label in range(data.num_classes):
        rows = [row for row in outcomes if records.labels[row] == label and outcomes[row] != "crowd"]
        rows.sort(key=lambda row: (-records.scores[row], row))
        num_truth = int((~data.iscrowd & (data.box_classes == label)).sum())
        if num_truth:
            own[names[label]] = slow_ap([outcomes[row] is not None for row in rows], num_truth)
    metrics = metrics_of(data, records)
    found = {name: value for name, value in metrics.items() if "center" in name}
    expected = with_means({"center_map": own}, {"center_map": "map_center"})
    assert found == pytest.approx(expected, abs=1e-12)  # the same sums in float64


def test_a_small_box_matches_up_to_five_pixels_off_and_a_large_one_up_to_half_its_side(new_scene) -> None:
    boxes = [(0, 0, (10, 10, 6, 6), False), (1, 0, (10, 10, 40, 40), False)]
    for offset, ap in ((4.9, 1.0), (5.1, 0.5 * 51 / 101)):
        detections = [(0, 0, 0.9, (10 + offset, 10, 16 + offset, 16)), (1, 0, 0.8, (29, 10, 69, 50))]
        found = metrics_of(*new_scene(2, ["ball"], boxes, detections))["ball_center_map"]
        assert found == pytest.approx(ap)


def test_the_nearest_centre_is_matched_and_not_the_largest_overlap(new_scene) -> None:
    boxes = [(0, 0, (0, 0, 40, 40), False), (0, 0, (24, 24, 6, 6), False)]
    detections = [(0, 0, 0.9, (5, 5, 45, 45)), (0, 0, 0.8, (0, 0, 40, 40))]
    assert metrics_of(*new_scene(1, ["ball"], boxes, detections))["ball_center_map"] == pytest.approx(1)


def curves_of(scene: Scene) -> list[tuple[str, Curve]]:
    data, records = scene
    points = operating_points(data, records, "auto").classes
    names = metric_names(data.class_names)
    return [(name, point.curve) for name, point in zip(names, points, strict=True) if point is not None]


def test_recall_at_95_percent_precision_is_the_largest_of_all_thresholds(scene: Scene) -> None:
    recalls, thresholds = {}, {}
    for name, curve in curves_of(scene):
        recalls[name] = 0.0
        for threshold in curve.thresholds.tolist():  # the highest first
            counts = curve.at(threshold)
            if counts.precision >= 0.95 and counts.recall > recalls[name]:
                recalls[name], thresholds[name] = counts.recall, threshold
    found = {name: value for name, value in metrics_of(*scene).items() if name.endswith("_p95")}
    assert found == with_means({"recall_p95": recalls, "threshold_p95": thresholds}, {})


def test_recall_at_high_precision_may_lie_behind_a_dip(new_scene) -> None:
    boxes = [(0, 0, (100 * (i % 4), 40 * (i // 4), 20, 20), False) for i in range(40)]
    right = [(x, y, x + w, y + h) for _, _, (x, y, w, h), _ in boxes]
    detections = [(0, 0, 0.95, (0, 0, 5, 5))] + [(0, 0, 0.9 - i / 100, box) for i, box in enumerate(right)]
    metrics = metrics_of(*new_scene(1, ["ball"], boxes, detections))
    assert metrics["ball_recall_p95"] == 1  # 40 of 41, while the best detection is wrong
    assert metrics["ball_threshold_p95"] == pytest.approx(0.51)
    without = metrics_of(*new_scene(1, ["ball"], boxes, detections[:10]))
    assert without["ball_recall_p95"] == without["recall_p95"] == 0
    assert "ball_threshold_p95" not in without


def slow_calibration(curve: Curve) -> tuple[list[int], float | None]:
    bins: dict[int, list[tuple[float, int]]] = {index: [] for index in range(1, 10)}
    tp = fp = 0
    for threshold, all_tp, all_fp in zip(curve.thresholds, curve.tp, curve.fp, strict=True):
        here = [1] * (all_tp - tp) + [0] * (all_fp - fp)
        tp, fp = all_tp, all_fp
        for low in range(1, 10):
            if low / 10 <= threshold and (threshold < (low + 1) / 10 or low == 9):
                bins[low] += [(threshold, each) for each in here]
    filled = [np.array(each) for each in bins.values() if each]
    total = sum(map(len, filled))
    parts = [len(each) / total * abs(np.diff(each.mean(axis=0))[0]) for each in filled]
    return [len(each) for each in filled], sum(parts) if filled else None


def test_the_calibration_error_follows_the_definition(scene: Scene) -> None:
    curves = curves_of(scene)
    metrics = metrics_of(*scene)
    errors = {}
    for name, curve in curves:
        counts, errors[name] = slow_calibration(curve)
        assert calibration_of(curve).counts.tolist() == counts
    found = {name: value for name, value in metrics.items() if "calibration" in name}
    assert found == pytest.approx(with_means({"calibration_error": errors}, {}), abs=1e-12)
    together = pooled([curve for _, curve in curves])
    assert calibration_of(together).error == pytest.approx(slow_calibration(together)[1], abs=1e-12)


def test_without_scores_from_a_tenth_there_is_no_calibration_error(new_scene) -> None:
    box = (10, 10, 20, 20)
    scene = new_scene(1, ["ball"], [(0, 0, box, False)], [(0, 0, 0.09, (10, 10, 30, 30))])
    metrics = metrics_of(*scene)
    assert "ball_calibration_error" not in metrics
    assert metrics["ball_recall_p95"] == 1


def test_without_bands_and_boxes_their_metrics_are_absent(new_scene) -> None:
    assert [name for name, _ in bands([8])] == ["lt8", "gt8"]
    assert metrics_of(*new_scene(2, ["player", "ball"], [], [(0, 1, 0.9, (10, 10, 30, 30))])) == {}
    scene = new_scene(1, ["ball"], [(0, 0, (10, 10, 10, 10), False)], [])
    assert set(metrics_of(*scene, size_bands=())) == {
        *("ball_map_25", "map_25", "ball_center_map", "map_center", "ball_recall_p95", "recall_p95")
    }
    assert {name for name in metrics_of(*scene) if "_map_" in name} == {"ball_map_25", "ball_map_8_16"}


def test_metrics_do_not_depend_on_how_images_were_distributed(scene: Scene) -> None:
    data, records = scene
    shuffled = records.take(np.argsort(records.image_rows % 2, kind="stable"))
    parts = [shuffled, DetectionRecords.none()]
    assert metrics_of(data, DetectionRecords.concatenate(parts)) == metrics_of(data, records)
