"""A run that is stopped or killed, and goes on as if it had not been."""

import shutil
import signal
import sqlite3
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

STEPS = 40
EVERYTHING_THAT_DRAWS_OR_REMEMBERS = (
    f"training.max_steps={STEPS}",
    "training.num_epochs=20",
    "training.batch_size=2",
    "training.gradient_accumulation_steps=2",
    "training.ema_decay=0.9",
    "training.lr_schedule=cosine",
    "training.warmup_steps=5",
    "model.dropout=0.1",
    "data.augmentation=detr",
    "data.num_workers=2",
    "evaluation.every_epochs=2",
    "checkpoint.every_steps=3",
    "checkpoint.keep_last=3",
)
PER_STEP = ("train_loss", "train_loss_ce", "train_loss_bbox", "train_loss_giou", "learning_rate", "epoch")
WEIGHTS = ("model.safetensors", "ema.safetensors")


def logged_step(workplace) -> int:
    """The last optimizer step that MLflow has a loss of, in its newest run that has any."""
    with sqlite3.connect(f"file:{workplace.folder / 'mlflow.db'}?mode=ro", uri=True) as database:
        (step,) = database.execute("SELECT MAX(step) FROM metrics WHERE key = 'train_loss'").fetchone()
    return step or 0


def wait_for_step(workplace, process: subprocess.Popen, step: int) -> None:
    deadline = time.monotonic() + 60
    while logged_step(workplace) < step:
        assert process.poll() is None, workplace.log
        assert time.monotonic() < deadline, workplace.log
        time.sleep(0.005)


def trainers(process: subprocess.Popen, num_processes: int) -> list[psutil.Process]:
    """The training processes, without launcher and loader processes, in the order of their start."""
    started = psutil.Process(process.pid)
    return [started] if num_processes == 1 else started.children()


def stop(process: subprocess.Popen, how: signal.Signals, num_processes: int) -> None:
    """End a run: SIGKILL takes everything at once, SIGUSR1 goes to the last training process alone, the
    others to what was started (a launcher passes them on)."""
    if how == signal.SIGKILL:
        started = psutil.Process(process.pid)
        for each in [started, *started.children(recursive=True)]:
            each.kill()
    elif how == signal.SIGUSR1:
        trainers(process, num_processes)[-1].send_signal(how)
    else:
        process.send_signal(how)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, new_workplace, tiny_data: Path):
    """By number of processes: a run from beginning to end."""
    places = {}

    def run(num_processes: int):
        if num_processes not in places:
            place = new_workplace(tmp_path_factory.mktemp(f"uninterrupted_{num_processes}"))
            finished = place.train(
                tiny_data, *EVERYTHING_THAT_DRAWS_OR_REMEMBERS, num_processes=num_processes
            )
            assert finished.returncode == 0, finished.stdout + finished.stderr
            places[num_processes] = place
        return places[num_processes]

    return run


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("num_processes", [1, pytest.param(2, marks=pytest.mark.dist)])
@pytest.mark.parametrize("kind", ["on request", "killed"])
def test_a_run_stopped_three_times_equals_the_uninterrupted_one_bit_by_bit(
    workplace, uninterrupted, tiny_data: Path, num_processes: int, kind: str
) -> None:
    hows = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1) if kind == "on request" else (signal.SIGKILL,) * 3
    resume = "auto"
    for step, how in zip((7, 13, 29), hows, strict=True):
        process = workplace.start(
            tiny_data, *EVERYTHING_THAT_DRAWS_OR_REMEMBERS, "--resume", resume, num_processes=num_processes
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
        tiny_data, *EVERYTHING_THAT_DRAWS_OR_REMEMBERS, "--resume", resume, num_processes=num_processes
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr

    assert newest_run(workplace).info.status == "FINISHED"
    whole = uninterrupted(num_processes)
    for metric in (*PER_STEP, "val_map"):
        assert workplace.history(metric) == whole.history(metric), metric
    assert [step for step, _ in workplace.history("train_loss")] == list(range(1, STEPS + 1))
    last, expected = (place.folder / "out" / "checkpoints" / "last" for place in (workplace, whole))
    for name in WEIGHTS:
        weights = load_file(last / name)
        for key, tensor in load_file(expected / name).items():
            assert torch.equal(weights[key], tensor), (name, key)
    assert workplace.results()["metrics"] == whole.results()["metrics"]
    assert (workplace.folder / "out" / "model" / "config.json").exists()


def newest_run(workplace):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{workplace.folder / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("detr_training").experiment_id])
    return run
