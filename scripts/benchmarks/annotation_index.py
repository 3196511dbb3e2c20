"""Measure how a large annotation file is opened: the first time, later, and by two processes at once.

Writes a COCO JSON of the size of Objects365 (no images), opens it in processes of their own as a run does at
its start, and removes everything. Memory is above that after the imports: resident memory includes the pages
of the index that a process has used, which all processes share; anonymous memory is its own.

    python scripts/benchmarks/annotation_index.py [--num-images 2000000] [--num-boxes 30000000]
        [--folder FOLDER] [--json FILE]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from timing import command_line, publish

from detr_dist.data.checks import CheckSettings, check_boxes
from detr_dist.data.coco import load_data
from detr_dist.resize import Resize

NUM_CLASSES, ROWS_AT_ONCE = 365, 500_000
SETTINGS = CheckSettings(Resize(800, 1333), 900)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--num-images", type=int, default=2_000_000)
    parser.add_argument("--num-boxes", type=int, default=30_000_000)
    parser.add_argument("--folder", type=Path, help="folder for about 8 GB of files")
    parser.add_argument("--open", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.open:
        print(json.dumps(open_data(options.open)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        data, cache = Path(name, "data"), Path(name, "cache")
        data.mkdir()
        size_mb = write_annotations(data / "annotations.json", options.num_images, options.num_boxes)
        print(
            f"{options.num_images} images and {options.num_boxes} boxes, {size_mb:.0f} MB of JSON", flush=True
        )
        rows = []
        for when, num_processes in (("first", 2), ("later", 1), ("later", 2)):
            for row in open_at_once(data, cache, num_processes):
                rows.append({"open": when, "processes": num_processes, **row})
                print(rows[-1], flush=True)
        index_mb = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file()) / 1e6
    later = [row for row in rows if row["open"] == "later"]
    publish(
        rows,
        options.json,
        goals={"longest_later_s": "under 3", "most_later_rss_mb": "under 300"},
        json_mb=size_mb,
        index_mb=index_mb,
        longest_later_s=max(row["load_s"] + row["checks_s"] for row in later),
        most_later_rss_mb=max(row["peak_rss_mb"] for row in later),
    )


def write_annotations(path: Path, num_images: int, num_boxes: int) -> float:
    """Write a generated annotation file and return its size in MB."""
    rng = np.random.default_rng(0)
    image_ids = rng.permutation(num_images * 5)[:num_images]
    owners = np.sort(rng.integers(0, num_images, num_boxes))
    with path.open("wb") as file:
        categories = [{"id": c, "name": f"class {c}"} for c in range(1, NUM_CLASSES + 1)]
        file.write(f'{{"info": {{}}, "categories": {json.dumps(categories)}, "images": ['.encode())
        for first in range(0, num_images, ROWS_AT_ONCE):
            ids = image_ids[first : first + ROWS_AT_ONCE]
            names = pc.utf8_lpad(text(ids), 12, "0")
            record = '{"id": ', text(ids), ', "file_name": "', names, '.jpg", "height": 600, "width": 800}'
            write_records(file, record, is_last=first + ROWS_AT_ONCE >= num_images)
        file.write(b'], "annotations": [')
        for first in range(0, num_boxes, ROWS_AT_ONCE):
            rows = owners[first : first + ROWS_AT_ONCE]
            corners = [rng.integers(0, 40_000, len(rows)) / 100 for _ in range(4)]
            box = [part for side in corners for part in (text(side), ", ")][:-1]
            record = (
                *(
                    '{"id": ',
                    text(np.arange(first, first + len(rows))),
                    ', "image_id": ',
                    text(image_ids[rows]),
                ),
                *(', "category_id": ', text(rng.integers(1, NUM_CLASSES + 1, len(rows)))),
                *(', "bbox": [', *box, '], "area": ', text(np.round(corners[2] * corners[3], 4))),
                ', "iscrowd": 0, "segmentation": []}',
            )
            write_records(file, record, is_last=first + ROWS_AT_ONCE >= num_boxes)
        file.write(b"]}\n")
    return path.stat().st_size / 1e6


def text(values: np.ndarray[Any, Any]) -> pa.Array:
    return pc.cast(pa.array(values), pa.string())


def write_records(file: Any, parts: Sequence[pa.Array | str], *, is_last: bool) -> None:
    joined = pc.binary_join_element_wise(*parts, ", ", "").cast(pa.large_string())
    records = joined.buffers()[2].to_pybytes()
    records = records[: records.rindex(b"}") + 1]
    file.write(records if is_last else records + b", ")


def open_at_once(data: Path, cache: Path, num_processes: int) -> list[dict[str, float]]:
    """Open the data set in new processes at the same time."""
    environment = os.environ | {"DETR_DIST_CACHE": str(cache)}
    command = [sys.executable, __file__, "--open", str(data)]
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(num_processes)
    ]
    found = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        raise SystemExit("a process failed")
    return [json.loads(output) for output in found]


def open_data(folder: str) -> dict[str, float]:
    """Do what a process of a run does with its data at the start, and return seconds and memory in MB."""
    before, is_over = memory_mb(), threading.Event()
    peak = dict(before)

    def watch() -> None:
        while not is_over.wait(0.05):
            for kind, value in memory_mb().items():
                peak[kind] = max(value, peak[kind])

    watcher = threading.Thread(target=watch)
    watcher.start()
    started_at = time.perf_counter()
    data = load_data(folder, check_files=False)
    loaded_at = time.perf_counter()
    data.fingerprint()
    assert data.max_boxes_per_image > 0
    data.computed_once(repr(SETTINGS), partial(check_boxes, data, SETTINGS))
    ended_at = time.perf_counter()
    is_over.set()
    watcher.join()
    after = memory_mb()
    return {
        "load_s": loaded_at - started_at,
        "checks_s": ended_at - loaded_at,
        **{f"peak_{kind}_mb": max(peak[kind], after[kind]) - before[kind] for kind in ("rss", "anonymous")},
        **{f"{kind}_mb": after[kind] - before[kind] for kind in ("rss", "anonymous", "pss")},
    }


def memory_mb() -> dict[str, float]:
    """Return resident, anonymous and proportional memory; summing the last takes the system a moment."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="utf-8").splitlines()[1:]
    sizes = {
        name: int(value.split()[0]) / 1000 * 1.024 for name, value in (line.split(":") for line in lines)
    }
    return {"rss": sizes["Rss"], "anonymous": sizes["Anonymous"], "pss": sizes["Pss"]}


if __name__ == "__main__":
    main()
