"""Host-side collectives, with two real processes."""

from pathlib import Path

import pytest


@pytest.mark.dist
def test_two_processes_agree_on_sums_objects_errors_and_buffers(workplace) -> None:
    finished = workplace.launch(Path(__file__).with_name("check_host_group.py"), num_processes=2)
    assert finished.returncode == 0, finished.stderr
    assert "process 0 agrees" in finished.stdout
    assert "process 1 agrees" in finished.stdout
