"""Training cleans up at its end, and only the main process connects to MLflow."""

import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("check_cleanup.py")


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("store", ["server", "database"])
def test_two_processes_clean_up_and_only_rank_0_connects_to_mlflow(
    workplace, mlflow_server, tiny_data: Path, store: str
) -> None:
    uri, asked = "sqlite:///mlflow.db", f"database {workplace.folder / 'mlflow.db'}"
    if store == "server":
        mlflow_server.start()
        uri, asked = mlflow_server.uri, f"port {mlflow_server.port}"
    finished = workplace.launch(
        SCRIPT,
        *("train", "--config", workplace.config, "--output-dir", "out"),
        *("--train-dir", tiny_data / "train", "--val-dir", tiny_data / "val"),
        *("data.num_workers=1", "logging.tensorboard=true", f"logging.mlflow_tracking_uri={uri}"),
        num_processes=2,
    )
    assert finished.returncode == 0, finished.stderr
    first, second = (json.loads((workplace.folder / f"left_{rank}.json").read_text()) for rank in (0, 1))
    assert asked in first["asked"]
    assert not [each for each in second["asked"] if each == asked or each.startswith("database")]
    for left in (first, second):
        del left["asked"]
        assert not any(left.values()), left
