"""`detr-dist prune` deletes old checkpoints and epoch models on request, and nothing else."""

import json
import signal
import time
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, new_workplace, tiny_data: Path):
    """Train four epochs with a checkpoint each, of which the newest three are kept."""
    place = new_workplace(tmp_path_factory.mktemp("pruned"))
    finished = place.train(
        tiny_data,
        "training.num_epochs=4",
        "checkpoint.every_epochs=1",
        "checkpoint.keep_last=3",
        "logging.log_every_steps=10",
    )
    assert finished.returncode == 0, finished.stderr
    return place


def checkpoints(place) -> set[str]:
    return {path.name for path in (place.folder / "out" / "checkpoints").iterdir()}


def artifacts(place, path: str, run_id: str | None = None) -> set[str]:
    client = MlflowClient(f"sqlite:///{place.folder / 'mlflow.db'}")
    return {item.path for item in client.list_artifacts(run_id or place.results()["run_id"], path)}


def test_a_run_keeps_the_configured_number_of_checkpoints(place) -> None:
    assert checkpoints(place) == {"best", "last", "epoch_2", "epoch_3", "epoch_4"}
    assert artifacts(place, "checkpoints") == {
        f"checkpoints/{name}" for name in ("best", "last", "epoch_2", "epoch_3", "epoch_4")
    }
    assert artifacts(place, "models") == {"models/epoch_2", "models/epoch_3", "models/epoch_4"}


def test_without_delete_it_only_lists_what_it_would_delete(place) -> None:
    before = checkpoints(place), artifacts(place, "models")
    listed = place.run("prune", "out", "--keep-last", "2")
    assert listed.returncode == 0, listed.stderr
    run_id = place.results()["run_id"]
    lines = listed.stdout.splitlines()
    assert {line.split("MiB")[1].strip() for line in lines[:-1]} == {
        "out/checkpoints/epoch_2", f"runs:/{run_id}/checkpoints/epoch_2", f"runs:/{run_id}/models/epoch_2"
    }  # fmt: skip
    assert "3 folders" in lines[-1]
    assert "nothing is deleted without --delete" in lines[-1]
    assert (checkpoints(place), artifacts(place, "models")) == before


def test_the_remaining_checkpoints_and_models_load_and_resume(place, tiny_data: Path) -> None:
    run_id = place.results()["run_id"]
    in_mlflow = place.run("prune", run_id, "--keep-last", "2", "--delete")
    assert in_mlflow.returncode == 0, in_mlflow.stderr
    assert artifacts(place, "models") == {"models/epoch_3", "models/epoch_4"}
    assert checkpoints(place) == {"best", "last", "epoch_2", "epoch_3", "epoch_4"}
    everywhere = place.run("prune", "out", "--experiment", "detr_training", "--delete")
    assert everywhere.returncode == 0, everywhere.stderr
    assert artifacts(place, "models") == {"models/epoch_4"}
    assert artifacts(place, "checkpoints") == {f"checkpoints/{n}" for n in ("best", "last", "epoch_4")}
    assert checkpoints(place) == {"best", "last", "epoch_4"}
    mlflow.set_tracking_uri(f"sqlite:///{place.folder / 'mlflow.db'}")
    for path in ("model", "models/epoch_4"):
        assert mlflow.pytorch.load_model(f"runs:/{run_id}/{path}") is not None
    resumed = place.train(tiny_data, "training.num_epochs=5", "--resume", run_id)
    assert resumed.returncode == 0, resumed.stderr
    assert "at step 40" in resumed.stdout


def test_prune_of_a_rewound_run_deletes_abandoned_epochs_and_keeps_newest(workplace, tiny_data: Path) -> None:
    overrides = ("training.num_epochs=4", "checkpoint.every_epochs=1", "logging.log_every_steps=10")
    first = workplace.train(tiny_data, *overrides)
    assert first.returncode == 0, first.stderr
    back = workplace.train(
        tiny_data, *overrides, "training.max_steps=30", "--resume", "out/checkpoints/epoch_2"
    )
    assert back.returncode == 0, back.stderr
    assert "models/epoch_4" in artifacts(workplace, "models")
    pruned = workplace.run("prune", workplace.results()["run_id"], "--keep-last", "2", "--delete")
    assert pruned.returncode == 0, pruned.stderr
    assert artifacts(workplace, "models") == {"models/epoch_2", "models/epoch_3"}
    assert artifacts(workplace, "checkpoints") == {
        f"checkpoints/{name}" for name in ("best", "last", "epoch_2", "epoch_3")
    }


def test_a_run_resumed_in_the_middle_of_an_epoch_has_nothing_to_prune(workplace, tiny_data: Path) -> None:
    overrides = ("training.batch_size=2", "training.num_epochs=4", "checkpoint.every_epochs=1")
    cut_short = workplace.train(tiny_data, *overrides, "training.max_steps=24")  # of 20 steps an epoch
    assert cut_short.returncode == 0, cut_short.stderr
    resumed = workplace.start(tiny_data, *overrides, "--resume", "auto")
    log = workplace.folder / "log"
    while not log.exists() or "step 25/80" not in log.read_text():
        assert resumed.poll() is None, log.read_text()
        time.sleep(0.01)
    resumed.send_signal(signal.SIGTERM)  # saves `last`, and no model
    assert resumed.wait(timeout=60) == 75
    (run_id,) = [path.name for path in (workplace.folder / "out" / "outbox").iterdir()]
    assert artifacts(workplace, "models", run_id) == {"models/epoch_1", "models/epoch_2"}
    pruned = workplace.run("prune", run_id, "--keep-last", "2")
    assert pruned.returncode == 0, pruned.stderr
    assert "models/" not in pruned.stdout


def test_a_run_named_in_several_ways_is_pruned_once(workplace, tiny_data: Path) -> None:
    trained = workplace.train(tiny_data, "training.num_epochs=2", "checkpoint.every_epochs=1")
    assert trained.returncode == 0, trained.stderr
    run_id = workplace.results()["run_id"]
    names = ("out", "./out", run_id, run_id, "--experiment", "detr_training")
    pruned = workplace.run("prune", *names, "--delete")
    assert pruned.returncode == 0, pruned.stderr
    *lines, total = pruned.stdout.splitlines()
    assert [line.split("MiB")[1].strip() for line in lines] == [
        "out/checkpoints/epoch_1", f"runs:/{run_id}/checkpoints/epoch_1", f"runs:/{run_id}/models/epoch_1"
    ]  # fmt: skip
    assert total.startswith("3 folders")


def test_a_failed_deletion_is_reported_and_the_rest_is_deleted(workplace) -> None:
    checkpoints_dir = workplace.folder / "out" / "checkpoints"
    for number in range(1, 5):
        (checkpoints_dir / f"epoch_{number}").mkdir(parents=True)
        state = {"step": number, "closed_step": number}
        (checkpoints_dir / f"epoch_{number}" / "state.json").write_text(json.dumps(state))
    (checkpoints_dir / ".epoch_2.removed").write_text("no folder, and in the way")
    pruned = workplace.run("prune", "out", "--delete")
    assert pruned.returncode == 1
    (error,) = pruned.stderr.splitlines()
    assert error.startswith("error: out/checkpoints/epoch_2 could not be deleted (")
    assert checkpoints(workplace) == {"epoch_2", "epoch_4", ".epoch_2.removed"}
    assert pruned.stdout.splitlines()[-1].startswith("2 folders")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((), "nothing to prune"),
        (("no_such_folder",), "neither an existing folder nor an MLflow run id"),
        (("empty",), "holds neither checkpoints nor an outbox"),
        (("0" * 32,), "is not available at"),
        (("--experiment", "none"), "there is none of that name"),
    ],
)
def test_a_wrong_target_fails_with_one_line(workplace, arguments: tuple[str, ...], complaint: str) -> None:
    (workplace.folder / "empty").mkdir()
    finished = workplace.run("prune", *arguments)
    assert finished.returncode == 2
    (error,) = finished.stderr.splitlines()
    assert complaint in error
