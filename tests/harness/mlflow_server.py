"""A real MLflow server that can be killed."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from harness.commands import clean_environment, free_port


class MLflowServer:
    """`mlflow server` on its own port, with database and artifacts in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def client(self):
        from mlflow import MlflowClient

        return MlflowClient(self.uri)

    def start(self) -> None:
        """Start the server and wait until it answers."""
        if self._process is not None:
            return
        with (self.folder / "log").open("a") as log:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "mlflow", "server"),
                    *("--backend-store-uri", f"sqlite:///{self.folder / 'mlflow.db'}"),
                    *("--artifacts-destination", str(self.folder / "artifacts")),
                    *("--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"),
                ],
                cwd=self.folder,
                env=clean_environment() | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        deadline = time.monotonic() + 90
        while not self._answers():
            assert self._process.poll() is None, (self.folder / "log").read_text()
            assert time.monotonic() < deadline, (self.folder / "log").read_text()
            time.sleep(0.1)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def kill(self) -> None:
        """Kill the server and all its processes at once."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def num_steps(self, run_id: str) -> int:
        """Return the number of losses of a run in the database file, as the server may be unavailable."""
        with sqlite3.connect(f"file:{self.folder / 'mlflow.db'}?mode=ro", uri=True) as database:
            query = "SELECT COUNT(*) FROM metrics WHERE key = 'train_loss' AND run_uuid = ?"
            (number,) = database.execute(query, (run_id,)).fetchone()
        return int(number)

    def losses(self, run_id: str) -> list[tuple[int, float]]:
        history = self.client.get_metric_history(run_id, "train_loss")
        return sorted((entry.step, entry.value) for entry in history)

    def files(self, run_id: str, folder: str) -> dict[str, bytes]:
        """Return the files of an artifact folder, downloaded from the server."""
        target = self.folder / "downloads" / run_id
        target.mkdir(parents=True, exist_ok=True)
        there = Path(self.client.download_artifacts(run_id, folder, str(target)))
        return {
            str(path.relative_to(there)): path.read_bytes() for path in there.rglob("*") if path.is_file()
        }
