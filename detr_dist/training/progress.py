"""What a person sees while a run trains: a bar on a terminal, lines with an estimate elsewhere."""

import logging
import time
from collections.abc import Mapping
from datetime import timedelta

from detr_dist.progress_bar import ProgressBar

# In a log file, more frequent lines say nothing new.
_SECONDS_BETWEEN_LINES = 2.0

_logger = logging.getLogger(__name__)


class Progress:
    """Shows optimizer steps as they are done. Main process only."""

    def __init__(self, *, first_step: int, total_steps: int) -> None:
        self._first_step, self._total_steps = first_step, total_steps
        self._began_at = time.monotonic()
        self._last_line_at = float("-inf")
        self._bar = ProgressBar("step", total_steps, completed=first_step)

    def step(self) -> None:
        """Count one optimizer step."""
        self._bar.advance()

    def metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show the values that were logged at a step."""
        losses = {name: value for name, value in metrics.items() if name.startswith("train_loss")}
        parts = [
            f"{name.removeprefix('train_').replace('loss_', '')} {loss:.4f}" for name, loss in losses.items()
        ]
        parts += [
            f"lr {metrics['learning_rate']:.2e}",
            f"{metrics['train_images_per_s']:.1f} images/s",
            f"data wait {metrics['train_data_wait_share']:.0%}",
        ]
        self._bar.describe(", ".join(parts))
        now = time.monotonic()
        if step == self._total_steps or now - self._last_line_at >= _SECONDS_BETWEEN_LINES:
            left_s = (now - self._began_at) / (step - self._first_step) * (self._total_steps - step)
            parts.append(f"time left {timedelta(seconds=round(left_s))}")
            line = f"step {step}/{self._total_steps}  epoch {metrics['epoch']:.2f}  {'  '.join(parts)}"
            _logger.info(line, extra={"is_on_screen": self._bar.is_shown})
            self._last_line_at = now

    def close(self) -> None:
        """Remove the bar."""
        self._bar.close()
