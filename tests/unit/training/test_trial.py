"""The largest batch is tried before the first step, and changes nothing."""

import copy
from dataclasses import replace
from itertools import chain, islice
from math import ceil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from detr_dist.config import load_config
from detr_dist.data.coco import load_data
from detr_dist.data.dataset import Batch
from detr_dist.data.sampling import StepPlan
from detr_dist.errors import TrainingError
from detr_dist.extensions import LOSSES
from detr_dist.models.criterion import SetCriterion, StepCounts
from detr_dist.models.device_memory import DeviceMemory
from detr_dist.training.groups import GroupStream
from detr_dist.training.loop import Training
from detr_dist.training.strategy import synchronise_batch_norm
from detr_dist.training.trial import try_largest_batch

BATCH = {"num_images": 2, "num_boxes": 3, "canvas_hw": (64, 96)}


def everything(training: Training) -> list[Tensor]:
    """Return weights, buffers, their average, the optimizer state, and the state of random numbers."""
    states = (training.model.state_dict(), training.average.detector.state_dict())
    moments = [value for state in training.optimizer.state.values() for value in state.values()]
    tensors = [*(tensor for state in states for tensor in state.values()), *moments, torch.get_rng_state()]
    return copy.deepcopy(tensors)


@pytest.mark.parametrize("is_first_step", [True, False])
def test_the_trial_changes_no_state(training: Training, is_first_step: bool) -> None:
    training.model.train()
    if is_first_step:
        training.optimizer.state.clear()
    training.optimizer.zero_grad()
    before = everything(training)
    tracked = [name for name in training.model.state_dict() if name.endswith("num_batches_tracked")]
    assert tracked  # batch norm that learns
    try_largest_batch(training, 0, **BATCH)
    after = everything(training)
    assert len(after) == len(before)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert all(parameter.grad is None for parameter in training.model.parameters())
    assert training.model.training


def test_synchronised_batch_norm_does_not_wait_for_other_processes(training: Training) -> None:
    synchronise_batch_norm(training.model)
    training.model.train()
    norms = [module for module in training.model.modules() if isinstance(module, nn.SyncBatchNorm)]
    modes: list[bool] = []
    for norm in norms:
        norm.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    try_largest_batch(training, 0, **BATCH)
    assert modes == [False] * len(norms) != []
    assert all(norm.training for norm in norms)


def test_a_term_that_is_not_finite_ends_the_run_at_the_next_check_but_not_in_the_trial(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LOSSES._objects, "own", lambda matched: matched.logits.sum((1, 2, 3)) / 0)
    criterion = SetCriterion(training.criterion.settings, {"own": 1.0})
    training = replace(training, criterion=criterion)
    try_largest_batch(training, 0, **BATCH)
    training.check(0)
    outputs = {"pred_logits": torch.zeros(1, 1, 4, 3), "pred_boxes": torch.full((1, 1, 4, 4), 0.5)}
    no_labels, no_boxes = torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4)
    assert criterion(outputs, no_labels, no_boxes, [0], StepCounts(0, 1)).finite
    with pytest.raises(TrainingError, match="the term own of the loss was NaN or Inf"):
        training.check(1)


def test_the_trial_runs_forward_and_backward(training: Training) -> None:
    seen: list[tuple[int, ...]] = []
    parameter = next(p for p in training.model.parameters() if p.requires_grad)
    parameter.register_hook(lambda gradient: seen.append(tuple(gradient.shape)))
    training.model.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape)))
    try_largest_batch(training, 0, **BATCH)
    assert seen == [(2, 3, 64, 96), tuple(parameter.shape)]


def lack_memory(*_: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def test_out_of_memory_names_the_batch_and_the_remedies_in_order(training: Training) -> None:
    training.model.register_forward_hook(lack_memory)
    config = load_config(None, ["training.batch_size=2", "training.mixed_precision=no"])
    training = replace(training, memory=DeviceMemory(config))
    with pytest.raises(TrainingError) as raised:
        try_largest_batch(training, 0, **BATCH)
    message = str(raised.value)
    remedies = (
        "training.gradient_checkpointing=true",
        "training.batch_size=1 with training.gradient_accumulation_steps=2",
        "training.mixed_precision=bf16",
        "data.longest_edge",
        "ZeRO",
    )
    parts = ("out of memory", "2 images", "64x96", "peak memory", "GiB", *remedies)
    places = [message.find(part) for part in parts]
    assert -1 not in places
    assert places == sorted(places)
    assert "\n" not in message


def test_remedies_already_in_use_are_not_suggested(training: Training) -> None:
    taken = ["training.gradient_checkpointing=true", "training.mixed_precision=bf16", "training.batch_size=1"]
    memory = DeviceMemory(load_config(None, taken))
    with (
        pytest.raises(TrainingError) as raised,
        memory.explained("at step 3", num_images=1, canvas_hw=(8, 8), is_training=True),
    ):
        lack_memory()
    assert not [setting for setting in taken if setting.partition("=")[0] in str(raised.value)]


def test_the_documentation_names_the_remedies_in_the_same_order() -> None:
    page = (Path(__file__).parents[3] / "docs" / "performance.md").read_text()
    item = page[page.index("3. Out of memory") : page.index("4. Otherwise")]
    keys = ("gradient_checkpointing", "batch_size", "mixed_precision", "longest_edge", "ZeRO")
    places = [item.find(key) for key in keys]
    assert -1 not in places
    assert places == sorted(places)


@pytest.mark.parametrize(("group_by_shape", "tiles"), [(True, "null"), (False, "null"), (True, "{size: 70}")])
def test_the_largest_canvas_is_the_largest_of_all_steps(
    tiny_data: Path, group_by_shape: bool, tiles: str
) -> None:
    config = load_config(
        None,
        [
            *("data.num_workers=0", "data.shortest_edge=64", "data.longest_edge=96", "training.batch_size=2"),
            *("training.gradient_accumulation_steps=2", f"data.group_by_shape={str(group_by_shape).lower()}"),
            f"data.tiles={tiles}",
        ],
    )
    data = load_data(tiny_data / "train")
    plan = StepPlan(len(data), batch_size=2, num_processes=2, accumulation=2)
    streams = [
        GroupStream(data, config, plan, process_index=process, first_step=2, total_steps=12, pin_memory=False)
        for process in (0, 1)
    ]
    canvases = []
    for groups in zip(*streams, strict=False):
        sizes = [batch.images.shape[-2:] for group in groups for batch in group]
        height, width = (max(sides) for sides in zip(*sizes, strict=True))
        canvases.append((ceil(height / 32) * 32, ceil(width / 32) * 32))
        if len(canvases) == 10:
            break
    largest = max(canvases, key=lambda canvas: canvas[0] * canvas[1])
    assert {stream.largest_canvas_hw() for stream in streams} == {largest}


@pytest.mark.parametrize("resize", ["square", "rectangle", "shortest_edge"])
def test_every_split_sees_the_same_sizes_at_every_scale(resize: str, tiny_data: Path) -> None:
    config = load_config(
        None,
        [
            *("data.num_workers=0", f"data.resize={resize}", "data.shortest_edge=56", "data.longest_edge=88"),
            "data.multi_scale=[40, 56, 72]",
            f"data.augmentation={'light' if resize == 'shortest_edge' else 'detr'}",
        ],
    )
    data = load_data(tiny_data / "train")
    images_of_steps = []
    for batch_size, num_processes, accumulation in ((8, 1, 1), (2, 2, 2)):
        settings = {"batch_size": batch_size, "gradient_accumulation_steps": accumulation}
        own = config.model_copy(update={"training": config.training.model_copy(update=settings)})
        plan = StepPlan(len(data), batch_size, num_processes, accumulation)
        streams = [
            GroupStream(
                data, own, plan, process_index=process, first_step=3, total_steps=15, pin_memory=False
            )
            for process in range(num_processes)
        ]
        steps = [
            [batch for group in groups for batch in group]
            for groups in islice(zip(*streams, strict=False), 12)
        ]
        for stream in streams:
            stream.close()
        images_of_steps.append([list(chain(*map(unpadded, batches))) for batches in steps])
    one, several = images_of_steps
    for images, others in zip(one, several, strict=True):
        assert all(image.equal(other) for image, other in zip(images, others, strict=True))
    shapes = {tuple(image.shape[1:]) for images in one for image in images}
    if resize == "square":
        assert shapes == {(40, 40), (56, 56), (72, 72)}
    elif resize == "rectangle":  # 63 and 113 pixels to multiples of 32
        assert shapes == {(40, 64), (56, 88), (72, 128), (64, 40), (88, 56), (128, 72)}
    else:
        assert {min(shape) for shape in shapes} == {40, 56, 72}
    largest = {"square": (72, 72), "rectangle": (128, 128)}
    assert streams[0].largest_canvas_hw() == largest.get(resize, streams[1].largest_canvas_hw())


def unpadded(batch: Batch) -> list[torch.Tensor]:
    return [
        image[:, :height, :width]
        for image, (height, width) in zip(batch.images, batch.sizes_hw.tolist(), strict=True)
    ]
