"""Timing and reporting for all benchmarks.

Ratios are only valid within one run, because hosts differ and shared hosts are noisy. Therefore all
alternatives alternate, and the results are medians.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import torch

LIBRARIES = ("torch", "torchvision", "transformers", "accelerate", "mlflow")

Row = Mapping[str, Any]


def command_line(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser with the program's docstring as help and the option that all benchmarks have."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=_new_file, metavar="FILE", help="also write the metrics to this file")
    return parser


def _new_file(text: str) -> Path:
    """Return the path, and refuse one without a folder before minutes of measuring."""
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"folder {path.parent} does not exist")
    return path


def figures_of(command: Sequence[object], path: Path, **how: Any) -> dict[str, float]:
    """Return the JSON that a program wrote to `path`; exit with the program's output if it wrote none."""
    finished = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, **how)
    if not path.exists():
        raise SystemExit(f"{finished.stdout}{finished.stderr}{command[0]} wrote no measurements")
    figures: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
    return figures


def seconds_of(action: Callable[[], object], device: torch.device | str = "cpu") -> float:
    """Return the seconds of an action, including its work on the device."""
    _synchronise(device)
    began_at = time.perf_counter()
    action()
    _synchronise(device)
    return time.perf_counter() - began_at


def take_turns(
    ways: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warm_up: int = 2,
    device: torch.device | str = "cpu",
    stopwatch: Callable[[Callable[[], object]], float] | None = None,
) -> dict[str, list[float]]:
    """Return the seconds of every call of every way.

    Each round calls all ways once; the first `warm_up` rounds fill caches and do not count. `stopwatch` calls
    a way and returns its seconds; the default is `seconds_of`.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(warm_up + rounds):
        for name, action in ways.items():
            took_s = stopwatch(action) if stopwatch else seconds_of(action, device)
            if number >= warm_up:
                seconds[name].append(took_s)
    return seconds


def medians(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in seconds.items()}


def median_ratio(seconds: Mapping[str, Sequence[float]], above: str, below: str) -> float:
    """Return the median of the ratios of each round, in which both suffer from the same load of the host."""
    pairs = zip(seconds[above], seconds[below], strict=True)
    return statistics.median(one / other for one, other in pairs)


def reset_peak_memory(device: torch.device | str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        # Linux: resets the peak to the current size.
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def peak_memory_mib(device: torch.device | str) -> float:
    """Return the peak memory since the last reset: torch's allocations on a GPU, or the process on the
    CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    (peak_kib,) = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(peak_kib) / 2**10


def machine(device: torch.device | str = "cpu") -> dict[str, str]:
    """Return the hardware and library versions of the measurement."""
    facts = {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": f"{_cpu_model()}, {len(os.sched_getaffinity(0))} cores, {torch.get_num_threads()} threads",
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "python": platform.python_version(),
        **{library: version(library) for library in LIBRARIES},
    }
    if torch.device(device).type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
    return facts


def publish(
    rows: Sequence[Row],
    json_path: Path | None,
    *,
    device: torch.device | str = "cpu",
    goals: Mapping[str, str] | None = None,
    more_rows: Mapping[str, Sequence[Row]] | None = None,
    **facts: Any,
) -> None:
    """Print a table of the rows, the facts and the host; with `json_path` also write them as JSON.

    `goals` are the goals of facts, by name; `more_rows` are further tables, by title.
    """
    where, more_rows = machine(device), more_rows or {}
    for title, of_table in {"": rows, **more_rows}.items():
        print(title, end="\n" if title else "")
        print(pd.DataFrame(of_table).fillna("").to_string(index=False, float_format=_in_four_digits))
    for name, value in facts.items():
        goal = f"  (goal: {goals[name]})" if goals and name in goals else ""
        print(f"{name.replace('_', ' ')}: {_in_four_digits(value)}{goal}")
    print("on " + ", ".join(f"{name} {value}" for name, value in where.items()))
    if json_path is not None:
        found = {"rows": list(rows), **more_rows, **facts, "machine": where}
        json_path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def _in_four_digits(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "CPU")


def _synchronise(device: torch.device | str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
