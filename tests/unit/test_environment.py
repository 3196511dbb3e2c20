"""The GPUs that were requested, and whether they exist."""

import os
import re

import pytest
import torch

from detr_dist.data.loading import num_local_processes
from detr_dist.distributed import group_of_processes
from detr_dist.environment import (
    check_environment,
    find_device_problem,
    is_cpu_fallback,
    seconds_from_environment,
)
from detr_dist.errors import UsageError

LAUNCHED = {
    "WORLD_SIZE": "2",
    "RANK": "1",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", os.environ.copy())  # the code under test unsets variables as well
    launched = {*LAUNCHED, "ACCELERATE_USE_CPU", "CUDA_VISIBLE_DEVICES", "PMI_SIZE"}
    for name in launched:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def num_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make torch report two GPUs, whatever the host really has."""
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
        assert find_device_problem() is None
    else:
        assert re.search(complaint, find_device_problem() or "")


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
    assert (find_device_problem() is not None) is is_problem
    assert is_cpu_fallback() is falls_back


@pytest.mark.parametrize("text", ["soon", "0", "-3", "nan"])
def test_an_invalid_time_limit_is_refused_with_its_name(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("DETR_DIST_FORM_LIMIT_S", text)
    with pytest.raises(UsageError, match=f"DETR_DIST_FORM_LIMIT_S is '{text}'"):
        seconds_from_environment("DETR_DIST_FORM_LIMIT_S", 60.0)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        LAUNCHED,
        LAUNCHED | {"PMI_SIZE": "4", "OMPI_COMM_WORLD_SIZE": "4"},  # one launcher on each of four nodes
        LAUNCHED
        | {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "PMI_SIZE": "2"},
        dict.fromkeys([*LAUNCHED, "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "ACCELERATE_USE_CPU"], ""),
        {"WORLD_SIZE": " ", "LOCAL_RANK": "-1"},
        {"WORLD_SIZE": "1"},
        {"RANK": "0"},
        {"LOCAL_WORLD_SIZE": "0"},
        {"LOCAL_WORLD_SIZE": "4"},
        {"PMI_SIZE": "1", "PMI_RANK": "0"},
        {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"},
    ],
)
def test_empty_or_consistent_variables_are_accepted(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    check_environment()
    assert 1 <= num_local_processes() <= int(environment.get("WORLD_SIZE", "").strip() or "1")
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "PMI_SIZE", "ACCELERATE_USE_CPU"):
        assert os.environ.get(name, "1").strip() not in ("", "-1")


def test_a_local_rank_alone_means_a_single_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    check_environment()
    assert "LOCAL_RANK" not in os.environ


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2 .* RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT not set"),
        (LAUNCHED | {"MASTER_ADDR": ""}, "WORLD_SIZE is 2 .* MASTER_ADDR not set"),
        (LAUNCHED | {"RANK": "2"}, "RANK is 2 in the environment, but WORLD_SIZE is 2"),
        (LAUNCHED | {"WORLD_SIZE": ""}, "RANK is 1 in the environment, but WORLD_SIZE is not set"),
        (LAUNCHED | {"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE is 0 .* but WORLD_SIZE is 2"),
        (LAUNCHED | {"LOCAL_WORLD_SIZE": "4"}, "LOCAL_WORLD_SIZE is 4 .* but WORLD_SIZE is 2"),
        ({"LOCAL_RANK": "3"}, "LOCAL_RANK is 3 in the environment, but WORLD_SIZE is not set"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is 0"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two', which is no whole number"),
        ({"LOCAL_RANK": "0.0"}, "LOCAL_RANK is '0.0'"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT is 'http'"),
        ({"PMI_SIZE": "2"}, "PMI_SIZE is 2"),
        ({"OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_RANK": "3"}, "OMPI_COMM_WORLD_SIZE is 8"),
        ({"MV2_COMM_WORLD_SIZE": "2", "WORLD_SIZE": "1"}, "MV2_COMM_WORLD_SIZE is 2"),
        ({"PMI_RANK": "first"}, "PMI_RANK is 'first'"),
        ({"ACCELERATE_USE_CPU": "maybe"}, "ACCELERATE_USE_CPU is 'maybe'"),
    ],
)
def test_a_leftover_launcher_variable_is_named(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], name: str
) -> None:
    for each, value in environment.items():
        monkeypatch.setenv(each, value)
    with pytest.raises(UsageError, match=name) as caught:
        check_environment()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [(None, None), ("PYTORCH_ALLOC_CONF", "max_split_size_mb:64"), ("PYTORCH_CUDA_ALLOC_CONF", "")],
)
def test_gpu_memory_segments_are_expandable_unless_the_user_disables_it(
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
