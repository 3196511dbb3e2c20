"""Measure padding and step time by `data.group_by_shape`, and canvas sizes by `data.canvas_multiple`.

    python scripts/benchmarks/padding.py [--edges 800 1333] [--multiple 64] [--no-times] [--device cuda]
        [--json FILE]

Uses match footage (all 1280x720) and photographs (70 % 640x480, 30 % 480x640), each with `light` and `detr`.
Padding and canvases are for an epoch of 8,000 images. The time is forward and backward of a ResNet-18's
convolutions on some of the exact canvases, at the edges given by `--edges`.
"""

from collections.abc import Callable

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from timing import command_line, median_ratio, publish, seconds_of, take_turns

from detr_dist.config import DataConfig
from detr_dist.data.sampling import (
    CanvasRule,
    MicroBatchSampler,
    Purpose,
    SampleKey,
    SizeOf,
    StepPlan,
    random_numbers,
)
from detr_dist.data.transforms import Augmentation, build_transform
from detr_dist.resize import Resize
from detr_dist.training.groups import canvas_rule

NUM_SAMPLES, SHARE_OF_PORTRAITS = 8000, 0.3
TIMED_EVERY = 40
"""Time every 40th step, because a complete epoch would take minutes."""
SETS: dict[str, tuple[Augmentation, bool]] = {
    "footage, light": ("light", False),
    "footage, detr": ("detr", False),
    "photographs, light": ("light", True),
    "photographs, detr": ("detr", True),
}


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--edges", type=int, nargs=2, default=[100, 166], help="shortest_edge longest_edge")
    parser.add_argument("--multiple", type=int, default=DataConfig().canvas_multiple)
    parser.add_argument("--no-times", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    network = timm.create_model("resnet18", features_only=True).to(options.device).train()
    rows = []
    for name, (augmentation, is_mixed) in SETS.items():
        rule = canvas_rule(DataConfig(augmentation=augmentation, canvas_multiple=options.multiple))
        size_of = sizes(augmentation, is_mixed, options.edges)
        plan_ms = 1e3 * seconds_of(lambda: [size_of((1, row)) for row in range(1000)]) / 1000  # noqa: B023
        for step_size in (8, 32):
            steps = {
                "mixed": epoch_of(size_of, step_size, grouped=False),
                "grouped": epoch_of(size_of, step_size, grouped=True),
            }
            canvases = {way: canvases_of(sizes_hw, rule) for way, sizes_hw in steps.items()}
            exact = {way: canvases_of(sizes_hw, CanvasRule()) for way, sizes_hw in steps.items()}
            row = {
                "set": name,
                "images a step": step_size,
                "padded, mixed": padded_share(steps["mixed"], exact["mixed"]),
                "padded, grouped": padded_share(steps["grouped"], exact["grouped"]),
                f"and multiples of {options.multiple}": padded_share(steps["grouped"], canvases["grouped"]),
                "steps": len(exact["grouped"]),
                "canvases, grouped": len(set(exact["grouped"])),
                f"canvases, multiples of {options.multiple}": len(set(canvases["grouped"])),
            }
            if not options.no_times:
                ways = {way: passes(network, step_size, exact[way], options.device) for way in steps}
                seconds = take_turns(ways, rounds=options.rounds, warm_up=1, device=options.device)
                row["step time, grouped to mixed"] = median_ratio(seconds, "grouped", "mixed")
                row["planning, ms a step"] = step_size * plan_ms
            rows.append(row)
    publish(rows, options.json, device=options.device)


def sizes(augmentation: Augmentation, is_mixed: bool, edges: list[int]) -> SizeOf:
    """Return a function that returns the size of a sample after augmentation."""
    is_portrait = np.random.default_rng(0).random(NUM_SAMPLES) < SHARE_OF_PORTRAITS
    transform = build_transform(augmentation, Resize(*edges), train=True)

    def size_of(key: SampleKey) -> tuple[int, int]:
        epoch, row = key
        size_hw = ((640, 480) if is_portrait[row] else (480, 640)) if is_mixed else (720, 1280)
        return transform.plan(size_hw, random_numbers(Purpose.AUGMENT, 0, epoch, row)).size_hw

    return size_of


def epoch_of(size_of: SizeOf, step_size: int, *, grouped: bool) -> NDArray[np.int64]:
    """Return the sizes [steps, images, 2] of an epoch's samples."""
    plan = StepPlan(NUM_SAMPLES, step_size, 1, 1)
    sampler = MicroBatchSampler(plan, 0, 0, 0, plan.steps_per_epoch, size_of if grouped else None)
    return np.array([[size_of(key) for key in keys] for keys in sampler])


def canvases_of(sizes_hw: NDArray[np.int64], rule: CanvasRule) -> list[tuple[int, int]]:
    """Return the canvas of each step."""
    least_hw, most_hw = sizes_hw.min(axis=1).tolist(), sizes_hw.max(axis=1).tolist()
    return [rule.canvas_hw(tuple(low), tuple(high)) for low, high in zip(least_hw, most_hw, strict=True)]


def padded_share(sizes_hw: NDArray[np.int64], canvases: list[tuple[int, int]]) -> float:
    """Return the padded fraction of all canvases."""
    canvas_px = np.prod(canvases, axis=1).sum() * sizes_hw.shape[1]
    return float(1 - sizes_hw.prod(axis=2).sum() / canvas_px)


def passes(
    network: torch.nn.Module, step_size: int, canvases: list[tuple[int, int]], device: str
) -> Callable[[], None]:
    """Return a function that runs forward and backward on every `TIMED_EVERY`-th canvas."""

    def run() -> None:
        for height, width in canvases[::TIMED_EVERY]:
            features = network(torch.rand(step_size, 3, height, width, device=device))
            features[-1].mean().backward()

    return run


if __name__ == "__main__":
    main()
