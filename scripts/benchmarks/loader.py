"""How fast one core loads, decodes, augments (`light`) and resizes JPEGs, beside Pillow's decoding alone.

All are timed in one run, in turns, by the processor time that they take, so that a busy machine counts less.
The goal is 100 images/s where Pillow's decoding alone does 129, a ratio of 0.775.

Pillow has two speeds, and chance decides which: the C library may ask the system for new memory for every
picture, as it did where the 129 was measured, or keep what it has. Each row fixes that, in its own process.

    python scripts/benchmarks/loader.py [--images FOLDER_OF_JPEGS] [--json out.json]
"""

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image
from torch.utils.data import DataLoader

from detr_dist.data.batching import Sample, collate
from detr_dist.data.coco import load_coco
from detr_dist.data.dataset import CocoDetectionDataset
from detr_dist.data.decoding import decode_rgb
from detr_dist.data.transforms import build_transform

HEIGHT, WIDTH, GOAL = 720, 1280, 100 / 129
REFERENCE, OURS = "Pillow, decode, new memory", "ours, all, in a loader process"
PILLOW = """
import sys, time
from PIL import Image
for line in sys.stdin:
    started_at = time.process_time()
    for path in sys.argv[1:]:
        Image.open(path).convert("RGB")
    print(time.process_time() - started_at, flush=True)
"""
NEW_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "131072"}
KEPT_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "1000000000", "MALLOC_TRIM_THRESHOLD_": "1000000000"}


def main() -> None:
    options = parse_options()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        paths = sorted(options.images.glob("*.jp*g")) if options.images else write_photos(Path(folder), 32)
        dataset = make_dataset(Path(folder), paths)
        loader = start_loader(dataset, len(paths))
        with (
            pillow_process(paths, NEW_MEMORY) as pillow,
            pillow_process(paths, KEPT_MEMORY) as keeping_pillow,
        ):
            rates = measure(
                options.rounds,
                {
                    REFERENCE: lambda: ask_for_seconds(pillow),
                    "Pillow, decode, kept memory": lambda: ask_for_seconds(keeping_pillow),
                    "ours, decode": lambda: decoding_seconds(paths),
                    OURS: lambda: loader_seconds(loader),
                },
                len(paths),
            )
            pillow.communicate()
            keeping_pillow.communicate()
    report(rates, options.json)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, help="folder of JPEGs to use instead of generated ones")
    parser.add_argument(
        "--rounds", type=int, default=7, help="times that every row is measured; the median counts"
    )
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    return parser.parse_args()


def write_photos(folder: Path, num_images: int) -> list[Path]:
    """Noise of many scales, with as much detail in a JPEG as a photograph has."""
    rng = np.random.default_rng(0)
    paths = []
    for index in range(num_images):
        picture = np.zeros((HEIGHT, WIDTH, 3), np.float32)
        for cell in (320, 80, 20, 5, 2):
            coarse = rng.integers(0, 256, (HEIGHT // cell + 1, WIDTH // cell + 1, 3), dtype=np.uint8)
            octave = Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
            picture += np.asarray(octave) * min(1, cell / 24)
        picture *= 255 / picture.max()
        paths.append(folder / f"{index:03d}.jpg")
        Image.fromarray(picture.astype(np.uint8)).save(paths[-1], quality=87)
    return paths


def make_dataset(folder: Path, paths: list[Path]) -> CocoDetectionDataset:
    boxes = [(i, [40 * j, 30 * j, 90, 60]) for i in range(len(paths)) for j in range(8)]
    annotations = [
        {"id": n, "image_id": i, "category_id": 1, "bbox": box} for n, (i, box) in enumerate(boxes, start=1)
    ]
    images = [{"id": i, "file_name": str(path.resolve())} for i, path in enumerate(paths)]
    document = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
    (folder / "annotations.json").write_text(json.dumps(document))
    transform = build_transform("light", 800, 1333, train=True)
    return CocoDetectionDataset(load_coco(folder), transform, seed=0, train=True)


def measure(rounds: int, rows: dict[str, Callable[[], float]], num_images: int) -> dict[str, float]:
    """Images per second of processor time, the median of all rounds."""
    rates: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(rounds):
        for name, seconds in rows.items():
            rates[name].append(num_images / seconds())
    return {name: statistics.median(values) for name, values in rates.items()}


def pillow_process(paths: list[Path], memory: dict[str, str]) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", PILLOW, *map(str, paths)]
    environment = {**os.environ, **memory}
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )


def ask_for_seconds(child: "subprocess.Popen[str]") -> float:
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write("go\n")
    child.stdin.flush()
    return float(child.stdout.readline())


def decoding_seconds(paths: list[Path]) -> float:
    started_at = time.process_time()
    for path in paths:
        decode_rgb(path)
    return time.process_time() - started_at


def start_loader(dataset: CocoDetectionDataset, num_images: int) -> "DataLoader[Sample]":
    """One loader process, warmed up, that stays between rounds."""
    keys = [[(0, i) for i in range(first, num_images, 4)] for first in range(4)]
    loader = DataLoader(
        dataset, batch_sampler=keys, num_workers=1, collate_fn=collate, persistent_workers=True
    )
    loader_seconds(loader)
    return loader


def loader_seconds(loader: "DataLoader[Sample]") -> float:
    """Of the loader process, for one epoch; that includes handing the batches over through shared memory."""
    batches = iter(loader)
    (child,) = multiprocessing.active_children()
    before = psutil.Process(child.pid).cpu_times()
    for _ in batches:
        pass
    after = psutil.Process(child.pid).cpu_times()
    return after.user + after.system - before.user - before.system


def report(rates: dict[str, float], json_path: Path | None) -> None:
    reference = rates[REFERENCE]
    for name, rate in rates.items():
        print(f"{name:32s} {rate:7.1f} images/s   {rate / reference:5.2f} of Pillow")
    ratio = rates[OURS] / reference
    print(f"ratio {ratio:.3f}, goal {GOAL:.3f}: {'reached' if ratio >= GOAL else 'missed'}")
    if json_path:
        json_path.write_text(
            json.dumps({"images_per_s": rates, "ratio": ratio, "goal": GOAL}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
