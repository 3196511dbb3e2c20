"""Progress bars on a terminal and in a notebook, and none elsewhere.

One display by rich serves all bars of a process. It has no thread, because a forked loader process would
inherit the thread's locks in any state, and it does not write to standard error.
"""

import importlib
import multiprocessing
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
        if _display is None:
            _display = _start_display()
        self._display = _display
        if self._display is not None:
            self._task = self._display.add_task("", label=label, total=total, completed=completed)

    @property
    def is_shown(self) -> bool:
        """Whether there is a terminal or notebook that shows the bar."""
        return self._display is not None

    def advance(self, num_steps: int = 1) -> None:
        """Count `num_steps` more."""
        if self._display is not None:
            self._display.advance(self._task, num_steps)
            if time.monotonic() - self._updated_at > _SECONDS_BETWEEN_UPDATES:
                self._updated_at = time.monotonic()
                self._display.refresh()

    def describe(self, text: str) -> None:
        """Show `text` to the right of the bar."""
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


class _NotebookProgress(Progress):
    """Updates one output of the notebook's cell; rich itself would need ipywidgets for that."""

    def start(self) -> None:
        self._output = importlib.import_module("IPython.display").display(self, display_id=True)

    def refresh(self) -> None:
        self._output.update(self)

    stop = refresh


def _start_display() -> Progress | None:
    """Return a started display, or None if there is no terminal or notebook to show it on."""
    console = rich.get_console()
    # A process forked by a notebook cannot use the notebook's connection to the page.
    is_notebook = console.is_jupyter and multiprocessing.parent_process() is None
    if not is_notebook and not (sys.stdout.isatty() and console.is_interactive):
        return None
    columns = (TextColumn("{task.fields[label]}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    display = (_NotebookProgress if is_notebook else Progress)(
        *(*columns, TextColumn("{task.description}")),
        auto_refresh=False,
        redirect_stdout=False,
        redirect_stderr=False,
        transient=True,
    )
    display.start()
    if not is_notebook:
        display.console.show_cursor(True)  # the process may end at any moment
    return display


def print_line(text: str) -> None:
    """Print a line on standard output, above the bars where there are any."""
    if _display is None or not _display.live.is_started:
        print(text, flush=True)
    else:
        _display.console.print(text, markup=False, highlight=False, soft_wrap=True)
