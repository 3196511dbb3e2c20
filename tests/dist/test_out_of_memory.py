"""A device that runs out of memory during training ends all processes, each with a line about the reason."""

from pathlib import Path

import mlflow
import pytest

SCRIPT = Path(__file__).with_name("check_out_of_memory.py")


@pytest.mark.dist
@pytest.mark.slow
def test_out_of_memory_on_one_process_ends_all_with_the_reason(workplace, tiny_data: Path) -> None:
    finished = workplace.launch(
        SCRIPT,
        *("train", "--config", workplace.config, "--output-dir", "out"),
        *("--train-dir", tiny_data / "train", "--val-dir", tiny_data / "val"),
        num_processes=2,
    )
    assert finished.returncode == 1
    lines = [line for line in finished.stderr.splitlines() if "] error: " in line]
    assert len(lines) == 2, finished.stderr
    for line in lines:
        assert "out of memory" in line
        assert "training.gradient_checkpointing=true" in line
    store = mlflow.MlflowClient(f"sqlite:///{workplace.folder / 'mlflow.db'}")
    (run,) = store.search_runs([store.get_experiment_by_name("detr_training").experiment_id])
    assert run.info.status == "FAILED"
    assert "out of memory" in run.data.tags["error"]
