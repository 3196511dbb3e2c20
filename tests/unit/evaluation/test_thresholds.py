"""Precision, recall, F1, thresholds and the confusion matrix equal the definition, written as loops."""

import contextlib
import io
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from harness.data import ground_truth
from harness.slow_matching import considered, iou_from, slow_match
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detr_dist.data.coco import CocoData
from detr_dist.evaluation.detections import DetectionRecords
from detr_dist.evaluation.error_analysis import analyse_errors
from detr_dist.evaluation.matching import match_detections
from detr_dist.evaluation.small_objects import small_object_metrics
from detr_dist.evaluation.thresholds import operating_points

DOCUMENT = Path(__file__).parents[3] / "docs" / "evaluation.md"
Scene = tuple[CocoData, DetectionRecords]


def slow_counts(
    data: CocoData, records: DetectionRecords, label: int, threshold: float
) -> tuple[int, int, int]:
    rows = [row for row in considered(records) if records.labels[row] == label]
    rows = [row for row in rows if records.scores[row] >= threshold]
    outcomes = list(slow_match(data, records, rows, True, iou_from(0.5)).values())
    tp, fp = sum(isinstance(each, int) for each in outcomes), outcomes.count(None)
    return tp, fp, int((~data.iscrowd & (data.box_classes == label)).sum()) - tp


def slow_best_threshold(data: CocoData, records: DetectionRecords, label: int) -> float:
    """Try the score of each detection outside a crowd, with a new calculation each time."""
    rows = [row for row in considered(records) if records.labels[row] == label]
    outcomes = slow_match(data, records, rows, True, iou_from(0.5))
    best, best_f1 = 0.0, -1.0
    for threshold in sorted({float(records.scores[row]) for row in rows if outcomes[row] != "crowd"}):
        tp, fp, fn = slow_counts(data, records, label, threshold)
        f1 = 2 * tp / (2 * tp + fp + fn)
        if f1 >= best_f1:
            best, best_f1 = threshold, f1
    return best


def slow_confusion(data: CocoData, records: DetectionRecords, thresholds: dict[int, float]) -> np.ndarray:
    confusion = np.zeros((data.num_classes + 1, data.num_classes + 1), dtype=np.int64)
    rows = [
        row
        for row in considered(records)
        if records.scores[row] >= thresholds.get(int(records.labels[row]), np.inf)
    ]
    rows.sort()
    outcomes = slow_match(data, records, rows, False, iou_from(0.5))
    for row, box in outcomes.items():
        if box != "crowd":
            truth = data.num_classes if box is None else data.box_classes[box]
            confusion[truth, records.labels[row]] += 1
    for box in np.flatnonzero(~data.iscrowd):
        if box not in outcomes.values():
            confusion[data.box_classes[box], data.num_classes] += 1
    return confusion


@pytest.mark.parametrize("score_threshold", ["auto", 0.5])
def test_counts_thresholds_and_confusion_matrix_follow_the_definition(
    scene: Scene, score_threshold: float | str
) -> None:
    data, records = scene
    points = operating_points(data, records, score_threshold)
    assert points.classes[3:] == [None, None]  # crowds only, and never seen
    thresholds = {}
    for label, point in enumerate(points.classes[:3]):
        if score_threshold == "auto":
            assert point.threshold == slow_best_threshold(data, records, label)
        else:
            assert point.threshold == score_threshold
        thresholds[label] = point.threshold
        counts = point.counts
        assert (counts.tp, counts.fp, counts.fn) == slow_counts(data, records, label, point.threshold)
    assert np.array_equal(points.confusion, slow_confusion(data, records, thresholds))
    assert points.confusion[:3].sum() == (~data.iscrowd & (data.box_classes < 3)).sum()  # each box once


def test_the_curve_gives_the_metrics_at_each_threshold(scene: Scene) -> None:
    data, records = scene
    for label, point in enumerate(operating_points(data, records, "auto").classes[:3]):
        curve = point.curve
        assert (np.diff(curve.thresholds) < 0).all()
        numbers = zip(curve.thresholds, curve.precision, curve.recall, curve.f1, strict=True)
        for threshold, precision, recall, f1 in list(numbers)[::9]:
            tp, fp, fn = slow_counts(data, records, label, threshold)
            # One division each, of the same whole numbers.
            assert (precision, recall) == (tp / (tp + fp), tp / (tp + fn))
            assert f1 == 2 * tp / (2 * tp + fp + fn)


def test_detections_match_the_same_boxes_as_in_pycocotools(scene: Scene) -> None:
    data, records = scene
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = ground_truth(data)
        coco.createIndex()
        boxes = records.boxes_xyxy_px.astype(np.float64)
        boxes[:, 2:] -= boxes[:, :2]
        columns = (records.image_rows, boxes, records.scores, records.labels)
        rows = np.column_stack([columns[0], columns[1], columns[2], columns[3]])
        evaluation = COCOeval(coco, coco.loadRes(rows), "bbox")
        evaluation.params.iouThrs = np.array([0.5])
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.params.maxDets = [300]
        evaluation.evaluate()
    expected = np.full(len(records.scores), -1)
    for of_image in filter(None, evaluation.evalImgs):
        detections = np.array(of_image["dtIds"], dtype=np.int64) - 1
        expected[detections] = of_image["dtMatches"][0].astype(np.int64) - 1  # 0: none
    order = np.argsort(-records.scores, kind="stable")
    found = match_detections(data, records.take(order), by_class=True)
    crowds = np.append(data.iscrowd, False)
    # Which crowd takes a detection that lies in several makes no difference.
    assert np.array_equal(np.where(crowds[found], -2, found), np.where(crowds[expected], -2, expected)[order])


def test_many_pairs_are_processed_in_chunks(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    data, records = scene
    at_once = operating_points(data, records, "auto")
    monkeypatch.setattr("detr_dist.evaluation.matching.PAIRS_AT_ONCE", 7)
    in_parts = operating_points(data, records, "auto")
    assert np.array_equal(in_parts.confusion, at_once.confusion)
    assert in_parts.overall == at_once.overall


BOX, ELSEWHERE = (10, 10, 20, 20), (200, 200, 220, 220)
ON_BOX = (10, 10, 30, 30)


def test_the_highest_of_equally_good_thresholds_is_chosen(new_scene) -> None:
    boxes = [(0, 0, BOX, False), (0, 0, (100, 100, 20, 20), False)]
    # F1 is 2 / 3 at 0.9 and, after two detections that find nothing and one that does, again at 0.6.
    detections = [(0, 0, 0.9, ON_BOX), (0, 0, 0.8, ELSEWHERE), (0, 0, 0.7, ELSEWHERE)]
    detections.append((0, 0, 0.6, (100, 100, 120, 120)))
    (point,) = operating_points(*new_scene(1, ["ball"], boxes, detections), "auto").classes
    assert point.curve.f1.tolist() == [2 / 3, 2 / 4, 2 / 5, 4 / 6]
    assert point.threshold == np.float32(0.9)


def test_several_detections_in_a_crowd_are_ignored(new_scene) -> None:
    boxes = [(0, 0, BOX, False), (0, 0, (100, 100, 200, 200), True)]
    detections = [(0, 0, 0.9, (110, 110, 130, 130)), (0, 0, 0.8, (150, 150, 170, 170)), (0, 0, 0.7, ON_BOX)]
    points = operating_points(*new_scene(1, ["player"], boxes, detections), 0.5)
    assert points.metrics(["player"]) == {
        "precision": 1.0, "recall": 1.0, "f1": 1.0,
        "player_precision": 1.0, "player_recall": 1.0, "player_f1": 1.0, "player_threshold": 0.5,
    }  # fmt: skip
    assert points.confusion.tolist() == [[1, 0], [0, 0]]


def test_without_detections_all_metrics_are_zero_and_no_threshold_is_best(new_scene) -> None:
    scene = new_scene(1, ["player", "ball"], [(0, 0, BOX, False)], [])
    zeros = dict.fromkeys(
        ("precision", "recall", "f1", "player_precision", "player_recall", "player_f1"), 0.0
    )
    assert operating_points(*scene, "auto").metrics(["player", "ball"]) == zeros
    assert operating_points(*scene, 0.5).metrics(["player", "ball"]) == zeros | {"player_threshold": 0.5}
    assert operating_points(*scene, 0.5).confusion.tolist() == [[0, 0, 1], [0, 0, 0], [0, 0, 0]]


def test_a_class_without_boxes_is_ignored(new_scene) -> None:
    detections = [(0, 0, 0.9, ON_BOX), (0, 1, 0.9, ELSEWHERE), (0, 1, 0.8, ON_BOX)]
    points = operating_points(*new_scene(1, ["player", "ball"], [(0, 0, BOX, False)], detections), 0.5)
    assert points.overall.precision == 1
    assert points.confusion.tolist() == [[1, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert not [name for name in points.metrics(["player", "ball"]) if name.startswith("ball")]
    nothing = operating_points(*new_scene(1, ["player", "ball"], [], detections), 0.5)
    assert nothing.metrics(["player", "ball"]) == {}


def test_overall_metrics_count_every_box_once(scene: Scene) -> None:
    points = operating_points(*scene, "auto")
    metrics = points.metrics(["a", "b", "c", "d", "e"])
    counts = [point.counts for point in points.classes[:3]]
    tp, fp, fn = (sum(getattr(each, name) for each in counts) for name in ("tp", "fp", "fn"))
    assert (metrics["precision"], metrics["recall"]) == (tp / (tp + fp), tp / (tp + fn))
    assert metrics["f1"] == 2 * tp / (2 * tp + fp + fn)


def rows_under(heading: str) -> Iterator[list[str]]:
    """Return the cells of the table under a heading of the document, without its header."""
    text = DOCUMENT.read_text().partition(f"### {heading}\n")[2]
    table = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert table is not None, heading
    for line in table[0].splitlines()[2:]:
        yield [cell.strip() for cell in line.strip("|").split("|")]


def test_the_documented_example_is_correct(new_scene) -> None:
    names = ["player", "ball"]
    boxes = [
        (int(image) - 1, names.index(name), tuple(map(float, xywh.split())), crowd == "yes")
        for image, name, xywh, crowd in rows_under("Boxes")
    ]
    detections = [
        (int(image) - 1, names.index(name), float(score), tuple(map(float, xyxy.split())))
        for image, name, score, xyxy, _ in rows_under("Detections")
    ]
    scene = new_scene(2, names, boxes, detections)
    points = operating_points(*scene, "auto")
    for name, point in zip(names, points.classes, strict=True):
        rows = [row for row in rows_under("Best thresholds") if row[0] == name]
        curve = point.curve
        for row, *numbers in zip(
            rows, curve.thresholds, curve.tp, curve.fp, curve.precision, curve.recall, curve.f1, strict=True
        ):
            assert [float(cell.strip("*")) for cell in row[1:]] == [round(float(v), 2) for v in numbers]
            assert ("**" in row[1]) == (numbers[0] == point.threshold)
    metrics = points.metrics(names)
    for name, *values in rows_under("Metrics"):
        prefix = "" if name == "all" else f"{name}_"
        keys = [f"{prefix}{metric}" for metric in ("precision", "recall", "f1")]
        assert [float(value) for value in values] == [round(metrics[key], 2) for key in keys], name
    confusion = [[int(cell) for cell in cells] for _, *cells in rows_under("Confusion matrix")]
    assert points.confusion.tolist() == confusion
    small = small_object_metrics(*scene, points.classes, ())
    keys = ("map_25", "center_map", "recall_p95", "threshold_p95", "calibration_error")
    for name, *values in rows_under("Small objects in the example"):
        assert [float(value) for value in values] == [round(small[f"{name}_{key}"], 2) for key in keys], name
    errors = analyse_errors(*scene)
    for (_, *cells), counts, dap in zip(
        rows_under("Errors in the example"), errors.counts, errors.dap, strict=True
    ):
        expected = [f"{number}, {cost:.2f}" for number, cost in zip(counts, dap, strict=True)]
        assert cells == expected
