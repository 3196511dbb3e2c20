"""A failure of one process ends the run in all: quickly, with one line each, and a non-zero code.

Most processes are started like those of a launcher on two hosts, by the variables in the environment. Where
the launcher itself matters, a real one is used.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist

pytestmark = [pytest.mark.dist, pytest.mark.slow]

REPOSITORY = Path(__file__).parents[2]
HOST = socket.gethostname()
PATIENCE_S = 300.0  # a limit on hangs, not a promise of speed: a shared CI host may be slow
LONG = ("training.num_epochs=100000", "evaluation.every_epochs=100000", "checkpoint.every_epochs=100000")
LIMITS = {"DETR_DIST_FORM_LIMIT_S": "8", "DETR_DIST_COLLECTIVE_LIMIT_S": "6"}


@dataclass
class Nodes:
    """Two processes of a run, each as on its own host, or one launcher of both."""

    workplace: object
    data: Path
    store: dist.TCPStore | None = None
    began_at: float = field(default_factory=time.monotonic)
    commands: list = field(default_factory=list)

    def log(self, node: int) -> str:
        path = self.workplace.folder / f"log_{node}"
        return path.read_text() if path.exists() else ""

    def errors(self, node: int) -> list[str]:
        return [line for line in self.log(node).splitlines() if "error:" in line]

    def arguments(self, *overrides: str, train_dir: Path | None = None) -> list[str | Path]:
        folders = ("--train-dir", train_dir or self.data / "train", "--val-dir", self.data / "val")
        config = ("--config", self.workplace.config, "--output-dir", "out")
        return ["train", *config, *folders, *LONG, *overrides]

    def start(self, node: int, *overrides: str, train_dir: Path | None = None, **environment: str) -> None:
        """Start the process of a node like a launcher, with a store in the process of the first node."""
        self.store = self.store or dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        launched = {
            "RANK": str(node),
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self.store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "ACCELERATE_USE_CPU": "true",
        }
        log = self.workplace.folder / f"log_{node}"
        arguments = self.arguments(*overrides, train_dir=train_dir)
        environment = launched | LIMITS | environment
        self.commands.append(
            self.workplace.server.start(arguments, self.workplace.folder, log, log, environment=environment)
        )

    def launch(self) -> None:
        """Start both processes with one launcher."""
        config = REPOSITORY / "accelerate_configs" / "multi_cpu.yaml"
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "MLFLOW_"))}
        environment |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"} | LIMITS
        with (self.workplace.folder / "log_0").open("w") as log:
            self.commands.append(
                subprocess.Popen(
                    [*command, "-m", "detr_dist", *map(str, self.arguments())],
                    cwd=self.workplace.folder,
                    env=environment,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )

    def wait_for_step(self) -> None:
        while not re.search(r"^step [3-9]", self.log(0), re.MULTILINE):
            assert all(command.poll() is None for command in self.commands), self.log(0) + self.log(1)
            assert time.monotonic() - self.began_at < PATIENCE_S, self.log(0) + self.log(1)
            time.sleep(0.05)
        self.began_at = time.monotonic()

    def codes(self) -> list[int]:
        """Return the exit codes of all, within their time limit."""
        return [command.wait(PATIENCE_S - (time.monotonic() - self.began_at)) for command in self.commands]

    def stacks(self, rank: int) -> str:
        return (self.workplace.folder / "out" / "stacks" / f"rank_{rank}.txt").read_text()


@pytest.fixture
def nodes(workplace, tiny_data: Path) -> Iterator[Nodes]:
    nodes = Nodes(workplace, tiny_data)
    yield nodes
    for command in nodes.commands:
        with suppress(psutil.NoSuchProcess):
            family = [psutil.Process(command.pid), *psutil.Process(command.pid).children(recursive=True)]
            for each in family if command.poll() is None else ():
                each.kill()


def status_of_the_run(nodes: Nodes) -> str:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{nodes.workplace.folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("detr_training")
    (run,) = client.search_runs([experiment.experiment_id])
    return str(run.info.status)


def test_a_process_that_dies_at_start_is_named_as_missing(nodes: Nodes) -> None:
    nodes.start(0)
    nodes.start(1, "training.nonsense=1")
    codes = nodes.codes()
    assert 0 not in codes
    (own,) = nodes.errors(1)
    assert "training.nonsense: unknown configuration key" in own
    (error,) = nodes.errors(0)
    assert f"1 of 2 processes are missing after 8 s: 1 (here: 0 on {HOST})" in error


@pytest.mark.parametrize("killed", [0, 1])
def test_a_process_killed_during_training_is_named_by_the_other(nodes: Nodes, killed: int) -> None:
    for node in (0, 1):
        nodes.start(node)
    nodes.wait_for_step()
    nodes.commands[killed].send_signal(signal.SIGKILL)
    codes = nodes.codes()
    assert codes[killed] == -signal.SIGKILL
    assert codes[1 - killed] == 1
    (error,) = nodes.errors(1 - killed)
    assert f"process {killed} ({HOST}) does not answer" in error
    assert re.search(rf"this is process {1 - killed} \(.*\) at step \d+, image ids \[\d+, ", error)
    assert f"out/stacks/rank_{1 - killed}.txt" in error
    assert "Current thread" in nodes.stacks(1 - killed)
    assert nodes.errors(killed) == []
    if killed == 1:
        assert status_of_the_run(nodes) == "FAILED"


def test_a_stopped_process_is_named_and_killed_by_the_launcher(nodes: Nodes) -> None:
    nodes.launch()
    nodes.wait_for_step()
    launcher = psutil.Process(nodes.commands[0].pid)
    workers = [each for each in launcher.children() if "train" in each.cmdline()]
    (second,) = [each for each in workers if each.environ()["RANK"] == "1"]
    second.suspend()
    assert nodes.codes() == [1]
    assert not any(each.is_running() for each in workers)
    (error,) = nodes.errors(0)
    assert error.startswith("[process 0] error: ")
    assert f"process 1 ({HOST}) does not answer" in error
    assert re.search(r"\bin fit\b", nodes.stacks(0))
    assert status_of_the_run(nodes) == "FAILED"


def test_a_hanging_process_is_named_and_ends_itself(nodes: Nodes, tmp_path: Path) -> None:
    first = sorted((nodes.data / "train").glob("*.jpg"))[0]
    data = tmp_path / "data"
    for path in (nodes.data / "train").iterdir():
        (data / "train").mkdir(parents=True, exist_ok=True)
        (data / "train" / path.name).hardlink_to(path)
    (data / "train" / first.name).unlink()
    os.mkfifo(data / "train" / first.name)  # opening it blocks until another process writes
    for node in (0, 1):
        nodes.start(node, train_dir=data / "train", DETR_DIST_COLLECTIVE_LIMIT_S="4")
    assert nodes.codes() == [1, 1]
    both = [nodes.errors(node) for node in (0, 1)]
    assert [len(errors) for errors in both] == [1, 1]
    (hung,) = [rank for rank in (0, 1) if " made no progress for 5 s" in both[rank][0].split(";")[0]]
    assert f"process {hung} ({HOST})" in both[1 - hung][0]
    assert f"this is process {1 - hung} " in both[1 - hung][0]
    assert "decod" in nodes.stacks(hung)
    assert "gather_rows" in nodes.stacks(1 - hung)


def test_missing_gpus_stop_all_processes_before_anything_is_loaded(nodes: Nodes) -> None:
    for node in (0, 1):
        nodes.start(node, ACCELERATE_USE_CPU="false", CUDA_VISIBLE_DEVICES="998,999")
    assert nodes.codes() == [2, 2]
    for node in (0, 1):
        (line,) = nodes.log(node).splitlines()
        assert line.startswith(f"[process {node}] error: CUDA_VISIBLE_DEVICES names 2 GPUs (998,999), but")


def test_missing_gpus_on_one_node_stop_the_other_node(nodes: Nodes) -> None:
    nodes.start(0)
    nodes.start(1, ACCELERATE_USE_CPU="false", CUDA_VISIBLE_DEVICES="999")
    assert nodes.codes() == [2, 2]
    (error,) = nodes.errors(0)
    assert f"process 1 ({HOST}) cannot take part: CUDA_VISIBLE_DEVICES names 1 GPUs (999), but" in error
