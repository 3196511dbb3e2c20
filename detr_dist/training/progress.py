"""What a person sees while a run goes on: a bar on a terminal, plain lines elsewhere. Main process only."""

import sys
import time
from typing import Any

from tqdm import tqdm

# In a log file a line more often than this says nothing new.
_SECONDS_BETWEEN_LINES = 2.0


class Progress:
    """Shows optimizer steps as they are done."""

    def __init__(self, *, is_main_process: bool, first_step: int, total_steps: int) -> None:
        self._is_main_process = is_main_process
        self._total_steps = total_steps
        self._last_line_at = float("-inf")
        self._bar: Any = None
        if is_main_process and sys.stderr.isatty():
            self._bar = tqdm(initial=first_step, total=total_steps, unit="step", dynamic_ncols=True)

    def step(self) -> None:
        if self._bar is not None:
            self._bar.update()

    def metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Show the values that were logged at a step."""
        losses = {name: value for name, value in metrics.items() if name.startswith("train_loss")}
        parts = [
            f"{name.removeprefix('train_loss_').removeprefix('train_')} {loss:.4f}"
            for name, loss in losses.items()
        ]
        parts += [
            f"lr {metrics['learning_rate']:.2e}",
            f"{metrics['train_images_per_s']:.1f} images/s",
            f"data wait {metrics['train_data_wait_share']:.0%}",
        ]
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(parts))
        elif step == self._total_steps or time.monotonic() - self._last_line_at >= _SECONDS_BETWEEN_LINES:
            self.say(f"step {step}/{self._total_steps}  epoch {metrics['epoch']:.2f}  " + "  ".join(parts))
            self._last_line_at = time.monotonic()

    def say(self, text: str) -> None:
        """A line of its own, beside a bar or without one."""
        if not self._is_main_process:
            return
        if self._bar is not None:
            self._bar.write(text)
        else:
            print(text, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
