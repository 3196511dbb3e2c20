"""Files of version 0.1 are still read: a checkpoint, a model, an outbox (tests/data/version_0_1)."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from harness.commands import REPOSITORY
from mlflow import MlflowClient

WRITTEN = REPOSITORY / "tests" / "data" / "version_0_1"


@pytest.fixture
def earlier(workplace):
    """Return a workplace with a copy of the files of the earlier version."""
    shutil.copytree(WRITTEN, workplace.folder, dirs_exist_ok=True)
    return workplace


def test_an_earlier_checkpoint_is_resumed_in_its_own_folder(earlier) -> None:
    folders = (
        "--train-dir",
        "train",
        "--val-dir",
        "val",
        "--output-dir",
        "out",
        "--config",
        "out/config.yaml",
    )
    resumed = earlier.run(
        "train", *folders, "--resume", "auto", "training.max_steps=4", "logging.mlflow=false"
    )
    assert resumed.returncode == 0, resumed.stderr
    assert "at step 3, 6 samples seen" in resumed.stdout
    state = json.loads((earlier.folder / "out" / "checkpoints" / "last" / "state.json").read_text())
    assert state["step"] == 4


@pytest.mark.parametrize("model", ["out/model", "out/checkpoints/epoch_2"])
def test_an_earlier_model_or_checkpoint_keeps_its_score(earlier, model: str) -> None:
    evaluated = earlier.run("evaluate", "--model", model, "--data-dir", "val", "--report", "report.json")
    assert evaluated.returncode == 0, evaluated.stderr
    found = json.loads((earlier.folder / "report.json").read_text())["metrics"]
    if model == "out/model":  # the best one, of another epoch
        expected = yaml.safe_load((WRITTEN / model / "MLmodel").read_text())["metadata"]["metrics"]
    else:
        expected = json.loads((WRITTEN / "out" / "results.json").read_text())["metrics"]
    for name in ("val_loss", "val_loss_ce", "val_loss_bbox", "val_loss_giou", "val_map"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5), name  # float32 in another order


def test_an_earlier_outbox_is_delivered(earlier) -> None:
    uri = f"sqlite:///{earlier.folder / 'mlflow.db'}"
    client = MlflowClient(uri)
    run_id = client.create_run(client.create_experiment("earlier")).info.run_id
    outbox = Path(earlier.folder, "out", "outbox", run_id)
    outbox.mkdir(parents=True)
    shutil.copy(WRITTEN / "outbox" / "records.jsonl", outbox)
    (outbox / "run.json").write_text(json.dumps({"tracking_uri": uri, "run_id": run_id}))
    delivered = earlier.run("sync", "out")
    assert delivered.returncode == 0, delivered.stderr
    assert [metric.step for metric in client.get_metric_history(run_id, "train_loss")] == [1, 2, 3]
    assert client.get_run(run_id).info.status == "FINISHED"
