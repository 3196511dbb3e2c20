"""The precision of a run."""

import logging
import os

import torch

from detr_dist.config import Config
from detr_dist.distributed import HostGroup
from detr_dist.environment import uses_cpu

_logger = logging.getLogger(__name__)


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
