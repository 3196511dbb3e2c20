"""Memory that each image's activations take between forward and backward pass, of every architecture.

    python scripts/benchmarks/activations.py [--size-hw 800 1333] [section.key=value ...]

A ResNet-50 whose batch norm and first stage do not learn, as from ImageNet's weights, in training, in float32
and bf16, with and without `training.gradient_checkpointing`. Counts what autograd keeps of a second image, on
CUDA tensors that have a shape and no content: exact for the kernels that are assumed (memory-efficient
attention), and no GPU is needed. What allocator, gradients and kernels take for a moment comes on top, and
what is inside a layer or stage while it is computed again.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from timing import command_line, publish
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from train_step import without_download

from detr_dist.config import load_config
from detr_dist.extensions import FAMILIES
from detr_dist.models.build import build_detector
from detr_dist.models.detector import Detector
from detr_dist.models.optimizations import recompute_activations


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--size-hw", type=int, nargs=2, default=[800, 1333], help="pixels")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_args()
    rows = []
    for architecture in FAMILIES.built_in:
        with tempfile.TemporaryDirectory() as folder:
            settings = [*without_download(Path(folder)), f"model.model_architecture={architecture}"]
            config = load_config(None, [*settings, *options.overrides])
            detector = build_detector(config.model, ["player", "ball"]).train()
        row: dict[str, Any] = {"MiB an image": architecture}
        with FakeTensorMode(), efficient_attention():
            move_to_fake_gpu(detector)
            for way in ("", " checkpointing"):
                if way:
                    recompute_activations(detector.network)
                for precision in ("float32", "bf16"):
                    one, two = (kept_mib(detector, num, options.size_hw, precision) for num in (1, 2))
                    row[precision + way] = two - one
        rows.append(row)
    shares = {f"{row['MiB an image']}_bf16_share": row["bf16"] / row["float32"] for row in rows}
    publish(rows, options.json, **shares)


def move_to_fake_gpu(detector: nn.Module) -> None:
    """Replace all weights by ones without content; layers that share theirs still do."""
    moved: dict[int, Tensor] = {}
    for module in detector.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in moved:
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
                    is_parameter = isinstance(tensor, nn.Parameter)
                    moved[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
                tensors[name] = moved[id(tensor)]


@contextmanager
def efficient_attention() -> Iterator[None]:
    """Let attention be the kernel that a GPU takes: without one torch would choose that which keeps all
    weights of attention."""

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        **how: Any,
    ) -> Tensor:
        kernel = torch.ops.aten._scaled_dot_product_efficient_attention
        return kernel(query, key, value, attn_mask, True, dropout_p, scale=how.get("scale"))[0]

    functional, original = nn.functional, nn.functional.scaled_dot_product_attention
    functional.scaled_dot_product_attention = attend
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = original


def kept_mib(detector: Detector, num_images: int, size_hw: list[int], precision: str) -> float:
    images = torch.zeros(num_images, 3, *size_hw, dtype=torch.uint8, device="cuda")
    sizes_hw = torch.tensor([size_hw] * num_images, device="cuda")
    kept: dict[int, Any] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage  # held, so that no other takes its address
        return tensor

    # torch.autocast would turn itself off where there is no GPU.
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.set_autocast_enabled("cuda", precision == "bf16")
    try:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            outputs = detector(images, sizes_hw, is_padded=False)
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.clear_autocast_cache()
    weights = {each.untyped_storage()._cdata for each in detector.state_dict().values()}
    del outputs
    return sum(storage.nbytes() for address, storage in kept.items() if address not in weights) / 2**20


if __name__ == "__main__":
    main()
