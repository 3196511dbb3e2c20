"""The report before training, also as a dry run; and how to start on one host."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).parents[2]


def options(place, data: Path) -> list[str]:
    folders = ("--train-dir", data / "train", "--val-dir", data / "val", "--output-dir", "out")
    return [str(each) for each in ("--config", place.config, *folders)]


def test_a_dry_run_prints_a_report_and_leaves_no_files(workplace, tiny_data: Path) -> None:
    (workplace.folder / "out" / "checkpoints" / ".step_5.partial").mkdir(parents=True)  # of a run at work
    before = sorted(workplace.folder.rglob("*"))
    settings = (
        "--resume",
        "auto",
        "training.gradient_accumulation_steps=2",
        "training.ema_decay=0.9",
        "training.max_steps=7",
    )
    finished = workplace.run("train", *options(workplace, tiny_data), "--dry-run", *settings)
    assert finished.returncode == 0, finished.stderr
    lines = finished.stdout.splitlines()
    assert "verdict: 0 errors, " in finished.stdout
    assert f"1 process on {socket.gethostname()} (cpu), precision no" in lines
    assert "batch 4 x 1 process x accumulation 2 = 8 images a step; 5 steps an epoch, 5 steps in all" in lines
    assert not [line for line in lines if line.startswith("step ")]
    assert sorted(workplace.folder.rglob("*")) == before


def test_the_reported_sizes_equal_those_of_the_files(workplace, tiny_data: Path) -> None:
    settings = (
        "training.max_steps=2",
        "training.ema_decay=0.9",
        "model.config_overrides.encoder_ffn_dim=40000",
    )
    finished = workplace.train(tiny_data, *settings)
    assert finished.returncode == 0, finished.stderr
    (line,) = [line for line in finished.stdout.splitlines() if " a checkpoint takes about " in line]
    *_, checkpoint, _, _, _, model, _ = line.split()

    def mib(folder: Path) -> float:
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20

    out = workplace.folder / "out"
    # Of what is not tensors there is less than 0.3 MiB.
    assert mib(out / "checkpoints" / "last") == pytest.approx(float(checkpoint), abs=1)
    assert mib(out / "model") == pytest.approx(float(model), abs=1)
    assert float(checkpoint) > 20


@pytest.mark.dist
@pytest.mark.slow
def test_several_processes_are_listed_by_host(workplace, tiny_data: Path) -> None:
    finished = workplace.run("train", *options(workplace, tiny_data), "--dry-run", num_processes=2)
    assert finished.returncode == 0, finished.stderr
    assert "2 processes (world size 2) on 1 node, DDP over gloo, precision no" in finished.stdout
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


NUM_PROCESSES = {"cpu": 1, "multi_cpu": 2, "single_gpu": 1, "multi_gpu": 2, "multi_node": 2}


def test_every_accelerate_config_is_tested() -> None:
    """Leave out those of DeepSpeed, which tests/dist/test_zero.py uses."""
    names = {path.stem for path in (REPOSITORY / "accelerate_configs").glob("*.yaml")}
    assert {name for name in names if not name.startswith("deepspeed_")} == NUM_PROCESSES.keys()


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("name", NUM_PROCESSES)
def test_each_accelerate_config_trains_with_its_number_of_processes(
    workplace, tiny_data: Path, name: str
) -> None:
    config = REPOSITORY / "accelerate_configs" / f"{name}.yaml"
    settings = yaml.safe_load(config.read_text())
    assert settings["num_processes"] == NUM_PROCESSES[name]
    processes, port = [], free_port()
    for rank in range(settings["num_machines"]):
        several = ("--machine_rank", str(rank), "--main_process_port", str(port))
        several = several if settings["num_machines"] > 1 else ()
        command = ["-m", "accelerate.commands.launch", "--config_file", config, *several]
        script = [REPOSITORY / "scripts" / "train_detr.py", *options(workplace, tiny_data)]
        processes.append(
            subprocess.Popen(
                [sys.executable, *command, *script, "training.num_epochs=2", "training.max_steps=10"],
                cwd=workplace.folder,
                env=environment() | {"OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    printed = ""
    for process in processes:
        printed += process.communicate(timeout=300)[0]
        assert process.returncode == 0, printed[-2000:]
    assert f"{NUM_PROCESSES[name]} process" in printed
    assert ("(world size 2) on 1 node, DDP" in printed) == (NUM_PROCESSES[name] == 2)
    assert " 10 steps in all" in printed
    assert (workplace.folder / "out" / "results.json").exists()
    if name.endswith("cpu"):
        assert "on cpu" in printed or "(cpu)" in printed


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}


def workstation(place, *arguments: str | Path, **variables: str):
    own = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "VIRTUAL_ENV": sys.prefix}
    return subprocess.run(
        ["bash", REPOSITORY / "launch" / "workstation.sh", *arguments],
        cwd=place.folder,
        env=environment() | own | variables,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.dist
@pytest.mark.slow
def test_the_workstation_script_starts_the_requested_num_processes(workplace, tiny_data: Path) -> None:
    finished = workstation(
        workplace, "--processes", "2", *options(workplace, tiny_data), "training.max_steps=1",
        CUDA_VISIBLE_DEVICES="",
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
def test_the_workstation_script_prints_its_usage(workplace, arguments, code: int, part: str) -> None:
    finished = workstation(workplace, *arguments)
    assert (finished.returncode, finished.stderr) == (code, part)
    assert ("--processes N" in finished.stdout) == (code == 0)
