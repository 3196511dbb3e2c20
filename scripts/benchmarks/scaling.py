"""Measure how training scales with the processes that this host can run, and predict it for many GPUs.

    python scripts/benchmarks/scaling.py [--device cuda] [--config configs/quickstart.yaml] [--edge 128]
        [--step-ms MS] [--backward-ms MS] [--gradient-mb MB] [--exchange-ms MS] [--latency-us US]
        [--bandwidth-gb-s GB_S] [--between-gb-s GB_S] [--rounds 30] [--json FILE]

Measured: one process and two (on GPUs up to one per GPU), started by `accelerate launch` with the shipped
files, each with one thread on the CPU and the same batch, ready in memory.

Predicted: the seconds of a step of n processes with g = 8 per node and m = n / g nodes,

    step(n)       = step(1) + exchange(n) + exposed(n)
    exchange(n)   = exchange(2) x log2(n)                        a few host values per step, over gloo
    all_reduce(n) = 2 (g-1)/g x bytes / within  + 2 (g-1) x latency
                  + 2 (m-1)/m x bytes / between + 2 (m-1) x latency
    exposed(n)    = max(all_reduce(n) x last, all_reduce(n) - backward x (1 - last))

where `last` is the fraction of DDP's last bucket (25 MiB at most), which is only sent after the backward
pass. On the CPU nothing overlaps, because the all-reduce needs the core that computes. For several
processes the measured step is printed beside the predicted one. step(1) is then that of the slowest of
concurrent processes without communication, because these compete for memory and, on a busy host, for cores.
Values not given are measured.
"""

import argparse
import math
import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from timing import command_line, figures_of, publish

REPOSITORY = Path(__file__).parents[2]
GPUS_OF_A_NODE = 8
BUCKET_BYTES = 25 * 2**20  # DistributedDataParallel's default
PREDICTED = (8, 16, 32, 64, 128, 256)

# Nominal GB/s in one direction; not measured here.
NVLINK, INFINIBAND_200, ETHERNET_25 = 450.0, 25.0, 3.125
NOMINAL = {
    "nominal NVLink 4, 200 Gb/s InfiniBand": (NVLINK, INFINIBAND_200),
    "nominal NVLink 4, 25 Gb/s Ethernet": (NVLINK, ETHERNET_25),
}


@dataclass(frozen=True)
class Model:
    """The inputs of the prediction, in seconds, bytes and bytes per second."""

    step_s: float
    backward_s: float
    """The part of a step that can overlap with an all-reduce."""
    gradient_bytes: float
    exchange_s: float
    """Exchange of host values between two processes."""
    latency_s: float
    within: float
    between: float

    def exchange(self, num_processes: int) -> float:
        return self.exchange_s * math.log2(num_processes)

    def all_reduce(self, num_processes: int) -> float:
        per_node = min(num_processes, GPUS_OF_A_NODE)
        levels = ((per_node, self.within), (num_processes // per_node, self.between))
        return sum(
            2 * (size - 1) * (self.gradient_bytes / (size * bandwidth) + self.latency_s)
            for size, bandwidth in levels
            if size > 1
        )

    def step(self, num_processes: int) -> float:
        took_s, last = self.all_reduce(num_processes), min(1.0, BUCKET_BYTES / self.gradient_bytes)
        exposed_s = max(took_s * last, took_s - self.backward_s * (1 - last))
        return self.step_s + self.exchange(num_processes) + exposed_s

    def efficiency(self, num_processes: int) -> float:
        return self.step_s / self.step(num_processes)


def run_processes(folder: Path, num_processes: int, options: argparse.Namespace) -> dict[str, float]:
    """Return the measurements of the main process of `num_processes`."""
    one, several = ("cpu", "multi_cpu") if options.device == "cpu" else ("single_gpu", "multi_gpu")
    settings = REPOSITORY / "accelerate_configs" / f"{one if num_processes == 1 else several}.yaml"
    script, out = Path(__file__).with_name("scaling_process.py"), folder / f"{num_processes}.json"
    launch = ("accelerate", "launch", "--quiet", "--config_file", settings, "--num_processes", num_processes)
    command = (*launch, script, out, options.config, options.edge, options.rounds)
    return figures_of(command, out, env=os.environ | {"OMP_NUM_THREADS": "1"})


def measure(options: argparse.Namespace) -> dict[int, dict[str, float]]:
    """Return measurements by number of processes; for one process the mean of before and after the others."""
    counts = [2] if options.device == "cpu" else range(2, torch.cuda.device_count() + 1)
    with tempfile.TemporaryDirectory() as folder:
        before = run_processes(Path(folder), 1, options)
        several = {count: run_processes(Path(folder), count, options) for count in counts}
        (Path(folder) / "1.json").unlink()
        after = run_processes(Path(folder), 1, options)
    return {1: {name: (before[name] + after[name]) / 2 for name in before}} | several


def model_of(measured: dict[int, dict[str, float]], options: argparse.Namespace) -> Model:
    """Return the values from options, else the measured ones, with one bandwidth for both levels."""
    one, most = measured[1], max(measured)
    several = measured[most]

    def given(value: float | None, unit: float, or_else: float) -> float:
        return value * unit if value is not None else or_else

    gradient_bytes = given(options.gradient_mb, 1e6, one["gradient_bytes"])
    latency_s = given(options.latency_us, 1e-6, several["latency_s"])
    transfer_s = several["all_reduce_s"] - 2 * (most - 1) * latency_s
    ring_bandwidth = 2 * (most - 1) / most * one["gradient_bytes"] / transfer_s if most > 1 else math.nan
    within = given(options.bandwidth_gb_s, 1e9, ring_bandwidth)
    return Model(
        step_s=given(options.step_ms, 1e-3, one["step_s"]),
        backward_s=given(options.backward_ms, 1e-3, one["backward_s"] if options.device == "cuda" else 0.0),
        gradient_bytes=gradient_bytes,
        exchange_s=given(options.exchange_ms, 1e-3, several["exchange_s"] / math.log2(max(most, 2))),
        latency_s=latency_s,
        within=within,
        between=given(options.between_gb_s, 1e9, within),
    )


def measured_rows(measured: dict[int, dict[str, float]]) -> list[dict[str, Any]]:
    return [
        {
            "processes": count,
            "step_ms": 1e3 * each["step_s"],
            "alone_ms": 1e3 * each["alone_s"],
            "slowest_ms": 1e3 * each["slowest_s"],
            "efficiency": measured[1]["step_s"] / each["step_s"],
            "images_per_s": count * each["batch_size"] / each["step_s"],
            "backward_ms": 1e3 * each["backward_s"],
            "exchange_ms": 1e3 * each["exchange_s"],
            "all_reduce_ms": 1e3 * each["all_reduce_s"],
        }
        for count, each in measured.items()
    ]


def predicted_rows(model: Model) -> list[dict[str, Any]]:
    networks = {"given or measured here": model} | {
        name: replace(model, within=1e9 * within, between=1e9 * between)
        for name, (within, between) in NOMINAL.items()
    }
    return [
        {"network": name} | {str(count): each.efficiency(count) for count in PREDICTED}
        for name, each in networks.items()
    ]


def parse_options() -> argparse.Namespace:
    parser = command_line(__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--config", type=Path, default=REPOSITORY / "configs" / "quickstart.yaml")
    parser.add_argument("--edge", type=int, default=128, help="size of the square images in pixels")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--step-ms", type=float, help="step time of one process")
    parser.add_argument(
        "--backward-ms", type=float, help="part of the step that can overlap with an all-reduce"
    )
    parser.add_argument("--gradient-mb", type=float)
    parser.add_argument("--exchange-ms", type=float, help="exchange of host values between two processes")
    parser.add_argument("--latency-us", type=float, help="latency of one message")
    parser.add_argument("--bandwidth-gb-s", type=float, help="bandwidth between the GPUs of a node")
    parser.add_argument("--between-gb-s", type=float, help="bandwidth between two nodes")
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    measured = measure(options)
    model = model_of(measured, options)
    checked, nothing_given = max(measured), dict.fromkeys(vars(options)) | {"device": options.device}
    from_here = model_of(measured, argparse.Namespace(**nothing_given))
    from_here = replace(from_here, step_s=measured[checked]["slowest_s"])
    predicted_s, found_s = from_here.step(checked), measured[checked]["step_s"]
    publish(
        measured_rows(measured),
        options.json,
        device=options.device,
        more_rows={"predicted efficiency by the number of processes": predicted_rows(model)},
        **{
            f"predicted for {checked}, ms": 1e3 * predicted_s,
            f"measured for {checked}, ms": 1e3 * found_s,
            "error": predicted_s / found_s - 1,
            "gradients, MB": model.gradient_bytes / 1e6,
            "latency, us": 1e6 * model.latency_s,
            "bandwidth within, GB/s": model.within / 1e9,
            "bandwidth between, GB/s": model.between / 1e9,
        },
    )


if __name__ == "__main__":
    main()
