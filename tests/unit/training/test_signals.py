"""Signals only record a request; only a repeated Ctrl-C ends the process."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from detr_dist.errors import StopRequested, TrainingError
from detr_dist.training.signals import SIGNALS, StopSignals, leave_note

TWO_INTERRUPTS = """
import os, signal, sys, time
from detr_dist.training.signals import StopSignals
with StopSignals() as signals:
    os.kill(os.getpid(), signal.SIGINT)
    print(signals.received, flush=True)
    time.sleep(float(sys.argv[1]))
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(1)
    print("continues", flush=True)
"""


def interrupt_twice(pause_s: float) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", TWO_INTERRUPTS, str(pause_s)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_is_recorded_and_execution_continues(number: signal.Signals) -> None:
    with StopSignals() as signals:
        assert not signals.is_requested
        os.kill(os.getpid(), number)
        assert signals.is_requested
        assert signals.received == number.name
    assert signals.is_requested


def test_the_first_signal_is_reported() -> None:
    with StopSignals() as signals:
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
    assert signals.received == "SIGUSR1"


@pytest.mark.parametrize("error", [StopRequested, RuntimeError])
def test_a_stopped_or_failed_run_is_not_killed_while_it_exits(error: type[Exception]) -> None:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        with pytest.raises(error), StopSignals():
            raise error("the end")
        for number in (signal.SIGTERM, signal.SIGUSR1):
            os.kill(os.getpid(), number)
        assert signal.getsignal(signal.SIGINT) == before[signal.SIGINT]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_the_previous_handlers_are_restored() -> None:
    def own_handler(number: int, frame: object) -> None: ...

    default = signal.signal(signal.SIGUSR1, own_handler)
    try:
        before = [signal.getsignal(number) for number in SIGNALS]
        with StopSignals():
            during = [signal.getsignal(number) for number in SIGNALS]
        after = [signal.getsignal(number) for number in SIGNALS]
    finally:
        signal.signal(signal.SIGUSR1, default)
    assert after == before
    assert not set(during) & set(before)


def test_exit_does_not_wait_for_forked_processes() -> None:
    with StopSignals():
        child = os.fork()  # as a loader process, which holds all open files as well
        if child == 0:
            time.sleep(30)
            os._exit(0)
        began_at = time.monotonic()
    took_s = time.monotonic() - began_at
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert took_s < 10


def test_a_second_interrupt_within_half_a_second_is_the_same_request() -> None:
    process = interrupt_twice(pause_s=0)
    assert (process.returncode, process.stdout) == (0, "SIGINT\ncontinues\n")


def test_a_later_interrupt_ends_the_process_at_once() -> None:
    process = interrupt_twice(pause_s=0.7)
    assert (process.returncode, process.stdout, process.stderr) == (130, "SIGINT\n", "")


def test_a_later_signal_of_another_kind_is_ignored() -> None:
    script = TWO_INTERRUPTS.replace(
        "os.kill(os.getpid(), signal.SIGINT)", "os.kill(os.getpid(), signal.SIGTERM)"
    )
    command = [sys.executable, "-c", script, "0.7"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (process.returncode, process.stdout) == (0, "SIGTERM\ncontinues\n")


def test_a_marker_file_is_written_for_schedulers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    leave_note("nobody asked for it")
    monkeypatch.setenv("DETR_DIST_STOPPED_FILE", str(tmp_path / "note"))
    leave_note("asked to stop at step 3: saved")
    assert (tmp_path / "note").read_text() == "asked to stop at step 3: saved\n"
    monkeypatch.setenv("DETR_DIST_STOPPED_FILE", str(tmp_path / "no" / "folder"))
    with pytest.raises(TrainingError, match="no/folder: cannot be written"):
        leave_note("asked to stop at step 3: saved")


def test_stacks_are_printed_on_request(capfd: pytest.CaptureFixture[str]) -> None:
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGUSR2)
        assert not signals.is_requested
    assert "test_stacks_are_printed_on_request" in capfd.readouterr().err


def test_a_request_to_terminate_is_reported_from_another_thread() -> None:
    terminated = threading.Event()
    with StopSignals(terminated.set):
        os.kill(os.getpid(), signal.SIGUSR1)
        assert not terminated.wait(0.2)
        os.kill(os.getpid(), signal.SIGTERM)
        assert terminated.wait(5.0)
