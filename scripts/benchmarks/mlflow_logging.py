"""What it costs the training thread to log 8 metrics: through the outbox, against a call of MLflow's client.

    python scripts/benchmarks/mlflow_logging.py [--steps 500] [--json]

Both log to a SQLite store in a temporary folder, in turns. The goal is 50 microseconds through the outbox.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from mlflow.entities import Metric

from detr_dist.config import LoggingConfig
from detr_dist.tracking.mlflow import MLflowTracker

GOAL_US = 50
NAMES = [f"metric_{number}" for number in range(8)]


def measure(folder: Path, steps: int) -> dict[str, float]:
    """Medians and 99th percentiles in microseconds."""
    tracker = MLflowTracker(LoggingConfig(mlflow_tracking_uri=f"sqlite:///{folder / 'mlflow.db'}"))
    tracker.open(folder / "outbox")
    direct = tracker.client.create_run(tracker.client.get_run(tracker.run_id).info.experiment_id).info.run_id
    work = torch.rand(512, 512)
    outbox_us, direct_us = [], []
    for step in range(1, steps + 1):
        values = dict.fromkeys(NAMES, step / 7)
        began_at = time.perf_counter()
        tracker.log(values, step=step)
        outbox_us.append((time.perf_counter() - began_at) * 1e6)
        if step % 10 == 0:
            began_at = time.perf_counter()
            metrics = [Metric(name, value, int(time.time() * 1000), step) for name, value in values.items()]
            tracker.client.log_batch(direct, metrics=metrics)
            direct_us.append((time.perf_counter() - began_at) * 1e6)
        torch.mm(work, work)  # a training step, of some milliseconds
    tracker.end("FINISHED")
    return {
        "outbox_us": statistics.median(outbox_us),
        "outbox_p99_us": statistics.quantiles(outbox_us, n=100)[98],
        "direct_us": statistics.median(direct_us),
        "goal_us": GOAL_US,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), options.steps)
    if options.json:
        print(json.dumps(figures))
        return
    tail = f"99 of 100 under {figures['outbox_p99_us']:.0f} us"
    print(f"through the outbox  {figures['outbox_us']:8.0f} us, {tail}")
    print(f"a direct call       {figures['direct_us']:8.0f} us")
    print(f"goal                {GOAL_US:8d} us")


if __name__ == "__main__":
    main()
