"""One process at a time works in an output folder."""

import errno
import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from detr_dist.errors import DataError
from detr_dist.storage import locked

HOLDS_THE_LOCK = """
import os, sys, time
from pathlib import Path
from detr_dist.storage import locked

with locked(Path(sys.argv[1])):
    child = os.fork()
    if child == 0:
        time.sleep(100)
        os._exit(0)
    print(child, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], psutil.Process]]:
    """Start a process that holds the lock until it is killed, and a child of it that keeps running."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS_THE_LOCK, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    child = psutil.Process(int(process.stdout.readline()))
    yield process, child
    child.kill()
    process.kill()
    process.communicate()


def test_a_second_process_does_not_get_the_lock(
    tmp_path: Path, holder: tuple[subprocess.Popen[str], psutil.Process]
) -> None:
    with (
        pytest.raises(DataError, match=f"process {holder[0].pid} on"),
        locked(tmp_path),
    ):
        pytest.fail("got it")


def test_a_second_thread_does_not_get_the_lock(tmp_path: Path) -> None:
    def take() -> None:
        with locked(tmp_path / ".." / tmp_path.name):
            pytest.fail("got it")

    with (
        locked(tmp_path),
        ThreadPoolExecutor() as thread,
        pytest.raises(DataError, match=f"process {os.getpid()} on"),
    ):
        thread.submit(take).result()
    with locked(tmp_path):
        pass


def test_a_lock_ends_with_its_process_even_if_a_forked_child_lives(
    tmp_path: Path, holder: tuple[subprocess.Popen[str], psutil.Process]
) -> None:
    process, child = holder
    process.kill()
    process.wait()
    with locked(tmp_path):
        assert child.is_running()
        assert child.status() != psutil.STATUS_ZOMBIE
    with locked(tmp_path):  # the lock was released
        pass


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_file_system_locks_it_warns_once_and_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    for _ in range(2):
        with locked(tmp_path):
            (tmp_path / "written").touch()
    (warning,) = capsys.readouterr().out.splitlines()
    assert warning.startswith(f"warning: {tmp_path}: cannot be locked on this file system (")
    assert os.strerror(number) in warning
    assert [path.name for path in tmp_path.iterdir()] == ["written"]


def test_a_lock_that_fails_for_another_reason_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "lockf", fail)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)), locked(tmp_path):
        pytest.fail("continued")
