"""Compare the cost of logging 8 metrics through the outbox with a direct call of MLflow's client.

    python scripts/benchmarks/tracking.py [--steps 500] [--json FILE]

Both alternate and log to a SQLite store in a temporary folder. Goal: 50 microseconds through the outbox.
"""

import itertools
import statistics
import tempfile
import time
from pathlib import Path

import torch
from mlflow.entities import Metric
from timing import command_line, publish, take_turns

from detr_dist.config import LoggingConfig
from detr_dist.tracking.mlflow import MLflowTracker

NAMES = [f"metric_{number}" for number in range(8)]
LOGS_PER_ROUND = 10  # through the outbox; a direct call takes longer than all of these


def measure(folder: Path, steps: int) -> dict[str, list[float]]:
    """Return the seconds of every call."""
    tracker = MLflowTracker(LoggingConfig(mlflow_tracking_uri=f"sqlite:///{folder / 'mlflow.db'}"))
    tracker.open(folder / "outbox")
    direct = tracker.client.create_run(tracker.client.get_run(tracker.run_id).info.experiment_id).info.run_id
    work = torch.rand(512, 512)
    step = itertools.count(1)

    def through_the_outbox() -> None:
        number = next(step)
        tracker.log_metrics(dict.fromkeys(NAMES, number / 7), number)

    def directly() -> None:
        now, number = int(time.time() * 1000), next(step)
        metrics = [Metric(name, number / 7, now, number) for name in NAMES]
        tracker.client.log_batch(direct, metrics=metrics)

    def training_step() -> None:  # takes some milliseconds
        torch.mm(work, work)

    ways = {"direct": directly}
    for number in range(LOGS_PER_ROUND):
        ways |= {f"outbox {number}": through_the_outbox, f"step {number}": training_step}
    seconds = take_turns(ways, rounds=steps // LOGS_PER_ROUND)
    tracker.close("FINISHED")
    through = [values for name, values in seconds.items() if name.startswith("outbox")]
    return {
        "through the outbox": list(itertools.chain.from_iterable(through)),
        "a direct call": seconds["direct"],
    }


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--steps", type=int, default=500)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        seconds = measure(Path(folder), options.steps)
    rows = [
        {
            "way": way,
            "median_us": 1e6 * statistics.median(values),
            "p99_us": 1e6 * statistics.quantiles(values, n=100)[98],
        }
        for way, values in seconds.items()
    ]
    publish(rows, options.json, goals={"outbox_us": "50"}, outbox_us=rows[0]["median_us"])


if __name__ == "__main__":
    main()
