"""The real commands, each in its own process."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).parents[2]
LIMIT_S = 300
"""Limit of one command: far more than it takes, even if several test runs share a host."""


def launcher(num_processes: int, config_name: str = "multi_cpu") -> tuple[str, ...]:
    config = REPOSITORY / "accelerate_configs" / f"{config_name}.yaml"
    launcher = ("-m", "accelerate.commands.launch", "--config_file", str(config))
    return (*launcher, "--num_processes", str(num_processes))


def clean_environment() -> dict[str, str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "MLFLOW_"))}
    return inherited | {"OMP_NUM_THREADS": "1"}


def rank_environment(rank: int, num_processes: int, port: int) -> dict[str, str]:
    """Return the variables that the launcher sets for each of several processes on one host."""
    if num_processes == 1:
        return {}
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_processes, "LOCAL_WORLD_SIZE": num_processes}
    return {name: str(value) for name, value in ranks.items()} | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


class CommandServer:
    """Start our commands in their own processes, forked from one that has imported what they need."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("command_server.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=clean_environment(),
            text=True,
        )

    def start(
        self,
        arguments: Iterable[str | Path],
        folder: Path,
        stdout: Path,
        stderr: Path,
        *,
        environment: Mapping[str, str] | None = None,
    ) -> "ForkedCommand":
        request = {
            "arguments": [*map(str, arguments)],
            "folder": str(folder),
            "environment": clean_environment() | dict(environment or {}),
            "stdout": str(stdout),
            "stderr": str(stderr),
        }
        return ForkedCommand(self, self.ask(request))

    def ask(self, request: object) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return int(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate(timeout=60)


@dataclass
class ForkedCommand:
    """Subset of `subprocess.Popen` that the tests use, for a process that is the server's child."""

    server: CommandServer
    pid: int
    returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None and psutil.Process(self.pid).status() == psutil.STATUS_ZOMBIE:
            self.returncode = self.server.ask(self.pid)
        return self.returncode

    def wait(self, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                psutil.Process(self.pid).kill()
                raise subprocess.TimeoutExpired("detr-dist", timeout)
            time.sleep(0.01)
        return code

    def kill(self) -> None:
        """Kill the process if it still runs."""
        if self.poll() is None:
            self.send_signal(signal.SIGKILL)
            self.wait(timeout=10)

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)


_launcher_environments: dict[tuple[str, int], dict[str, str]] = {}


@dataclass
class Workplace:
    """Folder to run commands in, with its own configuration and MLflow database."""

    folder: Path
    server: CommandServer

    @property
    def config(self) -> Path:
        return self.folder / "tiny.yaml"

    def run(
        self,
        *arguments: str | Path,
        num_processes: int = 1,
        environment: Mapping[str, str] | None = None,
        launch_config: str = "multi_cpu",
    ) -> subprocess.CompletedProcess[str]:
        """Run one of our commands in one process or in several on the CPU.

        The processes are started without a launcher, which saves the time of importing, but with the
        variables that `accelerate launch` sets by the file `launch_config`; `environment` is added to them.
        """
        launched: dict[str, str] = {}
        if launch_config != "multi_cpu":
            launched = self.launcher_environment(launch_config, num_processes)
        elif num_processes > 1:
            launched = {"ACCELERATE_USE_CPU": "true"}
        port = free_port()
        paths = [
            (self.folder / f"stdout_{rank}", self.folder / f"stderr_{rank}") for rank in range(num_processes)
        ]
        commands = [
            self.server.start(
                arguments,
                self.folder,
                *paths[rank],
                environment={
                    **rank_environment(rank, num_processes, port),
                    **launched,
                    **(environment or {}),
                },
            )
            for rank in range(num_processes)
        ]
        try:
            codes = [command.wait(timeout=LIMIT_S) for command in commands]
        finally:
            for command in commands:
                command.kill()
        stdout, stderr = ("".join(path.read_text() for path in column) for column in zip(*paths, strict=True))
        for path in chain(*paths):
            path.unlink()
        code = next(filter(None, codes), 0)
        return subprocess.CompletedProcess([*map(str, arguments)], code, stdout, stderr)

    def launcher_environment(self, launch_config: str, num_processes: int) -> dict[str, str]:
        """Return the variables that the real `accelerate launch` sets for its processes."""
        key = (launch_config, num_processes)
        if key not in _launcher_environments:
            shell = ("--no_python", "sh", "-c", "env | grep ^ACCELERATE_")
            finished = self.launch(*shell, num_processes=num_processes, launch_config=launch_config)
            assert finished.returncode == 0, finished.stderr
            lines = [line for line in finished.stdout.splitlines() if line.startswith("ACCELERATE_")]
            environment = dict(line.split("=", 1) for line in lines)
            assert sorted(lines) == sorted(num_processes * [f"{k}={v}" for k, v in environment.items()])
            _launcher_environments[key] = environment
        return _launcher_environments[key]

    def launch(
        self, *arguments: str | Path, num_processes: int, launch_config: str = "multi_cpu"
    ) -> subprocess.CompletedProcess[str]:
        """Run a script (or -m and a module) with its arguments, in several processes on the CPU."""
        return subprocess.run(
            [sys.executable, *launcher(num_processes, launch_config), *map(str, arguments)],
            cwd=self.folder,
            env=clean_environment(),
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )

    def train(
        self,
        data: Path,
        *overrides: str,
        output: str = "out",
        num_processes: int = 1,
        launch_config: str = "multi_cpu",
    ) -> subprocess.CompletedProcess[str]:
        arguments = (*self._training(data, output), *overrides)
        return self.run(*arguments, num_processes=num_processes, launch_config=launch_config)

    def start(
        self, data: Path, *overrides: str, output: str = "out", num_processes: int = 1
    ) -> "subprocess.Popen[str] | ForkedCommand":
        """Run `train` in the background, with all its output in the file `log`."""
        arguments, log = (*self._training(data, output), *overrides), self.folder / "log"
        log.unlink(missing_ok=True)
        if num_processes == 1:
            return self.server.start(arguments, self.folder, log, log)
        with log.open("w") as file:
            return subprocess.Popen(
                [sys.executable, *launcher(num_processes), "-m", "detr_dist", *map(str, arguments)],
                cwd=self.folder,
                env=clean_environment(),
                stdout=file,
                stderr=subprocess.STDOUT,
                text=True,
            )

    def _training(self, data: Path, output: str) -> tuple[str | Path, ...]:
        folders = ("--train-dir", data / "train", "--val-dir", data / "val", "--output-dir", output)
        return ("train", "--config", self.config, *folders)

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    def results(self, output: str = "out") -> dict[str, object]:
        results: dict[str, object] = json.loads((self.folder / output / "results.json").read_text())
        return results

    def history(self, metric: str, output: str = "out") -> list[tuple[int, float]]:
        """Return step and value of every entry of a metric in MLflow, in the order of logging."""
        from mlflow import MlflowClient

        client = MlflowClient(f"sqlite:///{self.folder / 'mlflow.db'}")
        entries = client.get_metric_history(str(self.results(output)["run_id"]), metric)
        return [(entry.step, entry.value) for entry in entries]


def free_port() -> int:
    """Return a port below those from which clients connect.

    One of those could be given to a client that looks for the killed server, which then connects to itself
    and keeps the port.
    """
    for port in range(20000 + os.getpid() % 10000, 32000):
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError("no port is free")
