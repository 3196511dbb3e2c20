"""What goes wrong on one machine ends the run on all: soon, with one line each, and a non-zero code.

Two processes stand for two machines. Most are started as a launcher would start them, by what it sets in the
environment; where it is the launcher that matters there are two of them.
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
PATIENCE_S = 90.0
LONG = ("training.num_epochs=100000", "evaluation.every_epochs=100000", "checkpoint.every_epochs=100000")
LIMITS = {"DETR_DIST_FORM_LIMIT_S": "8", "DETR_DIST_SILENCE_LIMIT_S": "5"}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@dataclass
class Nodes:
    """Two machines that are one, each with one training process or one launcher of such."""

    workplace: object
    data: Path
    port: int = 0
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
        """The process of a machine, as a launcher starts it: with a store in that of the first machine."""
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

    def launch(self, node: int, *options: str) -> None:
        """The launcher of a machine."""
        self.port = self.port or free_port()
        config = REPOSITORY / "accelerate_configs" / "multi_node.yaml"
        machine = ("--machine_rank", str(node), "--main_process_port", str(self.port), *options)
        command = [sys.executable, "-m", "detr_dist.launch", "--config_file", str(config), *machine]
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "MLFLOW_"))}
        environment |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"} | LIMITS
        with (self.workplace.folder / f"log_{node}").open("w") as log:
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
        """How all ended, within the time they have."""
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
    assert nodes.errors(0) == [
        f"[process 0] error: 1 of 2 processes are missing after 8 s: 1 (here: 0 on {HOST}); see what their "
        "machines say, or raise DETR_DIST_FORM_LIMIT_S if they are slow to start"
    ]


@pytest.mark.parametrize("killed", [0, 1])
def test_a_process_that_is_killed_in_the_middle_is_named_by_the_other(nodes: Nodes, killed: int) -> None:
    for node in (0, 1):
        nodes.start(node)
    nodes.wait_for_step()
    nodes.commands[killed].send_signal(signal.SIGKILL)
    codes = nodes.codes()
    assert codes[killed] == -signal.SIGKILL
    assert codes[1 - killed] == 1
    (error,) = nodes.errors(1 - killed)
    lost = rf"lost contact: process {killed} \({re.escape(HOST)}, last at step \d+\) has ended without a word"
    assert re.search(rf"{lost}; this is process {1 - killed} \(.*\) at step \d+, image ids \[\d+, ", error)
    assert f"out/stacks/rank_{1 - killed}.txt" in error
    assert "Current thread" in nodes.stacks(1 - killed)
    assert nodes.errors(killed) == []
    if killed == 1:
        assert status_of_the_run(nodes) == "FAILED"


def test_a_process_that_is_stopped_is_named_and_killed_on_its_machine(nodes: Nodes) -> None:
    for node in (0, 1):
        nodes.launch(node)
    nodes.wait_for_step()
    launcher = psutil.Process(nodes.commands[1].pid)
    (worker,) = [each for each in launcher.children() if "train" in each.cmdline()]
    worker.suspend()
    codes = nodes.codes()
    assert 0 not in codes, codes
    lost = (
        rf"lost contact: process 1 \({re.escape(HOST)}, last at step \d+\) has given no sign of life for 5 s"
    )
    (error,) = nodes.errors(0)
    assert re.search(rf"^\[process 0\] error: {lost}; this is process 0", error)
    first, second = nodes.errors(1)
    assert re.search(rf"^\[process 1\] error: {lost}; that is this process, which is killed now$", first)
    assert second == f"error: process 1 on {HOST} was ended by SIGKILL"
    assert " in fit" in nodes.stacks(0)
    assert status_of_the_run(nodes) == "FAILED"


def test_processes_that_are_all_stopped_for_longer_than_the_limit_go_on(nodes: Nodes) -> None:
    for node in (0, 1):
        nodes.start(node, DETR_DIST_SILENCE_LIMIT_S="4")
    nodes.wait_for_step()
    both = [psutil.Process(command.pid) for command in nodes.commands]
    everything = [*both, *(child for each in both for child in each.children(recursive=True))]
    assert len(everything) >= 4, "each has a guard"
    for each in everything:
        each.suspend()
    time.sleep(6)
    for each in everything:
        each.resume()
    time.sleep(6)
    assert [command.poll() for command in nodes.commands] == [None, None]
    for command in nodes.commands:
        command.send_signal(signal.SIGTERM)
    assert nodes.codes() == [75, 75]


def test_a_process_that_hangs_but_lives_makes_all_write_their_stacks(nodes: Nodes, tmp_path: Path) -> None:
    first = sorted((nodes.data / "train").glob("*.jpg"))[0]
    data = tmp_path / "data"
    for path in (nodes.data / "train").iterdir():
        (data / "train").mkdir(parents=True, exist_ok=True)
        (data / "train" / path.name).hardlink_to(path)
    (data / "train" / first.name).unlink()
    os.mkfifo(data / "train" / first.name)  # to open it takes until somebody writes
    for node in (0, 1):
        nodes.start(node, train_dir=data / "train", DETR_DIST_COLLECTIVE_LIMIT_S="4")
    assert nodes.codes() == [1, 1]
    both = [nodes.errors(node) for node in (0, 1)]
    assert [len(errors) for errors in both] == [1, 1]
    waited = r"process (\d) \(.*\) at step \d+, image ids \[.*\] has waited 4 s in vain for another"
    (waiting,) = {re.search(waited, errors[0]).group(1) for errors in both}
    assert "decod" in nodes.stacks(1 - int(waiting))
    assert "all_gather" in nodes.stacks(int(waiting)) or "explain" in nodes.stacks(int(waiting))


def test_gpus_that_are_not_there_stop_all_processes_before_anything_is_loaded(nodes: Nodes) -> None:
    for node in (0, 1):
        nodes.start(node, ACCELERATE_USE_CPU="false", CUDA_VISIBLE_DEVICES="998,999")
    assert nodes.codes() == [2, 2]
    for node in (0, 1):
        (line,) = nodes.log(node).splitlines()
        assert line.startswith(f"[process {node}] error: CUDA_VISIBLE_DEVICES names 2 GPUs (998,999), but")


def test_guards_do_not_take_orders_from_strangers_and_show_nobody_their_token(nodes: Nodes) -> None:
    for node in (0, 1):
        nodes.start(node)
    nodes.wait_for_step()
    guards = [psutil.Process(command.pid).children()[0] for command in nodes.commands]
    assert all("token" not in " ".join(guard.cmdline()) for guard in guards)
    (port,) = {each.laddr.port for each in guards[0].net_connections() if each.status == "LISTEN"}
    with socket.create_connection(("127.0.0.1", port)) as stranger:
        stranger.sendall(b'{"token": "guessed", "rank": 1, "gone": true}\n')
        stranger.settimeout(5)
        assert stranger.recv(1) == b""
    time.sleep(3)
    assert [command.poll() for command in nodes.commands] == [None, None]
    for command in nodes.commands:
        command.send_signal(signal.SIGTERM)
    assert nodes.codes() == [75, 75]


def test_gpus_that_are_missing_on_one_machine_stop_the_other(nodes: Nodes) -> None:
    nodes.start(0)
    nodes.start(1, ACCELERATE_USE_CPU="false", CUDA_VISIBLE_DEVICES="999")
    assert nodes.codes() == [2, 2]
    (error,) = nodes.errors(0)
    assert f"process 1 ({HOST}) cannot take part: CUDA_VISIBLE_DEVICES names 1 GPUs (999), but" in error


@pytest.mark.parametrize(
    ("ranks", "said"),
    [
        ((0, 2), "--machine_rank 2 on .*: with 2 machines it is 0 to 1"),
        ((1, 1), "machine 0 did not answer at 127.0.0.1:"),
    ],
)
def test_a_wrong_machine_rank_is_said_on_all_machines(
    nodes: Nodes, ranks: tuple[int, int], said: str
) -> None:
    nodes.launch(ranks[0])
    nodes.launch(ranks[1])
    assert 0 not in nodes.codes()
    for rank in set(ranks):
        lines = nodes.log(rank).splitlines()
        assert lines
        assert all(re.match(f"error: {said}", line) for line in lines), lines


def test_a_port_in_use_is_said_on_all_machines(nodes: Nodes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        nodes.port = server.getsockname()[1]
        for node in (0, 1):
            nodes.launch(node)
        assert 0 not in nodes.codes()
    (first,), (second,) = (nodes.log(node).splitlines() for node in (0, 1))
    assert first.startswith(f"error: port {nodes.port} cannot be used on {HOST} (Address already in use)")
    assert second.startswith(f"error: machine 0 did not answer at 127.0.0.1:{nodes.port} within 8 s")
