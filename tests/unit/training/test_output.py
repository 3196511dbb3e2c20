"""An output folder holds one run: files of another are set aside, and none of them is deleted."""

import json
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from harness.commands import REPOSITORY

from detr_dist.config import Config, EvaluationConfig, LoggingConfig
from detr_dist.data.coco import load_data
from detr_dist.data.sampling import StepPlan
from detr_dist.errors import CheckpointError, UsageError
from detr_dist.storage import check_writable
from detr_dist.tracking.pages import ways_to_see
from detr_dist.training.checkpoint import (
    NETWORK,
    Snapshot,
    newest_checkpoint,
    open_checkpoint,
    write_checkpoint,
)
from detr_dist.training.loop import TrainState
from detr_dist.training.output import RunTrackers, bring_best, check_output, leave_results, make_room

SnapshotAt = Callable[..., Snapshot]
RUN = {"checkpoints", "model", "models", "pictures", "tensorboard", "config.yaml", "results.json"}
OTHERS = {"mlflow.db", "notes"}


@pytest.fixture
def output_dir(tmp_path: Path, snapshot_at: SnapshotAt) -> Path:
    """Write the files of a run of two epochs, of which the first was better, and those of a user."""
    folder = tmp_path / "out"
    for names, step, closed_step in (
        (["epoch_1", "best"], 10, 10),
        (["step_20"], 20, 10),
        (["epoch_2", "last"], 20, 20),
    ):
        snapshot = snapshot_at(step, closed_step=closed_step, best_step=10)
        write_checkpoint(folder / "checkpoints", names, snapshot)
    for name in ("model", "models/epoch_2", "pictures/epoch_2", "tensorboard", "notes"):
        (folder / name).mkdir(parents=True)
        (folder / name / "content").write_text(name)
    for name in ("config.yaml", "results.json", "mlflow.db"):
        (folder / name).write_text(name)
    return folder


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def set_aside(output_dir: Path) -> Path:
    (folder,) = (output_dir / "earlier_runs").iterdir()
    return folder


def test_a_new_run_sets_the_earlier_run_aside_and_reports_it(
    output_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_room(output_dir, None)
    aside = set_aside(output_dir)
    assert names_in(output_dir) == OTHERS | {"earlier_runs"}
    assert names_in(aside) == RUN
    assert capsys.readouterr().out == f"{output_dir} held an earlier run: moved to {aside}\n"
    newest = newest_checkpoint(aside / "checkpoints")
    assert newest is not None
    assert newest.state.step == 20
    assert (aside / "results.json").read_text() == "results.json"


def test_an_empty_folder_has_nothing_to_set_aside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_room(tmp_path, None)
    assert names_in(tmp_path) == set()
    assert capsys.readouterr().out == ""


def test_runs_set_aside_in_the_same_second_do_not_mix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "strftime", lambda form: "now")
    for number in range(3):
        (tmp_path / "config.yaml").write_text(str(number))
        make_room(tmp_path, None)
    kept = {
        folder.name: (folder / "config.yaml").read_text() for folder in (tmp_path / "earlier_runs").iterdir()
    }
    assert kept == {"now": "0", "now_2": "1", "now_3": "2"}


USERS_OWN = (
    "checkpoints/mine/w.bin",
    "models/important/w.bin",
    "models/.cache.partial/w.bin",
    "pictures/holiday.jpg",
    "outbox/letter.txt",
    "stacks/notes.txt",
    "earlier_runs/mine.txt",
)


def write_files(folder: Path, names: Iterable[str]) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def test_user_files_next_to_a_run_stay_in_place(output_dir: Path) -> None:
    write_files(output_dir, USERS_OWN)
    check_output(output_dir)
    make_room(output_dir, None)
    assert all((output_dir / name).read_text() == name for name in USERS_OWN)
    aside = next(path for path in (output_dir / "earlier_runs").iterdir() if path.is_dir())
    assert names_in(aside) == RUN
    assert names_in(output_dir / "checkpoints") == {"mine"}


def test_user_files_among_checkpoints_stay_when_a_run_resumes(output_dir: Path) -> None:
    write_files(output_dir, USERS_OWN)
    make_room(output_dir, open_checkpoint(output_dir / "checkpoints" / "step_20"))
    assert all((output_dir / name).read_text() == name for name in USERS_OWN)


@pytest.mark.parametrize(
    "name",
    [
        "config.yaml",
        "results.json",
        "model/w.bin",
        "tensorboard/x",
        "checkpoints/best/x",
        "pictures/epoch_1/x",
    ],
)
def test_a_folder_with_files_that_a_run_would_overwrite_is_refused(name: str, tmp_path: Path) -> None:
    write_files(tmp_path, [*USERS_OWN, name])
    with pytest.raises(
        UsageError, match=f"--output-dir {tmp_path}: holds '{name.rpartition('/')[0] or name}'"
    ):
        check_output(tmp_path)
    assert all((tmp_path / each).read_text() == each for each in (*USERS_OWN, name))


def test_a_folder_with_other_files_is_accepted(tmp_path: Path) -> None:
    write_files(tmp_path, USERS_OWN)
    check_output(tmp_path)
    make_room(tmp_path, None)
    assert all((tmp_path / name).read_text() == name for name in USERS_OWN)
    check_output(tmp_path / "not there yet")


@pytest.mark.parametrize("trace", ["checkpoints/a/state.json", "outbox/x/run.json", "stacks/rank_0.txt", ""])
def test_any_trace_of_a_run_marks_an_output_folder(trace: str, tmp_path: Path) -> None:
    write_files(tmp_path, ["model/w.bin", "results.json", *([trace] if trace else [])])
    (tmp_path / "config.yaml").write_text("training: {seed: 1}" if trace else Config().to_yaml())
    check_output(tmp_path)


def test_a_resumed_run_sets_aside_newer_checkpoints_and_old_results(
    output_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_room(output_dir, open_checkpoint(output_dir / "checkpoints" / "step_20"))
    aside = set_aside(output_dir)
    assert names_in(output_dir / "checkpoints") == {"epoch_1", "best", "step_20"}
    assert names_in(aside) == {"checkpoints"}
    assert names_in(aside / "checkpoints") == {"epoch_2", "last"}  # closed their epoch, which is newer
    assert names_in(output_dir) == RUN - {"results.json"} | OTHERS | {"earlier_runs"}
    assert "newer than step 20" in capsys.readouterr().out


def test_a_run_resumed_from_its_newest_checkpoint_sets_nothing_aside(
    output_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(output_dir.parent)
    (output_dir.parent / "link").symlink_to(output_dir)
    make_room(output_dir, open_checkpoint(Path("link", "checkpoints", "last")))
    assert names_in(output_dir) == RUN - {"results.json"} | OTHERS
    assert capsys.readouterr().out == ""


def test_checkpoints_of_unknown_age_are_set_aside_as_incomplete(output_dir: Path) -> None:
    checkpoints_dir = output_dir / "checkpoints"
    (checkpoints_dir / "last" / "state.json").unlink()
    (checkpoints_dir / "epoch_9").mkdir()
    make_room(output_dir, open_checkpoint(checkpoints_dir / "epoch_2"))
    assert names_in(checkpoints_dir) == {"epoch_1", "best", "step_20", "epoch_2"}
    assert names_in(set_aside(output_dir) / "checkpoints") == {"last", "epoch_9"}


def test_a_run_resumed_from_elsewhere_sets_the_old_run_aside(output_dir: Path, tmp_path: Path) -> None:
    elsewhere = Path(shutil.copytree(output_dir / "checkpoints" / "last", tmp_path / "other" / "last"))
    make_room(output_dir, open_checkpoint(elsewhere))
    assert names_in(output_dir) == OTHERS | {"earlier_runs"}
    assert names_in(set_aside(output_dir)) == RUN


def test_a_run_resumed_from_elsewhere_keeps_only_its_own_outbox(output_dir: Path, tmp_path: Path) -> None:
    elsewhere = Path(shutil.copytree(output_dir / "checkpoints" / "last", tmp_path / "other" / "last"))
    resumed = open_checkpoint(elsewhere)
    run_id, of_another = str(resumed.facts.mlflow_run_id), "f" * 32
    for name in (run_id, of_another):
        (output_dir / "outbox" / name).mkdir(parents=True)
    make_room(output_dir, resumed)
    assert names_in(output_dir) == OTHERS | {"earlier_runs", "outbox"}
    assert names_in(output_dir / "outbox") == {run_id}
    assert names_in(set_aside(output_dir)) == RUN | {"outbox"}
    assert names_in(set_aside(output_dir) / "outbox") == {of_another}


def test_a_best_checkpoint_is_set_aside_with_its_model(output_dir: Path, snapshot_at: SnapshotAt) -> None:
    snapshot = snapshot_at(20, closed_step=20, best_step=20)
    write_checkpoint(output_dir / "checkpoints", ["epoch_2", "best", "last"], snapshot)
    make_room(output_dir, open_checkpoint(output_dir / "checkpoints" / "epoch_1"))
    assert "best" in names_in(set_aside(output_dir) / "checkpoints")
    assert not (output_dir / "model").exists()


def test_the_best_checkpoint_and_model_are_copied(output_dir: Path, tmp_path: Path) -> None:
    resumed = open_checkpoint(output_dir / "checkpoints" / "last")
    bring_best(tmp_path / "new", resumed, output_dir / "checkpoints" / "best", output_dir / "model")
    brought = open_checkpoint(tmp_path / "new" / "checkpoints" / "best")
    assert brought.state.step == 10
    torch.testing.assert_close(brought.network(), resumed.network(), rtol=0, atol=0)
    assert names_in(tmp_path / "new") == {"checkpoints", "model"}
    assert (tmp_path / "new" / "model" / "content").read_text() == "model"


def test_a_best_checkpoint_of_another_step_is_not_copied(output_dir: Path, tmp_path: Path) -> None:
    checkpoints_dir = output_dir / "checkpoints"
    with pytest.raises(
        CheckpointError, match=f"{checkpoints_dir / 'step_20'}: is of step 20, the best was 10"
    ):
        bring_best(
            tmp_path / "new",
            open_checkpoint(checkpoints_dir / "last"),
            checkpoints_dir / "step_20",
            output_dir / "model",
        )
    assert not (tmp_path / "new").exists()


def test_an_incomplete_best_checkpoint_is_not_copied(output_dir: Path, tmp_path: Path) -> None:
    best = output_dir / "checkpoints" / "best"
    resumed = open_checkpoint(output_dir / "checkpoints" / "last")
    (best / NETWORK).unlink()
    with pytest.raises(CheckpointError, match=str(best / NETWORK)):
        bring_best(tmp_path / "new", resumed, best, output_dir / "model")
    assert not (tmp_path / "new").exists()


def test_an_output_folder_is_created_or_refused(tmp_path: Path) -> None:
    check_writable("--output-dir", tmp_path / "deeper" / "out")
    assert names_in(tmp_path / "deeper" / "out") == set()
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UsageError, match=f"--output-dir {tmp_path / 'file'}: File exists"):
        check_writable("--output-dir", tmp_path / "file")


def test_the_results_are_printed_and_saved_with_the_location_of_the_run(
    tmp_path: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings, data = LoggingConfig(register_model_as="detector"), load_data(tiny_data / "train")
    setup = SimpleNamespace(
        output_dir=tmp_path,
        config=SimpleNamespace(logging=settings, evaluation=EvaluationConfig()),
        train_data=data,
        val_data=data,
        samples=None,
        plan=StepPlan(len(data), batch_size=2, num_processes=1, accumulation=1),
    )
    trackers = RunTrackers()
    address = "http://user:secret@server"
    trackers.mlflow = SimpleNamespace(
        run_id="abc",
        uri=address,
        register_model=lambda name, **facts: print(f"as {name}, {facts}"),
        ways_to_see=lambda: ways_to_see(address, "1", "abc", "a_view"),
    )
    (tmp_path / "model").mkdir()
    of_best = {"val_map": 0.5, "val_seconds": 9.0, "val_ball_map": 0.25, "val_ball_center_map": 0.75}
    metadata = {"metrics": of_best}
    (tmp_path / "model" / "MLmodel").write_text(json.dumps({"metadata": metadata}))
    metrics = {"val_map": 0.123456, "val_ball_map": 0.25, "val_loss": 2.0}
    state = TrainState(step=9, best_map=0.5, best_step=4, metrics=metrics)
    leave_results(setup, state, trackers)
    results = json.loads((tmp_path / "results.json").read_text())
    uri = results.pop("tracking_uri")
    source = {"annotations": str(data.annotations_path), "images": len(data), "samples": len(data)}
    epoch = {"steps": len(data) // 2, "samples": len(data), "sources": [source]}
    assert results == {"metrics": metrics, "run_id": "abc", "epoch": epoch}
    shown = capsys.readouterr().out
    table = [line.split() for line in shown.splitlines()[:4]]
    assert table[0] == ["class", "boxes", "AP", "precision", "recall", "f1", "threshold"]
    assert table[2] == ["ball", str(data.boxes_per_class[1]), "0.2500", *"----"]
    assert table[3] == ["all", "classes", str(data.boxes_per_class.sum()), "0.1235", *"----"]
    after_table = shown[shown.index("val_loss") :].splitlines()
    assert after_table[:3] == [
        "val_loss 2.0000",
        f"best model: {tmp_path / 'model'}, val_map 0.5000 at step 4",
        "as detector, "
        "{'epoch': 1, 'step': 4, 'classes': 'player, ball', 'val_map': 0.5, 'val_ball_map': 0.25}",
    ]
    assert "http://server/#/experiments/1/runs?viewStateShareKey=a_view&" in shown
    assert "secret" not in shown + uri


def test_an_output_folder_of_the_first_version_is_recognised(tmp_path: Path) -> None:
    written = REPOSITORY / "tests" / "data" / "version_0_1" / "out" / "config.yaml"
    (tmp_path / "config.yaml").write_bytes(written.read_bytes())
    (tmp_path / "tensorboard").mkdir()
    check_output(tmp_path)
    (tmp_path / "config.yaml").write_text("training: {seed: 1}")
    with pytest.raises(UsageError):
        check_output(tmp_path)
