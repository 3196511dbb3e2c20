"""Several runs that open, create and change one MLflow store at the same time."""

import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, TEMPORARILY_UNAVAILABLE

from detr_dist.tracking.store import unless_busy

FOUR_RUNS_AT_ONCE = """
import multiprocessing, sys
from detr_dist.config import LoggingConfig
from detr_dist.tracking.mlflow import MLflowTracker
from detr_dist.tracking.artifacts import register_artifact

def run(uri):
    tracker = MLflowTracker(LoggingConfig(mlflow_tracking_uri=uri, mlflow_experiment_name="sweep"))
    register_artifact(tracker.client, "players", tracker.run_id, "model")

fork = multiprocessing.get_context("fork")
for uri in sys.argv[1:]:
    runs = [fork.Process(target=run, args=(uri,)) for _ in range(4)]
    for each in runs:
        each.start()
    for each in runs:
        each.join()
    assert [each.exitcode for each in runs] == [0] * 4, uri
"""


def test_four_runs_that_start_together_can_use_a_new_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uris = [f"sqlite:///{tmp_path / 'mlflow.db'}", (tmp_path / "mlruns").as_uri()]
    command = [sys.executable, "-c", FOUR_RUNS_AT_ONCE, *uris]
    finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)
    assert finished.returncode == 0, finished.stderr
    for uri in uris:
        client = MlflowClient(uri)
        assert sorted(each.name for each in client.search_experiments()) == ["Default", "sweep"]
        runs = client.search_runs([client.get_experiment_by_name("sweep").experiment_id])
        tags = client.get_experiment_by_name("sweep").tags
        assert len([name for name in tags if name.startswith("mlflow.sharedViewState.")]) == 1
        versions = client.search_model_versions("name = 'players'")
        assert sorted(int(each.version) for each in versions) == [1, 2, 3, 4]
        assert sorted(each.run_id for each in versions) == sorted(run.info.run_id for run in runs)


def test_a_busy_database_is_retried_and_a_refusal_is_not() -> None:
    answers = [MlflowException("database is locked", TEMPORARILY_UNAVAILABLE)] * 3 + ["answer"]

    def request() -> object:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert unless_busy(request) == "answer"
    answers[:] = [MlflowException("no", INVALID_PARAMETER_VALUE), "answer"]
    with pytest.raises(MlflowException, match="no"):
        unless_busy(request)
