"""The one place that builds an Accelerator, and host-side collectives.

Sums, decisions and gathered records are exchanged from host memory over gloo, so that no step makes the host
wait for the device.
"""

import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DeepSpeedPlugin, DistributedDataParallelKwargs, GradientAccumulationPlugin
from torch import nn

from detr_dist.environment import (
    check_environment,
    is_cpu_fallback,
    restored_environment,
    seconds_from_environment,
    set_environment,
    uses_cpu,
    uses_deepspeed,
)
from detr_dist.errors import DetrDistError, StopRequested, TrainingError, UsageError, as_one_line
from detr_dist.rendezvous import Rendezvous

T = TypeVar("T")

_logger = logging.getLogger(__name__)

COLLECTIVE_LIMIT_S = 90.0
"""A collective that waits longer has failed. Torch's own limits are 10 minutes (NCCL) and 30 (gloo), but two
collectives of a step are only seconds apart. A stopped process, and its launcher, which needs 30 s to kill
it, have ended within 150 s."""

COMPILE_LIMIT_S = 600.0
"""The limit with torch.compile: any step may compile first, and processes take different times for it."""

PATIENT_LIMIT_S = 3600.0
"""Limit while the others wait for one process that downloads, scores or saves."""

_COLLECTIVE_LIMIT = "DETR_DIST_COLLECTIVE_LIMIT_S"

_rendezvous: Rendezvous | None = None  # one, like the process group


def build_accelerator(
    *,
    mixed_precision: str,
    gradient_accumulation_steps: int | None = None,
    deepspeed: DeepSpeedPlugin | None = None,
) -> Accelerator:
    """Build the Accelerator of this process, on the CPU if there is no accelerator.

    Without accumulation steps it is for predictions only. `deepspeed` replaces the launcher's DeepSpeed
    settings.

    Collective: forms the process group.

    Raises:
        UsageError: Accelerate's own settings contradict ours, the precision is not available on this device,
            or the number of processes differs from the requested one.
    """
    check_launch_settings(mixed_precision, gradient_accumulation_steps)
    accelerator = Accelerator(
        cpu=uses_cpu() and not uses_deepspeed(),
        # Accelerate would make it the precision of DeepSpeed's weights, which stay float32 like all others.
        mixed_precision="no" if uses_deepspeed() else mixed_precision,
        deepspeed_plugin=deepspeed,
        # The loop passes complete groups of micro-batches; the end of a data loader has no meaning there.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=gradient_accumulation_steps or 1, sync_with_dataloader=False
        ),
        step_scheduler_with_optimizer=False,
        # Gradients are views of DDP's buckets: saves one copy of all gradients, in memory and in time.
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
    wanted = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != wanted:
        raise UsageError(
            f"{wanted} processes were launched, but each counts {accelerator.num_processes}: "
            "they would train separately; start with one of accelerate_configs/*.yaml "
            "(multi_cpu.yaml without GPUs)"
        )
    if uses_deepspeed():
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()  # else transformers would build every network partitioned, under ZeRO-3
    return accelerator


def _place() -> dict[str, Any]:
    """Return Accelerate's arguments that decide on which device the processes compute.

    Raises:
        UsageError: DeepSpeed is wanted, but not installed.
    """
    if not uses_deepspeed():
        return {"cpu": uses_cpu()}
    if importlib.util.find_spec("deepspeed") is None:
        raise UsageError(
            "the Accelerate configuration wants DeepSpeed, which is not installed: pip install "
            "'detr_dist[deepspeed]', or start with accelerate_configs/multi_gpu.yaml"
        )
    # On the CPU DeepSpeed works over gloo, but only if Accelerate does not know that it is the CPU.
    return {} if torch.accelerator.is_available() else {"backend": "gloo"}


@contextmanager
def group_of_processes(
    stacks_dir: Path | None = None, *, may_compile: bool = False
) -> Iterator[PartialState]:
    """Join the processes that were launched together, until the block ends.

    Collective. An Accelerator that is built in the block joins the same group. When one of the processes is
    lost, every other one writes its stacks into `stacks_dir` and ends with one line that names it. After the
    block the environment and Accelerate's state are as before, so that the process can join a group again.

    Args:
        stacks_dir: Folder for the stacks of all threads, which show why a process hangs.
        may_compile: Whether a collective may have to wait for processes that compile.

    Raises:
        UsageError: there are too few GPUs, or this process trains or evaluates already.
        TrainingError: another process did not come, or was lost.
    """
    global _rendezvous
    if is_group_open():
        raise UsageError(
            "this cannot run inside a training or an evaluation of the same process; in a callback use "
            "model.predict, or event.details of an evaluation"
        )
    with restored_environment():
        check_environment()
        set_environment(stacks_dir)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and importlib.util.find_spec("deepspeed") is not None:
            # transformers imports it when it first saves a model; state that it then keeps would outlive the
            # group.
            with nullcontext() if uses_deepspeed() else suppress(Exception):  # a broken one is not needed
                importlib.import_module("deepspeed")
        if may_compile:
            os.environ.setdefault(_COLLECTIVE_LIMIT, str(COMPILE_LIMIT_S))
        limit_s = collective_limit_s()
        rendezvous = Rendezvous.of_environment(stacks_dir)
        rendezvous.check_in(seconds_from_environment("DETR_DIST_FORM_LIMIT_S", 40.0))
        # Collectives on the CPU time out first, with an error that can be explained; then the watch ends a
        # process whose main thread hangs in the driver; last, NCCL's watchdog aborts the process.
        timeout = timedelta(seconds=limit_s if uses_cpu() else limit_s * 5 / 3)
        state = PartialState(**_place(), timeout=timeout)
        if is_cpu_fallback() and state.is_main_process and "WORLD_SIZE" in os.environ:
            _logger.info("no GPU was found and none was requested by its number: running on the CPU")
        is_intact = rendezvous.size == 1
        _rendezvous = rendezvous
        try:
            with rendezvous.watched(limit_s * 6 / 5):
                yield state
            is_intact = True
        except StopRequested:
            is_intact = True
            raise
        except BaseException as error:
            rendezvous.report(error)
            raise
        finally:
            _rendezvous = None
            if is_intact:  # a group that has lost a process could wait for it for minutes
                state.destroy_process_group()
                rendezvous.close()
                AcceleratorState._reset_state(reset_partial_state=True)
                GradientState._reset_state()


def is_group_open() -> bool:
    """Return whether this process is inside `group_of_processes`, in whichever thread."""
    return _rendezvous is not None


def collective_limit_s() -> float:
    """Return how long a collective may wait for another process."""
    return seconds_from_environment(_COLLECTIVE_LIMIT, COLLECTIVE_LIMIT_S)


def check_launch_settings(mixed_precision: str, accumulation: int | None = None) -> None:
    """Compare settings with those that `accelerate launch` exports ("no" or 1 if its YAML has none).

    Raises:
        UsageError: they contradict ours, or the precision is not available on this device.
    """
    for name, key, value, unset in (
        ("MIXED_PRECISION", "mixed_precision", mixed_precision, "no"),
        ("GRADIENT_ACCUMULATION_STEPS", "gradient_accumulation_steps", accumulation, "1"),
    ):
        launched = os.environ.get(f"ACCELERATE_{name}") or unset
        if value is not None and launched not in (unset, str(value)):
            raise UsageError(
                f"{key} is {launched} for accelerate launch, but training.{key} is {value}; set "
                f"training.{key}={launched} or remove it from Accelerate's settings"
            )
    if mixed_precision == "fp16" and uses_cpu():
        raise UsageError(
            "training.mixed_precision=fp16 (or accelerate launch's) needs a GPU; use bf16 or no on the CPU"
        )


class HostGroup:
    """Exchanges small host values between the processes of a run; with one process it costs nothing.

    Every method is collective.

    Attributes:
        rendezvous: Start-up checks and failure reports of the processes; its use is not collective.
    """

    def __init__(self, processes: Accelerator | PartialState) -> None:
        self.num_processes = processes.num_processes
        self.process_index = processes.process_index
        self.local_process_index = processes.local_process_index
        self.rendezvous = _rendezvous or Rendezvous(0, 1, None)
        self._group: Any = None
        self._patient_group: Any = None
        if self.num_processes > 1:
            limit = timedelta(seconds=collective_limit_s())
            self._group = dist.new_group(backend="gloo", timeout=limit)
            patient = timedelta(seconds=PATIENT_LIMIT_S)
            self._patient_group = dist.new_group(backend="gloo", timeout=patient)

    @contextmanager
    def explained(self, *, is_collective: bool = False) -> Iterator[None]:
        """Turn torch's error after the loss of another process into one line that names it. Not collective.

        Raises:
            TrainingError: instead of any RuntimeError, if there are several processes.
        """
        try:
            yield
        except RuntimeError as error:
            if self.rendezvous.size == 1:
                raise
            is_lost_contact = is_collective or isinstance(error, dist.DistError)
            line = self.rendezvous.explain(error, is_lost_contact=is_lost_contact)
            raise TrainingError(line) from error
        except BaseException:
            self.rendezvous.watch.pause()  # an orderly end may take longer
            raise

    @property
    def is_main_process(self) -> bool:
        """Whether this is process 0, which logs, saves and writes files. Not collective."""
        return bool(self.process_index == 0)

    def gather_rows(self, values: Sequence[float]) -> list[list[float]]:
        """Return the values of every process as float64, on every process, in process order."""
        if self._group is None:
            return [list(values)]
        row = torch.tensor(values, dtype=torch.float64)
        rows = [torch.empty_like(row) for _ in range(self.num_processes)]
        with self.explained(is_collective=True):
            dist.all_gather(rows, row, group=self._group)
        return torch.stack(rows).tolist()

    def gather_objects(self, value: Any) -> list[Any]:
        """Return a picklable value of every process in process order, on the main process; elsewhere []."""
        if self._group is None:
            return [value]
        self._wait_for_others()
        gathered: list[Any] | None = [None] * self.num_processes if self.process_index == 0 else None
        with self.explained(is_collective=True):
            dist.gather_object(value, gathered, dst=0, group=self._group)
        return gathered or []

    def all_gather_objects(self, value: Any) -> list[Any]:
        """Return a picklable value of every process, on every process, in process order."""
        if self._group is None:
            return [value]
        gathered: list[Any] = [None] * self.num_processes
        with self.explained(is_collective=True):
            dist.all_gather_object(gathered, value, group=self._group)
        return gathered

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """Run a block on each process and raise the first exception of any process on all of them.

        Waits until all processes have left the block, however long that takes.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:  # anything else would leave the other processes waiting
            failure = error
        self._wait_for_others()
        is_ours = failure is None or isinstance(failure, DetrDistError)  # others may not be picklable
        own = failure if is_ours else DetrDistError(as_one_line(cast(Exception, failure)))
        failures = [each for each in self.all_gather_objects(own) if each is not None]
        if failure is not None:
            raise failure if own is failure else cast(Exception, own) from failure
        if failures:
            raise failures[0]

    def once_per_node(self, action: Callable[[], T]) -> T:
        """Run `action` on the first process of each node and return its result on all processes there.

        The result must be picklable. An exception on any node is raised on every process.
        """
        result: T | None = None
        with self.failing_together():
            if self.local_process_index == 0:
                result = action()
        results = self.all_gather_objects(result)
        return cast(T, results[self.process_index - self.local_process_index])

    def _wait_for_others(self) -> None:
        """Wait until every process is here, however long that takes."""
        if self._patient_group is not None:
            self.rendezvous.watch.pause()
            with self.explained(is_collective=True):
                dist.barrier(group=self._patient_group)

    def synchronise_buffers(self, module: nn.Module) -> None:
        """Copy the main process's buffers to every process.

        Batch-norm statistics are updated from each process's own images; those of the main process are
        evaluated and saved.
        """
        if self._group is not None:
            for buffer in module.buffers():
                dist.broadcast(buffer, src=0)

    def broadcast(self, value: Any) -> Any:
        """Return the main process's value, on every process."""
        if self._group is None:
            return value
        box = [value]
        with self.explained(is_collective=True):
            dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]
