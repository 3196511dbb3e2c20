"""The metrics of hosts and GPUs and their names, whatever the driver numbers, hides or refuses."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pynvml
import pytest
import torch
from mlflow import MlflowClient
from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

from detr_dist.tracking.system_metrics import GIB, DeviceMonitor

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
HOST_METRICS = {
    *("cpu_utilization_percentage", "system_memory_usage_megabytes", "system_memory_usage_percentage"),
    *("disk_usage_percentage", "disk_usage_megabytes", "disk_available_megabytes"),
    *("network_receive_megabytes", "network_transmit_megabytes"),
}
UUIDS = [f"{i}{i}{i}{i}0000-1111-2222-3333-444444444444" for i in range(8)]


@dataclass(eq=False)
class Gpu:
    """GPU, or an instance of one under MIG: then `busy` is None, as NVML does not report it."""

    uuid: str
    used_gib: float = 0.0
    busy: int | None = 0
    instances: "list[Gpu]" = field(default_factory=list)
    is_lost: bool = False


class Driver:
    """Subset of NVML that the package uses, for a node with these GPUs. There is no real one here.

    As in NVML, the count is that of visible GPUs, independent of CUDA_VISIBLE_DEVICES.
    """

    def __init__(self, *gpus: Gpu, is_installed: bool = True) -> None:
        self.gpus = gpus
        self.is_installed = is_installed
        self.num_users = 0

    def nvmlInit(self) -> None:
        if not self.is_installed:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)
        self.num_users += 1

    def nvmlShutdown(self) -> None:
        self._check()
        self.num_users -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes) -> Gpu:
        self._check()
        for gpu in self.gpus:
            names = {f"GPU-{gpu.uuid}": gpu} | {f"MIG-{each.uuid}": each for each in gpu.instances}
            if uuid.decode() in names:
                return names[uuid.decode()]
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, instance: Gpu) -> Gpu:
        self._check()
        return next(gpu for gpu in self.gpus if instance in gpu.instances)

    def nvmlDeviceGetIndex(self, handle: Gpu) -> int:
        self._check(handle)
        if handle in self.gpus:
            return self.gpus.index(handle)
        return self.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle).instances.index(handle)

    def nvmlDeviceGetMemoryInfo(self, handle: Gpu, version: int | None = None) -> SimpleNamespace:
        self._check(handle)
        reserved = 0 if version == pynvml.nvmlMemory_v2 else GIB // 2  # the driver's own
        return SimpleNamespace(used=int(handle.used_gib * GIB) + reserved, total=80 * GIB)

    def nvmlDeviceGetUtilizationRates(self, handle: Gpu) -> SimpleNamespace:
        self._check(handle)
        if handle.busy is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return SimpleNamespace(gpu=handle.busy, memory=0)

    def nvmlDeviceGetPowerUsage(self, handle: Gpu) -> int:
        self._check(handle)
        if handle.busy is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return 7000 * handle.busy

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: Gpu) -> int:
        self._check(handle)
        return 700_000

    def cuda_uuid(self, device: torch.device) -> str:
        """Return the bare UUID of a torch device, as CUDA chooses it."""
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(str(i) for i in range(len(self.gpus))))
        chosen = visible.split(",")[device.index]
        return self.gpus[int(chosen)].uuid if chosen.isdigit() else chosen.split("-", 1)[1]

    def _check(self, handle: Gpu | None = None) -> None:
        if self.num_users == 0:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_UNINITIALIZED)
        if handle is not None and handle.is_lost:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)


class Company:
    """Main process of a run with other processes, which were started before."""

    def __init__(self, others: Sequence["Process"]) -> None:
        self.others = others
        self.announced: Any = None
        self.sent: Any = None

    def all_gather_objects(self, value: Any) -> list[Any]:
        self.announced = value
        return [value, *(other.company.announced for other in self.others)]

    def gather_objects(self, value: Any) -> list[Any]:
        self.sent = value
        return [value, *(other.company.sent for other in self.others)]


@dataclass
class Process:
    monitor: DeviceMonitor
    company: Company
    read: dict[str, float]


Start = Callable[..., Process]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Start:
    """Start a process of a run on a node, and read once."""

    def start_one(
        driver: Driver,
        *others: Process,
        host: str = "node1",
        visible: str | None = None,
        allocated_gib: float = 1.0,
    ) -> Process:
        for name in [name for name in dir(driver) if name.startswith("nvml")]:
            monkeypatch.setattr(pynvml, name, getattr(driver, name))
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        monkeypatch.setattr(socket, "gethostname", lambda: host)
        stand_ins = {
            "get_device_properties": lambda device: SimpleNamespace(uuid=driver.cuda_uuid(device)),
            "max_memory_allocated": lambda device: allocated_gib * GIB,
            "max_memory_reserved": lambda device: 2 * allocated_gib * GIB,
            "reset_peak_memory_stats": lambda device: None,
        }
        for name, stand_in in stand_ins.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)
        company = Company(others)
        monitor = DeviceMonitor(CUDA, company)  # type: ignore[arg-type]
        return Process(monitor, company, monitor.read())

    return start_one


def of_driver(read: dict[str, float]) -> dict[str, float]:
    """Return the driver's metrics without those for MLflow's page of system metrics."""
    own = {name: value for name, value in read.items() if not name.startswith("system/")}
    return {name: value for name, value in own.items() if "gpu" in name and "/" in name}


def of_system(read: dict[str, float], host: str) -> dict[str, float]:
    prefix = f"system/{host}/"
    return {name.removeprefix(prefix): value for name, value in read.items() if name.startswith(prefix)}


def test_a_gpu_is_numbered_by_the_driver_not_by_cuda_visible_devices(start: Start) -> None:
    driver = Driver(*(Gpu(UUIDS[i], used_gib=10 + i, busy=50 + i) for i in range(4)))
    assert of_driver(start(driver, visible="2").read) == {
        "memory_gpu_used_gb/node1/2": 12.0, "utilization_gpu_percent/node1/2": 52.0
    }  # fmt: skip


def test_a_mig_instance_has_its_own_number_and_no_utilisation(start: Start) -> None:
    instances = [Gpu(UUIDS[4], used_gib=3, busy=None), Gpu(UUIDS[5], used_gib=4, busy=None)]
    driver = Driver(Gpu(UUIDS[0]), Gpu(UUIDS[1], used_gib=7, busy=None, instances=instances))
    process = start(driver, visible=f"MIG-{UUIDS[5]}")
    assert of_driver(process.read) == {"memory_gpu_used_gb/node1/1.1": 4.0}
    assert process.monitor.notice == ""


def test_all_gpus_of_all_nodes_are_reported_with_the_process_maximum(start: Start) -> None:
    first, second = (Driver(*(Gpu(UUIDS[i + j], used_gib=i + j) for j in (0, 1))) for i in (0, 2))
    others = [
        start(second, host="node2", visible="1,0", allocated_gib=3),
        start(second, host="node2", visible="0", allocated_gib=4),
        start(first, visible="1", allocated_gib=2),
    ]
    read = start(first, *others, visible="0").read
    used = {name: value for name, value in read.items() if name.startswith("memory_gpu_used_gb/")}
    assert used == {f"memory_gpu_used_gb/node{1 + i // 2}/{i % 2}": float(i) for i in range(4)}
    assert (read["memory_gpu_gb"], read["memory_gpu_reserved_gb"]) == (4.0, 8.0)
    assert {name for name in read if "machine" in name} == {
        "memory_machine_gb/node1", "memory_machine_gb/node2"
    }  # fmt: skip


def test_mlflows_page_shows_every_host_and_the_gpus_that_the_run_uses(start: Start) -> None:
    driver = Driver(*(Gpu(UUIDS[i], used_gib=8 * i, busy=50 * i) for i in range(4)))
    other = start(driver, host="node2", visible="2")
    read = start(driver, other, visible="1").read
    for host, index, used, watts in (("node1", 1, 8, 350), ("node2", 2, 16, 700)):
        shown = of_system(read, host)
        assert {name: value for name, value in shown.items() if name.startswith("gpu")} == {
            f"gpu_{index}_memory_usage_megabytes": used * GIB / 1e6,
            f"gpu_{index}_memory_usage_percentage": 10.0 * index,
            f"gpu_{index}_utilization_percentage": 50.0 * index,
            f"gpu_{index}_power_usage_watts": watts,
            f"gpu_{index}_power_usage_percentage": watts / 7,
        }
        assert shown.keys() > HOST_METRICS


def test_metrics_of_the_host_have_the_names_and_units_of_mlflows_own_monitor(start: Start) -> None:
    theirs: dict[str, float] = {}
    for monitor in (CPUMonitor(), DiskMonitor(), NetworkMonitor()):
        monitor.collect_metrics()
        theirs |= monitor.aggregate_metrics()
    ours = of_system(start(Driver(Gpu(UUIDS[0])), host="node1").read, "node1")
    assert theirs.keys() == HOST_METRICS
    for name in HOST_METRICS - {name for name in theirs if name.startswith(("cpu", "network"))}:
        assert ours[name] == pytest.approx(theirs[name], rel=0.2)  # other processes use memory and disk


def test_two_processes_on_one_gpu_log_one_metric(start: Start) -> None:
    driver = Driver(Gpu(UUIDS[0], used_gib=5, busy=80))
    other = start(driver)
    driver.gpus[0].used_gib = 4
    assert of_driver(start(driver, other).read) == {
        "memory_gpu_used_gb/node1/0": 5.0, "utilization_gpu_percent/node1/0": 80.0
    }  # fmt: skip


def test_gpus_that_are_number_0_in_each_process_are_distinguished(start: Start) -> None:
    first, second = (Driver(Gpu(UUIDS[i], used_gib=i, busy=None)) for i in (2, 3))
    elsewhere = start(Driver(Gpu(UUIDS[5], used_gib=5, busy=None)), host="node2")
    other = start(second, start(first))  # every process knows of all others
    read = start(first, other, elsewhere).read
    assert of_driver(read) == {
        "memory_gpu_used_gb/node1/0-22220000": 2.0,
        "memory_gpu_used_gb/node1/0-33330000": 3.0,
        "memory_gpu_used_gb/node2/0": 5.0,
    }


@pytest.mark.parametrize("is_installed", [False, True], ids=["no driver", "another driver's GPU"])
def test_without_the_driver_torch_metrics_stay_and_one_line_is_logged(
    is_installed: bool, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Driver(is_installed=is_installed)
    process = start(driver, visible=f"GPU-{UUIDS[0]}")
    assert of_driver(process.read) == {}
    assert process.read["memory_gpu_gb"] == 1.0
    (line,) = process.monitor.notice.splitlines()
    assert "node1" in line
    assert "Not Found" in line
    process.monitor.close()
    assert driver.num_users == 0


def test_the_main_process_names_the_nodes_without_a_driver(start: Start) -> None:
    others = [start(Driver(is_installed=False), host=f"node{i}", visible="GPU-x") for i in (3, 2, 2)]
    process = start(Driver(Gpu(UUIDS[0])), *others)
    assert "on node2, node3: " in process.monitor.notice
    assert len(of_driver(process.read)) == 2


def test_a_lost_gpu_is_omitted_until_it_returns(start: Start) -> None:
    gpu = Gpu(UUIDS[0], used_gib=1, busy=90)
    process = start(Driver(gpu))
    gpu.is_lost = True
    read = process.monitor.read()
    assert of_driver(read) == {}
    assert read["memory_gpu_gb"] == 1.0
    gpu.is_lost = False
    assert len(of_driver(process.monitor.read())) == 2


def test_the_driver_is_shut_down_once_at_the_end(start: Start) -> None:
    driver = Driver(Gpu(UUIDS[0]))
    driver.num_users = 1  # another user in this process
    process = start(driver)
    assert driver.num_users == 2
    process.monitor.close()
    assert driver.num_users == 1


def test_a_driver_that_is_missing_at_the_end_is_no_error(start: Start) -> None:
    driver = Driver(Gpu(UUIDS[0]))
    process = start(driver)
    driver.num_users = 0
    process.monitor.close()
    assert driver.num_users == 0


def test_on_the_cpu_the_driver_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(Gpu(UUIDS[0]))
    monkeypatch.setattr(pynvml, "nvmlInit", driver.nvmlInit)
    monkeypatch.setattr(socket, "gethostname", lambda: "node1")
    monitor = DeviceMonitor(CPU, Company([]))  # type: ignore[arg-type]
    read = monitor.read()
    monitor.close()
    assert driver.num_users == 0
    system = {f"system/node1/{name}" for name in HOST_METRICS}
    assert read.keys() == {"memory_ram_gb", "memory_machine_gb/node1", *system}
    assert 0 < read["memory_machine_gb/node1"] < psutil.virtual_memory().total / GIB
    assert "no CUDA device" in monitor.notice


def test_the_memory_of_a_process_includes_its_child_processes() -> None:
    monitor = DeviceMonitor(CPU, Company([]))  # type: ignore[arg-type]
    alone = monitor.read()["memory_ram_gb"]
    hold = "import sys; held = b'x' * 2**28; print('ready', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", hold]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        together = monitor.read()["memory_ram_gb"]
        child.communicate()
    # A quarter of a GiB and a small Python; half of it would do to tell them apart from noise.
    assert together - alone > 0.125


def test_an_mlflow_file_store_accepts_every_metric_for_any_host_name(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Use the strictest store: a metric is a file there, so no name may be another's folder."""
    read = start(Driver(Gpu(UUIDS[0], used_gib=1)), host="Jörg's/pc:1").read
    assert len(read) == 6 + 5 + len(HOST_METRICS)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    client = MlflowClient(tmp_path.as_uri())
    run_id = client.create_run(client.create_experiment("test")).info.run_id
    for name, value in read.items():
        client.log_metric(run_id, name, value)
    assert client.get_run(run_id).data.metrics == read
