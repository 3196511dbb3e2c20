"""Any failure while images are loaded is one error, and no loader process is left."""

import multiprocessing
import os
import shutil
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch.utils.data._utils import signal_handling

from detr_dist.config import Config, load_config, specific_tiles
from detr_dist.data import batch, loading
from detr_dist.data.coco import CocoData, load_data
from detr_dist.data.dataset import CocoDetectionDataset
from detr_dist.data.loading import BatchLoader, _Batches, num_loader_processes, shared_memory_need
from detr_dist.data.sampling import SampleKey
from detr_dist.data.transforms import build_transform
from detr_dist.errors import DataError, LoaderError
from detr_dist.resize import Resize

Document = dict[str, Any]
WriteCoco = Callable[..., Path]

MIB = 2**20


class Usage(NamedTuple):
    total: int
    used: int
    free: int


class Faulty(CocoDetectionDataset):
    """Data set whose second image causes a fault instead of being loaded."""

    def __init__(self, data: CocoData, fault: Callable[[], object]) -> None:
        super().__init__(data, build_transform("none", Resize(32, 64), train=True), seed=0, train=True)
        self.fault = fault

    def __getitem__(self, key: SampleKey):
        if key[1] == 1:
            self.fault()
        return super().__getitem__(key)


def raising(error: Exception) -> Callable[[], None]:
    def fault() -> None:
        raise error

    return fault


def children() -> set[BaseProcess]:
    """Return the children of this process; other tests may have left some."""
    return set(multiprocessing.active_children())


def settings(num_workers: int) -> Config:
    return load_config(
        None, [f"data.num_workers={num_workers}", "data.augmentation=none", "training.batch_size=1"]
    )


@pytest.fixture
def data(document: Document, write_coco: WriteCoco) -> CocoData:
    return load_data(write_coco(document))


@pytest.fixture
def loader(data: CocoData) -> Callable[..., BatchLoader]:
    """Return a function that builds a loader of three one-image batches, with a fault in the second."""

    def build(fault: Callable[[], object], num_workers: int) -> BatchLoader:
        config = settings(num_workers)
        need = shared_memory_need(config, data, train=True)
        keys = [[(0, 0)], [(0, 1)], [(0, 2)]]
        return BatchLoader(Faulty(data, fault), keys, config.data, pin_memory=False, need=need)

    return build


@pytest.fixture(autouse=True)
def torch_has_no_handler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Remove torch's handler of SIGCHLD, which a loader of another test may have set."""
    monkeypatch.setattr(signal_handling, "_SIGCHLD_handler_set", False)
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGCHLD, handler)


def failure_of(loader: BatchLoader, *, after_s: float = 0.0) -> Exception:
    """Return the error that ends the loading, kept as by a caller; `after_s` later than the first batch."""
    before = children()
    with pytest.raises((DataError, LoaderError)) as raised:
        [time.sleep(after_s) for _ in loader]
    assert children() <= before  # although the traceback of the error is still there
    return raised.value


@pytest.mark.parametrize("num_workers", [0, 1, 2])
@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (DataError("the disk is gone"), DataError, ["the disk is gone"]),
        (KeyError("a bug"), LoaderError, ["/3.jpg", "KeyError", "a bug"]),
        (MemoryError(), LoaderError, ["/3.jpg", "MemoryError", "data.num_workers"]),
        (UnicodeDecodeError("utf-8", b"x", 0, 1, "two\nlines"), LoaderError, ["/3.jpg", "two lines"]),
    ],
    ids=["data", "bug", "memory", "not_made_from_text"],
)
def test_any_loader_error_is_one_line(loader, num_workers, error, kind, words) -> None:
    failure = failure_of(loader(raising(error), num_workers))
    assert type(failure) is kind
    assert "\n" not in str(failure)
    assert not [word for word in words if word not in str(failure)], str(failure)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (signal.SIGKILL, ["SIGKILL", "memory", "data.num_workers"]),
        (signal.SIGBUS, ["SIGBUS", "shared memory", "--shm-size"]),
        (signal.SIGSEGV, ["SIGSEGV"]),
    ],
)
def test_a_loader_process_that_dies_is_exactly_one_line(loader, number, words, capfd) -> None:
    before = signal.getsignal(signal.SIGCHLD)
    failure = failure_of(loader(lambda: os.kill(os.getpid(), number), 2), after_s=0.5)
    assert not [word for word in words if word not in str(failure)], str(failure)
    assert signal.getsignal(signal.SIGCHLD) is before  # nothing is raised in the midst of something else
    assert capfd.readouterr() == ("", "")


def test_a_failure_is_reported_before_its_batch_is_due(data) -> None:
    config = settings(2)
    keys = [[(0, 0)], [(0, 0)], [(0, 0)], [(0, 0)], [(0, 0)], [(0, 1)]]
    need = shared_memory_need(config, data, train=True)
    faulty = Faulty(data, raising(ValueError("late")))
    loaded = iter(BatchLoader(faulty, keys, config.data, pin_memory=False, need=need))
    next(loaded)
    time.sleep(0.5)
    with pytest.raises(LoaderError, match="late"):
        next(loaded)


def test_unread_failures_do_not_fill_the_pipe(data) -> None:
    failures = multiprocessing.SimpleQueue()
    need = shared_memory_need(settings(1), data, train=True)
    batches = _Batches(Faulty(data, raising(ValueError("gone"))), need, failures)
    assert [type(batches[[(0, 1)]]) for _ in range(3)] == [LoaderError] * 3
    assert "gone" in str(failures.get())
    assert failures.empty()


def test_an_abandoned_loader_leaves_no_process(loader) -> None:
    before = children()
    loaded = iter(loader(lambda: None, 2))
    next(loaded)
    assert len(children() - before) == 2
    loaded.close()
    assert children() <= before


def test_a_hanging_loader_does_not_prevent_the_run_from_ending(loader) -> None:
    before = children()
    loaded = iter(loader(lambda: time.sleep(100), 2))
    next(loaded)
    began_at = time.monotonic()
    loaded.close()
    assert time.monotonic() - began_at < 15  # it is killed after 2 s
    assert children() <= before


def test_exhausted_shared_memory_is_an_error_with_size_and_remedy(loader, monkeypatch) -> None:
    monkeypatch.setattr(batch, "_black", raising_always)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(64 * MIB, 64 * MIB, 0))
    message = str(failure_of(loader(lambda: None, 1)))
    for word in ("/dev/shm has 64 MiB", "0 MiB of them free", "--shm-size=", "data.num_workers=0"):
        assert word in message


def raising_always(shape: tuple[int, ...]) -> torch.Tensor:
    raise RuntimeError("unable to allocate shared memory")


@pytest.mark.parametrize(
    ("total", "free", "num_processes", "outcome"),
    [
        (0, 0, 1, "nothing"),  # without a limit
        (1000, 900, 8, "nothing"),
        (1000, 500, 8, "warning"),
        (100, 90, 1, "nothing"),
        (100, 90, 2, "error"),
    ],
)
def test_shared_memory_is_compared_with_the_need_of_all_processes(
    total, free, num_processes, outcome, data, monkeypatch, capsys
) -> None:
    """Expect two loaders with 4 batches each ahead, and one in use: 9 times 8.2 MiB."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(total * MIB, 0, free * MIB))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(num_processes))
    overrides = ["data.num_workers=2", "training.batch_size=3", "data.augmentation=none"]
    need = shared_memory_need(load_config(None, overrides), data, train=True)
    assert need == (9 * 3 * 3 * 800 * 1200,) * 2
    if outcome == "error":
        with pytest.raises(LoaderError, match="--shm-size=1g"):
            loading.check_room(need)
    else:
        loading.check_room(need)
    assert capsys.readouterr().out.startswith("warning") == (outcome == "warning")


def test_an_evaluation_in_windows_needs_shared_memory_for_all_of_them(data) -> None:
    overrides = ["data.num_workers=1", "training.batch_size=1000", "data.tiles={size: 32, overlap: 0}"]
    config = load_config(None, [*overrides, "data.resize=square", "data.shortest_edge=64"])
    tiles = specific_tiles(config)
    assert tiles is not None
    num_windows = sum(tiles.grid.num_windows(*size_hw) for size_hw in data.sizes_hw.tolist())
    assert num_windows > len(data)
    need = shared_memory_need(config, data, train=False)
    assert need == (2 * num_windows * 3 * 64 * 64,) * 2  # one batch of all ahead, and one in use


def test_shared_memory_is_unchecked_without_loader_processes(data, monkeypatch, tmp_path, capsys) -> None:
    loading.check_room(shared_memory_need(settings(0), data, train=True))
    monkeypatch.setattr(loading, "SHARED_MEMORY", tmp_path / "none")
    loading.check_room(loading.Need(2**50, 2**50))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("num_cores", "num_processes", "expected"), [(1, 1, 1), (2, 1, 2), (2, 2, 1), (64, 8, 4), (2, 8, 1)]
)
def test_by_default_there_are_no_more_loaders_than_cores(
    num_cores: int, num_processes: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(num_cores)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(num_processes))
    assert num_loader_processes(Config().data.num_workers) == expected
    assert num_loader_processes(7) == 7


def test_more_loaders_than_cores_cause_no_library_warning(loader, monkeypatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    with warnings.catch_warnings(action="error"):
        assert sum(1 for _ in loader(lambda: None, 2)) == 3


def test_loader_processes_give_the_same_batches_as_the_main_process(loader) -> None:
    own, sent = ([*loader(lambda: None, num_workers)] for num_workers in (0, 1))
    for one, other in zip(own, sent, strict=True):
        assert np.array_equal(one.images.numpy(), other.images.numpy())
        assert torch.equal(one.boxes_cxcywh, other.boxes_cxcywh)
        assert one.image_ids == other.image_ids
