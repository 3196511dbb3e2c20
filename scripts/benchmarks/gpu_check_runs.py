"""Steps of gpu_check.py that train and evaluate with the real command and compare the results."""

import contextlib
import importlib.util
import itertools
import json
import multiprocessing
import os
import shutil
import socket
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

# Imported once for the processes of all commands, because it takes seconds.
import mlflow.store.tracking.sqlalchemy_store  # noqa: F401
import torch
from gpu_check_findings import Check
from gpu_check_network import SMALL, settings_for
from mlflow import MlflowClient

import detr_dist.training.trainer  # noqa: F401
from detr_dist.cli import main as run_command

EXACT = ["training.mixed_precision=no", "training.tf32=false"]
NO_CHANCE = ["model.dropout=0", "data.augmentation=none"]  # all processes see the same images
LOSSES_APART = 1e-4  # relative, between one process and two in float32: another order of sums, over ten steps


def time_training(check: Check, overrides: Sequence[str]) -> None:
    """Train with the real command, on a GPU with 12 loader processes."""
    settings = settings_for(check)
    if check.on_gpu:
        settings += [*overrides, "data.num_workers=12"]
    logging = f"logging.log_every_steps={check.sized(10, 1)}"
    run = train(
        check, "whole", f"training.max_steps={check.sized(160, 8)}", logging, settings=settings, data="long"
    )
    metrics = ("train_images_per_s", "train_data_wait_share")
    images_per_s, wait_share = (statistics.median(run.history(metric)[6:]) for metric in metrics)
    check.figures(images_per_s=images_per_s, data_wait_share=wait_share)
    check.expect_on_gpu(wait_share < 0.03, "training waits for data for 3 percent of its time or more")
    compiled = check.figures_of("compiled")
    if "bare_ms" in compiled:  # of another process at another moment: the ratio is reported only
        bare_images_per_s = 1e3 * compiled["images"][0] / compiled["bare_ms"]
        check.figures(of_the_bare=bare_images_per_s / images_per_s)


def compare_evaluations(check: Check) -> None:
    """Evaluate a model on the GPU and on the CPU."""
    run = train(check, "evaluate", *EXACT, f"training.max_steps={check.sized(32, 2)}")
    reports = {}
    for device, environment in {"gpu": {}, "cpu": {"ACCELERATE_USE_CPU": "true"}}.items():
        path = check.out / f"evaluate_{device}.json"
        model, data = check.out / "evaluate" / "model", check.out / "scenes" / "val"
        command(["evaluate", "--model", model, "--data-dir", data, "--report", path], environment=environment)
        reports[device] = json.loads(path.read_text())
    gpu, cpu = (reports[device]["metrics"] for device in ("gpu", "cpu"))
    loss_apart = abs(gpu["val_loss"] / cpu["val_loss"] - 1)
    check.figures(
        device="gpu" if check.on_gpu else "cpu",
        last_loss=run.history("train_loss")[-1],
        seconds=reports["gpu"]["seconds"],
        cpu_seconds=reports["cpu"]["seconds"],
        map=gpu["val_map"],
        map_apart=abs(gpu["val_map"] - cpu["val_map"]),
        loss_apart=loss_apart,
    )
    check.expect(loss_apart < 1e-3, "GPU and CPU evaluate a model differently")


def compare_one_process_with_two(check: Check) -> None:
    """Train on the same images with one process and with two processes on the same GPU."""
    for tf32 in (False, True) if check.on_gpu else (False,):
        way = [*NO_CHANCE, *EXACT, f"training.max_steps={check.sized(10, 2)}"]
        way += ["training.tf32=true"] if tf32 else []
        one = train(check, "one", *way, "training.batch_size=8").history("train_loss")
        two = train(check, "two", *way, "training.batch_size=4", num_processes=2).history("train_loss")
        found = apart(one, two)
        check.figures(**{f"{'tf32' if tf32 else 'float32'}_losses_apart": found})
        # TF32 rounds to 10 bits and training amplifies it: reported only.
        check.expect(tf32 or found < LOSSES_APART, "one process and two train differently")


def compare_resumed_with_uninterrupted(check: Check) -> None:
    """Compare an uninterrupted run with a resumed one; on a GPU in fp16, whose loss scale is resumed too."""
    way = ["training.num_epochs=20", f"training.mixed_precision={'fp16' if check.on_gpu else 'no'}"]
    num_steps = check.sized(40, 4)
    whole = train(check, "uninterrupted", *way, f"training.max_steps={num_steps}")
    train(check, "resumed", *way, f"training.max_steps={num_steps // 2}")
    resumed = train(check, "resumed", *way, f"training.max_steps={num_steps}", "--resume", "auto")
    losses_apart = apart(whole.history("train_loss"), resumed.history("train_loss"))
    speeds = [statistics.median(run.history("train_images_per_s")[-10:]) for run in (whole, resumed)]
    check.figures(losses_apart=losses_apart, images_per_s=speeds[0], resumed_images_per_s=speeds[1])
    if check.on_gpu:  # equal to rounding, which 20 more steps amplify
        check.expect(losses_apart < 0.05, "a resumed run differs from the uninterrupted one")
        check.expect(speeds[1] > 0.8 * speeds[0], "a resumed run is slower than the uninterrupted one")
    else:
        check.expect(losses_apart == 0, "a resumed run does not equal the uninterrupted one bit for bit")


def compare_two_runs(check: Check) -> None:
    """Train twice in the same way, by default and with `training.deterministic`."""
    ways = {"default": "false", "deterministic": "true"} if check.on_gpu else {"deterministic": "true"}
    for name, setting in ways.items():
        way = [f"training.max_steps={check.sized(20, 2)}", f"training.deterministic={setting}"]
        first, second = (train(check, "again", *way).history("train_loss") for _ in range(2))
        check.figures(**{f"{name}_losses_apart": apart(first, second)})
        check.expect(check.on_gpu or first == second, f"two runs on the CPU differ ({name})")


def run_out_of_memory(check: Check) -> None:
    """Train with too little memory; expect one error line at once."""
    check.needs_gpu("host memory must not be exhausted")
    path = check.out / "out_of_memory.txt"
    path.unlink(missing_ok=True)
    child = start(
        training_arguments(check, "oom", *settings_for(check)),
        output=path,
        before=partial(torch.cuda.set_per_process_memory_fraction, 0.02),
    )
    child.join()
    errors = [line for line in path.read_text().splitlines() if line.startswith("error: ")]
    check.figures(exit_code=child.exitcode, error=" ".join(errors)[:200])
    check.expect(child.exitcode == 1, "a lack of memory does not end the run with exit code 1")
    check.expect(len(errors) == 1 and "memory" in errors[0], "a lack of memory is not reported in one line")


def launch(check: Check, config_name: str) -> None:
    """Train one process with `accelerate launch` and a shipped configuration file."""
    check.needs_gpu("the tests cover the files for the CPU")
    if "deepspeed" in config_name and importlib.util.find_spec("deepspeed") is None:
        check.skip("deepspeed is not installed")
    shutil.rmtree(check.out / config_name, ignore_errors=True)
    file = check.repository / "accelerate_configs" / f"{config_name}.yaml"
    launcher = ["-m", "accelerate.commands.launch", "--config_file", file, "--num_processes", "1"]
    script = check.repository / "scripts" / "train_detr.py"
    more = ["training.mixed_precision=bf16", "training.max_steps=20", "logging.memory_every_steps=5"]
    _, *arguments = training_arguments(check, config_name, *SMALL, *more)  # the script replaces `train`
    subprocess.run([*map(str, [sys.executable, *launcher, script, *arguments])], check=True)
    run = Run(check.out / config_name)
    check.figures(
        last_loss=run.history("train_loss")[-1],
        images_per_s=run.history("train_images_per_s")[-1],
        memory_gpu_gb=max(run.history("memory_gpu_gb"), default=0.0),
    )


class Run:
    """The results of a run, from its output folder and MLflow."""

    def __init__(self, output_dir: Path) -> None:
        self._results = json.loads((output_dir / "results.json").read_text())

    def history(self, metric: str) -> list[float]:
        client = MlflowClient(self._results["tracking_uri"])
        return [each.value for each in client.get_metric_history(self._results["run_id"], metric)]


def apart(one: Sequence[float], other: Sequence[float]) -> float:
    """Return the largest relative difference of two runs' losses, step by step."""
    return max(abs(a / b - 1) for a, b in zip(one, other, strict=True))


def train(
    check: Check,
    output: str,
    *arguments: str,
    settings: Sequence[str] = SMALL,
    data: str = "scenes",
    num_processes: int = 1,
) -> Run:
    """Train to the end.

    Raises:
        RuntimeError: training failed; its output is in the log of the step.
    """
    if "--resume" not in arguments:
        shutil.rmtree(check.out / output, ignore_errors=True)
    command(training_arguments(check, output, *settings, *arguments, data=data), num_processes=num_processes)
    return Run(check.out / output)


def training_arguments(check: Check, output: str, *more: str, data: str = "scenes") -> list[str]:
    """Return the arguments of `detr-dist`."""
    config = check.repository / "configs" / "training.yaml"
    train_dir, val_dir = (check.out / data / split for split in ("train", "val"))
    paths = {"config": config, "train-dir": train_dir, "val-dir": val_dir, "output-dir": check.out / output}
    return [
        "train",
        *itertools.chain.from_iterable((f"--{name}", str(path)) for name, path in paths.items()),
        "data.augmentation=light",
        "data.num_workers=1",
        "training.batch_size=8",
        f"logging.mlflow_tracking_uri=sqlite:///{check.out / 'mlflow.db'}",
        "logging.log_every_steps=1",
        "logging.tensorboard=false",
        "evaluation.pictures=false",
        *more,
    ]


def command(
    arguments: Sequence[Any], *, environment: Mapping[str, str] | None = None, num_processes: int = 1
) -> None:
    """Run a command of detr-dist in `num_processes` processes on one GPU.

    Raises:
        RuntimeError: a process ended with an error.
    """
    port = free_port()
    children = [
        start(
            [*map(str, arguments)],
            {**(environment or {}), **environment_of(rank, num_processes, port)},
            before=use_gloo if num_processes > 1 else None,
        )
        for rank in range(num_processes)
    ]
    for child in children:
        child.join()
    codes = [child.exitcode for child in children]
    if any(codes):
        raise RuntimeError(f"detr-dist {arguments[0]} ended with {codes}")


def environment_of(rank: int, num_processes: int, port: int) -> dict[str, str]:
    """Return a launcher's variables for a process that is alone on its host, so that all use the same GPU."""
    if num_processes == 1:
        return {}
    numbers = {"RANK": rank, "WORLD_SIZE": num_processes, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    return {**{name: str(number) for name, number in numbers.items()}, **address}


def use_gloo() -> None:
    """Exchange gradients over gloo, because NCCL refuses two processes on one GPU."""
    original = torch.distributed.init_process_group

    def init_process_group(*_: Any, **options: Any) -> None:
        original(**{**options, "backend": "gloo"})

    torch.distributed.init_process_group = init_process_group


def start(
    arguments: Sequence[str],
    environment: Mapping[str, str] | None = None,
    *,
    output: Path | None = None,
    before: Callable[[], object] | None = None,
) -> Any:
    """Start a command in a fork of this process, which has imported everything that it needs."""
    run = multiprocessing.get_context("fork").Process(
        target=run_forked, args=(arguments, environment or {}, output, before)
    )
    run.start()
    return run


def run_forked(
    arguments: Sequence[str],
    environment: Mapping[str, str],
    output: Path | None,
    before: Callable[[], object] | None,
) -> None:
    os.environ.update(environment)
    if output is not None:
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
    if before is not None:
        before()
    sys.argv = ["detr-dist", *arguments]
    run_command(arguments)


def free_port() -> int:
    """Return a free port below the ephemeral range."""
    for port in itertools.count(20000 + os.getpid() % 10000):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError("count() never ends")
