"""Memory that a forward pass keeps for the backward pass, with and without `training.gradient_checkpointing`.

    python scripts/benchmarks/activations.py [--size-hw 750 1333] [--device cuda] [section.key=value ...]

DETR with a ResNet-50 whose batch norm is frozen, one image, in training. Counts what autograd keeps beside
the weights: the same on every device, if the same kernels are taken.
"""

from collections.abc import Callable

import torch
from timing import command_line, medians, publish, take_turns
from torch import Tensor

from detr_dist.config import load_config
from detr_dist.distributed import autocast
from detr_dist.models.build import build_detector
from detr_dist.models.detector import Detector
from detr_dist.models.execution import recompute_activations

AS_TRAINED = [
    "model.pretrained_backbone=false",
    "model.freeze_batch_norm=true",
    "training.mixed_precision=no",
]


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--size-hw", type=int, nargs=2, default=[750, 1333], help="pixels")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_args()
    config = load_config(None, [*AS_TRAINED, *options.overrides])
    plain, frugal = (build_detector(config.model, ["player", "ball"]).to(options.device) for _ in range(2))
    recompute_activations(frugal.network)
    ways = {"everything kept": plain.train(), "gradient_checkpointing": frugal.train()}
    images = torch.zeros(1, 3, *options.size_hw, dtype=torch.uint8, device=options.device)
    sizes_hw = torch.tensor([options.size_hw], device=options.device)

    def forward(detector: Detector) -> Tensor:
        with autocast(images.device, config.training.mixed_precision):
            outputs = detector(images, sizes_hw, is_padded=False)
        return torch.stack([output.float().mean() for output in outputs.values()]).sum()

    kept = {name: kept_mib(detector, lambda: forward(detector)) for name, detector in ways.items()}  # noqa: B023
    steps = {name: lambda detector=detector: forward(detector).backward() for name, detector in ways.items()}
    seconds = medians(take_turns(steps, rounds=options.rounds, warm_up=1, device=options.device))
    rows = [
        {"way": name, "MiB kept": kept[name], "forward and backward ms": 1e3 * seconds[name]} for name in ways
    ]
    publish(
        rows,
        options.json,
        device=options.device,
        memory_share=kept["gradient_checkpointing"] / kept["everything kept"],
        time_ratio=seconds["gradient_checkpointing"] / seconds["everything kept"],
    )


def kept_mib(detector: Detector, forward: Callable[[], Tensor]) -> float:
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = forward()
    weights = {each.untyped_storage().data_ptr() for each in detector.state_dict().values()}
    del loss
    return sum(num_bytes for address, num_bytes in kept.items() if address not in weights) / 2**20


if __name__ == "__main__":
    main()
