"""Compare time and memory of scoring predictions with pycocotools on the same predictions.

    python scripts/benchmarks/evaluation.py [--images 5000] [--detections 100] [--classes 80]
        [--json FILE]

Each measurement runs in its own process, forked from one that holds the data, so that its peak memory is
its own growth. Ours is everything after the network: concatenating the records of all batches, COCO
metrics, precision, recall, F1, thresholds and the confusion matrix. pycocotools reads its results,
evaluates, accumulates and summarises. The CPU time of each part of ours, and of the metrics for small objects
and the kinds of errors, is measured once more, in this process.
"""

import contextlib
import io
import multiprocessing
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from timing import command_line, peak_memory_mib, publish, reset_peak_memory

from detr_dist.data.coco import CocoData
from detr_dist.evaluation.coco_metrics import compute_coco_metrics
from detr_dist.evaluation.detections import DetectionRecords, coco_results
from detr_dist.evaluation.error_analysis import analyse_errors
from detr_dist.evaluation.small_objects import small_object_metrics
from detr_dist.evaluation.thresholds import operating_points

BOXES_OF_IMAGE = 7
BATCH = 8


def scene(num_images: int, num_detections: int, num_classes: int) -> tuple[CocoData, list[DetectionRecords]]:
    """Return COCO-like annotations and batches of detections, a third of which lie on a box."""
    rng = np.random.default_rng(0)
    num_boxes = num_images * BOXES_OF_IMAGE
    corners = rng.uniform(0, 500, (num_boxes, 2))
    extents = np.exp(rng.uniform(np.log(8), np.log(140), (num_boxes, 2)))
    data = CocoData(
        annotations_path=Path("generated"),
        images_dir=Path(),
        class_names=tuple(f"class {index}" for index in range(num_classes)),
        category_ids=tuple(range(1, 1 + num_classes)),
        notices=[],
        image_ids=np.arange(num_images),
        sizes_hw=np.full((num_images, 2), 640),
        file_names=np.array([b"x"] * num_images),
        box_offsets=np.arange(0, num_boxes + 1, BOXES_OF_IMAGE),
        boxes_xywh_px=np.hstack([corners, extents]),
        box_classes=rng.integers(num_classes, size=num_boxes),
        iscrowd=rng.random(num_boxes) < 0.01,
        areas=extents.prod(axis=1),
        annotation_ids=np.arange(1, 1 + num_boxes),
    )
    image_rows = np.repeat(np.arange(num_images), num_detections)
    box_rows = image_rows * BOXES_OF_IMAGE + rng.integers(BOXES_OF_IMAGE, size=len(image_rows))
    on_box = rng.random(len(image_rows)) < 1 / 3
    left_top = np.where(on_box[:, None], corners[box_rows], rng.uniform(0, 500, (len(box_rows), 2)))
    left_top += rng.normal(0, 3, left_top.shape)
    labels = np.where(on_box, data.box_classes[box_rows], rng.integers(num_classes, size=len(box_rows)))
    scores = rng.beta(1 + 2 * on_box, 3)
    boxes = np.hstack([left_top, left_top + extents[box_rows]]).clip(0, 640).astype(np.float32)
    batches = []
    for first in range(0, num_images, BATCH):
        images = np.arange(first, min(first + BATCH, num_images))
        rows = slice(first * num_detections, (first + len(images)) * num_detections)
        columns = image_rows[rows], boxes[rows], scores[rows].astype(np.float32), labels[rows]
        batches.append(DetectionRecords(images, *(column.copy() for column in columns)))
    return data, batches


def ours(data: CocoData, batches: list[DetectionRecords]) -> float:
    records = DetectionRecords.concatenate(batches)
    points = operating_points(data, records, "auto")
    assert points.overall is not None
    return compute_coco_metrics(data, records).metrics["map"]


def cpu_seconds_of_parts(data: CocoData, records: DetectionRecords) -> list[dict[str, Any]]:
    """Return the CPU time of COCO's metrics and of each part that is computed on top."""
    points = operating_points(data, records, 0.5).classes
    parts: dict[str, Callable[[], object]] = {
        "COCO metrics": lambda: compute_coco_metrics(data, records),
        "precision, recall, F1": lambda: operating_points(data, records, "auto"),
        "small objects": lambda: small_object_metrics(data, records, points, ()),
        "small objects, five bands": lambda: small_object_metrics(data, records, points, (8, 16, 32, 96)),
        "kinds of errors": lambda: analyse_errors(data, records),
    }
    rows = []
    for name, compute in parts.items():
        began_at = time.process_time()
        compute()
        rows.append({"of": name, "cpu_seconds": time.process_time() - began_at})
    return rows


def ground_truth(data: CocoData) -> dict[str, Any]:
    """COCO's form of a data set, for pycocotools, with class indices as category ids.

    Image ids are `image_ranks`: small numbers in the order of the real ids, by which COCO's evaluation ranks
    detections of equal score. Annotations are numbered from 1: pycocotools takes id 0 for "no match".
    """
    ranks = data.image_ranks
    columns = (data.box_classes, data.boxes_xywh_px, data.areas, data.iscrowd.astype(int))
    rows = zip(ranks[data.image_rows].tolist(), *(column.tolist() for column in columns), strict=True)
    keys = ("id", "image_id", "category_id", "bbox", "area", "iscrowd")
    return {
        "images": [{"id": rank} for rank in ranks.tolist()],
        "annotations": [dict(zip(keys, (i, *row), strict=True)) for i, row in enumerate(rows, start=1)],
        "categories": [{"id": index, "name": name} for index, name in enumerate(data.class_names)],
    }


def reference(truth: COCO, results: list[dict[str, Any]]) -> float:
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return float(evaluation.stats[0])


def measured(function: Callable[[], float]) -> dict[str, float]:
    """Return seconds, growth of the peak memory in MiB, and the result, measured in a new process."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(function, sender))
    process.start()
    report: dict[str, float] = receiver.recv()
    process.join()
    return report


def _measure(function: Callable[[], float], sender: Connection) -> None:
    reset_peak_memory("cpu")
    before_mib = psutil.Process().memory_info().rss / 2**20
    began_at = time.perf_counter()
    result = function()
    seconds = time.perf_counter() - began_at
    sender.send({"seconds": seconds, "peak_mib": peak_memory_mib("cpu") - before_mib, "map": result})


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--detections", type=int, default=100, help="per image")
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--rounds", type=int, default=3, help="alternating measurements of each")
    args = parser.parse_args()
    data, batches = scene(args.images, args.detections, args.classes)
    records = DetectionRecords.concatenate(batches)
    columns_mib = sum(getattr(records, name).nbytes for name in vars(records)) / 2**20
    before = psutil.Process().memory_info().rss
    results = coco_results(data, records)
    objects_mib = (psutil.Process().memory_info().rss - before) / 2**20
    truth = COCO()
    truth.dataset = ground_truth(data)
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
    for result, category_id in zip(results, records.labels.tolist(), strict=True):
        result["category_id"] = category_id  # ids of the annotations
    parts = cpu_seconds_of_parts(data, records)
    del records
    runs: dict[str, list[dict[str, float]]] = {"ours": [], "pycocotools": []}
    for _ in range(args.rounds):
        runs["ours"].append(measured(lambda: ours(data, batches)))
        runs["pycocotools"].append(measured(lambda: reference(truth, results)))
    rows = [
        {"of": name} | {key: statistics.median(each[key] for each in of_name) for key in of_name[0]}
        for name, of_name in runs.items()
    ]
    mine, theirs = rows
    publish(
        rows,
        args.json,
        more_rows={"parts": parts},
        columns_mib=columns_mib,
        objects_mib=objects_mib,
        share_of_time=mine["seconds"] / theirs["seconds"],
        map_differs_by=abs(mine["map"] - theirs["map"]),
    )


if __name__ == "__main__":
    main()
