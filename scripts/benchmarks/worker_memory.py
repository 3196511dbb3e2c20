"""Measure the memory of loader processes that read targets of a large annotation file, and of their parent.

Writes a COCO JSON (no images), reads it, and iterates over an epoch of its targets in forked loader
processes. Data in Python objects would grow there, because counting a reference writes to the object's page
and copies it. Goal: no process is more than 100 MB above its parent after the epoch.

    python scripts/benchmarks/worker_memory.py [--num-images 100000] [--num-boxes 850000] [--json FILE]
"""

import json
import multiprocessing
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import torch
from timing import command_line, publish
from torch.utils.data import DataLoader, Dataset

from detr_dist.data.coco import CocoData, load_data

NUM_CLASSES, GOAL_MB = 80, 100
KINDS = ("rss", "pss", "uss")  # resident; with its part of shared pages; private


class Targets(Dataset[tuple[int, float]]):
    """The annotations that a training sample reads, without the image."""

    def __init__(self, data: CocoData) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, row: int) -> tuple[int, float]:
        boxes, classes = self.data.training_targets(row)
        height, width = self.data.size_hw(row)
        return len(str(self.data.image_path(row))) + height + width, float(boxes.sum()) + int(classes.sum())


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--num-images", type=int, default=100_000)
    parser.add_argument("--num-boxes", type=int, default=850_000)
    parser.add_argument("--num-workers", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        size_mb = write_annotations(Path(folder), options.num_images, options.num_boxes)
        started_at = time.perf_counter()
        data = load_data(folder, check_files=False)
        load_s = time.perf_counter() - started_at
    print(f"{len(data)} images and {len(data.areas)} boxes from {size_mb:.0f} MB of JSON; memory in MB")
    figures = run_epoch(data, options.num_workers)
    resident = {name: memory["rss_after"] for name, memory in figures.items()}
    publish(
        [{"process": name} | memory for name, memory in figures.items()],
        options.json,
        goals={"above_the_parent_mb": f"at most {GOAL_MB}"},
        load_s=load_s,
        above_the_parent_mb=max(resident.values()) - resident["parent"],
    )


def write_annotations(folder: Path, num_images: int, num_boxes: int) -> float:
    """Write a generated annotation file and return its size in MB."""
    rng = np.random.default_rng(0)
    image_ids = rng.permutation(num_images * 5)[:num_images].tolist()
    corners = rng.integers(0, 400, (num_boxes, 4)) + rng.integers(0, 100, (num_boxes, 4)) / 100
    owners = rng.integers(0, num_images, num_boxes).tolist()
    classes = rng.integers(1, NUM_CLASSES + 1, num_boxes).tolist()
    document = {
        "images": [{"id": i, "file_name": f"{i:012d}.jpg", "height": 600, "width": 800} for i in image_ids],
        "annotations": [
            {
                "id": n,
                "image_id": image_ids[owner],
                "category_id": category,
                "bbox": box,
                "area": box[2] * box[3] / 2,
                "iscrowd": int(n % 100 == 0),
                "segmentation": [],
            }
            for n, (owner, category, box) in enumerate(zip(owners, classes, corners.tolist(), strict=True))
        ],
        "categories": [{"id": c, "name": f"class {c}"} for c in range(1, NUM_CLASSES + 1)],
    }
    path = folder / "annotations.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    return path.stat().st_size / 1e6


def run_epoch(data: CocoData, num_workers: int) -> dict[str, dict[str, float]]:
    """Return the memory of all processes in MB, `before` (after the first batches) and `after` the epoch."""
    loader = DataLoader(
        Targets(data),
        batch_size=64,
        shuffle=True,
        num_workers=num_workers,
        persistent_workers=True,  # so that they can be measured after the epoch
        multiprocessing_context="fork",
        generator=torch.Generator().manual_seed(0),
    )
    batches = iter(loader)
    for _ in range(num_workers):
        next(batches)
    before = memory_of_all("before")
    for _ in batches:
        pass
    after = memory_of_all("after")
    return {name: before[name] | after[name] for name in before}


def memory_of_all(when: str) -> dict[str, dict[str, float]]:
    pids = {"parent": multiprocessing.current_process().pid}
    pids |= {f"worker {n}": child.pid for n, child in enumerate(multiprocessing.active_children())}
    infos = {name: psutil.Process(pid).memory_full_info() for name, pid in pids.items()}
    return {
        name: {f"{kind}_{when}": getattr(info, kind) / 1e6 for kind in KINDS} for name, info in infos.items()
    }


if __name__ == "__main__":
    main()
