"""The error message when the device runs out of memory."""

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from detr_dist.config import Config
from detr_dist.errors import TrainingError

_GIB = 2**30


@dataclass(frozen=True)
class DeviceMemory:
    """Turns a lack of device memory into an error that lists remedies."""

    config: Config = field(default_factory=Config)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @contextmanager
    def explained(
        self, doing: str, *, num_images: int, canvas_hw: tuple[int, int], is_training: bool
    ) -> Iterator[None]:
        """Report a lack of memory in the block, which computes `num_images` on a canvas, in one line.

        Raises:
            TrainingError: the device has run out of memory.
        """
        try:
            yield
        except torch.OutOfMemoryError as error:
            (height, width), remedies = canvas_hw, ", ".join(self._remedies(is_training))
            raise TrainingError(
                f"out of memory on {self.device} {doing}: {num_images} images on a canvas of "
                f"{height}x{width} (height x width), {self._peak()}; in this order set {remedies}"
            ) from error

    def _peak(self) -> str:
        if self.device.type != "cuda":
            scale = 1 if sys.platform == "darwin" else 1024
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
            return f"peak memory {peak / _GIB:.1f} GiB (of the process)"
        peak, total = torch.cuda.max_memory_allocated(self.device), torch.cuda.mem_get_info(self.device)[1]
        return f"peak memory {peak / _GIB:.1f} of {total / _GIB:.1f} GiB"

    def _remedies(self, is_training: bool) -> Iterator[str]:
        """Yield the remedies in the order of docs/performance.md, except those in use already."""
        settings, data = self.config.training, self.config.data
        if is_training and not settings.gradient_checkpointing:
            yield "training.gradient_checkpointing=true"
        if settings.batch_size > 1 and is_training:
            batch_size = settings.batch_size // 2 if settings.batch_size % 2 == 0 else 1
            accumulation = settings.gradient_accumulation_steps * settings.batch_size // batch_size
            yield (
                f"training.batch_size={batch_size} with training.gradient_accumulation_steps={accumulation} "
                "(the same training)"
            )
        elif settings.batch_size > 1:
            yield f"training.batch_size={settings.batch_size // 2}"
        if settings.mixed_precision == "no":
            yield "training.mixed_precision=bf16"
        edge = f"data.shortest_edge below {data.shortest_edge}"
        if is_training and data.multi_scale:
            yield f"edges of data.multi_scale below {max(data.multi_scale)}"
        else:
            yield (
                edge if data.resize == "square" else f"data.longest_edge below {data.longest_edge} and {edge}"
            )
        if is_training:
            yield "or use ZeRO (docs/distributed.md)"
