"""Sources with weights, repeated images, windows of images, class weights, footage and copy-paste: the same
training for every split, and resumed.
"""

import json
from pathlib import Path

import pytest
from harness.data import write_coco
from safetensors.torch import load_file

OVERRIDES = (
    "data.repeat_rare=0.9",
    "data.augmentation=[footage, mosaic]",
    "data.copy_paste={classes: [player, ball], most: 2}",
    "data.tiles={size: 48, min_visible: 0.8}",
    "loss.class_weights={ball: 4}",
    "training.batch_size=2",
    "training.num_epochs=3",
    "training.max_steps=12",
    "model.dropout=0",
    "model.freeze_batch_norm=true",
    "checkpoint.every_steps=5",
    "evaluation.every_epochs=100",
)
LOSSES = ("train_loss", "train_loss_ce", "train_loss_bbox", "train_loss_giou")
IN_ONE = "training.gradient_accumulation_steps=2"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write two sources whose ids and file names are the same, one with few images and most of the boxes."""
    folder = tmp_path_factory.mktemp("sources")
    for seed, (name, num_images, num_boxes) in enumerate((("wide", 15, 1), ("close", 5, 4), ("val", 3, 2))):
        write_coco(
            folder / name,
            num_images=num_images,
            with_boxes=lambda i, most=num_boxes: most * (i % 3 > 0),
            mixed_sizes=True,
            seed=seed,
        )
    return folder


def train(workplace, sources: Path, output: str, *overrides: str, num_processes: int = 1) -> str:
    folders = ("--train-dir", f"{sources / 'wide'}=1", "--train-dir", f"{sources / 'close'}=2")
    common = ("train", "--config", workplace.config, *folders, "--val-dir", sources / "val")
    finished = workplace.run(
        *common, "--output-dir", output, *OVERRIDES, *overrides, num_processes=num_processes
    )
    printed = finished.stdout + finished.stderr
    assert finished.returncode == 0, printed
    return printed


@pytest.mark.dist
@pytest.mark.timeout(900)
def test_weighted_sources_and_classes_train_the_same_in_every_split_and_when_resumed(
    workplace, sources: Path
) -> None:
    dry = train(workplace, sources, "dry", IN_ONE, "--dry-run")
    assert not (workplace.folder / "dry" / "results.json").exists()
    for printed in (dry, train(workplace, sources, "complete", IN_ONE)):
        assert "close/_annotations.coco.json: 5 images, 66.7% of every epoch (16 samples)" in printed
        assert "player x 1.20, ball x 1.50; 20 images are 24 samples an epoch" in printed
        assert "6 steps an epoch" in printed
    train(workplace, sources, "two_processes", num_processes=2)
    for metric in LOSSES:
        # Sums in another order and convolutions over other batch sizes: float32 rounding, nothing more.
        assert workplace.history(metric, "two_processes") == [
            (step, pytest.approx(value, rel=1e-4, abs=1e-7))
            for step, value in workplace.history(metric, "complete")
        ]
    epoch = workplace.results("complete")["epoch"]
    assert isinstance(epoch, dict)
    assert epoch == workplace.results("two_processes")["epoch"]
    assert (epoch["steps"], epoch["samples"]) == (6, 24)
    assert [(each["images"], each["samples"]) for each in epoch["sources"]] == [(15, 8), (5, 16)]

    train(workplace, sources, "resumed", IN_ONE, "training.max_steps=5")  # in the middle of an epoch
    train(workplace, sources, "resumed", IN_ONE, "--resume", "auto")
    for metric in LOSSES:
        both = workplace.history(metric, "resumed")
        assert both[-7:] == workplace.history(metric, "complete")[-7:]
    weights, resumed = (
        load_file(workplace.folder / output / "checkpoints" / "last" / "model.safetensors")
        for output in ("complete", "resumed")
    )
    assert all(resumed[name].equal(weight) for name, weight in weights.items())

    state = json.loads((workplace.folder / "resumed" / "checkpoints" / "last" / "state.json").read_text())
    assert state["source_weights"] == [1.0, 2.0]
    folders = ("--train-dir", f"{sources / 'wide'}=1", "--train-dir", f"{sources / 'close'}=3")
    common = ("train", "--config", workplace.config, *folders, "--val-dir", sources / "val")
    refused = workplace.run(*common, "--output-dir", "resumed", *OVERRIDES, IN_ONE, "--resume", "auto")
    assert refused.returncode == 2
    assert "weights of the sources in --train-dir 1, 2 -> 1, 3" in refused.stderr
