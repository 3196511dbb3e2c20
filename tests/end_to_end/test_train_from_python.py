"""Training from Python: equal to the command, repeatable in one process, and usable in a notebook."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from harness.commands import LIMIT_S, clean_environment, free_port
from mlflow import MlflowClient
from safetensors.torch import load_file
from transformers.utils.logging import get_verbosity, is_progress_bar_enabled

from detr_dist.config import Config
from detr_dist.errors import DetrDistError, UsageError
from detr_dist.training.callback import Callback
from detr_dist.training.trainer import dry_run, train

SETTINGS = ("training.max_steps=4", "training.num_epochs=2", "data.augmentation=light")

TRAINS_IN_ONE_PROCESS = """
import json, multiprocessing, os, signal, sys, threading
from detr_dist.config import Config
from detr_dist.training.callback import Callback
from detr_dist.training.trainer import train

data, settings = sys.argv[1], sys.argv[2:]

class Interrupts(Callback):
    def on_step(self, event):
        if event.step == 2:  # and a moment later, wherever the main thread then is
            threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
    def on_end(self, event):
        ends.append((event.status, type(event.error).__name__, event.result))

def run(output, *more, callbacks=()):
    config = Config.load("tiny.yaml", [*settings, *more])
    folders = {"train_dir": f"{data}/train", "val_dir": f"{data}/val", "output_dir": output}
    return train(config, **folders, callbacks=callbacks)

def traces():
    names = sorted(each.name for each in threading.enumerate())
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2
    return names, [*map(signal.getsignal, numbers)], dict(os.environ), len(multiprocessing.active_children())

ends, results, before = [], {}, traces()
try:
    run(
        "interrupted", "training.max_steps=100000", "training.num_epochs=100000", "data.num_workers=2",
        "training.mixed_precision=bf16", "training.gradient_accumulation_steps=2", callbacks=[Interrupts()],
    )
except KeyboardInterrupt:
    assert ends == [("KILLED", "KeyboardInterrupt", None)], ends
else:
    raise AssertionError("not interrupted")
assert traces() == before, (traces(), before)
results["first"] = run("first")
in_thread = threading.Thread(target=lambda: results.update(second=run("second", "data.num_workers=2")))
in_thread.start()
in_thread.join()
assert traces() == before, (traces(), before)
with open("results", "w") as file:
    json.dump({name: [r.metrics, r.run_id, str(r.model_dir)] for name, r in results.items()}, file)
"""

LAUNCHED_FROM_A_NOTEBOOK = """
import json, os, sys
from accelerate import notebook_launcher
from detr_dist.config import Config
from detr_dist.training.trainer import train

def train_here(data, settings):
    result = train(
        Config.load("tiny.yaml", settings), train_dir=f"{data}/train", val_dir=f"{data}/val", output_dir="out"
    )
    with open(f"result_{os.environ['RANK']}", "w") as file:
        json.dump([result.metrics, result.run_id], file)

notebook_launcher(train_here, (sys.argv[1], sys.argv[2:]), num_processes=2, use_port=os.environ["PORT"])
"""

OWN_CODE = """
import detr_dist.training.callback, detr_dist.tracking.tracker, os

class Counts(detr_dist.training.callback.Callback):
    num_steps = 0
    def on_step(self, event):
        self.num_steps += 1
    def on_evaluation(self, event):
        event.log_metrics({"found_per_image": len(event.detections.scores) / len(event.data)})
    def on_checkpoint(self, event):
        raise OSError("the copy failed")
    def on_end(self, event):
        with open("counted", "w") as file:
            print(event.status, self.num_steps, event.result.metrics["val_found_per_image"], file=file)

class Lines(detr_dist.tracking.tracker.Tracker):
    def log_metrics(self, metrics, step):
        with open("lines", "a") as file:
            print(step, *metrics, file=file)
"""


def run_script(
    folder: Path, script: str, *arguments: str | Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    (folder / "script.py").write_text(script)
    return subprocess.run(
        [sys.executable, "script.py", *map(str, arguments)],
        cwd=folder,
        env=clean_environment() | environment,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )


def assert_same_weights(first: Path, second: Path) -> None:
    for path in ("model/model.safetensors", "checkpoints/last/model.safetensors"):
        weights, others = load_file(first / path), load_file(second / path)
        assert weights.keys() == others.keys()
        assert all(torch.equal(weights[name], others[name]) for name in weights), path


@pytest.mark.timeout(LIMIT_S)
def test_training_from_python_equals_the_command_and_survives_ctrl_c(workplace, tiny_data: Path) -> None:
    finished = run_script(workplace.folder, TRAINS_IN_ONE_PROCESS, tiny_data, *SETTINGS)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == ""
    command = workplace.train(tiny_data, *SETTINGS, output="command")
    assert command.returncode == 0, command.stderr
    client, expected = (
        MlflowClient(f"sqlite:///{workplace.folder / 'mlflow.db'}"),
        workplace.results("command"),
    )
    results = json.loads((workplace.folder / "results").read_text())
    for name, (metrics, run_id, model_dir) in results.items():
        assert metrics == expected["metrics"]
        assert run_id == workplace.results(name)["run_id"]
        assert model_dir == f"{name}/model"
        assert client.get_run(run_id).info.status == "FINISHED"
        assert_same_weights(workplace.folder / "command", workplace.folder / name)
    runs = client.search_runs([client.get_experiment_by_name("detr_training").experiment_id])
    assert sorted(run.info.status for run in runs) == ["FINISHED"] * 3 + ["KILLED"]
    log = (workplace.folder / "first" / "logs" / "train.log").read_text()
    assert "evaluation after step 4" in log, "the log is complete without any handler"

    (workplace.folder / "own.py").write_text(OWN_CODE)
    own = ("training.callbacks=own.py:Counts", "training.extensions=own.py", "logging.trackers=own.py:Lines")
    resumed = workplace.train(
        tiny_data, *SETTINGS, "--resume", "auto", "training.max_steps=6", *own, output="first"
    )
    assert resumed.returncode == 0, resumed.stderr
    assert "callback Counts.on_checkpoint failed (OSError: the copy failed" in resumed.stdout
    assert workplace.results("first")["metrics"]["val_found_per_image"] == 8
    assert (workplace.folder / "counted").read_text() == "FINISHED 2 8.0\n"
    lines = (workplace.folder / "lines").read_text().splitlines()
    assert "6 val_found_per_image" in lines
    assert any(line.startswith("5 train_loss ") for line in lines)
    assert workplace.history("val_found_per_image", "first") == [(6, 8.0)]


@pytest.mark.dist
@pytest.mark.timeout(LIMIT_S)
def test_a_notebook_launches_two_processes(workplace, tiny_data: Path) -> None:
    finished = run_script(
        workplace.folder, LAUNCHED_FROM_A_NOTEBOOK, tiny_data, *SETTINGS, PORT=str(free_port())
    )
    assert finished.returncode == 0, finished.stderr
    first, second = (json.loads((workplace.folder / f"result_{rank}").read_text()) for rank in (0, 1))
    assert first == second
    assert first[0] == workplace.results()["metrics"]
    run = MlflowClient(f"sqlite:///{workplace.folder / 'mlflow.db'}").get_run(first[1])
    assert (run.info.status, run.data.tags["num_processes"]) == ("FINISHED", "2")


FAILS_AT_THE_START = """
from pathlib import Path
import detr_dist as dd

class Good(dd.Tracker):
    def close(self, status, error=None):
        Path("closed").write_text(f"{status}: {error}")

class Bad: ...

class NeedsOne(dd.Callback):
    def __init__(self, value): ...

def needs_boxes(example, rng):
    example.boxes.max()
    return example
"""


def start(workplace, data: Path, *overrides: str, run: Callable[..., object] = train) -> str:
    """Start a run in this process; return its error."""
    (workplace.folder / "at_the_start.py").write_text(FAILS_AT_THE_START)
    overrides = (*SETTINGS, "logging.mlflow=false", "training.tf32=false", *overrides)
    config = Config.load(workplace.config, overrides)
    folders = {"train_dir": data / "train", "val_dir": data / "val", "output_dir": workplace.folder / "out"}
    try:
        with pytest.raises(DetrDistError) as raised:
            run(config, **folders)
    finally:
        sys.modules.pop("at_the_start", None)
    return str(raised.value)


def test_a_failed_start_closes_the_trackers_and_restores_the_settings_of_torch_and_transformers(
    workplace, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workplace.folder)
    before = torch.backends.cudnn.allow_tf32, is_progress_bar_enabled(), get_verbosity()
    assert before[0]
    error = start(workplace, tiny_data, "logging.trackers=[at_the_start.py:Good, at_the_start.py:Bad]")
    assert "at_the_start.py:Bad is no tracker" in error
    assert (workplace.folder / "closed").read_text() == f"FAILED: UsageError: {error}"
    assert (torch.backends.cudnn.allow_tf32, is_progress_bar_enabled(), get_verbosity()) == before


@pytest.mark.parametrize(
    ("argument", "value"),
    [("config", "tiny.yaml"), ("callbacks", Callback()), ("callbacks", None), ("trackers", "own.py:Lines")],
)
def test_an_argument_of_another_type_is_named(tmp_path: Path, argument: str, value: object) -> None:
    folders = {"train_dir": "train", "val_dir": "val", "output_dir": tmp_path / "out"}
    with pytest.raises(UsageError, match=rf"^{argument}: .* is wanted, got "):
        train(**({"config": Config()} | folders | {argument: value}))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("loss.weights={centre: 1}", "loss.weights.centre: there is no part of the loss 'centre'"),
        ("training.callbacks=at_the_start.py:Absent", "training.callbacks: at_the_start.py:Absent cannot be"),
        ("logging.trackers=absent.Tracker", "logging.trackers: absent.Tracker cannot be imported"),
        (
            "training.callbacks=at_the_start.py:NeedsOne",
            "training.callbacks: at_the_start.py:NeedsOne() fail",
        ),
        ("logging.trackers=[at_the_start.py:Good, at_the_start.py:Bad]", "at_the_start.py:Bad is no tracker"),
        ("data.augmentation=at_the_start.py:needs_boxes", "at_the_start.py:needs_boxes failed on image"),
    ],
)
def test_a_dry_run_finds_a_mistake_in_users_code(
    workplace, tiny_data: Path, monkeypatch: pytest.MonkeyPatch, override: str, part: str
) -> None:
    monkeypatch.chdir(workplace.folder)
    error = start(workplace, tiny_data, "training.extensions=at_the_start.py", override, run=dry_run)
    assert part in error
    assert not (workplace.folder / "out").exists()
    assert not (workplace.folder / "closed").exists()
