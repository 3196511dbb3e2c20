"""How much of the canvas is padding, and how long a step takes, with and without `data.group_by_shape`.

    python scripts/benchmarks/padding.py [--edges 100 166] [--device cuda] [--json FILE]

Two sets: match footage, 1280x720 all of it; and photographs, 70 % 640x480 and 30 % 480x640; each with `light`
and `detr`. The padded share is of an epoch of 8,000 images; the time is forward and backward of a ResNet-18's
convolutions on some of its canvases, at the edges that are asked for.
"""

from collections.abc import Callable

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from timing import command_line, median_ratio, publish, seconds_of, take_turns

from detr_dist.data.sampling import MicroBatchSampler, Purpose, SampleKey, SizeOf, StepPlan, random_numbers
from detr_dist.data.transforms import Augmentation, build_transform

NUM_SAMPLES, SHARE_OF_PORTRAITS = 8000, 0.3
TIMED_EVERY = 40
"""Steps: those of a whole epoch would take minutes."""
SETS: dict[str, tuple[Augmentation, bool]] = {
    "footage, light": ("light", False),
    "footage, detr": ("detr", False),
    "photographs, light": ("light", True),
    "photographs, detr": ("detr", True),
}


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--edges", type=int, nargs=2, default=[100, 166], help="shortest_edge longest_edge")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    network = timm.create_model("resnet18", features_only=True).to(options.device).train()
    rows = []
    for name, (augmentation, is_mixed) in SETS.items():
        size_of = sizes(augmentation, is_mixed, options.edges)
        plan_ms = 1e3 * seconds_of(lambda: [size_of((1, row)) for row in range(1000)]) / 1000  # noqa: B023
        for step_size in (8, 32):
            steps = {
                "mixed": epoch_of(size_of, step_size, grouped=False),
                "grouped": epoch_of(size_of, step_size, grouped=True),
            }
            ways = {way: passes(network, sizes_hw, options.device) for way, sizes_hw in steps.items()}
            seconds = take_turns(ways, rounds=options.rounds, warm_up=1, device=options.device)
            rows.append(
                {
                    "set": name,
                    "images a step": step_size,
                    "padded, mixed": padded_share(steps["mixed"]),
                    "padded, grouped": padded_share(steps["grouped"]),
                    "step time, grouped to mixed": median_ratio(seconds, "grouped", "mixed"),
                    "planning, ms a step": step_size * plan_ms,
                }
            )
    publish(rows, options.json, device=options.device)


def sizes(augmentation: Augmentation, is_mixed: bool, edges: list[int]) -> SizeOf:
    """What tells the size of a sample as the network will see it."""
    is_portrait = np.random.default_rng(0).random(NUM_SAMPLES) < SHARE_OF_PORTRAITS
    transform = build_transform(augmentation, *edges, train=True)

    def size_of(key: SampleKey) -> tuple[int, int]:
        epoch, row = key
        size_hw = ((640, 480) if is_portrait[row] else (480, 640)) if is_mixed else (720, 1280)
        return transform.plan(size_hw, random_numbers(Purpose.AUGMENT, 0, epoch, row)).size_hw

    return size_of


def epoch_of(size_of: SizeOf, step_size: int, *, grouped: bool) -> NDArray[np.int64]:
    """Sizes [steps, images, 2] of an epoch's samples."""
    plan = StepPlan(NUM_SAMPLES, step_size, 1, 1)
    sampler = MicroBatchSampler(plan, 0, 0, 0, plan.steps_per_epoch, size_of if grouped else None)
    return np.array([[size_of(key) for key in keys] for keys in sampler])


def padded_share(sizes_hw: NDArray[np.int64]) -> float:
    """Of all canvases."""
    canvas_px = sizes_hw.max(axis=1).prod(axis=1).sum() * sizes_hw.shape[1]
    return float(1 - sizes_hw.prod(axis=2).sum() / canvas_px)


def passes(network: torch.nn.Module, sizes_hw: NDArray[np.int64], device: str) -> Callable[[], None]:
    """Forward and backward on every so many of the canvases."""
    canvases = sizes_hw[::TIMED_EVERY].max(axis=1).tolist()

    def run() -> None:
        for height, width in canvases:
            features = network(torch.rand(sizes_hw.shape[1], 3, height, width, device=device))
            features[-1].mean().backward()

    return run


if __name__ == "__main__":
    main()
