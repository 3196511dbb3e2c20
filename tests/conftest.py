"""What the tests share: a tiny data set, a tiny network, and the real commands."""

import json
import logging
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist
import yaml
from PIL import Image
from torch._subclasses import FakeTensorMode

from detr_dist.console import configure_logging

REPOSITORY = Path(__file__).parents[1]

TINY_CONFIG = {
    "data": {"num_workers": 0, "shortest_edge": 64, "longest_edge": 96, "augmentation": "none"},
    "model": {
        "backbone": {
            "model_type": "resnet",
            "layer_type": "basic",
            "embedding_size": 8,
            "hidden_sizes": [8, 8, 16, 16],
            "depths": [1, 1, 1, 1],
            "out_features": ["stage4"],
        },
        "pretrained_backbone": False,
        "hidden_dim": 32,
        "num_encoder_layers": 1,
        "num_decoder_layers": 2,
        "num_queries": 8,
        "config_overrides": {
            "encoder_ffn_dim": 32,
            "decoder_ffn_dim": 32,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
        },
    },
    "training": {"batch_size": 4, "num_epochs": 1, "learning_rate": 1e-4, "learning_rate_backbone": 1e-4},
    "evaluation": {"pictures": False},
    "logging": {"log_every_steps": 1, "tensorboard": False},
}


def write_coco(
    folder: Path, *, num_images: int, with_boxes: Callable[[int], int], mixed_sizes: bool, seed: int = 0
) -> None:
    """A COCO folder of noise pictures; image i has `with_boxes(i)` boxes, in turns of players and balls."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    images, annotations = [], []
    for i in range(num_images):
        height, width = (80, 96) if not mixed_sizes else [(80, 96), (96, 80), (64, 100), (120, 90)][i % 4]
        name = f"{i:03d}.jpg"
        Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(folder / name)
        images.append({"id": 10 + i, "file_name": name, "height": height, "width": width})
        for j in range(with_boxes(i)):
            x, y, w, h = (float(v) for v in rng.integers(4, 30, 4))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": 10 + i,
                    "category_id": 1 + j % 2,
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": 0,
                }
            )
    categories = [{"id": 1, "name": "player"}, {"id": 2, "name": "ball"}]
    document = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "_annotations.coco.json").write_text(json.dumps(document))


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`train` (40 images, most of them without boxes) and `val` (7 images), of several shapes."""
    folder = tmp_path_factory.mktemp("tiny_data")
    write_coco(
        folder / "train", num_images=40, with_boxes=lambda i: 3 if i % 10 == 0 else 0, mixed_sizes=True
    )
    write_coco(folder / "val", num_images=7, with_boxes=lambda i: i % 4, mixed_sizes=True, seed=1)
    return folder


@pytest.fixture(scope="session")
def easy_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Like `tiny_data`, but each class is always nearly at the same place: a hundred steps find it."""
    folder = tmp_path_factory.mktemp("easy_data")
    for seed, (split, num_images) in enumerate({"train": 96, "val": 7}.items()):
        write_coco(
            folder / split, num_images=num_images, with_boxes=lambda i: i % 4, mixed_sizes=True, seed=seed
        )
        path = folder / split / "_annotations.coco.json"
        document = json.loads(path.read_text())
        for each in document["annotations"]:
            x, y, w, h = [(12, 8, 36, 40), (56, 40, 20, 16)][each["category_id"] - 1]
            each["bbox"] = [x + each["id"] % 5, y + each["id"] % 3, w, h]
            each["area"] = w * h
        path.write_text(json.dumps(document))
    return folder


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database without runs: making one takes MLflow seconds, copying it nothing."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


def _launcher(num_processes: int, config_name: str = "multi_cpu") -> tuple[str, ...]:
    config = REPOSITORY / "accelerate_configs" / f"{config_name}.yaml"
    launcher = ("-m", "accelerate.commands.launch", "--config_file", str(config))
    return (*launcher, "--num_processes", str(num_processes))


def _environment() -> dict[str, str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "MLFLOW_"))}
    return inherited | {"OMP_NUM_THREADS": "1"}


def _environment_of_rank(rank: int, num_processes: int, port: int) -> dict[str, str]:
    """What the launcher tells each of several processes on one machine."""
    if num_processes == 1:
        return {}
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_processes, "LOCAL_WORLD_SIZE": num_processes}
    return {name: str(value) for name, value in ranks.items()} | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
    }


class CommandServer:
    """Starts our commands in processes of their own, from one that has imported what they need."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("command_server.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=_environment(),
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
            "environment": _environment() | dict(environment or {}),
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
        self._process.communicate(timeout=10)


@dataclass
class ForkedCommand:
    """What of `subprocess.Popen` the tests use, for a process that is the server's child."""

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
        """If it still runs."""
        if self.poll() is None:
            self.send_signal(signal.SIGKILL)
            self.wait(timeout=10)

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)


@dataclass
class Workplace:
    """A folder to run commands in, with a configuration and an MLflow database of its own."""

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
        """A command of ours, in one process or in several as `accelerate launch` would start them on the CPU,
        but for the time that importing takes; `environment` adds to theirs. With another of the shipped files
        of settings than `multi_cpu` it is started by the launcher."""
        if launch_config != "multi_cpu":
            module = ("-m", "detr_dist", *arguments)
            return self.launch(*module, num_processes=num_processes, launch_config=launch_config)
        port = free_port()
        paths = [
            (self.folder / f"stdout_{rank}", self.folder / f"stderr_{rank}") for rank in range(num_processes)
        ]
        commands = [
            self.server.start(
                arguments,
                self.folder,
                *paths[rank],
                environment={**_environment_of_rank(rank, num_processes, port), **(environment or {})},
            )
            for rank in range(num_processes)
        ]
        try:
            codes = [command.wait(timeout=100) for command in commands]
        finally:
            for command in commands:
                command.kill()
        stdout, stderr = ("".join(path.read_text() for path in column) for column in zip(*paths, strict=True))
        for path in chain(*paths):
            path.unlink()
        code = next(filter(None, codes), 0)
        return subprocess.CompletedProcess([*map(str, arguments)], code, stdout, stderr)

    def launch(
        self, *arguments: str | Path, num_processes: int, launch_config: str = "multi_cpu"
    ) -> subprocess.CompletedProcess[str]:
        """A script (or -m and a module) with its arguments, in several processes on the CPU."""
        return subprocess.run(
            [sys.executable, *_launcher(num_processes, launch_config), *map(str, arguments)],
            cwd=self.folder,
            env=_environment(),
            capture_output=True,
            text=True,
            timeout=100 if launch_config == "multi_cpu" else 300,  # DeepSpeed compiles when it starts first
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
        """`train` in the background, with everything it prints in the file `log`."""
        arguments, log = (*self._training(data, output), *overrides), self.folder / "log"
        log.unlink(missing_ok=True)
        if num_processes == 1:
            return self.server.start(arguments, self.folder, log, log)
        with log.open("w") as file:
            return subprocess.Popen(
                [sys.executable, *_launcher(num_processes), "-m", "detr_dist", *map(str, arguments)],
                cwd=self.folder,
                env=_environment(),
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
        """Step and value of everything that MLflow has of a metric, in the order it was logged."""
        from mlflow import MlflowClient

        client = MlflowClient(f"sqlite:///{self.folder / 'mlflow.db'}")
        entries = client.get_metric_history(str(self.results(output)["run_id"]), metric)
        return [(entry.step, entry.value) for entry in entries]


def free_port() -> int:
    """Below the ports from which clients connect: one of those could be given to a client that looks for the
    dead server, which then talks to itself and keeps the port."""
    for port in range(20000 + os.getpid() % 10000, 32000):
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError("no port is free")


class MLflowServer:
    """`mlflow server` on a port of its own, with database and artifacts in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def client(self):
        from mlflow import MlflowClient

        return MlflowClient(self.uri)

    def start(self) -> None:
        """Returns when it answers."""
        if self._process is not None:
            return
        with (self.folder / "log").open("a") as log:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "mlflow", "server"),
                    *("--backend-store-uri", f"sqlite:///{self.folder / 'mlflow.db'}"),
                    *("--artifacts-destination", str(self.folder / "artifacts")),
                    *("--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"),
                ],
                cwd=self.folder,
                env=_environment() | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        deadline = time.monotonic() + 90
        while not self._answers():
            assert self._process.poll() is None, (self.folder / "log").read_text()
            assert time.monotonic() < deadline, (self.folder / "log").read_text()
            time.sleep(0.1)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def kill(self) -> None:
        """With all its processes, in the middle of whatever they do."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def num_steps(self, run_id: str) -> int:
        """Losses that the database has of a run; asks the file, as the server may be away."""
        with sqlite3.connect(f"file:{self.folder / 'mlflow.db'}?mode=ro", uri=True) as database:
            query = "SELECT COUNT(*) FROM metrics WHERE key = 'train_loss' AND run_uuid = ?"
            (number,) = database.execute(query, (run_id,)).fetchone()
        return int(number)

    def losses(self, run_id: str) -> list[tuple[int, float]]:
        history = self.client.get_metric_history(run_id, "train_loss")
        return sorted((entry.step, entry.value) for entry in history)

    def files(self, run_id: str, folder: str) -> dict[str, bytes]:
        """What it gives out of an artifact folder."""
        target = self.folder / "downloads" / run_id
        target.mkdir(parents=True, exist_ok=True)
        there = Path(self.client.download_artifacts(run_id, folder, str(target)))
        return {
            str(path.relative_to(there)): path.read_bytes() for path in there.rglob("*") if path.is_file()
        }


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Iterator[MLflowServer]:
    """It has to be started, as a test may have killed it."""
    folder = tmp_path_factory.mktemp("server")
    shutil.copy(empty_store, folder / "mlflow.db")
    server = MLflowServer(folder)
    yield server
    server.kill()


@pytest.fixture(scope="session")
def command_server() -> Iterator[CommandServer]:
    server = CommandServer()
    yield server
    server.close()


@pytest.fixture(scope="session")
def new_workplace(empty_store: Path, command_server: CommandServer) -> Callable[[Path], Workplace]:
    """Makes a workplace in an existing folder, for fixtures that several tests share."""

    def make(folder: Path) -> Workplace:
        shutil.copy(empty_store, folder / "mlflow.db")
        place = Workplace(folder, command_server)
        place.config.write_text(yaml.safe_dump(TINY_CONFIG))
        return place

    return make


@pytest.fixture
def workplace(tmp_path: Path, new_workplace: Callable[[Path], Workplace]) -> Workplace:
    return new_workplace(tmp_path)


@pytest.fixture
def on_fake_gpu() -> Callable[[torch.nn.Module], AbstractContextManager[None]]:
    """Moves a module to a GPU that need not exist: its tensors have a device and a shape, but no values.

    While the context lasts new tensors are like that, too. Operations on them work, except backward passes.
    """

    @contextmanager
    def move(module: torch.nn.Module) -> Iterator[None]:
        with FakeTensorMode():
            moved: dict[torch.Tensor, torch.Tensor] = {}
            for part in module.modules():
                for tensors in (part._parameters, part._buffers):
                    for name, tensor in tensors.items():
                        if tensor is None:
                            continue
                        if tensor not in moved:
                            fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
                            is_parameter = isinstance(tensor, torch.nn.Parameter)
                            moved[tensor] = (
                                torch.nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
                            )
                        tensors[name] = moved[tensor]
            yield

    return move


@pytest.fixture(autouse=True)
def messages_are_printed() -> None:
    """As by every command."""
    configure_logging()


class _Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@pytest.fixture
def messages() -> Iterator[list[str]]:
    """What the package logs during the test."""
    collector = _Collector()
    logging.getLogger("detr_dist").addHandler(collector)
    yield collector.messages
    logging.getLogger("detr_dist").removeHandler(collector)


@pytest.fixture(autouse=True)
def no_process_group_is_left() -> Iterator[None]:
    yield
    assert not dist.is_available() or not dist.is_initialized()
