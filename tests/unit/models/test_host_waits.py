"""A step waits for its device once: for the costs by which queries are assigned."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from harness.data import RESNET_FAMILIES
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from detr_dist.boxes import IgnoredRegions
from detr_dist.extensions import FAMILIES
from detr_dist.models import matcher
from detr_dist.models.criterion import SetCriterion, StepCounts
from detr_dist.models.denoising import Denoising


class Questions(TorchDispatchMode):
    """Records the operations for which a GPU would let the host wait.

    Those are operations whose result Python needs to continue, whose shape depends on values, or whose
    tensors are on two devices. The last ones show only on a GPU, real or fake.
    """

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2")

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        result = function(*args, **(kwargs or {}))
        tensors = [each for each in tree_leaves((args, kwargs, result)) if isinstance(each, torch.Tensor)]
        if name in self.WAITING or by_mask or len({each.device for each in tensors}) > 1:
            self.asked.append(name)
        return result


@pytest.fixture(autouse=True)
def nothing_is_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the library compute its anchors each time, which belong to one fake GPU."""
    monkeypatch.setattr("transformers.pytorch_utils.is_torchdynamo_compiling", lambda: True)


@pytest.fixture(autouse=True)
def no_draws_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disable random layer drop in the decoder of Conditional DETR.

    Up to transformers 5.17 each layer draws a random number, whatever the probability. It is on the host, so
    nothing waits for it, but with all tensors on one device that does not show.
    """
    rand = torch.rand
    monkeypatch.setattr(torch, "rand", lambda *size, **how: 1.0 if size == ([],) else rand(*size, **how))


@pytest.mark.parametrize(("is_padded", "ignores"), [(True, False), (False, True)])
@pytest.mark.parametrize("architecture", FAMILIES.built_in)
def test_a_step_reads_nothing_from_the_device(
    tiny_detector, images_for, denoising_of, architecture: str, is_padded: bool, ignores: bool
) -> None:
    detector = tiny_detector(architecture).train()
    denoising = denoising_of(detector)
    criterion = SetCriterion(detector.loss_settings)
    images, sizes_hw = images_for(detector)
    labels, boxes_cxcywh = torch.tensor([0, 1, 1]), torch.rand(3, 4) / 4 + 0.3
    ignored = IgnoredRegions(labels[:1], boxes_cxcywh[:1] / 2, [1, 0]) if ignores else None
    with Questions() as questions:
        outputs = detector(images, sizes_hw, is_padded, denoising)
        targets = labels, boxes_cxcywh, [1, 2]
        criterion(outputs, *targets, StepCounts(3, 2), denoising, ignored).total.backward()
    assert questions.asked == []


@pytest.mark.parametrize(("is_padded", "ignores"), [(True, False), (False, True)])
@pytest.mark.parametrize("architecture", FAMILIES.built_in)
def test_a_micro_batch_on_a_gpu_copies_to_the_host_once(
    tiny_detector, denoising_of, on_fake_gpu, monkeypatch, architecture: str, is_padded: bool, ignores: bool
) -> None:
    detector = tiny_detector(architecture).train()
    denoising = denoising_of(detector)
    criterion = SetCriterion(detector.loss_settings)
    copies: list[torch.Size] = []

    def to_host(values: torch.Tensor) -> np.ndarray:
        copies.append(values.shape)
        return np.zeros(values.shape, np.float32)

    def to_device(host: torch.Tensor, device: torch.device) -> torch.Tensor:  # from pinned memory
        return torch.empty(host.shape, dtype=host.dtype, device=device)

    monkeypatch.setattr(matcher, "_to_host", to_host)
    monkeypatch.setattr(matcher, "_to_device", to_device)
    with on_fake_gpu(detector), Questions() as questions:
        images = torch.zeros(2, 3, 96, 96, dtype=torch.uint8, device="cuda")
        sizes_hw = torch.zeros(2, 2, dtype=torch.int64, device="cuda")
        labels, boxes_cxcywh = (
            torch.zeros(3, dtype=torch.int64, device="cuda"),
            torch.zeros(3, 4, device="cuda"),
        )
        if denoising is not None:
            denoising = Denoising(*(to_device(each, torch.device("cuda")) for each in denoising))
        ignored = IgnoredRegions(labels[:1], boxes_cxcywh[:1], [1, 0]) if ignores else None
        outputs = detector(images, sizes_hw, is_padded, denoising)
        criterion(outputs, labels, boxes_cxcywh, [1, 2], StepCounts(3, 2), denoising, ignored)
    assert len(copies) == 1
    # These copy the sizes of their feature maps to the device.
    copies_sizes = architecture in ("deformable_detr", "lw_detr", "rf_detr")
    assert questions.asked == (["_to_copy"] if copies_sizes else [])


def test_reads_from_the_device_are_detected(on_fake_gpu) -> None:
    with Questions() as questions:
        bool(torch.ones(3).isfinite().all())
        torch.ones(3)[torch.tensor([True, False, True])]
    assert questions.asked == ["_local_scalar_dense", "index"]
    with on_fake_gpu(torch.nn.Identity()), Questions() as questions:
        on_device = torch.ones(3, device="cuda")
        on_device[-1:].fill_(0.5)
        assert questions.asked == []
        on_device[-1] = 0.5
        torch.tensor([0.5], device="cuda")
        on_device.cpu()
    assert questions.asked == ["copy_", "_to_copy", "_to_copy"]


@pytest.mark.parametrize("architecture", RESNET_FAMILIES)
def test_images_that_fill_the_canvas_need_no_mask(tiny_detector, two_images, architecture: str) -> None:
    detector = tiny_detector(architecture).eval()
    images, _ = two_images
    sizes_hw = torch.tensor([[64, 96], [64, 96]])
    with torch.no_grad():
        masked, unmasked = (detector(images, sizes_hw, is_padded) for is_padded in (True, False))
    # Another kernel of attention: rounding in float32.
    for name in masked:
        assert torch.allclose(masked[name], unmasked[name], atol=1e-5), name


def test_a_copy_masks_by_its_own_padding(tiny_detector, two_images) -> None:
    detector = tiny_detector("detr").eval()
    average = copy.deepcopy(detector)
    images, sizes_hw = two_images
    with torch.no_grad():
        expected = average(images, sizes_hw, True)["pred_boxes"]
        detector(images, sizes_hw, False)
        average.network.model.encoder.register_forward_pre_hook(
            lambda module, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
        )
        masks: list[torch.Tensor | None] = []
        assert torch.equal(average(images, sizes_hw, True)["pred_boxes"], expected)
        average(images, torch.tensor([[64, 96], [64, 96]]), False)
    assert masks[0] is not None
    assert masks[1] is None
