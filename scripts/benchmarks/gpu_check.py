"""Run the steps of gpu_check.sh, each in its own process with a time limit, the most valuable first.

Every process is forked from this one, which has imported what they need and never touches the GPU.
"""

import argparse
import json
import multiprocessing
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gpu_check_network as network
import gpu_check_runs as runs
import psutil
import torch
from gpu_check_findings import Check, Findings, Skipped, read_findings
from timing import LIBRARIES

LEAST_S = 10  # a step with less time is not worth starting
NO_GPU, SKIPPED = 3, 4  # exit codes of a step's process


def environment(check: Check) -> None:
    """Report versions, the GPU, and torch's settings for it."""
    check.figures(python=platform.python_version(), **{library: version(library) for library in LIBRARIES})
    if check.on_gpu:
        gpu = torch.cuda.get_device_properties(0)
        check.figures(gpu=gpu.name, GiB=gpu.total_memory / 2**30, cudnn=torch.backends.cudnn.version())
        check.figures(nccl=".".join(map(str, torch.cuda.nccl.version())), cores=os.cpu_count())


@dataclass(frozen=True)
class Step:
    """A step, which is one line of the result."""

    name: str
    limit_s: int
    run: Callable[[Check], None]


BF16 = ["training.mixed_precision=bf16"]
COMPILED = [*BF16, "training.compile_model=true", "training.channels_last=true"]
STEPS = (
    Step("environment", 40, environment),
    Step("data", 60, network.write_all_data),
    Step("bf16", 60, partial(network.time_step, overrides=BF16)),
    Step("compiled", 150, partial(network.time_step, overrides=COMPILED, gpu_only=True)),
    Step("boxes", 60, network.compare_boxes),
    Step("waits", 40, network.count_waits),
    Step("command", 150, partial(runs.time_training, overrides=COMPILED)),
    Step("float32", 60, partial(network.time_step, overrides=network.FLOAT32)),
    Step("tf32", 50, partial(network.time_step, overrides=network.TF32, gpu_only=True)),
    Step("fp16", 50, partial(network.time_step, overrides=["training.mixed_precision=fp16"], gpu_only=True)),
    Step("canvases", 60, network.time_new_canvases),
    Step("evaluate", 70, runs.compare_evaluations),
    Step("split", 90, runs.compare_one_process_with_two),
    Step("resume", 90, runs.compare_resumed_with_uninterrupted),
    Step("out_of_memory", 60, runs.run_out_of_memory),
    Step("deterministic", 60, runs.compare_two_runs),
    Step("launch", 60, partial(runs.launch, config_name="multi_gpu")),
    Step(
        "checkpointing",
        40,
        partial(network.time_step, overrides=[*BF16, "training.gradient_checkpointing=true"], gpu_only=True),
    ),
    Step("deformable", 60, partial(network.time_step, overrides=network.DEFORMABLE, gpu_only=True)),
    Step("criterion", 40, network.time_criterion),
    Step("tiles", 80, network.time_tiles),
    Step("deepspeed", 90, partial(runs.launch, config_name="deepspeed_zero2")),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repository", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder for logs and results")
    parser.add_argument("--seconds", type=float, default=540, help="time limit of all steps together")
    parser.add_argument("--steps", default="", help="run only these steps, separated by spaces")
    options = parser.parse_args()
    wanted = options.steps.split() or [step.name for step in STEPS]
    unknown = set(wanted) - {step.name for step in STEPS}
    if unknown:
        parser.error(
            f"unknown steps: {', '.join(sorted(unknown))}; choose from {', '.join(s.name for s in STEPS)}"
        )
    options.out.mkdir(parents=True, exist_ok=True)
    raise SystemExit(run_all([step for step in STEPS if step.name in wanted], options))


def run_all(steps: list[Step], options: argparse.Namespace) -> int:
    """Print and write a line for each step. Return 1 if one failed, else 0."""
    ends_at = time.monotonic() + options.seconds
    context, on_gpu = find_gpu(options.out)
    found: dict[str, dict[str, Any]] = {}
    summary_path = options.out / "summary.txt"
    summary_path.write_text("")
    for step in steps:
        check = Check(step.name, options.repository.resolve(), options.out.resolve(), on_gpu)
        left_s = ends_at - time.monotonic()
        limit_s = min(step.limit_s, left_s) if on_gpu else left_s
        began_at = time.monotonic()
        if limit_s < LEAST_S:
            result, said = "SKIP", "no time left"
        else:
            result, said = run_step(context, step, check, limit_s)
        line = f"{result} {step.name} ({time.monotonic() - began_at:.0f} s): {said}"
        print(line, flush=True)
        with summary_path.open("a") as summary:
            print(line, file=summary)
        found[step.name] = {"result": result, **read_findings(check.path).figures}
    (options.out / "figures.json").write_text(json.dumps(found, indent=2) + "\n")
    return int(any(each["result"] == "FAIL" for each in found.values()))


def find_gpu(out: Path) -> tuple[Any, bool]:
    """Return a multiprocessing context whose processes can use the GPU, and whether there is a GPU."""
    for method in ("fork", "spawn"):
        context = multiprocessing.get_context(method)
        process = context.Process(target=touch_gpu, args=(out / "gpu.log",))
        process.start()
        process.join()
        if process.exitcode in (0, NO_GPU):
            return context, process.exitcode == 0
    raise SystemExit(f"torch finds a GPU but cannot use it: {last_line(out / 'gpu.log')}")


def touch_gpu(log_path: Path) -> None:
    redirect_output(log_path)
    if not torch.cuda.is_available():
        sys.exit(NO_GPU)
    torch.zeros(1, device="cuda").item()


def run_step(context: Any, step: Step, check: Check, limit_s: float) -> tuple[str, str]:
    """Return PASS, FAIL or SKIP, and a description."""
    check.path.unlink(missing_ok=True)
    log_path = check.out / f"{step.name}.log"
    process = context.Process(target=run_in_process, args=(step, check, log_path))
    process.start()
    process.join(limit_s)
    is_late = process.is_alive()
    if is_late:
        started = psutil.Process(process.pid)
        for each in [*started.children(recursive=True), started]:
            each.kill()
        process.join()
    found = read_findings(check.path)
    if process.exitcode == SKIPPED:
        return "SKIP", last_line(log_path)
    failures = [*found.failures]
    if is_late:
        failures.append(f"stopped after {limit_s:.0f} s")
    elif process.exitcode != 0:
        failures.append(last_line(log_path))
    return "FAIL" if failures else "PASS", "; ".join([*failures, *described(found)])


def run_in_process(step: Step, check: Check, log_path: Path) -> None:
    redirect_output(log_path)
    try:
        step.run(check)
    except Skipped as reason:
        print(reason, flush=True)
        sys.exit(SKIPPED)
    except Exception:
        traceback.print_exc()
        sys.exit(1)


def redirect_output(log_path: Path) -> None:
    """Redirect the output of this process and its children to a new file."""
    descriptor = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = (
        os.fdopen(number, "w", buffering=1, encoding="utf-8", closefd=False) for number in (1, 2)
    )


def described(found: Findings) -> list[str]:
    shown = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in found.figures.items()}
    return [", ".join(f"{name} {value}" for name, value in shown.items())] if shown else []


def last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines() if path.exists() else []
    return lines[-1][:300] if lines else "it ended without a message"


if __name__ == "__main__":
    main()
