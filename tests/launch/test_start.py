"""Before training: what would run where is said, also without training; and how to start on one machine."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


def options(place, data: Path) -> list[str]:
    folders = ("--train-dir", data / "train", "--val-dir", data / "val", "--output-dir", "out")
    return [str(each) for each in ("--config", place.config, *folders)]


def test_a_dry_run_reports_and_leaves_nothing(workplace, tiny_data: Path) -> None:
    before = sorted(workplace.folder.rglob("*"))
    settings = ("training.gradient_accumulation_steps=2", "training.ema_decay=0.9", "training.max_steps=7")
    finished = workplace.run("train", *options(workplace, tiny_data), "--dry-run", *settings)
    assert finished.returncode == 0, finished.stderr
    lines = finished.stdout.splitlines()
    assert "verdict: 0 errors, " in finished.stdout
    assert f"1 process on {socket.gethostname()} (cpu), precision no" in lines
    assert (
        "batch 4 x 1 processes x accumulation 2 = 8 images a step; 5 steps an epoch, 5 steps in all" in lines
    )
    assert not [line for line in lines if line.startswith("step ")]
    assert sorted(workplace.folder.rglob("*")) == before


def test_the_sizes_that_are_said_are_those_of_the_files(workplace, tiny_data: Path) -> None:
    settings = (
        "training.max_steps=2",
        "training.ema_decay=0.9",
        "model.config_overrides.encoder_ffn_dim=40000",
    )
    finished = workplace.train(tiny_data, *settings)
    assert finished.returncode == 0, finished.stderr
    (said,) = [line for line in finished.stdout.splitlines() if " a checkpoint takes about " in line]
    *_, checkpoint, _, _, _, model, _ = said.split()

    def mib(folder: Path) -> float:
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20

    out = workplace.folder / "out"
    # Of what is not tensors there is less than 0.3 MiB.
    assert mib(out / "checkpoints" / "last") == pytest.approx(float(checkpoint), abs=1)
    assert mib(out / "model") == pytest.approx(float(model), abs=1)
    assert float(checkpoint) > 20


@pytest.mark.dist
@pytest.mark.slow
def test_several_processes_are_listed_by_machine(workplace, tiny_data: Path) -> None:
    finished = workplace.run("train", *options(workplace, tiny_data), "--dry-run", num_processes=2)
    assert finished.returncode == 0, finished.stderr
    assert "2 processes (world size 2) on 1 machine, DDP over gloo, precision no" in finished.stdout
    assert f"  {socket.gethostname()}: rank 0 on cpu, 1 on cpu\n" in finished.stdout
    assert "batch 4 x 2 processes x accumulation 1 = 8 images a step" in finished.stdout


def test_a_dry_run_on_bad_data_names_every_fault_and_fails(workplace, tiny_data: Path) -> None:
    folder = workplace.folder / "val"
    shutil.copytree(tiny_data / "val", folder)
    path = folder / "_annotations.coco.json"
    document = json.loads(path.read_text())
    document["annotations"][0]["bbox"] = [1, 1, -5, 5]
    document["annotations"][1]["category_id"] = 77
    path.write_text(json.dumps(document))
    (folder / "003.jpg").unlink()
    arguments = options(workplace, tiny_data)
    arguments[arguments.index("--val-dir") + 1] = str(folder)
    finished = workplace.run("train", *arguments, "--dry-run")
    assert finished.returncode == 1
    assert finished.stdout.count("  error: ") == 3
    (line,) = finished.stderr.splitlines()
    assert line == "error: the data are not ready to train on: 3 errors, named above"


def workstation(place, *arguments: str | Path, environment: dict[str, str] | None = None):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    own = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "VIRTUAL_ENV": sys.prefix}
    return subprocess.run(
        ["bash", REPOSITORY / "launch" / "workstation.sh", *arguments],
        cwd=place.folder,
        env=clean | own | (environment or {}),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


@pytest.mark.dist
@pytest.mark.slow
def test_the_workstation_script_starts_as_many_processes_as_asked_for(workplace, tiny_data: Path) -> None:
    finished = workstation(
        workplace, "--processes", "2", *options(workplace, tiny_data), "training.max_steps=1",
        environment={"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.startswith("0 GPUs: 2 processes by accelerate_configs/multi_cpu.yaml\n")
    assert "(world size 2)" in finished.stdout
    assert (workplace.folder / "out" / "results.json").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (("--processes", "0"), 2, "error: --processes 0: a number from 1 is wanted\n"),
        (("--processes",), 2, "error: --processes is empty: a number from 1 is wanted\n"),
        (("--help",), 0, ""),
    ],
)
def test_the_workstation_script_says_how_it_is_used(workplace, arguments, code: int, part: str) -> None:
    finished = workstation(workplace, *arguments)
    assert (finished.returncode, finished.stderr) == (code, part)
    assert ("one process for each GPU" in finished.stdout) == (code == 0)
