"""Compare how fast one core makes batches of JPEGs: ours, Pillow's decoding alone, and transformers' example.

    python scripts/benchmarks/loader.py [--images FOLDER] [--size-hw 720 1280] [--edges 800 1333]

Times are CPU seconds, which depend less on the load of the host. Ours augments with `light`. The example
(examples/pytorch/object-detection there) opens images with Pillow, flips and changes brightness and
contrast with albumentations if installed (otherwise it augments nothing and is faster), and resizes,
normalises and pads with DetrImageProcessor. Both run in a loader process. Pillow's speed varies, because
the C library may request new memory from the system for every image or keep what it has; each Pillow row
fixes this in its own process.
"""

import importlib.util
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from PIL import Image
from timing import command_line, median_ratio, medians, publish, take_turns
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as F
from transformers import DetrImageProcessor

from detr_dist.data.coco import CocoData, load_data
from detr_dist.data.dataset import Batch, CocoDetectionDataset, collate
from detr_dist.data.images import decode_reduced
from detr_dist.data.transforms import build_transform
from detr_dist.resize import Resize
from detr_dist.serving.decoding import decode_rgb

NUM_IMAGES, BATCH_SIZE = 32, 4
PILLOW, OURS, EXAMPLE = "Pillow, decode, new memory", "ours, all", "transformers' example, all"
PILLOW_LOOP = """
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


class ExampleDataset(Dataset[tuple[NDArray[np.uint8], dict[str, Any]]]):
    """Images and COCO annotations after the example's transform."""

    def __init__(self, data: CocoData) -> None:
        self.data = data
        self.augment = albumentations_transform()

    def __getitem__(self, row: int) -> tuple[NDArray[np.uint8], dict[str, Any]]:
        image = np.array(Image.open(self.data.image_path(row)).convert("RGB"))
        boxes, labels = self.data.training_targets(row)
        if self.augment is not None:
            made = self.augment(image=image, bboxes=boxes, category=labels)
            image, boxes, labels = made["image"], made["bboxes"], made["category"]
        annotations = [
            {"category_id": label, "bbox": list(box), "iscrowd": 0, "area": box[2] * box[3]}
            for box, label in zip(boxes, labels, strict=True)
        ]
        return image, {"image_id": row, "annotations": annotations}


def albumentations_transform() -> Callable[..., dict[str, Any]] | None:
    if importlib.util.find_spec("albumentations") is None:
        return None
    import albumentations as A

    chosen = [A.HorizontalFlip(p=0.5), A.RandomBrightnessContrast(p=0.5)]
    transform: Callable[..., dict[str, Any]] = A.Compose(
        chosen, bbox_params=A.BboxParams(format="coco", label_fields=["category"], clip=True)
    )
    return transform


class ExampleCollate:
    """The example's batch: float32 `pixel_values`, `pixel_mask` and `labels`."""

    def __init__(self, edges: tuple[int, int]) -> None:
        self.processor = DetrImageProcessor(size={"shortest_edge": edges[0], "longest_edge": edges[1]})

    def __call__(self, samples: Sequence[tuple[NDArray[np.uint8], dict[str, Any]]]) -> dict[str, Any]:
        images, annotations = zip(*samples, strict=True)
        return dict(self.processor(images=list(images), annotations=list(annotations), return_tensors="pt"))


class LoaderProcess:
    """A loader process that persists between rounds."""

    def __init__(self, dataset: Dataset[Any], keys: Sequence[Any], collate_fn: Callable[..., Any]) -> None:
        batches = [keys[first : first + BATCH_SIZE] for first in range(0, len(keys), BATCH_SIZE)]
        self._loader: DataLoader[Any] = DataLoader(
            dataset, batch_sampler=batches, num_workers=1, collate_fn=collate_fn, persistent_workers=True
        )
        others = set(multiprocessing.active_children())
        self.bytes_per_image = sum(map(num_bytes, self._loader)) / len(keys)
        (child,) = set(multiprocessing.active_children()) - others
        self._process = psutil.Process(child.pid)

    def seconds(self) -> float:
        """Return the CPU seconds of an epoch, including the transfer of batches through shared memory."""
        before = self._process.cpu_times()
        for _ in self._loader:
            pass
        after = self._process.cpu_times()
        return after.user + after.system - before.user - before.system


def num_bytes(batch: Batch | dict[str, Any]) -> int:
    """Return the bytes of a batch's images as sent to the device."""
    tensors: list[Tensor] = (
        [batch["pixel_values"], batch["pixel_mask"]] if isinstance(batch, dict) else [batch.images]
    )
    return sum(tensor.nbytes for tensor in tensors)


def main() -> None:
    options = parse_options()
    torch.set_num_threads(1)
    edges: tuple[int, int] = tuple(options.edges)
    with tempfile.TemporaryDirectory() as name, ExitStack() as children:
        folder = Path(name)
        paths = (
            sorted(options.images.glob("*.jp*g")) if options.images else write_photos(folder, options.size_hw)
        )
        data = write_data(folder, paths)
        transform = build_transform("light", Resize(*edges), train=True)
        ours = LoaderProcess(
            CocoDetectionDataset(data, transform, seed=0, train=True),
            [(0, i) for i in range(len(data))],
            collate,
        )
        example = LoaderProcess(ExampleDataset(data), range(len(data)), ExampleCollate(edges))
        ways = {
            PILLOW: pillow_process(children, paths, NEW_MEMORY),
            "Pillow, decode, kept memory": pillow_process(children, paths, KEPT_MEMORY),
            "ours, decode": lambda: processor_seconds(lambda path: decode_rgb(path), paths),
            **reduced_ways(data, paths, edges),
            EXAMPLE: example.seconds,
            OURS: ours.seconds,
        }
        seconds = take_turns(ways, rounds=options.rounds, warm_up=1, stopwatch=lambda way: way())
    sizes = {OURS: ours.bytes_per_image / 2**20, EXAMPLE: example.bytes_per_image / 2**20}
    rows = [
        {"": name, "images/s": len(paths) / took_s, "MiB to the device per image": sizes.get(name)}
        for name, took_s in medians(seconds).items()
    ]
    publish(
        rows,
        options.json,
        goals={"ours_to_example": "at least 2", "ours_to_pillow_decoding": f"at least {100 / 129:.3f}"},
        albumentations="installed" if albumentations_transform() else "not installed: nothing is augmented",
        ours_to_example=median_ratio(seconds, EXAMPLE, OURS),
        ours_to_pillow_decoding=median_ratio(seconds, PILLOW, OURS),
    )


def parse_options() -> Any:
    parser = command_line(__doc__)
    parser.add_argument("--images", type=Path, help="folder of JPEGs (default: generated)")
    parser.add_argument(
        "--size-hw", type=int, nargs=2, default=[720, 1280], help="size of the generated JPEGs"
    )
    parser.add_argument("--edges", type=int, nargs=2, default=[800, 1333], help="shortest_edge longest_edge")
    parser.add_argument("--rounds", type=int, default=7)
    return parser.parse_args()


def write_photos(folder: Path, size_hw: tuple[int, int]) -> list[Path]:
    """Write JPEGs of noise at many scales, as detailed as photographs."""
    height, width = size_hw
    rng = np.random.default_rng(0)
    paths = []
    for index in range(NUM_IMAGES):
        picture = np.zeros((height, width, 3), np.float32)
        for cell in (320, 80, 20, 5, 2):
            coarse = rng.integers(0, 256, (height // cell + 1, width // cell + 1, 3), dtype=np.uint8)
            octave = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
            picture += np.asarray(octave) * min(1, cell / 24)
        picture *= 255 / picture.max()
        paths.append(folder / f"{index:03d}.jpg")
        Image.fromarray(picture.astype(np.uint8)).save(paths[-1], quality=87)
    return paths


def write_data(folder: Path, paths: list[Path]) -> CocoData:
    """Write and return a data set of these images with eight boxes each."""
    boxes = [(i, [40 * j, 30 * j, 90, 60]) for i in range(len(paths)) for j in range(8)]
    annotations = [
        {"id": n, "image_id": i, "category_id": 1, "bbox": box} for n, (i, box) in enumerate(boxes, start=1)
    ]
    images = [{"id": i, "file_name": str(path.resolve())} for i, path in enumerate(paths)]
    document = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
    (folder / "annotations.json").write_text(json.dumps(document), encoding="utf-8")
    return load_data(folder)


def reduced_ways(data: CocoData, paths: list[Path], edges: tuple[int, int]) -> dict[str, Callable[[], float]]:
    """Return ways to decode and resize at full and at reduced scale; none if these images are not reduced."""
    needed_hw = Resize(*edges).size_hw(*data.size_hw(0))
    if decode_reduced(paths[0], data.size_hw(0), needed_hw) is None:
        return {}

    def shrink(image: Tensor | None) -> None:
        assert image is not None
        F.resize(image, list(needed_hw), antialias=True)

    def whole(path: Path) -> None:
        shrink(decode_rgb(path))

    def reduced(path: Path) -> None:
        shrink(decode_reduced(path, data.size_hw(0), needed_hw))

    return {
        "ours, decode, resize": lambda: processor_seconds(whole, paths),
        "ours, decode at a reduced scale, resize": lambda: processor_seconds(reduced, paths),
    }


def processor_seconds(action: Callable[[Path], object], paths: list[Path]) -> float:
    started_at = time.process_time()
    for path in paths:
        action(path)
    return time.process_time() - started_at


def pillow_process(children: ExitStack, paths: list[Path], memory: dict[str, str]) -> Callable[[], float]:
    """Return a function that decodes the images in a separate process and returns the seconds."""
    command = [sys.executable, "-c", PILLOW_LOOP, *map(str, paths)]
    child = children.enter_context(
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **memory}
        )
    )
    children.callback(child.communicate)  # it exits when its input is closed

    def seconds() -> float:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write("go\n")
        child.stdin.flush()
        return float(child.stdout.readline())

    return seconds


if __name__ == "__main__":
    main()
