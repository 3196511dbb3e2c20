"""Compare the CPU time in which one core makes samples of footage with each augmentation.

    python scripts/benchmarks/augmentation.py [--train-dir FOLDER] [section.key=value ...]

Without a folder, 16 generated scenes of 1280x720 are used. A sample is decoded, augmented and resized; the
recipe `detr` alone is what all others are compared with. Every round is another epoch, the same for all.
"""

import tempfile
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

import torch
from timing import command_line, median_ratio, medians, publish, take_turns

from detr_dist.config import load_config
from detr_dist.data.coco import CocoData, load_data
from detr_dist.data.dataset import training_dataset
from detr_dist.data.synthetic import View, make_data
from detr_dist.extensions import FOOTAGE

ALONE, PASTE = "detr", "data.copy_paste={classes: [ball]}"
WAYS = {
    ALONE: ["data.augmentation=detr"],
    **{name: [f"data.augmentation=[detr, {name}]"] for name in (*FOOTAGE, "photometric", "mosaic")},
    "footage": ["data.augmentation=footage"],
    "detr, copy_paste": ["data.augmentation=detr", PASTE],
    "footage, copy_paste": ["data.augmentation=footage", PASTE],
}


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--train-dir", type=Path, help="folder of images and a COCO JSON with a class ball")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if options.train_dir is None:
            make_data(Path(folder), num_train=16, num_val=1, view=View((1280, 720), (6, 10)))
        data = load_data(options.train_dir or Path(folder) / "train")
        ways = {name: epochs(data, [*own, *options.overrides]) for name, own in WAYS.items()}
        seconds = take_turns(ways, rounds=options.rounds, warm_up=1, stopwatch=lambda way: way())
    rows = [
        {
            "": name,
            "ms a sample": 1000 * took_s / len(data),
            f"times {ALONE} alone": median_ratio(seconds, name, ALONE),
        }
        for name, took_s in medians(seconds).items()
    ]
    publish(rows, options.json, images=len(data))


def epochs(data: CocoData, overrides: list[str]) -> Callable[[], float]:
    """Return a function that makes all samples of the next epoch, and returns its CPU seconds."""
    config = load_config(None, ["training.num_epochs=1000", *overrides])
    samples, epoch = training_dataset(data, config), count()

    def make() -> float:
        number, started_at = next(epoch), time.process_time()
        for row in range(len(data)):
            samples[number, row]
        return time.process_time() - started_at

    return make


if __name__ == "__main__":
    main()
