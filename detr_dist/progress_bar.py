"""Progress bars on a terminal, and none elsewhere.

One display by rich for all bars of a process. It has no thread, whose locks a forked loader process would
inherit in any state, and leaves standard error alone.
"""

import sys
import time

import rich
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_SECONDS_BETWEEN_UPDATES = 0.1

_display: Progress | None = None


class ProgressBar:
    """Counts up to `total` below the lines that are logged meanwhile."""

    def __init__(self, label: str, total: int, *, completed: int = 0) -> None:
        global _display
        self._updated_at = float("-inf")
        if _display is None and sys.stdout.isatty() and rich.get_console().is_interactive:
            columns = (TextColumn("{task.fields[label]}"), BarColumn(), MofNCompleteColumn())
            _display = Progress(
                *(*columns, TimeRemainingColumn(), TextColumn("{task.description}")),
                auto_refresh=False,
                redirect_stdout=False,
                redirect_stderr=False,
                transient=True,
            )
            _display.start()
            _display.console.show_cursor(True)  # the process may end at any moment
        self._display = _display
        if self._display is not None:
            self._task = self._display.add_task("", label=label, total=total, completed=completed)

    @property
    def is_shown(self) -> bool:
        return self._display is not None

    def advance(self, num_steps: int = 1) -> None:
        """Count `num_steps` more."""
        if self._display is not None:
            self._display.advance(self._task, num_steps)
            if time.monotonic() - self._updated_at > _SECONDS_BETWEEN_UPDATES:
                self._updated_at = time.monotonic()
                self._display.refresh()

    def describe(self, text: str) -> None:
        """Show `text` behind the bar."""
        if self._display is not None:
            self._display.update(self._task, description=text)

    def close(self) -> None:
        """Remove the bar. Closing it again has no effect."""
        global _display
        if self._display is not None:
            self._display.remove_task(self._task)
            if not self._display.tasks:
                self._display.stop()
                _display = None
            self._display = None


def print_line(text: str) -> None:
    """Print a line on standard output, above the bars where there are any."""
    if _display is None:
        print(text, flush=True)
    else:
        _display.console.print(text, markup=False, highlight=False, soft_wrap=True)
