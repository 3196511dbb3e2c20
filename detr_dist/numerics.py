"""Numerical settings of a run: TF32, deterministic algorithms, autocast."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from detr_dist.config import Config, TrainingConfig
from detr_dist.distributed import HostGroup
from detr_dist.environment import uses_cpu

_logger = logging.getLogger(__name__)


def set_numerics(settings: TrainingConfig) -> None:
    """Apply `training.tf32` and `training.deterministic` to torch.

    Call it before CUDA starts: cuBLAS reads its environment only then.
    """
    # torch.compile still reads these older flags, and fails with their replacements.
    torch.backends.cuda.matmul.allow_tf32 = settings.tf32
    torch.backends.cudnn.allow_tf32 = settings.tf32
    if settings.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(settings.deterministic, warn_only=True)


@contextmanager
def temporary_numerics(settings: TrainingConfig) -> Iterator[None]:
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


def resolve_precision(config: Config, host: HostGroup | None = None) -> Config:
    """Return the configuration with a specific precision instead of `auto`.

    That is the launcher's precision if it has one, else bf16 if the GPUs of all processes compute it
    natively, else no. Warns if bf16 is requested of a GPU that only emulates it.

    Collective with `host`; without one, this process is alone.
    """
    on_gpu = not uses_cpu() and torch.cuda.is_available()
    is_native = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    all_native = is_native if host is None else all(n for (n,) in host.gather_rows([is_native]))
    precision: str = config.training.mixed_precision
    if precision == "auto":
        launched = os.environ.get("ACCELERATE_MIXED_PRECISION")
        default = "bf16" if all_native else "no"
        precision = launched if launched in ("bf16", "fp16") else default
    if precision == "bf16" and on_gpu and not all_native and (host is None or host.is_main_process):
        _logger.warning(
            "training.mixed_precision=bf16: a GPU of this run only emulates it, which is slow; set fp16 or no"
        )
    training = config.training.model_copy(update={"mixed_precision": precision})
    return config.model_copy(update={"training": training})


def autocast(device: torch.device, mixed_precision: str) -> torch.autocast:
    """Return the context in which a network computes with a resolved precision; its weights are float32."""
    dtype = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}[mixed_precision]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
