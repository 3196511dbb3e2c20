"""Count each image's activations between forward and backward pass.

    python scripts/benchmarks/activations.py [--size-hw 800 1333] [section.key=value ...]
    python scripts/benchmarks/activations.py --recipes

Counts all families with a ResNet-50, with frozen batch norm and first stage, as from ImageNet weights; or
the networks of the recipes in configs/, of the published shape, at the recipe's size. In float32 and bf16,
with and without `training.gradient_checkpointing`, and with denoising queries or groups where the network
has them.
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
from transformers import AutoConfig, AutoModelForObjectDetection

from detr_dist.config import load_config
from detr_dist.data.sampling import round_up
from detr_dist.extensions import FAMILIES
from detr_dist.models.build import build_detector, quiet_transformers
from detr_dist.models.denoising import Denoising
from detr_dist.models.detector import Detector
from detr_dist.models.families import find_family
from detr_dist.models.optimizations import recompute_activations

RECIPES = Path(__file__).parents[2] / "configs"
RESNET_18 = {
    "model_type": "rt_detr_resnet",
    "layer_type": "basic",
    "depths": [2, 2, 2, 2],
    "hidden_sizes": [64, 128, 256, 512],
    "out_features": ["stage2", "stage3", "stage4"],
}
HGNET_B0 = {
    "model_type": "hgnet_v2",
    "stem_channels": [3, 16, 16],
    "stage_in_channels": [16, 64, 256, 512],
    "stage_mid_channels": [16, 32, 64, 128],
    "stage_out_channels": [64, 256, 512, 1024],
    "hidden_sizes": [64, 256, 512, 1024],
    "stage_num_blocks": [1, 1, 2, 1],
    "stage_downsample": [False, True, True, True],
    "stage_light_block": [False, False, True, True],
    "stage_kernel_size": [3, 3, 5, 5],
    "stage_numb_of_layers": [3, 3, 3, 3],
    "use_learnable_affine_block": True,
    "out_features": ["stage2", "stage3", "stage4"],
}
VIT_TINY = {
    "model_type": "lw_detr_vit",
    "num_hidden_layers": 6,
    "window_block_indices": [0, 2, 4],
    "out_features": ["stage2", "stage4", "stage6"],
}
DINOV2 = {
    "model_type": "rf_detr_dinov2",
    "hidden_size": 384,
    "num_attention_heads": 6,
    "patch_size": 16,
    "num_windows": 2,
    "out_features": ["stage3", "stage6", "stage9", "stage12"],
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "rt_detr_v2_r18": {
        "backbone_config": RESNET_18,
        "encoder_in_channels": [128, 256, 512],
        "hidden_expansion": 0.5,
        "decoder_layers": 3,
    },
    "rt_detr_v2_r50": {},
    "d_fine_s": {
        "backbone_config": HGNET_B0,
        "encoder_in_channels": [256, 512, 1024],
        "hidden_expansion": 0.5,
        "depth_mult": 0.34,
        "decoder_layers": 3,
    },
    "d_fine_l": {},
    "lw_detr_tiny": {"backbone_config": VIT_TINY, "num_queries": 100},
    "rf_detr_nano": {"backbone_config": {**DINOV2, "image_size": 384}, "decoder_layers": 2},
    "rf_detr_small": {"backbone_config": {**DINOV2, "image_size": 512}},
}
"""Where the published network of a recipe differs from transformers' default configuration."""


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--size-hw", type=int, nargs=2, default=[800, 1333], help="pixels")
    parser.add_argument("--recipes", action="store_true", help="count the networks of the recipes instead")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_args()
    rows, fake_mode = [], FakeTensorMode()  # one mode, because transformers caches tensors
    networks = of_recipes() if options.recipes else with_resnet(tuple(options.size_hw), options.overrides)
    for name, detector, size_hw in networks:
        row: dict[str, Any] = {"MiB an image": name, "size": "x".join(map(str, size_hw))}
        with fake_mode, efficient_attention():
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


def with_resnet(
    size_hw: tuple[int, int], overrides: list[str]
) -> Iterator[tuple[str, Detector, tuple[int, int]]]:
    """Yield the name of every family that can have a ResNet-50, a detector, and the size of its images."""
    for architecture in filter(lambda name: find_family(name).default_backbone, FAMILIES.built_in):
        with tempfile.TemporaryDirectory() as folder:
            settings = [*without_download(Path(folder)), f"model.model_architecture={architecture}"]
            config = load_config(None, [*settings, *overrides])
            detector = build_detector(config.model, ["player", "ball"]).train()
        multiple = detector.family.size_multiple(detector.network.config)
        yield architecture, detector, round_up(size_hw, multiple)


def of_recipes() -> Iterator[tuple[str, Detector, tuple[int, int]]]:
    """Yield the same of every recipe, with random weights in place of the published ones."""
    for recipe, differences in PUBLISHED.items():
        path = RECIPES / f"{recipe}.yaml"
        family = find_family(load_config(path, []).model.model_architecture)
        options = {**family.config_defaults, **family.derived(differences)}
        network = AutoModelForObjectDetection.from_config(AutoConfig.for_model(family.model_type, **options))
        with tempfile.TemporaryDirectory() as folder, quiet_transformers():
            network.save_pretrained(folder)
            config = load_config(path, [f"model.pretrained={folder}"])
            detector = build_detector(config.model, ["player", "ball"]).train()
        edge = config.data.shortest_edge
        yield recipe, detector, (edge, edge)


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
