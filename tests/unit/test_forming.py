"""Which GPUs were asked for, and whether they are there."""

import os

import pytest
import torch

from detr_dist.distributed import group_of_processes
from detr_dist.errors import UsageError
from detr_dist.forming import call_roll, device_problem, fell_back_to_cpu, limit_s


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ACCELERATE_USE_CPU", "CUDA_VISIBLE_DEVICES", "LOCAL_WORLD_SIZE", "WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def num_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with two; what there is in truth must not matter here."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)


@pytest.mark.usefixtures("num_gpus")
@pytest.mark.parametrize(
    ("environment", "complaint"),
    [
        ({}, None),
        ({"LOCAL_WORLD_SIZE": "2"}, None),
        ({"LOCAL_WORLD_SIZE": "3"}, "3 processes were launched on .*, but torch finds 2 GPUs"),
        ({"LOCAL_WORLD_SIZE": "3", "ACCELERATE_USE_CPU": "true"}, None),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, None),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2"}, r"names 3 GPUs \(0,1,2\), but torch finds 2"),
        ({"CUDA_VISIBLE_DEVICES": "0,1,-1,2"}, None),
    ],
)
def test_every_process_needs_a_gpu_and_every_named_gpu_must_be_there(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], complaint: str | None
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if complaint is None:
        assert device_problem() is None
    else:
        with pytest.raises(UsageError, match=complaint):
            call_roll(device_problem(), 1.0)


@pytest.mark.parametrize(
    ("visible", "is_problem", "falls_back"),
    [(None, False, True), ("", False, False), ("-1,-1", False, False), ("0", True, False)],
)
def test_without_gpus_the_cpu_is_used_unless_some_were_named(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, is_problem: bool, falls_back: bool
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert (device_problem() is not None) is is_problem
    assert fell_back_to_cpu() is falls_back


@pytest.mark.parametrize("text", ["soon", "0", "-3", "nan"])
def test_a_limit_that_is_no_time_is_refused_with_its_name(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("DETR_DIST_FORM_LIMIT_S", text)
    with pytest.raises(UsageError, match=f"DETR_DIST_FORM_LIMIT_S is '{text}'"):
        limit_s("DETR_DIST_FORM_LIMIT_S", 60.0)


@pytest.mark.parametrize(("other", "complaint"), [("on gpu", "GPUs on node1 but none on "), ("on cpu", None)])
def test_all_processes_must_compute_on_the_same_kind_of_device(
    monkeypatch: pytest.MonkeyPatch, other: str, complaint: str | None
) -> None:
    agent = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    launched = {
        "WORLD_SIZE": "2",
        "RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(agent.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "ACCELERATE_USE_CPU": "true",
    }
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    there = torch.distributed.PrefixStore("detr_dist/0", agent)
    there.set("1", "node1")
    there.set(other, "node1")
    if complaint is None:
        assert call_roll(None, 5.0) is not None
    else:
        with pytest.raises(UsageError, match=complaint):
            call_roll(None, 5.0)


@pytest.mark.parametrize(
    ("name", "value"),
    [(None, None), ("PYTORCH_ALLOC_CONF", "max_split_size_mb:64"), ("PYTORCH_CUDA_ALLOC_CONF", "")],
)
def test_gpu_memory_grows_in_place_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, name: str | None, value: str | None
) -> None:
    for each in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"):
        monkeypatch.setenv(each, "")
        monkeypatch.delenv(each)
    if name is not None and value is not None:
        monkeypatch.setenv(name, value)
    with group_of_processes():
        found = {each: os.environ[each] for each in os.environ if each.endswith("_ALLOC_CONF")}
    assert found == ({name: value} if name else {"PYTORCH_ALLOC_CONF": "expandable_segments:True"})
