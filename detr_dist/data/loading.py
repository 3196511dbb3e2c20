"""Loader processes: batches of a data set in the order of a batch sampler."""

import math
import multiprocessing
import os
import signal
import threading
import traceback
import warnings
from collections.abc import Generator, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from multiprocessing.process import BaseProcess
from multiprocessing.queues import SimpleQueue
from typing import Any, Literal

from torch.utils.data import DataLoader, Dataset, get_worker_info

from detr_dist.config import Config, DataConfig
from detr_dist.data import shared_memory
from detr_dist.data.batching import Batch, collate
from detr_dist.data.coco import CocoData
from detr_dist.data.dataset import CocoDetectionDataset
from detr_dist.data.sampling import SampleKey
from detr_dist.data.transforms import areas_after_resize
from detr_dist.errors import DetrDistError, LoaderError, as_one_line

_MOST_BY_DEFAULT = 4

# A loader process finishes the batch it is at before it ends; one that hangs on a disk never does.
_END_WITHIN_S = 2.0


def num_loader_processes(setting: int | Literal["auto"]) -> int:
    """Return how many loader processes `data.num_workers` means for each process on this host."""
    return setting if setting != "auto" else min(_MOST_BY_DEFAULT, num_cores())


def num_cores() -> int:
    """Return the number of CPU cores for each process of the run on this host, at least 1."""
    is_known = hasattr(os, "sched_getaffinity")  # not on macOS
    on_host = len(os.sched_getaffinity(0)) if is_known else os.cpu_count() or 1
    return max(1, on_host // shared_memory.num_local_processes())


def shared_memory_need(config: Config, data: CocoData, *, train: bool) -> shared_memory.Need:
    """Return what the loader of one process takes of /dev/shm when it has loaded all that it may."""
    num_workers = num_loader_processes(config.data.num_workers)
    if num_workers == 0:
        return shared_memory.Need(0, 0)
    batch_size = min(config.training.batch_size, len(data))
    edges = config.data.shortest_edge, config.data.longest_edge
    areas = areas_after_resize(data.sizes_hw, config.data.augmentation if train else "none", *edges)
    num_epochs = config.training.num_epochs if train else 1
    num_batches = min(
        num_workers * config.data.prefetch_factor, math.ceil(num_epochs * len(data) / batch_size)
    )
    num_batches += config.training.gradient_accumulation_steps if train else 1  # in use
    smallest, largest = (3 * area * batch_size * num_batches for area in areas)
    return shared_memory.Need(smallest, largest)


class BatchLoader:
    """Iterates over batches; each iteration has loader processes of its own, until it is closed.

    Raises:
        DetrDistError: while iterating, in one line, whatever loading raises or a loader process dies of.
    """

    def __init__(
        self,
        dataset: CocoDetectionDataset,
        batch_sampler: Iterable[list[SampleKey]],
        config: DataConfig,
        *,
        pin_memory: bool,
        need: shared_memory.Need,
    ) -> None:
        """`need` is what the line says when shared memory runs out."""
        self._need = need
        num_workers = num_loader_processes(config.num_workers)
        self._failures: SimpleQueue[DetrDistError] | None
        self._failures = multiprocessing.SimpleQueue() if num_workers else None
        with _quiet():
            self._loader: DataLoader[Any] = DataLoader(
                _Batches(dataset, self._failures),
                sampler=batch_sampler,
                batch_size=None,  # they come whole
                collate_fn=_as_it_is,
                num_workers=num_workers,
                prefetch_factor=config.prefetch_factor if num_workers else None,
                pin_memory=pin_memory,
                worker_init_fn=_take_signals_as_a_loader,
            )

    def __iter__(self) -> Generator[Batch]:
        processes: list[BaseProcess] = []
        batches: Iterator[Any] | None = None
        try:
            while True:
                item: Any = None
                failure: DetrDistError | None = None
                try:
                    batches = self._start(processes) if batches is None else batches
                    failure = self._early_failure(processes)
                    item = next(batches) if failure is None else None
                except StopIteration:
                    return
                except Exception as error:
                    failure = self._death(processes) or _failure("loading images failed", error)
                if isinstance(item, DetrDistError):
                    failure = item
                if isinstance(failure, _SharedMemoryIsFull):
                    failure = LoaderError(f"shared memory ran out: {shared_memory.describe(self._need)}")
                if failure is not None:
                    # Not inside `except`: the traceback of torch's error would keep the loader processes.
                    raise failure
                yield item
        finally:
            with _killed_after(_END_WITHIN_S, processes):
                del batches  # torch ends them with its iterator

    def _start(self, processes: list[BaseProcess]) -> Iterator[Any]:
        """Start the loader processes, which are added to `processes`."""
        before = set(multiprocessing.active_children())
        handler = signal.getsignal(signal.SIGCHLD)
        try:
            with _quiet():
                return iter(self._loader)
        finally:
            processes += set(multiprocessing.active_children()) - before
            # Torch would raise the end of a loader process wherever the main thread then is.
            if signal.getsignal(signal.SIGCHLD) is not handler and handler is not None:
                signal.signal(signal.SIGCHLD, handler)

    def _early_failure(self, processes: list[BaseProcess]) -> DetrDistError | None:
        """Return what has gone wrong in a loader process, although its batch may not be due yet."""
        if self._failures is not None and not self._failures.empty():
            return self._failures.get()
        return self._death(processes)

    def _death(self, processes: list[BaseProcess]) -> DetrDistError | None:
        """Return what a loader process has died of, if one has."""
        code = next((process.exitcode for process in processes if process.exitcode), None)
        if code is None:
            return None
        if code > 0:
            return LoaderError(f"a loader process ended by itself, with exit code {code}")
        name = signal.Signals(-code).name
        if -code == signal.SIGBUS:
            room = shared_memory.describe(self._need)
            return LoaderError(
                f"a loader process was ended by {name}, as happens when shared memory runs out: {room}"
            )
        advice = ""
        if -code == signal.SIGKILL:
            advice = (
                ", as the system does when memory runs out (see dmesg, or the memory limit of the container "
                "or job); lower data.num_workers, data.prefetch_factor or training.batch_size"
            )
        return LoaderError(f"a loader process was ended by {name}{advice}")


class _SharedMemoryIsFull(LoaderError):
    """Noticed in a loader process; the other side knows what is needed."""


class _Batches(Dataset[Batch | DetrDistError]):
    """Whole batches by their keys. What goes wrong is returned: of what is raised in a loader process torch
    would pass on the text only, and nothing of what fails while a batch is sent."""

    def __init__(self, samples: CocoDetectionDataset, failures: "SimpleQueue[DetrDistError] | None") -> None:
        self._samples = samples
        self._failures = failures  # tells of the first at once, and not when the batch is due

    def __getitem__(self, keys: list[SampleKey]) -> Batch | DetrDistError:
        batch = self._load(keys)
        # One is enough: when the pipe is full, `put` waits for a reader that may wait for this batch.
        if isinstance(batch, DetrDistError) and self._failures is not None and self._failures.empty():
            self._failures.put(batch)
        return batch

    def _load(self, keys: list[SampleKey]) -> Batch | DetrDistError:
        samples = []
        try:
            for epoch, row in keys:
                samples.append(self._samples[epoch, row])
        except DetrDistError as error:
            return error
        except Exception as error:
            return _failure(f"loading {self._samples.data.image_path(row)} failed", error)
        try:
            batch = collate(samples)
            return batch.share_memory() if get_worker_info() is not None else batch
        except Exception as error:
            num_bytes = 2 * sum(sample.image.nbytes for sample in samples)  # with the padding, and some room
            if get_worker_info() is not None and shared_memory.is_full(num_bytes):
                return _SharedMemoryIsFull("shared memory ran out")
            return _failure("putting a batch together failed", error)


def _failure(what: str, error: Exception) -> LoaderError:
    """Return an error that can cross processes: one line, with the traceback for --debug as a note."""
    advice = ""
    if isinstance(error, MemoryError):
        advice = "; memory ran out: lower data.num_workers, data.prefetch_factor or training.batch_size"
    failure = LoaderError(f"{what}: {as_one_line(error)}{advice}")
    failure.add_note("".join(traceback.format_exception(error)).strip())
    return failure


def _quiet() -> AbstractContextManager[Any]:
    """Keep back torch's warning of more loader processes than cores: that is as the user asked, or as it was
    where the model was trained."""
    return warnings.catch_warnings(action="ignore")


def _as_it_is(batch: Any) -> Any:
    return batch


@contextmanager
def _killed_after(seconds: float, processes: list[BaseProcess]) -> Iterator[None]:
    """Kill what is left of the processes after so long, or on leaving: there is nothing in them to save."""

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


def _take_signals_as_a_loader(worker_id: int) -> None:
    """A request to stop often goes to all processes of a job. A loader process that ended by it would take
    the trainer with it, before it has saved; so it ends with its trainer, or a minute later.

    What a loader process dies of is told by the trainer, in one line: torch's own handlers print another.
    """
    signal.set_wakeup_fd(-1)  # the trainer's
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(60))
    for number in (signal.SIGBUS, signal.SIGSEGV, signal.SIGFPE):
        signal.signal(number, signal.SIG_DFL)
