"""Compiled or with less memory, a detector learns the same."""

import copy
import sys
from pathlib import Path
from typing import NoReturn

import pytest
import torch
import torch.distributed as dist
from harness.data import RESNET_FAMILIES
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor.cpp_builder import cpp_compiler_search
from torch.nn.parallel import DistributedDataParallel

from detr_dist.errors import UsageError
from detr_dist.models.denoising import Denoising
from detr_dist.models.detector import Detector
from detr_dist.models.optimizations import (
    _Recomputed,
    check_compiler,
    compile_regions,
    num_compiled_graphs,
    recompute_activations,
)


def learn(
    detector: Detector,
    height: int,
    width: int,
    *,
    is_padded: bool = True,
    denoising: Denoising | None = None,
) -> dict[str, Tensor]:
    """Return predictions, and the gradients of all parameters."""
    generator = torch.Generator().manual_seed(height)
    images = torch.randint(0, 255, (2, 3, height, width), dtype=torch.uint8, generator=generator)
    sizes_hw = torch.tensor([[height, width], [height - 9 * is_padded, width]])
    detector.zero_grad()
    torch.manual_seed(2)  # of dropout
    outputs = detector(images, sizes_hw, is_padded, denoising)
    torch.stack([output.square().sum() for output in outputs.values()]).sum().backward()
    return outputs | {name: p.grad for name, p in detector.named_parameters() if p.grad is not None}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "frugal"),
    [
        ("detr", False),
        ("detr", True),
        ("deformable_detr", False),
        ("rt_detr", False),
        ("rt_detr_v2", True),
        ("d_fine", False),
        ("deimv2", False),
    ],
)
def test_compiled_training_is_the_same_without_graph_breaks_at_any_size(
    tiny_detector, denoising_of, architecture: str, frugal: bool
) -> None:
    plain = tiny_detector(architecture, dropout=0.0, num_decoder_layers=2).train()
    compiled = copy.deepcopy(plain)
    if frugal:
        recompute_activations(compiled.network)
    # As the real one, but without the C++ compiler, which takes minutes.
    compile_regions(compiled.network, backend="aot_eager")
    graphs, breaks = [num_compiled_graphs()], sum(counters["graph_break"].values())
    denoising = denoising_of(plain)
    sizes = [(64, 96), (70, 101), (90, 75), (97, 118), (111, 72), (65, 99)]
    if plain.family.size_multiple(plain.network.config) > 1:
        sizes = [(64, 96), (96, 128), (160, 64), (96, 192), (128, 160), (192, 64)]
    for number, (height, width) in enumerate(sizes):
        options = {"is_padded": number % 2 == 0, "denoising": denoising}
        expected, found = (learn(each, height, width, **options) for each in (plain, compiled))
        for name, value in expected.items():
            # Other kernels, other rounding in float32.
            assert torch.allclose(found[name], value, rtol=1e-4, atol=1e-5), name
        graphs.append(num_compiled_graphs())
    assert graphs[0] < graphs[1], "nothing was compiled"
    assert graphs[5] == graphs[6], "after two sizes with padding and two without"
    assert sum(counters["graph_break"].values()) == breaks


def test_sizes_stay_on_the_host_within_a_forward_pass_alone(tiny_detector, monkeypatch) -> None:
    detector = tiny_detector("rt_detr_v2")
    modes = torch.overrides._get_current_function_mode_stack
    images, sizes_hw = torch.zeros(1, 3, 64, 96, dtype=torch.uint8), torch.tensor([[64, 96]])
    monkeypatch.setattr(
        detector.network.model.decoder_input_proj[1], "forward", lambda _: seen.extend(modes())
    )
    seen: list[object] = []
    with pytest.raises(AttributeError):
        detector(images, sizes_hw)
    assert len(seen) == 1
    assert modes() == []


def refuse(graph: object, inputs: object) -> NoReturn:
    raise AssertionError("this was to be compiled")


def test_ddp_does_not_split_compiled_graphs(tiny_detector) -> None:
    plain = tiny_detector("detr", dropout=0.0, hidden_dim=256, num_decoder_layers=1)
    in_ddp, compiled = copy.deepcopy(plain), []

    def count(graph: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
        compiled.append(graph)
        return graph

    graphs = num_compiled_graphs()
    compile_regions(in_ddp.network, backend=count)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = DistributedDataParallel(in_ddp)  # with buckets smaller than a layer
        images, sizes_hw = torch.zeros(1, 3, 64, 96, dtype=torch.uint8), torch.tensor([[64, 96]])
        expected, found = plain(images, sizes_hw), model(images, sizes_hw)
    finally:
        dist.destroy_process_group()
    assert len(compiled) == num_compiled_graphs() - graphs > 0
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_a_missing_compiler_is_reported_in_one_line(
    device_type: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cpp_compiler_search.cache_clear()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(UsageError, match=r"compile_model=true needs a C(\+\+)? compiler"):
        check_compiler(device_type)
    if device_type == "cuda":
        monkeypatch.setenv("CC", sys.executable)
        check_compiler(device_type)


def test_a_copy_of_a_compiled_detector_is_not_compiled(tiny_detector) -> None:
    detector = tiny_detector("detr")
    compile_regions(detector.network, backend=refuse)
    learn(copy.deepcopy(detector), 64, 96)
    with pytest.raises(Exception, match="this was to be compiled"):
        learn(detector, 64, 96)


@pytest.mark.parametrize("architecture", RESNET_FAMILIES)
def test_recomputed_activations_are_the_same(tiny_detector, denoising_of, architecture: str) -> None:
    plain = tiny_detector(architecture, dropout=0.1, backbone="resnet18", freeze_batch_norm=True).train()
    frugal = copy.deepcopy(plain)
    recompute_activations(frugal.network)
    parts = [
        name for name, each in frugal.named_modules() if "backbone" in name and isinstance(each, _Recomputed)
    ]
    assert [name.split(".")[-1] for name in parts] == ["layer1", "layer2", "layer3", "layer4"]
    denoising = denoising_of(plain)
    expected, found = (learn(each, 64, 96, denoising=denoising) for each in (plain, frugal))
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("freeze", [True, False])
def test_trained_batch_norm_counts_each_batch_once(tiny_detector, freeze: bool) -> None:
    plain = tiny_detector("detr", backbone="resnet18", freeze_batch_norm=freeze).train()
    frugal = copy.deepcopy(plain)
    recompute_activations(frugal.network)
    learn(plain, 64, 96)
    learn(frugal, 64, 96)
    for name, buffer in plain.named_buffers():
        assert torch.equal(frugal.get_buffer(name), buffer), name


@pytest.mark.parametrize(("freeze", "fraction"), [(True, 0.7), (False, 0.99)])
def test_less_memory_is_kept_for_the_backward_pass(tiny_detector, freeze: bool, fraction: float) -> None:
    detector = tiny_detector("detr", backbone="resnet18", freeze_batch_norm=freeze).train()
    before = kept_bytes(detector)
    recompute_activations(detector.network)
    assert kept_bytes(detector) < fraction * before


def kept_bytes(detector: Detector) -> int:
    """Return the bytes of activations that a forward pass keeps."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        outputs = detector(torch.zeros(2, 3, 192, 192, dtype=torch.uint8), torch.tensor([[192, 192]] * 2))
    weights = {each.untyped_storage().data_ptr() for each in detector.state_dict().values()}
    assert len(outputs) == 2
    return sum(num_bytes for address, num_bytes in kept.items() if address not in weights)
