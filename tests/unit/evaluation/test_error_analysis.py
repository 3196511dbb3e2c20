"""Kinds of errors, and the AP that each costs, equal the definitions of TIDE written as loops."""

import numpy as np
import pytest
from harness.slow_matching import considered, iou_from, slow_ap, slow_iou, slow_match

from detr_dist.data.coco import CocoData
from detr_dist.evaluation.coco_metrics import compute_coco_metrics
from detr_dist.evaluation.detections import DetectionRecords
from detr_dist.evaluation.error_analysis import KINDS, ErrorAnalysis, analyse_errors

Scene = tuple[CocoData, DetectionRecords]
BOX, ON_BOX, NEAR, ELSEWHERE = (10, 10, 20, 20), (10, 10, 30, 30), (20, 10, 40, 30), (200, 200, 240, 240)


def slow_kind(data: CocoData, records: DetectionRecords, row: int) -> tuple[str, int]:
    """Return the kind of a false positive, and the box that its correction would match, -1 for none."""
    image = records.image_rows[row]
    same, other = (0.0, -1), (0.0, -1)
    for box in range(data.box_offsets[image], data.box_offsets[image + 1]):
        if data.iscrowd[box]:
            continue
        iou = slow_iou(records.boxes_xyxy_px[row], data.boxes_xywh_px[box], False)
        if data.box_classes[box] == records.labels[row]:
            same = (iou, box) if iou > same[0] else same
        else:
            other = (iou, box) if iou > other[0] else other
    if max(same[0], other[0]) <= 0.1:
        return "background", -1
    if 0.1 < same[0] < 0.5:
        return "localisation", same[1]
    if other[0] >= 0.5:
        return "classification", other[1]
    return ("duplicate" if same[0] >= 0.5 else "both"), -1


def slow_aps(
    data: CocoData, records: DetectionRecords, verdicts: dict[int, tuple[int, bool]], num_truth: list[int]
) -> list[float]:
    """Return the AP of each class of detections with their class and whether they are true positives."""
    aps = []
    for label in range(data.num_classes):
        rows = [row for row, (own, _) in verdicts.items() if own == label]
        rows.sort(key=lambda row: (-records.scores[row], row))
        aps.append(slow_ap([verdicts[row][1] for row in rows], num_truth[label]) if num_truth[label] else 1.0)
    return aps


def slow_analysis(data: CocoData, records: DetectionRecords) -> tuple[dict, np.ndarray, np.ndarray]:
    """Return the kind of each false positive by row, counts [C, K], and dAP [C, K]."""
    rows = considered(records)
    outcomes = slow_match(data, records, rows, True, iou_from(0.5))
    free = set(np.flatnonzero(~data.iscrowd).tolist()) - set(outcomes.values())
    found = {row: slow_kind(data, records, row) for row in rows if outcomes[row] is None}
    missed = free - {box for _, box in found.values()}
    verdicts = {
        row: (int(records.labels[row]), outcomes[row] is not None) for row in rows if outcomes[row] != "crowd"
    }
    num_truth = [
        int((~data.iscrowd & (data.box_classes == label)).sum()) for label in range(data.num_classes)
    ]
    before = slow_aps(data, records, verdicts, num_truth)
    counts, dap = np.zeros((data.num_classes, 6), dtype=int), np.zeros((data.num_classes, 6))
    for row, (kind, _) in found.items():
        counts[records.labels[row], KINDS.index(kind)] += 1
    for box in missed:
        counts[data.box_classes[box], KINDS.index("missed")] += 1
    for column, kind in enumerate(KINDS):
        corrected, left = dict(verdicts), list(num_truth)
        taken = set()
        for row in sorted(found, key=lambda row: (-records.scores[row], row)):
            of_row, box = found[row]
            if of_row == kind:
                del corrected[row]
                if box in free and box not in taken:
                    taken.add(box)
                    corrected[row] = (int(data.box_classes[box]), True)
        if kind == "missed":
            for box in missed:
                left[data.box_classes[box]] -= 1
        after = slow_aps(data, records, corrected, left)
        dap[:, column] = np.subtract(after, before)
    dap[np.array(num_truth) == 0] = np.nan
    return {row: kind for row, (kind, _) in found.items()}, counts, dap


def kinds_by_detection(analysis: ErrorAnalysis) -> list[tuple]:
    found = analysis.detections
    columns = (found.image_rows, found.labels, found.scores, found.boxes_xyxy_px.sum(axis=1), analysis.kinds)
    return sorted(zip(*(column.tolist() for column in columns), strict=True))


def test_kinds_counts_and_costs_follow_the_definition(scene: Scene) -> None:
    data, records = scene
    kinds, counts, dap = slow_analysis(data, records)
    analysis = analyse_errors(data, records)
    rows = considered(records)
    columns = [records.image_rows, records.labels, records.scores, records.boxes_xyxy_px.sum(axis=1)]
    of_rows = [KINDS.index(kinds[row]) if row in kinds else -1 for row in rows]
    expected = sorted(zip(*(column[rows].tolist() for column in columns), of_rows, strict=True))
    assert kinds_by_detection(analysis) == expected
    assert np.array_equal(analysis.counts, counts)
    assert analysis.dap == pytest.approx(dap, abs=1e-12, nan_ok=True)  # the same sums in float64
    assert set(kinds.values()) == set(KINDS) - {"missed"}
    metrics = analysis.metrics(data.class_names)
    assert len(metrics) == 4 * 6  # three classes with boxes, and their mean
    assert metrics["ball_error_missed_dap"] == analysis.dap[1, 5]
    assert metrics["error_both_dap"] == pytest.approx(np.nanmean(analysis.dap[:, 2]))


@pytest.mark.parametrize(
    ("kind", "boxes", "detections", "dap"),
    [
        ("classification", [(0, 0, BOX, False)], [(0, 1, 0.9, ON_BOX)], [1, 0]),
        ("localisation", [(0, 0, BOX, False)], [(0, 0, 0.9, NEAR)], [1, 0]),
        ("both", [(0, 0, BOX, False)], [(0, 1, 0.9, NEAR)], [0, 0]),
        ("duplicate", [(0, 0, BOX, False)], [(0, 0, 0.9, ON_BOX), (0, 0, 0.8, ON_BOX)], [0, 0]),
        ("background", [(0, 0, BOX, False)], [(0, 0, 0.9, ELSEWHERE), (0, 0, 0.8, ON_BOX)], [0.5, 0]),
        ("missed", [(0, 0, BOX, False)], [], [1, 0]),
    ],
)
def test_each_kind_of_error_alone(kind: str, boxes, detections, dap, new_scene) -> None:
    boxes = [*boxes, (1, 1, BOX, False)]
    data, records = new_scene(2, ["player", "ball"], boxes, [*detections, (1, 1, 0.95, ON_BOX)])
    analysis = analyse_errors(data, records)
    column = KINDS.index(kind)
    assert analysis.counts[:, column].sum() == 1
    assert analysis.dap[:, column] == pytest.approx(dap)
    others = {"both": {"missed"}}.get(kind, set())  # nothing else covers the box
    found = {KINDS[each] for each in np.flatnonzero(analysis.counts.sum(axis=0))}
    assert found == {kind} | others


def test_without_errors_nothing_is_gained(new_scene) -> None:
    data, records = new_scene(1, ["player"], [(0, 0, BOX, False)], [(0, 0, 0.9, ON_BOX)])
    analysis = analyse_errors(data, records)
    assert not analysis.counts.any()
    assert analysis.dap == pytest.approx(np.zeros((1, 6)), abs=1e-12)


def test_costs_start_from_coco_ap_at_50(scene: Scene) -> None:
    """Without false positives and false negatives the AP would be 1."""
    data, records = scene
    analysis = analyse_errors(data, records)
    ap = compute_coco_metrics(data, records).metrics["map_50"]
    gains = np.nanmean(analysis.dap, axis=0)
    assert (gains >= 0).all()
    assert ap + gains.max() <= 1 + 1e-12


def test_without_boxes_or_detections_there_are_no_costs(new_scene) -> None:
    data, records = new_scene(1, ["player"], [], [(0, 0, 0.9, ON_BOX)])
    analysis = analyse_errors(data, records)
    assert analysis.metrics(data.class_names) == {}
    assert analysis.counts.tolist() == [[0, 0, 0, 0, 1, 0]]
    empty = analyse_errors(*new_scene(1, ["player"], [], []))
    assert not empty.counts.any()
