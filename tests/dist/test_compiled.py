"""Compiled layers under DDP, with torch's own backend."""

import os
import shutil
from pathlib import Path

import pytest


@pytest.mark.dist
@pytest.mark.slow
def test_compiled_regions_learn_the_same_in_two_processes(workplace) -> None:
    if shutil.which("g++") is None:
        need = pytest.fail if os.environ.get("CI") else pytest.skip
        need("needs g++, as torch.compile does on the CPU")
    finished = workplace.launch(Path(__file__).with_name("check_compiled.py"), num_processes=2)
    assert finished.returncode == 0, finished.stderr
    for process in (0, 1):
        assert f"process {process} learns the same" in finished.stdout
