"""Loader processes: batches of a data set in the order of a batch sampler, passed in shared memory."""

import logging
import math
import multiprocessing
import os
import shutil
import signal
import threading
import warnings
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from torch.utils.data import DataLoader, Dataset, get_worker_info

from detr_dist.config import Config, DataConfig, specific_tiles
from detr_dist.data.coco import CocoData
from detr_dist.data.dataset import Batch, CocoDetectionDataset, collate, failure
from detr_dist.data.sampling import SampleKey
from detr_dist.data.transforms import areas_after_resize
from detr_dist.errors import DetrDistError, LoaderError
from detr_dist.resize import Resize, training_resizes

SHARED_MEMORY = Path("/dev/shm")

_MOST_BY_DEFAULT = 4

# A loader process finishes its current batch before it ends; one that hangs on a disk never ends.
_END_WITHIN_S = 2.0

_logger = logging.getLogger(__name__)


class Need(NamedTuple):
    """Bytes of shared memory for all batches that the loaders of one process may hold at once."""

    at_least: int
    """The bytes if all images have the smallest size."""
    at_most: int
    """The bytes if all images have the largest size."""

    def beside(self, other: "Need") -> "Need":
        """Return the need of two loaders that exist at the same time."""
        return Need(self.at_least + other.at_least, self.at_most + other.at_most)


def num_loader_processes(setting: int | Literal["auto"]) -> int:
    """Return how many loader processes `data.num_workers` means for each process on this host."""
    return setting if setting != "auto" else min(_MOST_BY_DEFAULT, _num_cores())


def shared_memory_need(config: Config, data: CocoData, *, train: bool) -> Need:
    """Return how much of /dev/shm the loader of one process takes when it is as far ahead as it may be."""
    num_workers = num_loader_processes(config.data.num_workers)
    if num_workers == 0:
        return Need(0, 0)
    augmentation = config.data.augmentation if train else "none"
    resizes = training_resizes(config.data) if train else [Resize.of(config.data)]
    sizes_hw, num_samples = data.sizes_hw, len(data)
    if (tiles := specific_tiles(config)) is not None:
        if not train:
            num_samples = sum(tiles.grid.num_windows(*size_hw) for size_hw in sizes_hw.tolist())
        sizes_hw = np.concatenate((sizes_hw, sizes_hw.clip(max=tiles.size_hw)))
    areas = areas_after_resize(sizes_hw, augmentation, resizes)
    batch_size = min(config.training.batch_size, num_samples)
    num_epochs = config.training.num_epochs if train else 1
    num_batches = min(
        num_workers * config.data.prefetch_factor, math.ceil(num_epochs * num_samples / batch_size)
    )
    num_batches += config.training.gradient_accumulation_steps if train else 1  # in use
    smallest, largest = (3 * area * batch_size * num_batches for area in areas)
    return Need(smallest, largest)


def check_room(need: Need) -> None:
    """Warn if /dev/shm may be too small for the loaders of all processes on this host.

    Raises:
        LoaderError: it is too small even for the smallest images, so that loaders ahead of training fill it.
    """
    room = _room()
    if room is not None and room[0] < num_local_processes() * need.at_least:
        raise LoaderError(f"shared memory is too small: {_describe_room(need)}")
    if room is not None and room[1] < num_local_processes() * need.at_most:
        _logger.warning(f"shared memory may run out: {_describe_room(need)}")


class BatchLoader:
    """Iterates over batches; each iteration has its own loader processes, until it is closed.

    Raises:
        DetrDistError: while iterating, with one line, if loading fails or a loader process dies.
    """

    def __init__(
        self,
        dataset: CocoDetectionDataset,
        batch_sampler: Iterable[list[SampleKey]],
        config: DataConfig,
        *,
        pin_memory: bool,
        need: Need,
    ) -> None:
        """Take `need` for the message when shared memory runs out."""
        self._need = need
        num_workers = num_loader_processes(config.num_workers)
        self._failures: SimpleQueue[DetrDistError] | None
        self._failures = multiprocessing.SimpleQueue() if num_workers else None
        with warnings.catch_warnings(
            action="ignore"
        ):  # on more processes than cores, which the user asked for
            self._loader: DataLoader[Any] = DataLoader(
                _Batches(dataset, need, self._failures),
                sampler=batch_sampler,
                batch_size=None,  # each item is a batch already
                collate_fn=_unchanged,
                num_workers=num_workers,
                prefetch_factor=config.prefetch_factor if num_workers else None,
                pin_memory=pin_memory,
                worker_init_fn=_set_signals_of_loader,
            )

    def __iter__(self) -> Generator[Batch]:
        processes: list[BaseProcess] = []
        batches: Iterator[Any] | None = None
        try:
            batches = self._start(processes)
            while (item := self._next(batches, processes)) is not None:
                if isinstance(item, DetrDistError):
                    raise item
                yield item
        finally:
            with _killed_after(_END_WITHIN_S, processes):
                del batches  # torch ends them with its iterator

    def _start(self, processes: list[BaseProcess]) -> Iterator[Any]:
        """Start the loader processes, which are added to `processes`."""
        before = set(multiprocessing.active_children())
        handler = signal.getsignal(signal.SIGCHLD)
        try:
            with warnings.catch_warnings(action="ignore"):
                return iter(self._loader)
        except Exception as error:
            raise failure("starting the loader processes failed", error) from None
        finally:
            processes += set(multiprocessing.active_children()) - before
            # Torch would raise an error about the end of a loader process anywhere in the main thread.
            if signal.getsignal(signal.SIGCHLD) is not handler and handler is not None:
                signal.signal(signal.SIGCHLD, handler)

    def _next(self, batches: Iterator[Any], processes: list[BaseProcess]) -> Batch | DetrDistError | None:
        """Return the next batch, None at the end, or the first error of any loader process.

        The error is returned even before its batch is due. It is not raised here, because the traceback of
        torch's error would keep the loader processes alive.
        """
        if self._failures is not None and not self._failures.empty():
            return self._failures.get()
        if (death := self._death(processes)) is not None:
            return death
        try:
            return next(batches, None)
        except Exception as error:
            return self._death(processes) or failure("loading images failed", error)

    def _death(self, processes: list[BaseProcess]) -> DetrDistError | None:
        """Return why a loader process has died, if one has."""
        code = next((process.exitcode for process in processes if process.exitcode), None)
        if code is None:
            return None
        if code > 0:
            return LoaderError(f"a loader process ended by itself, with exit code {code}")
        advice = ""
        if -code == signal.SIGBUS:
            advice = f", as happens when shared memory runs out: {_describe_room(self._need)}"
        elif -code == signal.SIGKILL:
            advice = (
                ", as the system does when memory runs out (see dmesg, or the memory limit of the container "
                "or job); lower data.num_workers, data.prefetch_factor or training.batch_size"
            )
        return LoaderError(f"a loader process was ended by {signal.Signals(-code).name}{advice}")


class _Batches(Dataset[Batch | DetrDistError]):
    """Batches by their keys, or errors, which are returned instead of raised.

    Torch would pass on only the text of what a loader process raises, and nothing of an error while a batch
    is sent.
    """

    def __init__(
        self, samples: CocoDetectionDataset, need: Need, failures: "SimpleQueue[DetrDistError] | None"
    ) -> None:
        self._samples = samples
        self._need = need
        self._failures = failures  # delivers the first error at once, before its batch is due

    def __getitem__(self, keys: list[SampleKey]) -> Batch | DetrDistError:
        batch = self._load(keys)
        # Only one: when the pipe is full, `put` would wait for a reader that may wait for this batch.
        if isinstance(batch, DetrDistError) and self._failures is not None and self._failures.empty():
            self._failures.put(batch)
        return batch

    def _load(self, keys: list[SampleKey]) -> Batch | DetrDistError:
        samples = []
        try:
            for key in keys:
                row = self._samples.row(*key[:2])
                samples.append(self._samples[key])
        except DetrDistError as error:
            return error
        except Exception as error:
            return failure(f"loading {self._samples.data.image_path(row)} failed", error)
        is_loader = get_worker_info() is not None
        try:
            batch = collate(samples)
            return batch.share_memory() if is_loader else batch
        except Exception as error:
            room = _room()
            num_bytes = 2 * sum(sample.image.nbytes for sample in samples)  # with padding, and some reserve
            if is_loader and room is not None and room[1] < num_bytes:
                return LoaderError(f"shared memory ran out: {_describe_room(self._need)}")
            return failure("putting a batch together failed", error)


def _unchanged(batch: Any) -> Any:
    return batch


@contextmanager
def _killed_after(seconds: float, processes: list[BaseProcess]) -> Iterator[None]:
    """Kill the remaining processes after `seconds`, or on leaving: they have nothing to save."""

    def kill() -> None:
        for process in processes:
            process.kill()

    timer = threading.Timer(seconds, kill)
    timer.daemon = True
    if processes:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()
        kill()


def _set_signals_of_loader(worker_id: int) -> None:
    """Ignore stop signals in a loader process, and reset torch's handlers.

    Stop signals often go to all processes of a job, and a loader process that ended would end the trainer
    before it has saved. It ends with its trainer, or a minute later. The trainer itself reports in one line
    why a loader process died; torch's handlers would print more.
    """
    signal.set_wakeup_fd(-1)  # the trainer's
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(60))
    for number in (signal.SIGBUS, signal.SIGSEGV, signal.SIGFPE):
        signal.signal(number, signal.SIG_DFL)


def _num_cores() -> int:
    """Return the number of CPU cores for each process of the run on this host, at least 1."""
    is_known = hasattr(os, "sched_getaffinity")  # not on macOS
    on_host = len(os.sched_getaffinity(0)) if is_known else os.cpu_count() or 1
    return max(1, on_host // num_local_processes())


def num_local_processes() -> int:
    """Return the number of processes of the run on this host, as the launcher set it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _room() -> tuple[int, int] | None:
    """Return total and free bytes of /dev/shm; None if there is none, or it has no limit."""
    try:
        usage = shutil.disk_usage(SHARED_MEMORY)
    except OSError:
        return None
    return (usage.total, usage.free) if usage.total else None


def _describe_room(need: Need) -> str:
    """Describe how large /dev/shm is, how much is needed, and how to enlarge it."""
    room = _room()
    size = f"has {_mib(room[0])}, {_mib(room[1])} of them free" if room is not None else "is missing"
    needed = num_local_processes() * need.at_most
    enough_gib = max(1, math.ceil(1.25 * needed / 2**30))  # others use it as well
    return (
        f"{SHARED_MEMORY} {size}, and the loaders need up to {_mib(needed)}; enlarge it (docker run "
        f"--shm-size={enough_gib}g), or lower data.num_workers, data.prefetch_factor or training.batch_size "
        "(data.num_workers=0 needs none)"
    )


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.0f} MiB"
