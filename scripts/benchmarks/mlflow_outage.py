"""Measure the cost of an MLflow outage: a real server is killed in the middle of a run.

    python scripts/benchmarks/mlflow_outage.py [--outage 60] [--json FILE]

Trains the quickstart's network on generated scenes, logs every step and sends MLflow a model at every epoch
of 8 steps. Prints the median step time before and during the outage, and whether the server has every value
exactly once at the end.
"""

import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from timing import command_line, publish

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
BEFORE_S = 30
NUM_SCENES, BATCH = 64, 8


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


class Server:
    """`mlflow server` on loopback."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._port = free_port()
        self.uri = f"http://127.0.0.1:{self._port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the server and wait until it answers."""
        store = ("--backend-store-uri", f"sqlite:///{self._folder / 'mlflow.db'}")
        artifacts = ("--artifacts-destination", str(self._folder / "artifacts"))
        address = ("--host", "127.0.0.1", "--port", str(self._port), "--workers", "1")
        with (self._folder / "server.log").open("a", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server", *store, *artifacts, *address],
                env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        wait_until(self._answers)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def kill(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit("timed out after two minutes")
        time.sleep(0.1)


def noted_losses(output_dir: Path) -> list[tuple[int, int]]:
    """Return step and time in milliseconds of every loss in the outbox."""
    noted = []
    for path in output_dir.glob("outbox/*/records.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            record = json.loads(line) if line.endswith("\n") else {}
            if record.get("kind") == "metrics" and "train_loss" in record["values"]:
                noted.append((record["step"], record["at_ms"]))
    return noted


def measure(folder: Path, outage_s: float) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the steps before and during the outage, and the other results."""
    make_data = ("make-data", "data", "--num-train", str(NUM_SCENES), "--num-val", "8")
    subprocess.run([sys.executable, "-m", "detr_dist", *make_data], cwd=folder, check=True)
    server = Server(folder)
    try:
        server.start()
        command = f"""train --config {CONFIG} --train-dir data/train --val-dir data/val --output-dir out
            training.batch_size={BATCH} training.num_epochs=100000 evaluation.every_epochs=100000
            checkpoint.every_epochs=100000 logging.log_every_steps=1
            logging.mlflow_tracking_uri={server.uri}"""
        with (folder / "train.log").open("w", encoding="utf-8") as log:
            training = subprocess.Popen(
                [sys.executable, "-m", "detr_dist", *command.split()],
                cwd=folder,
                stdout=log,
                stderr=log,
                # One core for training, the other for the server.
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
        wait_until(lambda: len(noted_losses(folder / "out")) > 20)
        time.sleep(BEFORE_S)
        went_at = time.time() * 1000
        server.kill()
        time.sleep(outage_s)
        came_at = time.time() * 1000
        server.start()
        time.sleep(5)
        training.send_signal(signal.SIGTERM)  # save, deliver and end
        training.wait(120)
        noted = noted_losses(folder / "out")
        spans = [(later[1], later[1] - earlier[1]) for earlier, later in pairwise(noted[10:])]
        before = [span for at, span in spans if at < went_at]
        during = [span for at, span in spans if went_at < at < came_at]
        (run_dir,) = (folder / "out" / "outbox").iterdir()
        client = MlflowClient(server.uri)
        there = Counter(entry.step for entry in client.get_metric_history(run_dir.name, "train_loss"))
        models = {item.path for item in client.list_artifacts(run_dir.name, "models")}
        epochs = {f"models/epoch_{epoch}" for epoch in range(1, noted[-1][0] // (NUM_SCENES // BATCH) + 1)}
        rows = [
            {"when": when, "steps": len(each), "median_ms": statistics.median(each)}
            for when, each in (("before", before), ("during", during))
        ]
        facts = {
            "ratio": statistics.median(during) / statistics.median(before),
            "each_step_once": there == Counter(step for step, _ in noted),
            "num_models": len(models),
            "each_model_there": models == epochs,
        }
        return rows, facts
    finally:
        server.kill()


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--outage", type=float, default=60, help="length of the outage in seconds")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows, facts = measure(Path(folder), options.outage)
    publish(rows, options.json, **facts)


if __name__ == "__main__":
    main()
