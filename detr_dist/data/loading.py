"""Loader processes: batches of a data set in the order of a batch sampler."""

import signal
from collections.abc import Generator, Iterable
from typing import Any

from torch.utils.data import DataLoader

from detr_dist.config import DataConfig
from detr_dist.data.batching import Batch, collate
from detr_dist.data.dataset import CocoDetectionDataset
from detr_dist.data.sampling import SampleKey
from detr_dist.errors import DataError

_RAISED_IN_WORKER = f"{DataError.__module__}.{DataError.__qualname__}: "


def _leave_signals_to_the_trainer(worker_id: int) -> None:
    """A request to stop often goes to all processes of a job. A loader process that ended by it would take
    the trainer with it, before it has saved; so it ends with its trainer, or a minute later."""
    signal.set_wakeup_fd(-1)  # the trainer's
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(60))


class BatchLoader:
    """Iterates over batches; each iteration has loader processes of its own, until it is closed.

    Raises:
        DataError: while iterating, with the one line that was raised in a loader process.
    """

    def __init__(
        self,
        dataset: CocoDetectionDataset,
        batch_sampler: Iterable[list[SampleKey]],
        config: DataConfig,
        *,
        pin_memory: bool,
    ) -> None:
        self._loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_sampler=batch_sampler,
            collate_fn=collate,
            num_workers=config.num_workers,
            prefetch_factor=config.prefetch_factor if config.num_workers else None,
            pin_memory=pin_memory,
            worker_init_fn=_leave_signals_to_the_trainer,
        )

    def __iter__(self) -> Generator[Batch]:
        try:
            yield from self._loader
        except DataError as error:
            # From a loader process it comes with that process's traceback, the message last.
            raise DataError(str(error).strip().splitlines()[-1].removeprefix(_RAISED_IN_WORKER)) from error
