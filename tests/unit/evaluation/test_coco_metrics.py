"""AP equals pycocotools'."""

import contextlib
import io
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detr_dist.evaluation.coco_metrics import DetectionRecords, average_precision, metric_names

CLASS_NAMES = ("Player", "ball", "goal post", "never seen")


def odd_scene(rng: np.random.Generator) -> tuple[dict[str, Any], DetectionRecords]:
    """Crowds, images without truth or detections, a class that is never there, equal scores."""
    images, annotations, rows = [], [], []
    for image_id in range(3, 40):
        images.append({"id": image_id, "height": 200, "width": 300})
        for _ in range(rng.integers(0, 6) if image_id % 5 else 0):
            box = [float(v) for v in rng.uniform(1, 100, 4)]
            label, crowd = int(rng.integers(0, 3)), int(rng.random() < 0.1)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": label,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": crowd,
                }
            )
            for _ in range(rng.integers(0, 4)):
                x, y, w, h = np.array(box) + rng.normal(0, 5, 4)
                score = rng.choice([rng.random(), 0.5])
                rows.append((image_id, x, y, x + max(w, 1), y + max(h, 1), score, int(rng.integers(0, 4))))
    table = np.array(rows)
    records = DetectionRecords(
        evaluated_rows=np.arange(3, 40),
        image_rows=table[:, 0].astype(np.int64),
        boxes_xyxy_px=table[:, 1:5].astype(np.float32),
        scores=table[:, 5].astype(np.float32),
        labels=table[:, 6].astype(np.int64),
    )
    categories = [{"id": i, "name": name} for i, name in enumerate(CLASS_NAMES)]
    return {"images": images, "annotations": annotations, "categories": categories}, records


def reference(truth: dict[str, Any], records: DetectionRecords) -> np.ndarray:
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        boxes = records.boxes_xyxy_px.astype(np.float64)
        boxes[:, 2:] -= boxes[:, :2]
        rows = zip(records.image_rows, boxes, records.scores, records.labels, strict=True)
        results = [
            {"image_id": int(i), "bbox": box.tolist(), "score": float(score), "category_id": int(label)}
            for i, box, score, label in rows
        ]
        evaluation = COCOeval(coco, coco.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation.eval["precision"][:, :, :, 0, -1]


@pytest.mark.parametrize("seed", range(5))
def test_ap_over_all_and_per_class_equals_pycocotools(seed: int) -> None:
    truth, records = odd_scene(np.random.default_rng(seed))
    precision = reference(truth, records)
    metrics = average_precision(truth, records, CLASS_NAMES)
    assert metrics.pop("map") == pytest.approx(precision[precision > -1].mean(), abs=1e-12)
    assert list(metrics) == ["player_map", "ball_map", "goal_post_map"]  # the fourth class has no truth
    for index, value in enumerate(metrics.values()):
        assert value == pytest.approx(precision[:, :, index].mean(), abs=1e-12)  # the same sums in float64


def test_no_detection_at_all_scores_zero() -> None:
    truth, records = odd_scene(np.random.default_rng(0))
    nothing = DetectionRecords(
        records.evaluated_rows,
        *(
            column[:0]
            for column in (records.image_rows, records.boxes_xyxy_px, records.scores, records.labels)
        ),
    )
    assert average_precision(truth, nothing, CLASS_NAMES)["map"] == 0


def test_records_are_the_same_whoever_had_which_image() -> None:
    _, records = odd_scene(np.random.default_rng(1))

    def of(ids: np.ndarray) -> DetectionRecords:
        rows = np.isin(records.image_rows, ids)
        return DetectionRecords(
            ids,
            records.image_rows[rows],
            records.boxes_xyxy_px[rows],
            records.scores[rows],
            records.labels[rows],
        )

    whole = DetectionRecords.concatenate([of(np.arange(3, 40))])
    dealt = DetectionRecords.concatenate([of(np.arange(4, 40, 2)), of(np.arange(3, 40, 2))])
    for name in ("evaluated_rows", "image_rows", "boxes_xyxy_px", "scores", "labels"):
        assert np.array_equal(getattr(whole, name), getattr(dealt, name)), name


def test_class_names_become_distinct_names_of_metrics() -> None:
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
