"""Fixtures that tests of several folders share; the code behind them is in `harness`."""

import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml
from harness.commands import CommandServer, Workplace
from harness.data import TINY_CONFIG, write_coco
from harness.fake_gpu import moved_to_fake_gpu
from harness.mlflow_server import MLflowServer

from detr_dist.console import configure_logging


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write `train` (40 images, most of them without boxes) and `val` (7 images), of several shapes."""
    folder = tmp_path_factory.mktemp("tiny_data")
    write_coco(
        folder / "train", num_images=40, with_boxes=lambda i: 3 if i % 10 == 0 else 0, mixed_sizes=True
    )
    write_coco(folder / "val", num_images=7, with_boxes=lambda i: i % 4, mixed_sizes=True, seed=1)
    return folder


@pytest.fixture(scope="session")
def easy_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a variant of `tiny_data` with objects of a class in nearly one place, learned in 100 steps."""
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
    """Create an MLflow database without runs: creating one takes seconds, copying it no time."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Iterator[MLflowServer]:
    """Return a server that each test must start, as an earlier test may have killed it."""
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
    """Return a function that makes a workplace in an existing folder, for shared fixtures."""

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
    return moved_to_fake_gpu


@pytest.fixture(autouse=True)
def messages_are_printed() -> None:
    """Configure logging as every command does."""
    configure_logging()


class _Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@pytest.fixture
def messages() -> Iterator[list[str]]:
    """Return the messages that the package logs during the test."""
    collector = _Collector()
    logging.getLogger("detr_dist").addHandler(collector)
    yield collector.messages
    logging.getLogger("detr_dist").removeHandler(collector)


@pytest.fixture(autouse=True)
def environment_is_restored() -> Iterator[None]:
    """Restore the environment after each test: MLflow writes its tracking URI into it."""
    before = dict(os.environ)
    yield
    if "mlflow" in sys.modules:
        sys.modules["mlflow"].set_tracking_uri(None)
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(autouse=True)
def no_process_group_is_left() -> Iterator[None]:
    yield
    assert not dist.is_available() or not dist.is_initialized()
