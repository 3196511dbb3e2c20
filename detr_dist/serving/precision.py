"""Numerical settings: TF32, deterministic algorithms, autocast."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

from .settings import Precision


class NumericSettings(Protocol):
    """The section `training` of the configuration, or the settings of a saved model."""

    @property
    def tf32(self) -> bool: ...  # noqa: D102
    @property
    def deterministic(self) -> bool: ...  # noqa: D102


def set_numerics(settings: NumericSettings) -> None:
    """Apply `tf32` and `deterministic` to torch.

    Call it before CUDA starts: cuBLAS reads its environment only then.
    """
    # torch.compile still reads these older flags, and fails with their replacements.
    torch.backends.cuda.matmul.allow_tf32 = settings.tf32
    torch.backends.cudnn.allow_tf32 = settings.tf32
    if settings.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(settings.deterministic, warn_only=True)


@contextmanager
def temporary_numerics(settings: NumericSettings) -> Iterator[None]:
    """Apply `set_numerics` within the block, and restore the caller's settings afterwards."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    tf32 = matmul.allow_tf32, cudnn.allow_tf32
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    set_numerics(settings)
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = tf32
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


def precision_on(device: torch.device, wanted: Precision) -> str:
    """Return the precision with which a saved model computes on a device.

    `auto` is bf16 on a GPU that computes it natively; a CPU never computes in fp16.
    """
    if wanted == "auto":
        is_native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16" if is_native else "no"
    return "no" if wanted == "fp16" and device.type == "cpu" else wanted


def autocast(device: torch.device, mixed_precision: str) -> torch.autocast:
    """Return the context in which a network computes with a resolved precision; its weights are float32."""
    dtype = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}[mixed_precision]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
