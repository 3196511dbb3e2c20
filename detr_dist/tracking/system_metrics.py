"""Memory use of a run's processes, hosts and GPUs, and what MLflow's own system metrics measure."""

import os
import re
import socket
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import psutil
import pynvml
import torch

from detr_dist.distributed import HostGroup

GIB = 2**30
MEGABYTE = 1e6


@dataclass(frozen=True)
class GpuName:
    """The GPU that a process uses, or the reason why that is unknown."""

    machine: str
    index: str = ""
    uuid: str = ""
    trouble: str = ""

    def index_among(self, names: Sequence["GpuName"]) -> str:
        """Return the index, with the start of the UUID if several GPUs of the host have that index.

        Slurm may show each process only its own GPU, which then has index 0.
        """
        is_ambiguous = any(
            (name.machine, name.index) == (self.machine, self.index) and name.uuid != self.uuid
            for name in names
        )
        return self.index + (f"-{self.uuid[:8]}" if is_ambiguous else "")


class DeviceMonitor:
    """Measures a run's use of its hosts and GPUs.

    Creating it and `read` are collective.
    """

    def __init__(self, device: torch.device, host: HostGroup) -> None:
        self._device = device
        self._host = host
        self._machine = re.sub(r"[^\w.-]+", "_", socket.gethostname(), flags=re.ASCII)
        self._driver = ExitStack()
        self._gpu: Any = None  # NVML's handle
        own = self._open_driver()
        names = host.all_gather_objects(own)
        self._gpu_index = own.index_among(names)
        self._traffic = _network_bytes()
        psutil.cpu_percent()  # the first call has nothing to compare with
        self.notice = _notice(names)
        """One line on metrics that are not available; empty if all are."""

    def read(self) -> dict[str, float]:
        """Return each metric's highest value over all processes, on the main process; empty elsewhere.

        `memory_ram_gb`: GiB resident in a process with its loader workers; `memory_machine_gb/<host>`: GiB in
        use on a host by all its processes. For GPUs `memory_gpu_gb` and `memory_gpu_reserved_gb`: the peak
        that torch allocated and reserved since the last call; and the driver's values for the complete GPU,
        each with `/<host>/<index>`: `memory_gpu_used_gb` and `utilization_gpu_percent`.

        `system/<host>/...` are the metrics of MLflow's own monitor, with its names and units, which the UI
        shows on its page of system metrics; GPUs are those that the run uses.

        No name may be the folder of another: MLflow's file store keeps each metric in a file.
        """
        readings = self._host.gather_objects(self._read_own())
        names = {name for reading in readings for name in reading}
        return {name: max(reading[name] for reading in readings if name in reading) for name in sorted(names)}

    def close(self) -> None:
        """Release the driver."""
        self._driver.close()

    def _open_driver(self) -> GpuName:
        """Find the GPU of this process in NVML, the library of NVIDIA's driver.

        NVML counts all GPUs of the host, regardless of CUDA_VISIBLE_DEVICES: the GPU is found by its UUID.
        """
        if self._device.type != "cuda":
            return GpuName(self._machine, trouble="no CUDA device in use")
        try:
            pynvml.nvmlInit()
            self._driver.callback(_release_driver)
            uuid = str(torch.cuda.get_device_properties(self._device).uuid)
            self._gpu, index = _find(uuid)
        except pynvml.NVMLError as error:  # there is no driver, or it does not know the GPU
            self.close()
            return GpuName(self._machine, trouble=str(error))
        return GpuName(self._machine, index, uuid)

    def _read_own(self) -> dict[str, float]:
        host = psutil.virtual_memory()
        metrics = {
            "memory_ram_gb": _resident_bytes() / GIB,
            f"memory_machine_gb/{self._machine}": (host.total - host.available) / GIB,
        }
        if self._device.type == "cuda":
            metrics["memory_gpu_gb"] = torch.cuda.max_memory_allocated(self._device) / GIB
            metrics["memory_gpu_reserved_gb"] = torch.cuda.max_memory_reserved(self._device) / GIB
            torch.cuda.reset_peak_memory_stats(self._device)
        if self._gpu is not None:
            metrics |= self._read_gpu()
        return metrics | self._read_host()

    def _read_gpu(self) -> dict[str, float]:
        """Return the driver's values for the complete GPU, without those that it cannot report."""
        name = f"{self._machine}/{self._gpu_index}"
        in_mlflow = f"system/{self._machine}/gpu_{self._gpu_index}"
        metrics = {}
        with suppress(pynvml.NVMLError):
            # Version 2 excludes the driver's own memory, as nvidia-smi does.
            memory = pynvml.nvmlDeviceGetMemoryInfo(self._gpu, version=pynvml.nvmlMemory_v2)
            metrics[f"memory_gpu_used_gb/{name}"] = memory.used / GIB
            metrics[f"{in_mlflow}_memory_usage_megabytes"] = memory.used / MEGABYTE
            metrics[f"{in_mlflow}_memory_usage_percentage"] = 100 * memory.used / memory.total
        with suppress(pynvml.NVMLError):
            busy = float(pynvml.nvmlDeviceGetUtilizationRates(self._gpu).gpu)
            metrics[f"utilization_gpu_percent/{name}"] = busy
            metrics[f"{in_mlflow}_utilization_percentage"] = busy
        with suppress(pynvml.NVMLError):
            watts = pynvml.nvmlDeviceGetPowerUsage(self._gpu) / 1000
            metrics[f"{in_mlflow}_power_usage_watts"] = watts
            limit = pynvml.nvmlDeviceGetEnforcedPowerLimit(self._gpu) / 1000
            metrics[f"{in_mlflow}_power_usage_percentage"] = 100 * watts / limit
        return metrics

    def _read_host(self) -> dict[str, float]:
        """Return what MLflow measures on a host; network traffic counts from the start of this process."""
        memory, disk = psutil.virtual_memory(), psutil.disk_usage(os.sep)
        received, sent = (now - before for now, before in zip(_network_bytes(), self._traffic, strict=True))
        metrics = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / MEGABYTE,
            "system_memory_usage_percentage": 100 * memory.used / memory.total,
            "disk_usage_percentage": disk.percent,
            "disk_usage_megabytes": disk.used / MEGABYTE,
            "disk_available_megabytes": disk.free / MEGABYTE,
            "network_receive_megabytes": received / MEGABYTE,
            "network_transmit_megabytes": sent / MEGABYTE,
        }
        return {f"system/{self._machine}/{name}": value for name, value in metrics.items()}


def _release_driver() -> None:
    with suppress(pynvml.NVMLError):
        pynvml.nvmlShutdown()


def _find(uuid: str) -> tuple[Any, str]:
    """Return NVML's handle and index of a GPU or MIG instance.

    The index of a MIG instance is `<GPU>.<device>`, as in `nvidia-smi -L`.
    """
    try:
        gpu = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}".encode())
        return gpu, str(pynvml.nvmlDeviceGetIndex(gpu))
    except pynvml.NVMLError:  # torch gives the bare UUID of both kinds
        instance = pynvml.nvmlDeviceGetHandleByUUID(f"MIG-{uuid}".encode())
        gpu = pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(instance)
        return instance, f"{pynvml.nvmlDeviceGetIndex(gpu)}.{pynvml.nvmlDeviceGetIndex(instance)}"


def _notice(names: Sequence[GpuName]) -> str:
    without = [name for name in names if name.trouble]
    if not without:
        return ""
    hosts = ", ".join(sorted({name.machine for name in without}))
    reasons = "; ".join(sorted({name.trouble for name in without}))
    return f"no GPU metrics from the NVIDIA driver on {hosts}: {reasons}"


def _resident_bytes() -> int:
    process = psutil.Process()
    total: int = process.memory_info().rss
    for child in process.children(recursive=True):
        try:
            total += child.memory_info().rss
        except psutil.Error:
            continue  # a worker that has just ended
    return total


def _network_bytes() -> tuple[int, int]:
    """Return the bytes that the host has received and sent, 0 where they are not counted."""
    counters = None
    with suppress(OSError):
        counters = psutil.net_io_counters()
    return (counters.bytes_recv, counters.bytes_sent) if counters is not None else (0, 0)
