"""Measure the seconds from the command to the end of the first training step, by part.

    python scripts/benchmarks/start_up.py [--rounds 3] [--config configs/quickstart.yaml] [--json FILE]

Starts training as scripts/quickstart.sh does, on the same scenes, alternating without and with an existing
MLflow database. timed_start.py replaces train_detr.py and records the parts. The first round fills the page
cache and does not count. Goal: 10 s without the launcher and the imports.
"""

import os
import statistics
import tempfile
import time
from pathlib import Path

from timing import command_line, figures_of, publish

from detr_dist.data.synthetic import make_data

REPOSITORY = Path(__file__).parents[2]
NEW, KNOWN = "new MLflow database", "known one"


def start(folder: Path, config: Path) -> dict[str, float]:
    """Return the seconds of each part of one start."""
    parts_path = folder / "parts.json"
    parts_path.unlink(missing_ok=True)
    launch = f"accelerate launch --quiet --config_file {REPOSITORY / 'accelerate_configs' / 'cpu.yaml'}"
    options = f"--config {config} --train-dir data/train --val-dir data/val --output-dir out"
    options += " logging.mlflow_tracking_uri=sqlite:///mlflow.db"  # whatever MLFLOW_TRACKING_URI says
    command = [*launch.split(), str(Path(__file__).with_name("timed_start.py")), parts_path.name]
    threads = {"OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))}  # as in quickstart.sh
    command += [str(time.time()), *options.split()]
    return figures_of(command, parts_path, cwd=folder, env=threads | os.environ)


def measure(folder: Path, config: Path, rounds: int) -> dict[str, list[dict[str, float]]]:
    make_data(folder / "data", num_train=512, num_val=128, seed=0)
    starts: dict[str, list[dict[str, float]]] = {NEW: [], KNOWN: []}
    for number in range(1 + rounds):
        (folder / "mlflow.db").unlink(missing_ok=True)
        for each in starts.values():
            seconds = start(folder, config)
            if number > 0:
                each.append(seconds)
    return starts


def is_ours(part: str) -> bool:
    return part != "launcher" and not part.startswith("import ")


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--config", type=Path, default=REPOSITORY / "configs" / "quickstart.yaml")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        starts = measure(Path(folder), options.config.resolve(), options.rounds)
    parts = list(dict.fromkeys(part for each in starts.values() for seconds in each for part in seconds))
    rows = [
        {"part": part}
        | {way: statistics.median(seconds.get(part, 0.0) for seconds in each) for way, each in starts.items()}
        for part in sorted(parts, key=lambda part: (part != "launcher", is_ours(part)))
    ]
    sums: dict[str, float] = {}
    for way, each in starts.items():
        sums[f"all, {way}, s"] = statistics.median(sum(seconds.values()) for seconds in each)
        sums[f"ours, {way}, s"] = statistics.median(
            sum(took_s for part, took_s in seconds.items() if is_ours(part)) for seconds in each
        )
    goals = {name: "below 10" for name in sums if name.startswith("ours")}
    publish(rows, options.json, goals=goals, **sums)


if __name__ == "__main__":
    main()
