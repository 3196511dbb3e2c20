"""Compare ways to find a small ball in footage at the same training time: mean and range over seeds.

    python scripts/benchmarks/small_objects.py --init-from models/quickstart/model --output-dir DIR
        [--seeds 0 1 2] [--only VARIANT ...] [--train-s 80] [--json FILE]

Generates scenes of 1280x720 with balls of 6 to 10 pixels, which are in 85 % of the scenes of `common` and in
20 % of those of `rare`. All runs start from the quickstart's network and train for the same CPU time on one
core: steps of all variants are measured first, in turns, and decide how many each may do. All are validated
on 50 other scenes of `common`.

What is complete in DIR is kept, so the same command continues. Two commands with different `--seeds` can run
at the same time once DIR/steps.json is there.
"""

import json
import math
import os
import re
import shutil
import statistics
import time
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timing import Row, command_line, medians, publish

import detr_dist as dd
from detr_dist.data.synthetic import View, make_data
from detr_dist.training.callback import StepEvent

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
SIZE_PX, BALL_PX = (1280, 720), (6, 10)
NUM_TRAIN, NUM_VAL = 400, 50
NO_BALL_SHARES = {"common": 0.15, "rare": 0.8}
NUM_TIMED, ROUNDS, WARM_UP = 4, 2, 1
METRICS = (
    "ball_recall",
    "ball_precision",
    "ball_map",
    "ball_map_25",
    "ball_center_map",
    "ball_recall_p95",
    "player_map",
)
COMMON = [
    "training.num_epochs=1000",
    "training.lr_schedule=constant",  # the variants have different numbers of epochs
    "training.learning_rate=5e-4",
    "training.learning_rate_backbone=5e-4",
    "training.warmup_steps=20",
    "training.ema_decay=0.98",
    "evaluation.every_epochs=1000",
    "evaluation.pictures=false",
    "checkpoint.every_epochs=1000",
    "data.num_workers=0",
    "logging.mlflow=false",
    "logging.tensorboard=false",
]


class Variant(NamedTuple):
    """What one row of the table trains on, and how."""

    train: str
    overrides: list[str]


def full(height: int, width: int, batch_size: int) -> list[str]:
    """Return the settings that resize full images to this size."""
    sides = [f"data.shortest_edge={height}", f"data.longest_edge={width}"]
    return ["data.resize=rectangle", *sides, f"training.batch_size={batch_size}"]


TILES = ["data.resize=square", "data.shortest_edge=256", "data.tiles={size: 256}", "training.batch_size=8"]
PASTE = "data.copy_paste={classes: [ball], most: 2}"
# Batch sizes that make steps take similar times
VARIANTS = {
    "full, 256x448": Variant("common", full(256, 448, 8)),
    "full, 736x1280": Variant("common", full(736, 1280, 1)),
    "tiles": Variant("common", TILES),
    "tiles, copy_paste": Variant("common", [*TILES, PASTE]),
    "tiles, class_weights": Variant("common", [*TILES, "loss.class_weights={ball: 2}"]),
    "rare, tiles": Variant("rare", TILES),
    "rare, tiles, repeat_rare": Variant("rare", [*TILES, "data.repeat_rare=0.8"]),
}


class Stopwatch(dd.Callback):
    """Records the CPU time of this process at the end of each step."""

    def __init__(self) -> None:
        self.at_s: list[float] = []

    def on_step(self, event: StepEvent) -> None:
        """Record the time."""
        self.at_s.append(time.process_time())


def prepare(folder: Path) -> None:
    """Make the scenes, unless they are there."""
    for seed, (name, share) in enumerate(NO_BALL_SHARES.items(), start=1):
        if not (folder / name).exists():
            num_val = NUM_VAL if name == "common" else 1
            view = View(SIZE_PX, BALL_PX, share)
            make_data(folder / name, num_train=NUM_TRAIN, num_val=num_val, seed=seed, view=view)


def train(
    first: str, folder: Path, name: str, variant: Variant, num_steps: int, *, val_dir: Path, seed: int = 0
) -> tuple[dict[str, float], list[float]]:
    """Train into the folder `name`; return the metrics, and the CPU time at the end of each step."""
    overrides = [*COMMON, *variant.overrides, f"training.max_steps={num_steps}", f"training.seed={seed}"]
    watch = Stopwatch()
    shutil.rmtree(folder / name, ignore_errors=True)
    found = dd.train(
        dd.Config.load(CONFIG, overrides),
        train_dir=folder / variant.train / "train",
        val_dir=val_dir,
        output_dir=folder / name,
        init_from=first,
        callbacks=[watch],
    )
    return found.metrics, watch.at_s


def timed(first: str, folder: Path) -> dict[str, float]:
    """Return the CPU seconds of a step of each variant: medians of steps in several rounds."""
    path = folder / "steps.json"
    if not path.exists():
        seconds = defaultdict(list)
        for _ in range(ROUNDS):
            for name, variant in VARIANTS.items():
                val_dir = folder / "rare" / "val"
                num_steps = 1 + WARM_UP + NUM_TIMED
                _, at_s = train(first, folder, f"timed_{os.getpid()}", variant, num_steps, val_dir=val_dir)
                seconds[name] += [end - start for start, end in pairwise(at_s)][WARM_UP:]
        path.write_text(json.dumps(medians(seconds), indent=2), encoding="utf-8")
    found: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
    return found


def run(first: str, folder: Path, name: str, seed: int, num_steps: int) -> None:
    """Train a variant with a seed, unless that is complete, and write its metrics."""
    safe = re.sub(r"\W+", "_", name)
    path = folder / "runs" / f"{safe}_{seed}.json"
    if path.exists():
        return
    val_dir = folder / "common" / "val"
    metrics, at_s = train(
        first, folder, f"networks/{safe}_{seed}", VARIANTS[name], num_steps, val_dir=val_dir, seed=seed
    )
    step_s = (at_s[-1] - at_s[0]) / (len(at_s) - 1)
    result = {"name": name, "seed": seed, "steps": len(at_s), "train_s": step_s * len(at_s), **metrics}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=2), encoding="utf-8")


def summary(runs: list[dict[str, Any]]) -> list[Row]:
    """Return a row of each variant: the mean of each metric over its seeds, the smallest and the largest."""
    rows = []
    for name in VARIANTS:
        found = [each for each in runs if each["name"] == name]
        if found:
            row = {"variant": name, "seeds": len(found), "steps": found[0]["steps"]}
            row["CPU s"] = statistics.mean(each["train_s"] for each in found)
            for metric in METRICS:
                values = [each.get(f"val_{metric}", 0.0) for each in found]
                row[metric] = f"{statistics.mean(values):.3f} ({min(values):.3f}-{max(values):.3f})"
            rows.append(row)
    return rows


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--output-dir", type=Path, required=True, help="keeps data, networks and results")
    parser.add_argument("--init-from", required=True, help="the model of scripts/quickstart.sh")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=[*VARIANTS], default=[*VARIANTS], metavar="VARIANT")
    parser.add_argument("--train-s", type=float, default=80, help="CPU seconds of training of each run")
    options = parser.parse_args()
    torch.set_num_threads(1)
    first, folder = options.init_from, options.output_dir
    prepare(folder)
    num_steps = {name: math.ceil(options.train_s / step_s) for name, step_s in timed(first, folder).items()}
    for seed in options.seeds:
        for name in options.only:
            run(first, folder, name, seed, num_steps[name])
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((folder / "runs").glob("*.json"))]
    publish(summary(runs), options.json)


if __name__ == "__main__":
    main()
