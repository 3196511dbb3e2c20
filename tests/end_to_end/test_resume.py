"""A run that is stopped or killed resumes with the same results as an uninterrupted run."""

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import yaml
from harness.data import TINY_OVERRIDES
from safetensors.torch import load_file
from transformers import ResNetBackbone, ResNetConfig

from detr_dist.training.checkpoint import _fingerprint, newest_checkpoint

STEPS = 40
RANDOM_AND_STATEFUL = (
    f"training.max_steps={STEPS}",
    "training.num_epochs=20",
    "training.batch_size=2",
    "training.gradient_accumulation_steps=2",
    "training.ema_decay=0.9",
    "training.ema_warmup_steps=20",
    "training.lr_schedule=flat_cosine",
    "training.lr_flat_share=0.1",
    "training.warmup_steps=5",
    "training.warmup=quadratic",
    "training.layer_decay=0.8",
    "model.dropout=0.1",
    "data.augmentation=detr",
    "data.tiles={size: 60, overlap: 0, min_visible: 0.8}",  # five windows of each validation image
    "data.num_workers=2",
    "evaluation.every_epochs=2",
    "checkpoint.every_steps=3",
    "checkpoint.keep_last=3",
)
PER_STEP = ("train_loss", "train_loss_ce", "train_loss_bbox", "train_loss_giou", "learning_rate", "epoch")
WEIGHTS = ("model.safetensors", "ema.safetensors")


def logged_step(workplace) -> int:
    """Return the last optimizer step with a loss in MLflow, of its newest run that has any."""
    with sqlite3.connect(f"file:{workplace.folder / 'mlflow.db'}?mode=ro", uri=True) as database:
        (step,) = database.execute("SELECT MAX(step) FROM metrics WHERE key = 'train_loss'").fetchone()
    return step or 0


def wait_for_step(workplace, process, step: int) -> None:
    wait_until(lambda: logged_step(workplace) >= step, process, workplace)


def wait_until(condition: Callable[[], bool], process, workplace) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, workplace.log
        assert time.monotonic() < deadline, workplace.log
        time.sleep(0.005)


def trainers(process, num_processes: int) -> list[psutil.Process]:
    """Return the training processes, without launcher and loader processes, in the order of their start."""
    started = psutil.Process(process.pid)
    return [started] if num_processes == 1 else started.children()


def stop(process, how: signal.Signals, num_processes: int) -> None:
    """End a run with a signal.

    SIGKILL ends all processes at once, SIGUSR1 is sent only to the last training process, the others to the
    started process (a launcher forwards them).
    """
    if how == signal.SIGKILL:
        started = psutil.Process(process.pid)
        for each in [started, *started.children(recursive=True)]:
            each.kill()
    elif how == signal.SIGUSR1:
        trainers(process, num_processes)[-1].send_signal(how)
    else:
        process.send_signal(how)


def newest_run(workplace):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{workplace.folder / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("detr_training").experiment_id])
    return run


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, new_workplace, tiny_data: Path):
    """Return an uninterrupted run for each number of processes."""
    places = {}

    def run(num_processes: int):
        if num_processes not in places:
            place = new_workplace(tmp_path_factory.mktemp(f"uninterrupted_{num_processes}"))
            finished = place.train(tiny_data, *RANDOM_AND_STATEFUL, num_processes=num_processes)
            assert finished.returncode == 0, finished.stdout + finished.stderr
            places[num_processes] = place
        return places[num_processes]

    return run


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("num_processes", "hows"),
    [
        pytest.param(1, (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1), id="one process, on request"),
        pytest.param(1, (signal.SIGKILL,) * 3, id="one process, killed"),
        pytest.param(
            2, (signal.SIGKILL, signal.SIGUSR1, signal.SIGTERM), marks=pytest.mark.dist, id="two processes"
        ),
    ],
)
def test_a_run_stopped_three_times_equals_an_uninterrupted_run_exactly(
    workplace, uninterrupted, tiny_data: Path, num_processes: int, hows: tuple[signal.Signals, ...]
) -> None:
    resume = "auto"
    for step, how in zip((7, 13, 29), hows, strict=True):
        process = workplace.start(
            tiny_data, *RANDOM_AND_STATEFUL, "--resume", resume, num_processes=num_processes
        )
        wait_for_step(workplace, process, step)
        stop(process, how, num_processes)
        process.wait(60)
        run = newest_run(workplace)
        if how != signal.SIGKILL:
            assert "asked to stop" in workplace.log
            assert run.info.status == "KILLED"
            if num_processes == 1:
                assert process.returncode == 75, workplace.log
        resume = "auto"
        if step == 13:  # from MLflow alone
            shutil.rmtree(workplace.folder / "out")
            resume = run.info.run_id
    finished = workplace.train(
        tiny_data, *RANDOM_AND_STATEFUL, "--resume", resume, num_processes=num_processes
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr

    assert newest_run(workplace).info.status == "FINISHED"
    complete = uninterrupted(num_processes)
    for metric in (*PER_STEP, "val_map", "val_f1", "val_loss"):
        assert workplace.history(metric) == complete.history(metric), metric
    assert [step for step, _ in workplace.history("train_loss")] == list(range(1, STEPS + 1))
    last, expected = (place.folder / "out" / "checkpoints" / "last" for place in (workplace, complete))
    for name in WEIGHTS:
        weights = load_file(last / name)
        for key, tensor in load_file(expected / name).items():
            assert torch.equal(weights[key], tensor), (name, key)
    assert workplace.results()["metrics"] == complete.results()["metrics"]
    assert (workplace.folder / "out" / "model" / "config.json").exists()


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("family", [name for name in TINY_OVERRIDES if name != "detr"])
def test_a_killed_run_of_each_family_resumes_exactly(workplace, tiny_data: Path, family: str) -> None:
    """They have denoising, groups of queries or two stages, and batch norm outside their backbones."""
    own = (*TINY_OVERRIDES[family], "training.max_steps=20", "logging.mlflow=false")
    settings = (*RANDOM_AND_STATEFUL, *own)
    finished = workplace.train(tiny_data, *settings, output="expected")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    process = workplace.start(tiny_data, *settings, "--resume", "auto")
    last = workplace.folder / "out" / "checkpoints" / "last"
    wait_until(lambda: newest_checkpoint(last.parent) is not None, process, workplace)
    stop(process, signal.SIGKILL, 1)
    process.wait(60)
    finished = workplace.train(tiny_data, *settings, "--resume", "auto")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "resuming from" in finished.stdout
    expected = workplace.folder / "expected" / "checkpoints" / "last"
    for name in WEIGHTS:
        weights = load_file(last / name)
        for key, tensor in load_file(expected / name).items():
            assert torch.equal(weights[key], tensor), (name, key)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(200)
def test_changing_num_processes_between_resumes_trains_the_same(workplace, tiny_data: Path) -> None:
    """Accumulate twice in one process: its micro-batches, and so its dropout, equal those of two."""
    splits = {2: "training.gradient_accumulation_steps=1", 1: "training.gradient_accumulation_steps=2"}
    common = ("training.num_epochs=4", "data.augmentation=detr", "model.freeze_batch_norm=true")
    finished = workplace.train(tiny_data, *common, splits[2], output="expected", num_processes=2)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    for num_processes, steps in ((2, 7), (1, 13), (2, 20)):  # of 20, five an epoch
        finished = workplace.train(
            tiny_data,
            *common,
            splits[num_processes],
            f"training.max_steps={steps}",
            "--resume",
            "auto",
            num_processes=num_processes,
        )
        assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "number of processes 1 -> 2" in finished.stdout
    assert "training.gradient_accumulation_steps 2 -> 1" in finished.stdout
    # Sums in another order: float32 rounding, nothing more.
    assert workplace.history("train_loss") == [
        (step, pytest.approx(value, rel=1e-4)) for step, value in workplace.history("train_loss", "expected")
    ]


def test_with_other_validation_data_the_best_score_is_reset(workplace, tiny_data: Path) -> None:
    quiet = ("logging.mlflow=false", "evaluation.every_epochs=1", "training.early_stopping_patience=2")
    assert workplace.train(tiny_data, *quiet).returncode == 0
    last = workplace.folder / "out" / "checkpoints" / "last"
    never_again = {"best_map": 0.99, "best_step": 10, "evaluations_since_best": 1}
    for name, change in (
        ("state.json", lambda: never_again),
        ("manifest.json", lambda: {"state.json": _fingerprint(last / "state.json")}),
    ):
        (last / name).write_text(json.dumps(json.loads((last / name).read_text()) | change()))
    shutil.rmtree(workplace.folder / "out" / "model")

    other = workplace.folder / "other"
    shutil.copytree(tiny_data, other)
    path = other / "val" / "_annotations.coco.json"
    document = json.loads(path.read_text())
    document["annotations"].pop()
    path.write_text(json.dumps(document))
    finished = workplace.train(other, *quiet, "--resume", "auto", "training.num_epochs=2")
    assert finished.returncode == 0, finished.stderr
    assert len([line for line in finished.stdout.splitlines() if "validation data" in line]) == 1
    state = json.loads((last / "state.json").read_text())
    assert state["best_map"] == state["metrics"]["val_map"] < 0.99
    assert (state["best_step"], state["evaluations_since_best"]) == (state["step"], 0)
    assert (workplace.folder / "out" / "model" / "config.json").exists()

    finished = workplace.train(other, *quiet, "--resume", "auto", "training.num_epochs=2")
    assert finished.returncode == 0, finished.stderr
    assert "changed since" not in finished.stdout


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_twenty_random_kills_always_leave_a_complete_checkpoint(workplace, tiny_data: Path) -> None:
    random = np.random.default_rng(0)
    overrides = (
        "training.max_steps=100000",
        "training.num_epochs=100000",
        "training.lr_schedule=constant",
        "evaluation.every_epochs=1",
        "checkpoint.every_steps=1",
        "checkpoint.keep_last=2",
        "logging.mlflow=false",
    )
    checkpoints_dir, resumed_at = workplace.folder / "out" / "checkpoints", 0
    for kill in range(20):
        process = workplace.start(tiny_data, *overrides, "--resume", "auto")
        wait_until(lambda step=resumed_at: saved_step(checkpoints_dir) > step, process, workplace)
        time.sleep(random.uniform(0, 0.5))
        stop(process, signal.SIGKILL, 1)
        process.wait(60)
        assert ("resuming from out/checkpoints/" in workplace.log) == (kill > 0)
        assert "skipped a corrupt checkpoint" not in workplace.log  # incomplete ones have no such name
        newest = newest_checkpoint(checkpoints_dir)
        assert newest is not None
        assert newest.state.step >= resumed_at
        resumed_at = newest.state.step
    assert resumed_at >= 20


def saved_step(checkpoints_dir: Path) -> int:
    return max((int(path.name.removeprefix("step_")) for path in checkpoints_dir.glob("step_*")), default=0)


def test_a_full_disk_is_reported_and_corrupts_no_checkpoint(
    workplace, tiny_data: Path, messages: list[str]
) -> None:
    disk = workplace.folder / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2500k", "tmpfs", disk], check=False)
    if mounted.returncode != 0:
        need = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        need("a small disk needs the right to mount one")
    try:
        finished = workplace.train(
            tiny_data, "training.num_epochs=3", "checkpoint.every_steps=3", output="disk/out"
        )
        newest = newest_checkpoint(disk / "out" / "checkpoints")
        leftovers = list(disk.rglob(".*"))
    finally:
        subprocess.run(["umount", disk], check=True)
    assert finished.returncode == 1
    (error,) = [line for line in finished.stderr.splitlines() if line.startswith("error:")]
    assert "could not be" in error
    assert "0 MiB free" in error
    assert "training continues" in finished.stdout
    assert "step 30/30" in finished.stdout
    assert messages == leftovers == []
    assert newest is not None
    assert newest.state.step in (6, 9)


@pytest.fixture(scope="module")
def stopped_early(tmp_path_factory: pytest.TempPathFactory, new_workplace, tiny_data: Path):
    """Finish a run of 12 steps, a little more than one epoch, with averaged weights."""
    place = new_workplace(tmp_path_factory.mktemp("stopped_early"))
    finished = place.train(
        tiny_data,
        "training.max_steps=12",
        "training.num_epochs=2",
        "training.ema_decay=0.9",
        "checkpoint.every_steps=5",
    )
    assert finished.returncode == 0, finished.stderr
    return place


@pytest.fixture
def copied(stopped_early, tmp_path: Path, command_server):
    """Return a copy of that run that may be changed. Its MLflow artifacts stay in place."""
    folder = Path(shutil.copytree(stopped_early.folder, tmp_path / "copy"))
    return type(stopped_early)(folder, command_server)


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink()  # `last` shares its files with another checkpoint
    path.write_bytes(content)


def test_a_checkpoint_with_a_flipped_byte_is_refused_and_skipped_by_auto(copied, tiny_data: Path) -> None:
    last = Path("out") / "checkpoints" / "last"
    flip_a_byte(copied.folder / last / "optimizer.pt")
    overrides = ("training.max_steps=12", "training.num_epochs=2", "training.ema_decay=0.9")
    refused = copied.train(tiny_data, *overrides, "--resume", str(last))
    assert refused.returncode == 1
    assert f"error: {last / 'optimizer.pt'}: not as it was written" in refused.stderr
    shutil.rmtree(copied.folder / "out" / "checkpoints" / "epoch_2")
    shutil.rmtree(copied.folder / "out" / "checkpoints" / "best")
    passed = copied.train(tiny_data, *overrides, "--resume", "auto")
    assert passed.returncode == 0, passed.stderr
    assert f"skipped a corrupt checkpoint: {last / 'optimizer.pt'}" in passed.stdout
    assert "step_10 at step 10, 40 samples seen" in passed.stdout


def test_an_incompatible_config_fails_with_one_error_that_names_the_keys(copied, tiny_data: Path) -> None:
    refused = copied.train(
        tiny_data,
        "training.max_steps=12",
        "training.num_epochs=3",
        "training.ema_decay=0.9",
        "training.seed=7",
        "training.batch_size=2",
        "model.num_queries=9",
        "--resume",
        "auto",
    )
    assert refused.returncode == 2
    (error,) = refused.stderr.splitlines()
    assert "training.seed 42 -> 7" in error
    assert "model.num_queries 8 -> 9" in error
    assert "training.gradient_accumulation_steps=2 keeps it" in error
    assert "num_epochs" not in error
    assert (copied.folder / "out" / "checkpoints" / "last").exists()


def test_a_finished_run_does_nothing_unless_it_gets_more_steps(copied, tiny_data: Path) -> None:
    overrides = ("training.num_epochs=2", "training.ema_decay=0.9", "--resume", "auto")
    again = copied.train(tiny_data, "training.max_steps=12", *overrides)
    assert again.returncode == 0, again.stderr
    assert "nothing left to do" in again.stdout
    assert {"val_map", "val_f1", "val_loss"} <= set(copied.results()["metrics"])
    more = copied.train(tiny_data, "training.max_steps=15", *overrides)
    assert more.returncode == 0, more.stderr
    assert "changed since: training.max_steps 12 -> 15" in more.stdout
    assert [step for step, _ in copied.history("train_loss")] == list(range(1, 16))
    assert newest_run(copied).data.tags["resumed_at_steps"] == "12"


def test_init_from_loads_the_averaged_weights_and_starts_a_new_run(copied, tiny_data: Path) -> None:
    run_id = copied.results()["run_id"]
    for number, source in enumerate(("out/checkpoints/last", f"runs:/{run_id}/model")):
        output = f"next_{number}"
        finished = copied.train(
            tiny_data,
            "training.max_steps=1",
            "training.learning_rate=1e-30",  # so that the saved weights equal the loaded ones
            "training.learning_rate_backbone=1e-30",
            "model.freeze_batch_norm=true",
            "--init-from",
            source,
            "--resume",
            "auto",  # no checkpoint yet: a scheduler repeats the command of the first start
            output=output,
        )
        assert finished.returncode == 0, finished.stderr
        assert copied.results(output)["run_id"] != run_id
        taken = load_file(copied.folder / output / "checkpoints" / "last" / "model.safetensors")
        averaged = load_file(copied.folder / "out" / "checkpoints" / "last" / "ema.safetensors")
        for key, tensor in taken.items():
            assert torch.allclose(tensor, averaged[key], atol=1e-6), key


def test_an_impossible_resume_fails_with_one_line(workplace, tiny_data: Path) -> None:
    for resume, part in (
        ("nowhere", "--resume nowhere: not an existing folder"),
        ("0" * 32, f"MLflow run {'0' * 32} is not available"),
        (f"runs:/{'0' * 32}/checkpoints/last", "cannot be fetched from MLflow"),
    ):
        finished = workplace.train(tiny_data, "--resume", resume)
        assert finished.returncode == 2
        (error,) = finished.stderr.splitlines()
        assert part in error
    both = workplace.train(tiny_data, "--resume", "out", "--init-from", "out")
    assert both.returncode == 2
    assert "leave one of them out" in both.stderr


def test_a_backbone_weights_file_is_needed_only_at_the_start(workplace, tiny_data: Path) -> None:
    backbone = yaml.safe_load(workplace.config.read_text())["model"]["backbone"]
    weights = ResNetBackbone(ResNetConfig(**backbone)).state_dict()
    torch.save(weights, workplace.folder / "r50.pth")
    settings = ("model.pretrained_backbone=r50.pth", "training.num_epochs=4")
    started = workplace.train(tiny_data, *settings, "training.max_steps=2")
    assert started.returncode == 0, started.stderr
    saved = load_file(workplace.folder / "out" / "checkpoints" / "last" / "model.safetensors")
    statistics = [
        name for name in saved if name.endswith("stages.3.layers.0.layer.1.normalization.running_var")
    ]
    assert [bool((saved[name] == 1).all()) for name in statistics] == [
        True
    ]  # frozen, as they were in the file
    (workplace.folder / "r50.pth").unlink()
    resumed = workplace.train(tiny_data, *settings, "training.max_steps=4", "--resume", "auto")
    assert resumed.returncode == 0, resumed.stderr
    assert workplace.history("train_loss")[-1][0] == 4
    assert "pretrained_backbone: r50.pth" in (workplace.folder / "out" / "config.yaml").read_text()
    evaluated = workplace.run("evaluate", "--model", "out/model", "--data-dir", tiny_data / "val")
    assert evaluated.returncode == 0, evaluated.stderr
    again = workplace.train(tiny_data, *settings, output="new")
    assert again.returncode == 2
    assert "model.pretrained_backbone r50.pth: no such file" in again.stderr


def test_patience_ends_a_run_and_is_kept_across_a_resume(workplace, tiny_data: Path) -> None:
    overrides = (
        "training.num_epochs=9",
        "training.early_stopping_patience=3",
        "training.learning_rate=1e-9",  # nothing gets better
        "evaluation.every_epochs=1",
    )
    first = workplace.train(tiny_data, *overrides, "training.max_steps=20")
    assert first.returncode == 0, first.stderr
    second = workplace.train(tiny_data, *overrides, "--resume", "auto")
    assert second.returncode == 0, second.stderr
    assert "ending early: 3 evaluations in a row" in second.stdout
    assert [step for step, _ in workplace.history("val_map")] == [10, 20, 30, 40]
    assert (workplace.folder / "out" / "checkpoints" / "epoch_4").exists()


@pytest.mark.dist
def test_a_killed_process_ends_the_other_and_corrupts_no_files(workplace, tiny_data: Path) -> None:
    process = workplace.start(
        tiny_data,
        "training.num_epochs=10000",
        "checkpoint.every_steps=1",
        "checkpoint.keep_last=2",
        num_processes=2,
    )
    wait_for_step(workplace, process, 3)
    family = psutil.Process(process.pid).children(recursive=True)
    trainers(process, 2)[1].kill()
    killed_at = time.monotonic()
    assert process.wait(60) != 0
    psutil.wait_procs(family, timeout=60 - (time.monotonic() - killed_at))
    assert not any(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in family)
    (error,) = [line for line in workplace.log.splitlines() if line.startswith("[process 0] error: ")]
    assert "process 1 (" in error
    assert "does not answer" in error
    assert newest_checkpoint(workplace.folder / "out" / "checkpoints") is not None
    assert newest_run(workplace).info.status == "FAILED"
