"""The same data, seed and global batch give the same training however the batch is split."""

import json
from pathlib import Path

import pytest
from harness.data import TINY_OVERRIDES, TINY_RT_DETR
from safetensors.torch import load_file

from detr_dist.data.sampling import epoch_order

SPLITS = {  # processes, batch per process and micro-batch, accumulation: 8 images a step each
    "one_process": (1, 8, 1),
    "accumulated": (1, 2, 4),
    "two_processes": (2, 4, 1),
    "two_processes_accumulated": (2, 2, 2),
}
ALL_SPLITS_OF = ("detr", "rt_detr_v2")
"""The families whose training is tried with all splits; for the others the two most different ones suffice."""
WITHOUT_MLFLOW = (
    "logging.mlflow=false",
    f"logging.trackers=[{Path(__file__).with_name('losses_file.py')}:LossesFile]",
)
SMALL_STEPS = (
    *("training.max_steps=10", "training.num_epochs=9"),
    *("training.learning_rate=3e-5", "training.learning_rate_backbone=3e-5"),
)


def train(workplace, data: Path, name: str, *overrides: str, launch_config: str = "multi_cpu"):
    """Train with the split `name` into a folder of that name; return the losses by step, and the weights."""
    num_processes, batch_size, accumulation = SPLITS[name]
    finished = workplace.train(
        data,
        *SMALL_STEPS,
        *WITHOUT_MLFLOW,
        f"training.batch_size={batch_size}",
        f"training.gradient_accumulation_steps={accumulation}",
        "model.dropout=0",
        "model.freeze_batch_norm=true",
        "data.augmentation=detr",
        "data.group_by_shape=false",
        *overrides,
        output=name,
        num_processes=num_processes,
        launch_config=launch_config,
    )
    assert finished.returncode == 0, (name, finished.stdout + finished.stderr)
    lines = (workplace.folder / "losses.jsonl").rename(workplace.folder / f"{name}.jsonl").read_text()
    weights = load_file(workplace.folder / name / "checkpoints" / "last" / "model.safetensors")
    return [json.loads(line) for line in lines.splitlines()], weights


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("family", TINY_OVERRIDES)
def test_num_processes_and_accumulation_change_neither_losses_nor_weights(
    workplace, tiny_data: Path, family: str
) -> None:
    first, *others = SPLITS if family in ALL_SPLITS_OF else ("accumulated", "two_processes")
    losses, weights = train(workplace, tiny_data, first, *TINY_OVERRIDES[family])
    for name in others:
        split_losses, split_weights = train(workplace, tiny_data, name, *TINY_OVERRIDES[family])
        # Sums in another order and convolutions over other batch sizes: float32 rounding, nothing more.
        assert split_losses == [pytest.approx(each, rel=1e-4, abs=1e-7) for each in losses], name
        for key, tensor in weights.items():
            assert ((split_weights[key] - tensor).abs() < 1e-5).all(), (name, key)
    # DDP fails if a parameter gets no gradient: in some steps there is no box, in others on one process only.
    has_boxes = epoch_order(40, 42, 0).reshape(5, 2, 4) % 10 == 0
    num_processes_with_boxes = has_boxes.any(2).sum(1)
    assert {0, 1} == set(num_processes_with_boxes.tolist())
    no_box = [each["train_loss_bbox"] == 0 for each in losses[:5]]
    assert no_box == (num_processes_with_boxes == 0).tolist()


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_rf_detr_which_has_frozen_parameters_trains_the_same_under_zero_2(workplace, tiny_data: Path) -> None:
    settings = (*TINY_OVERRIDES["rf_detr"], "training.max_steps=6")
    losses, weights = train(workplace, tiny_data, "accumulated", *settings)
    zero = {"launch_config": "deepspeed_zero2"}
    zero_losses, zero_weights = train(workplace, tiny_data, "two_processes", *settings, **zero)
    assert zero_losses == [pytest.approx(each, rel=1e-4, abs=1e-7) for each in losses]
    for key, tensor in weights.items():
        assert ((zero_weights[key] - tensor).abs() < 1e-5).all(), key


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_rt_detr_trains_the_same_in_micro_batches_of_the_same_size(workplace, tiny_data: Path) -> None:
    """Its backbone and neck have trained batch norm, whose statistics are those of a micro-batch."""
    for name, (num_processes, accumulation) in {"accumulated": (1, 2), "two_processes": (2, 1)}.items():
        finished = workplace.train(
            tiny_data,
            *TINY_RT_DETR,
            *SMALL_STEPS,
            "training.batch_size=4",
            f"training.gradient_accumulation_steps={accumulation}",
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
def test_every_split_trains_on_the_same_scales_and_windows(workplace, tiny_data: Path) -> None:
    for name in ("accumulated", "two_processes"):
        num_processes, batch_size, accumulation = SPLITS[name]
        finished = workplace.train(
            tiny_data,
            *("data.resize=square", "data.multi_scale=[32, 64, 96]", "data.augmentation=detr"),
            "data.tiles={size: 40, rare_share: 1, min_visible: 1}",
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
