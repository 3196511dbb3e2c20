"""The precision and the numerical settings of a run."""

import os
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from accelerate import PartialState

from detr_dist.config import Config, TrainingConfig, load_config
from detr_dist.distributed import (
    HostGroup,
    build_accelerator,
    collective_limit_s,
    group_of_processes,
    is_group_open,
)
from detr_dist.errors import UsageError
from detr_dist.numerics import resolve_precision
from detr_dist.serving.precision import set_numerics


@pytest.fixture
def numerics(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Restore the settings that a test changes."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that it is restored
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Make torch report a GPU that computes bf16 natively."""
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    return monkeypatch


def precision(wanted: str) -> str:
    config = load_config(None, [f"training.mixed_precision={wanted}"])
    return resolve_precision(config, HostGroup(PartialState(cpu=True))).training.mixed_precision


@pytest.mark.parametrize("tf32", [True, False])
def test_tf32_is_set_for_convolutions_and_matrix_products(numerics: None, tf32: bool) -> None:
    set_numerics(TrainingConfig(tf32=tf32))
    assert torch.backends.cuda.matmul.allow_tf32 is tf32
    assert torch.backends.cudnn.allow_tf32 is tf32
    # torch.compile asks in both of these ways; one of them raises when the flags were set in another way.
    assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")
    assert torch.backends.cuda.matmul.fp32_precision == ("tf32" if tf32 else "ieee")
    assert (torch.backends.cudnn.conv.fp32_precision == "tf32") is tf32


def test_deterministic_algorithms_are_used_on_request(numerics: None) -> None:
    set_numerics(TrainingConfig())
    assert not torch.are_deterministic_algorithms_enabled()
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    set_numerics(TrainingConfig(deterministic=True))
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.is_deterministic_algorithms_warn_only_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_the_timeout_allows_for_processes_that_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DETR_DIST_COLLECTIVE_LIMIT_S", "5")
    with group_of_processes(may_compile=True):
        assert collective_limit_s() == 5, "what the user sets counts"
    monkeypatch.delenv("DETR_DIST_COLLECTIVE_LIMIT_S")
    with group_of_processes(may_compile=True):
        assert collective_limit_s() == 600
    with group_of_processes():
        assert collective_limit_s() == 90


@pytest.mark.parametrize("error", [None, KeyboardInterrupt(), UsageError("wrong")], ids=repr)
def test_a_process_can_rejoin_with_another_precision(error: BaseException | None) -> None:
    before = dict(os.environ)
    ended = nullcontext() if error is None else pytest.raises(type(error))
    with ended, group_of_processes(may_compile=True):
        build_accelerator(mixed_precision="no", gradient_accumulation_steps=2)
        os.environ["MLFLOW_TRACKING_URI"] = "sqlite:///of_this_run.db"
        if error is not None:
            raise error
    assert os.environ == before
    with group_of_processes():
        again = build_accelerator(mixed_precision="bf16", gradient_accumulation_steps=1)
        assert (again.mixed_precision, again.gradient_accumulation_steps) == ("bf16", 1)


def test_a_second_group_is_refused_and_leaves_the_first_intact() -> None:
    assert not is_group_open()
    with group_of_processes() as processes:
        environment = dict(os.environ)
        with pytest.raises(UsageError, match=r"inside a training.*model\.predict"), group_of_processes():
            pytest.fail("opened")
        assert is_group_open()
        assert dict(os.environ) == environment
        assert PartialState._shared_state == processes.__dict__
    assert not is_group_open()


def test_without_a_gpu_the_precision_is_full() -> None:
    assert Config().training.mixed_precision == "auto"
    assert precision("auto") == "no"
    assert precision("bf16") == "bf16"


def test_a_gpu_uses_bf16_if_it_supports_it_natively(gpu: pytest.MonkeyPatch, capsys) -> None:
    assert precision("auto") == "bf16"
    gpu.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert precision("auto") == "no"
    assert precision("fp16") == "fp16"
    assert capsys.readouterr().out == ""
    assert precision("bf16") == "bf16"
    assert "warning: training.mixed_precision=bf16" in capsys.readouterr().out


@pytest.mark.parametrize("launched", ["fp16", "bf16"])
def test_auto_uses_the_precision_of_the_launcher(gpu: pytest.MonkeyPatch, launched: str) -> None:
    gpu.setenv("ACCELERATE_MIXED_PRECISION", launched)
    assert precision("auto") == launched
    gpu.setenv("ACCELERATE_MIXED_PRECISION", "no")  # which the launcher says when it was given none
    assert precision("auto") == "bf16"


@pytest.mark.parametrize(("launched", "wanted"), [("bf16", "no"), ("fp8", "auto")])
def test_a_precision_that_contradicts_the_launcher_is_refused(
    monkeypatch: pytest.MonkeyPatch, launched: str, wanted: str
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    with pytest.raises(UsageError, match=f"{launched} for accelerate launch"):
        build_accelerator(mixed_precision=precision(wanted))
