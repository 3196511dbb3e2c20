"""Bars are shown on a terminal only, without a thread, and lines that are logged appear above them."""

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


def test_elsewhere_than_on_a_terminal_there_is_no_bar(monkeypatch) -> None:
    environment = os.environ | {"FORCE_COLOR": "1"}  # as CI sets it
    shown = subprocess.run(
        [sys.executable, "-c", SHOWS_A_BAR], capture_output=True, text=True, env=environment, check=True
    )
    assert (shown.stdout, shown.stderr) == ("a line\n", "an error\n")


def test_on_a_terminal_the_bar_leaves_standard_error_and_the_cursor_alone() -> None:
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


def iter_bytes(descriptor: int) -> bytes:
    """Return all that comes until the other end is closed."""
    found = b""
    while True:
        try:
            some = os.read(descriptor, 4096)
        except OSError:
            return found
        if not some:
            return found
        found += some
