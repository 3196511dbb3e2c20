"""How much of the canvas is padding, and how long a step takes, with and without `data.group_by_shape`.

    python scripts/benchmarks/padding.py [--edges 200 333] [--device cuda] [--json FILE]

The set is 70 % 640x480 and 30 % 480x640, augmented with `light`. The padded share and the canvas are of a
whole epoch of 20,000 images; the time is forward and backward of a ResNet-18's convolutions on that epoch's
first canvases, at the edges that are asked for.
"""

from collections.abc import Callable

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from timing import command_line, median_ratio, medians, publish, take_turns

from detr_dist.data.sampling import epoch_order, group_by_shape
from detr_dist.data.transforms import resized_hw

NUM_SAMPLES, SHARE_OF_PORTRAITS, TIMED_STEPS = 20_000, 0.3, 8


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--edges", type=int, nargs=2, default=[200, 333], help="shortest_edge longest_edge")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    is_portrait = np.random.default_rng(0).random((NUM_SAMPLES, 1)) < SHARE_OF_PORTRAITS
    sizes_hw = np.where(is_portrait, (640, 480), (480, 640))
    resized = np.array([resized_hw(*size_hw, *options.edges) for size_hw in sizes_hw.tolist()])
    network = timm.create_model("resnet18", features_only=True).to(options.device).train()
    rows, ratios = [], {}
    for step_size in (8, 32):
        order = epoch_order(NUM_SAMPLES, seed=0, epoch=0)[: NUM_SAMPLES // step_size * step_size]
        orders = {"mixed": order, "grouped": group_by_shape(order, sizes_hw, step_size)}
        steps = {name: resized[each].reshape(-1, step_size, 2) for name, each in orders.items()}
        seconds = take_turns(
            {name: passes(network, hw, options.device) for name, hw in steps.items()},
            rounds=options.rounds,
            warm_up=1,
            device=options.device,
        )
        ratios[f"time_of_a_step_of_{step_size}_grouped_to_mixed"] = median_ratio(seconds, "grouped", "mixed")
        for name, took_s in medians(seconds).items():
            rows.append(
                {
                    "images a step": step_size,
                    "steps": name,
                    "padded share": padded_share(steps[name]),
                    "ms a step": 1e3 * took_s / TIMED_STEPS,
                }
            )
    publish(rows, options.json, device=options.device, **ratios)


def padded_share(sizes_hw: NDArray[np.int64]) -> float:
    """Of all canvases; sizes are [steps, images, 2]."""
    canvas_px = sizes_hw.max(axis=1).prod(axis=1).sum() * sizes_hw.shape[1]
    return float(1 - sizes_hw.prod(axis=2).sum() / canvas_px)


def passes(network: torch.nn.Module, sizes_hw: NDArray[np.int64], device: str) -> Callable[[], None]:
    """Forward and backward on the canvases of some steps."""
    canvases = sizes_hw[:TIMED_STEPS].max(axis=1).tolist()

    def run() -> None:
        for height, width in canvases:
            features = network(torch.rand(sizes_hw.shape[1], 3, height, width, device=device))
            features[-1].mean().backward()

    return run


if __name__ == "__main__":
    main()
