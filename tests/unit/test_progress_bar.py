"""Bars are shown only on a terminal or in a notebook, without a thread, below the logged lines."""

import os
import pty
import subprocess
import sys
import threading

SHOWS_A_BAR = """
import logging, sys, threading
from detr_dist.console import configure_logging
from detr_dist.progress_bar import ProgressBar
configure_logging()
outer = ProgressBar("step", 10, completed=3)
inner = ProgressBar("images", 2)
inner.advance(2)
logging.getLogger("detr_dist").info("a line")
print("an error", file=sys.stderr)
inner.close()
outer.advance()
assert threading.active_count() == 1
outer.close()
outer.close()
"""


def test_without_a_terminal_there_is_no_bar(monkeypatch) -> None:
    environment = os.environ | {"FORCE_COLOR": "1"}  # as CI sets it
    shown = subprocess.run(
        [sys.executable, "-c", SHOWS_A_BAR], capture_output=True, text=True, env=environment, check=True
    )
    assert (shown.stdout, shown.stderr) == ("a line\n", "an error\n")


def test_on_a_terminal_the_bar_does_not_affect_stderr_or_the_cursor() -> None:
    ours, its = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", SHOWS_A_BAR],
        stdout=its,
        stderr=subprocess.PIPE,
        env=os.environ | {"TERM": "xterm"},
    )
    os.close(its)
    printed = bytearray()
    reader = threading.Thread(target=lambda: printed.extend(iter_bytes(ours)))
    reader.start()
    _, errors = process.communicate(timeout=60)
    reader.join()
    assert process.returncode == 0
    assert errors == b"an error\n"
    text = printed.decode()
    assert "a line" in text
    assert "4/10" in text
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l")  # the cursor is shown


IN_A_NOTEBOOK = """
import builtins, multiprocessing, sys, types
class ZMQInteractiveShell: ...
builtins.get_ipython = ZMQInteractiveShell
class Output:
    shown = []
    def update(self, what): self.shown.append(what._repr_mimebundle_([], [])["text/plain"])
def display(what, display_id):
    output = Output()
    output.update(what)
    return output
sys.modules["IPython"] = types.ModuleType("IPython")
sys.modules["IPython.display"] = types.SimpleNamespace(display=display)
from detr_dist.progress_bar import ProgressBar
forked = multiprocessing.get_context("fork").Process(target=lambda: sys.exit(ProgressBar("step", 1).is_shown))
forked.start()
forked.join()
assert forked.exitcode == 0
bar = ProgressBar("step", 10, completed=3)
bar.advance()
bar.close()
assert any("4/10" in text for text in Output.shown), Output.shown
assert Output.shown[-1].strip() == ""
"""


def test_in_a_notebook_the_bar_is_an_output_of_the_cell() -> None:
    """Replace the shell and IPython's own functions: Jupyter is no dependency."""
    shown = subprocess.run([sys.executable, "-c", IN_A_NOTEBOOK], capture_output=True, text=True, check=False)
    assert (shown.returncode, shown.stdout, shown.stderr) == (0, "", "")


def iter_bytes(descriptor: int) -> bytes:
    """Return everything up to the end of the stream."""
    found = b""
    while True:
        try:
            some = os.read(descriptor, 4096)
        except OSError:
            return found
        if not some:
            return found
        found += some
