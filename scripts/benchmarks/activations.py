"""Count each image's activations between forward and backward pass, for all families with a ResNet-50.

    python scripts/benchmarks/activations.py [--size-hw 800 1333] [section.key=value ...]

Uses a ResNet-50 with frozen batch norm and first stage, as from ImageNet weights, in float32 and bf16,
with and without `training.gradient_checkpointing`, and with denoising queries where the network has them.
Counts what autograd keeps for a second image, on CUDA tensors with a shape but no content. No GPU is
needed, and the count is exact for the assumed kernels (memory-efficient attention). Temporary memory of
allocator, gradients and kernels comes on top, as do the activations inside a layer or stage while it is
recomputed.
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
from detr_dist.data.sampling import round_up
from detr_dist.extensions import FAMILIES
from detr_dist.models.build import build_detector
from detr_dist.models.denoising import Denoising
from detr_dist.models.detector import Detector
from detr_dist.models.families import find_family
from detr_dist.models.optimizations import recompute_activations


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--size-hw", type=int, nargs=2, default=[800, 1333], help="pixels")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_args()
    rows = []
    for architecture in filter(lambda name: find_family(name).default_backbone, FAMILIES.built_in):
        with tempfile.TemporaryDirectory() as folder:
            settings = [*without_download(Path(folder)), f"model.model_architecture={architecture}"]
            config = load_config(None, [*settings, *options.overrides])
            detector = build_detector(config.model, ["player", "ball"]).train()
        multiple = detector.family.size_multiple(detector.network.config)
        size_hw = round_up(tuple(options.size_hw), multiple)
        row: dict[str, Any] = {"MiB an image": architecture}
        with FakeTensorMode(), efficient_attention():
            move_to_fake_gpu(detector)
            for way in ("", " checkpointing"):
                if way:
                    recompute_activations(detector.network)
                for precision in ("float32", "bf16"):
                    one, two = (kept_mib(detector, num, size_hw, precision) for num in (1, 2))
                    row[precision + way] = two - one
        rows.append(row)
    shares = {f"{row['MiB an image']}_bf16_share": row["bf16"] / row["float32"] for row in rows}
    publish(rows, options.json, **shares)


def move_to_fake_gpu(detector: nn.Module) -> None:
    """Replace all weights by tensors without content, and keep shared weights shared."""
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
    """Use the attention kernel of a GPU. Without a GPU torch would choose one that keeps all attention
    weights."""

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


def queries_of(detector: Detector, num_images: int) -> Denoising | None:
    """Return denoising queries with a shape but no content, of images with one object each."""
    if detector.denoising is None:
        return None
    shape = (num_images, 2 * detector.denoising.num_queries)
    labels = torch.empty(shape, dtype=torch.int64, device="cuda")
    boxes, weight = torch.empty(*shape, 4, device="cuda"), torch.empty(shape, device="cuda")
    positive = torch.empty(shape[0] * shape[1] // 2, dtype=torch.int64, device="cuda")
    return Denoising(labels, boxes, torch.empty_like(labels), weight, positive, positive)


def kept_mib(detector: Detector, num_images: int, size_hw: tuple[int, int], precision: str) -> float:
    denoising = queries_of(detector, num_images)
    images = torch.zeros(num_images, 3, *size_hw, dtype=torch.uint8, device="cuda")
    sizes_hw = torch.tensor([list(size_hw)] * num_images, device="cuda")
    kept: dict[int, Any] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage  # kept alive, so that its address is not reused
        return tensor

    # torch.autocast turns itself off without a GPU.
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.set_autocast_enabled("cuda", precision == "bf16")
    try:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            outputs = detector(images, sizes_hw, False, denoising)
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.clear_autocast_cache()
    weights = {each.untyped_storage()._cdata for each in detector.state_dict().values()}
    del outputs
    return sum(storage.nbytes() for address, storage in kept.items() if address not in weights) / 2**20


if __name__ == "__main__":
    main()
