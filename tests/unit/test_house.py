"""What is shipped beside the package: scripts, YAML files, metadata."""

import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

import detr_dist

REPOSITORY = Path(__file__).parents[2]
SHIPPED_IN = (".ci", "accelerate_configs", "configs", "launch", "scripts")


def shipped(pattern: str) -> list[Path]:
    return sorted(path for folder in SHIPPED_IN for path in (REPOSITORY / folder).rglob(pattern))


YAML_FILES = [REPOSITORY / ".pre-commit-config.yaml", *shipped("*.yaml")]
SHELL_SCRIPTS = [REPOSITORY / ".ci" / "run", *shipped("*.sh"), *shipped("*.sbatch")]
SETTINGS_IN_BASH = shipped("*.env.example")
NUM_PROCESSES = {"cpu": 1, "multi_cpu": 2, "single_gpu": 1, "multi_gpu": 2, "multi_node": 2}

# As detr_dist makes its Accelerator: on the CPU where there is no GPU.
COUNT_PROCESSES = """
import torch
from accelerate import Accelerator

accelerator = Accelerator(cpu=not torch.cuda.is_available())
accelerator.wait_for_everyone()
if accelerator.is_main_process:
    print("processes:", accelerator.num_processes, "device:", accelerator.device.type)
accelerator.end_training()
"""


def shown(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def tool(name: str) -> str:
    """Path of a development tool, its environment activated or not; without it skips, in CI fails."""
    found = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if found is not None:
        return found
    message = f"{name} is not installed: pip install -e '.[dev]'"
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)


@pytest.mark.parametrize("path", YAML_FILES, ids=shown)
def test_every_shipped_yaml_file_holds_settings(path: Path) -> None:
    assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict)


@pytest.mark.parametrize("path", [*SHELL_SCRIPTS, *SETTINGS_IN_BASH], ids=shown)
def test_every_shell_script_passes_shellcheck(path: Path) -> None:
    finished = subprocess.run([tool("shellcheck"), str(path)], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout


@pytest.mark.parametrize("path", SHELL_SCRIPTS, ids=shown)
def test_every_shell_script_can_be_run_and_stops_at_its_first_error(path: Path) -> None:
    assert os.access(path, os.X_OK)
    assert "\nset -euo pipefail\n" in path.read_text(encoding="utf-8")


def test_the_version_is_the_one_that_was_installed() -> None:
    assert detr_dist.__version__ == version("detr_dist")


def test_the_package_says_that_it_is_typed() -> None:
    assert (Path(detr_dist.__file__).parent / "py.typed").is_file()


def test_the_number_of_processes_of_every_accelerate_config_is_checked() -> None:
    """Those of DeepSpeed train in tests/dist/test_zero.py."""
    names = {path.stem for path in (REPOSITORY / "accelerate_configs").glob("*.yaml")}
    assert {name for name in names if not name.startswith("deepspeed_")} == NUM_PROCESSES.keys()


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("name", NUM_PROCESSES)
def test_an_accelerate_config_starts_as_many_processes_as_it_says(name: str, tmp_path: Path) -> None:
    config = REPOSITORY / "accelerate_configs" / f"{name}.yaml"
    num_processes = NUM_PROCESSES[name]
    assert yaml.safe_load(config.read_text(encoding="utf-8"))["num_processes"] == num_processes

    script = tmp_path / "count_processes.py"
    script.write_text(COUNT_PROCESSES, encoding="utf-8")
    num_machines = yaml.safe_load(config.read_text(encoding="utf-8"))["num_machines"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # with it unset, the launcher warns that it chooses
    machines = [
        subprocess.Popen(
            [
                *(tool("accelerate"), "launch", "--config_file", str(config)),
                *(("--machine_rank", str(rank)) if num_machines > 1 else ()),
                str(script),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(num_machines)
    ]
    printed = ""
    for machine in machines:
        stdout, stderr = machine.communicate(timeout=100)
        assert machine.returncode == 0, stderr[-2000:]
        printed += stdout
    assert f"processes: {num_processes} " in printed
    if name.endswith("cpu"):
        assert "device: cpu" in printed
