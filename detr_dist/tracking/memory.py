"""How much memory this process and its device use."""

import psutil
import torch

GIB = 2**30


def memory_metrics() -> dict[str, float]:
    """Memory of this process in GiB.

    `memory_ram_gb`: resident, with the loader workers. On a GPU also `memory_gpu_gb` and
    `memory_gpu_reserved_gb`: the highest that torch had allocated and reserved since the last call.
    """
    metrics = {"memory_ram_gb": _resident_bytes() / GIB}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        metrics["memory_gpu_gb"] = torch.cuda.max_memory_allocated() / GIB
        metrics["memory_gpu_reserved_gb"] = torch.cuda.max_memory_reserved() / GIB
        torch.cuda.reset_peak_memory_stats()
    return metrics


def _resident_bytes() -> int:
    process = psutil.Process()
    total: int = process.memory_info().rss
    for child in process.children(recursive=True):
        try:
            total += child.memory_info().rss
        except psutil.NoSuchProcess:
            continue  # a worker that ended meanwhile
    return total
