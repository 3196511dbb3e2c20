"""pycocotools' evaluation of detections, as the reference for ours."""

import contextlib
import io

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detr_dist.data.coco import CocoData
from detr_dist.evaluation.detections import DetectionRecords
from harness.data import ground_truth


def evaluated(data: CocoData, records: DetectionRecords, **params: object) -> COCOeval:
    """Return pycocotools' evaluation with these of its `params`, accumulated but not summarised."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = ground_truth(data)
        coco.createIndex()
        boxes = records.boxes_xyxy_px.astype(np.float64)
        boxes[:, 2:] -= boxes[:, :2]
        rows = zip(data.image_ranks[records.image_rows], boxes, records.scores, records.labels, strict=True)
        results = [
            {"image_id": int(i), "bbox": box.tolist(), "score": float(score), "category_id": int(label)}
            for i, box, score, label in rows
        ]
        evaluation = COCOeval(coco, coco.loadRes(results), "bbox")
        for name, value in params.items():
            setattr(evaluation.params, name, value)
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation
