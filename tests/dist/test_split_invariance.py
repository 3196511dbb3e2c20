"""The same data, seed and global batch give the same training however the batch is split."""

from pathlib import Path

import pytest
from harness.data import TINY_RT_DETR
from safetensors.torch import load_file

FAMILIES = {"detr": ("ce", ()), "rt_detr_v2": ("vfl", TINY_RT_DETR)}
"""The class loss of a family, and overrides of the tiny configuration."""
SPLITS = {  # processes, batch per process and micro-batch, accumulation: 8 images a step each
    "one_process": (1, 8, 1),
    "accumulated": (1, 2, 4),
    "two_processes": (2, 4, 1),
    "two_processes_accumulated": (2, 2, 2),
}


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("family", FAMILIES)
def test_num_processes_and_accumulation_change_neither_losses_nor_weights(
    workplace, tiny_data: Path, family: str
) -> None:
    class_loss, overrides = FAMILIES[family]
    for name, (num_processes, batch_size, accumulation) in SPLITS.items():
        finished = workplace.train(
            tiny_data,
            *overrides,
            "training.max_steps=10",
            "training.num_epochs=9",
            f"training.batch_size={batch_size}",
            f"training.gradient_accumulation_steps={accumulation}",
            "training.learning_rate=3e-5",
            "training.learning_rate_backbone=3e-5",
            "model.dropout=0",
            "model.freeze_batch_norm=true",
            "data.augmentation=detr",
            output=name,
            num_processes=num_processes,
        )
        assert finished.returncode == 0, finished.stdout + finished.stderr
    names = [f"{of}_loss{term}" for of in ("train", "val") for term in ("", f"_{class_loss}", "_bbox", "_giou")]
    expected = {metric: workplace.history(metric, "one_process") for metric in names}
    steps_without_any_box = [value for _, value in expected["train_loss_bbox"] if value == 0]
    assert 0 < len(steps_without_any_box) < 10
    weights = load_file(workplace.folder / "one_process" / "model" / "model.safetensors")
    for name in list(SPLITS)[1:]:
        for metric in names:
            # Sums in another order and convolutions over other batch sizes: float32 rounding, nothing more.
            assert workplace.history(metric, name) == [
                (step, pytest.approx(value, rel=1e-4, abs=1e-7)) for step, value in expected[metric]
            ]
        split_weights = load_file(workplace.folder / name / "model" / "model.safetensors")
        for key, tensor in weights.items():
            assert (split_weights[key] - tensor).abs().max() < 1e-5, (name, key)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_rt_detr_trains_the_same_in_micro_batches_of_the_same_size(workplace, tiny_data: Path) -> None:
    """Its backbone and neck have trained batch norm, whose statistics are those of a micro-batch."""
    for name, (num_processes, accumulation) in {"accumulated": (1, 2), "two_processes": (2, 1)}.items():
        finished = workplace.train(
            tiny_data,
            *TINY_RT_DETR,
            "training.max_steps=10",
            "training.num_epochs=9",
            "training.batch_size=4",
            f"training.gradient_accumulation_steps={accumulation}",
            "training.learning_rate=3e-5",
            "training.learning_rate_backbone=3e-5",
            "data.augmentation=detr",
            output=name,
            num_processes=num_processes,
        )
        assert finished.returncode == 0, finished.stdout + finished.stderr
    without_boxes = [value == 0 for _, value in workplace.history("train_loss_bbox", "accumulated")]
    assert 0 < sum(without_boxes) < 10
    for metric in ("train_loss", "train_loss_vfl", "train_loss_bbox", "train_loss_giou"):
        assert workplace.history(metric, "two_processes") == [
            (step, pytest.approx(value, rel=1e-4, abs=1e-7))
            for step, value in workplace.history(metric, "accumulated")
        ]
    one, two = (
        load_file(workplace.folder / name / "model" / "model.safetensors")
        for name in ("accumulated", "two_processes")
    )
    for key, tensor in one.items():
        if "running_" not in key:  # the main process's statistics are used, of its micro-batches alone
            assert (two[key] - tensor).abs().max() < 1e-5, key


@pytest.mark.dist
def test_every_split_trains_on_the_same_scales(workplace, tiny_data: Path) -> None:
    for name in ("accumulated", "two_processes"):
        num_processes, batch_size, accumulation = SPLITS[name]
        finished = workplace.train(
            tiny_data,
            *("data.resize=square", "data.multi_scale=[32, 64, 96]", "data.augmentation=detr"),
            f"training.batch_size={batch_size}",
            f"training.gradient_accumulation_steps={accumulation}",
            *("training.max_steps=4", "model.dropout=0", "model.freeze_batch_norm=true"),
            output=name,
            num_processes=num_processes,
        )
        assert finished.returncode == 0, finished.stdout + finished.stderr
    for metric in ("train_loss", "train_loss_ce", "train_loss_bbox", "train_loss_giou"):
        # Sums in another order and convolutions over other batch sizes: float32 rounding, nothing more.
        assert workplace.history(metric, "two_processes") == [
            (step, pytest.approx(value, rel=1e-4, abs=1e-7))
            for step, value in workplace.history(metric, "accumulated")
        ]


@pytest.mark.dist
def test_deformable_detr_trains_in_two_processes_bf16_channels_last(workplace, tiny_data: Path) -> None:
    finished = workplace.train(
        tiny_data,
        "model.model_architecture=deformable_detr",
        "model.config_overrides.num_feature_levels=1",
        "training.mixed_precision=bf16",
        "training.channels_last=true",
        "training.max_steps=3",
        num_processes=2,
    )
    assert finished.returncode == 0, finished.stderr
    assert [step for step, _ in workplace.history("train_loss")] == [1, 2, 3]
