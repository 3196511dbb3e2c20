"""What may change between two parts of a run, and restoring what was saved."""

from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import pytest
import torch

from detr_dist.config import ModelConfig, TrainingConfig, describe_keys, load_config
from detr_dist.data.sampling import StepPlan
from detr_dist.errors import CheckpointError, UsageError
from detr_dist.models.average import WeightAverage
from detr_dist.models.build import build_detector
from detr_dist.models.detector import Detector
from detr_dist.training.checkpoint import OPTIMIZER, RunFacts, open_checkpoint
from detr_dist.training.loop import Training
from detr_dist.training.optim import build_optimizer
from detr_dist.training.resume import (
    FREE_KEYS,
    FREE_SECTIONS,
    compare_with_saved,
    has_other_validation,
    keep_settings,
    restore_average,
    restore_optimizer,
    restore_weights,
)

DECIDE_WHAT_IS_LEARNED = {
    "loss.weights",
    "loss.class_weights",
    "data.repeat_rare",
    "data.copy_paste",
    "data.shortest_edge",
    "data.longest_edge",
    "data.exif",
    "data.resize",
    "data.multi_scale",
    "data.tiles",
    "data.augmentation",
    "data.augmentation_off_epochs",
    "data.group_by_shape",
    "data.canvas_multiple",
    "model.model_architecture",
    "model.backbone",
    "model.pretrained",
    "model.pretrained_backbone",
    "model.freeze_batch_norm",
    "model.num_classes",
    "model.hidden_dim",
    "model.num_encoder_layers",
    "model.num_decoder_layers",
    "model.num_queries",
    "model.dropout",
    "model.class_loss",
    "model.config_overrides",
    "training.learning_rate",
    "training.learning_rate_backbone",
    "training.learning_rate_decoder_factor",
    "training.weight_decay",
    "training.layer_decay",
    "training.gradient_clip",
    "training.mixed_precision",
    "training.tf32",
    "training.seed",
    "training.lr_schedule",
    "training.lr_flat_share",
    "training.lr_final_factor",
    "training.warmup_steps",
    "training.warmup",
    "training.sync_batch_norm",
    "training.ema_decay",
    "training.ema_warmup_steps",
}


def run(*overrides: str, num_processes: int = 1, **others: object) -> RunFacts:
    """Return the facts of a run with these settings."""
    config = load_config(None, overrides)
    settings = config.training
    plan = StepPlan(80, settings.batch_size, num_processes, settings.gradient_accumulation_steps)
    facts = RunFacts(
        config=config,
        class_names=["player", "ball"],
        num_train_images=80,
        data_sha256="0",
        num_processes=num_processes,
        global_batch_size=plan.global_batch_size,
        init_from=None,
        mlflow_run_id=None,
        versions={"torch": "2.11"},
    )
    return replace(facts, **others)


def with_another_value(facts: RunFacts, keys: set[str]) -> RunFacts:
    """Return the run with other values of these settings."""
    config = facts.config
    for key in keys:
        section, name = key.split(".")
        changed = getattr(config, section).model_copy(update={name: "another value"})
        config = config.model_copy(update={section: changed})
    return replace(facts, config=config)


def refusal(saved: RunFacts, now: RunFacts) -> str:
    with pytest.raises(UsageError) as refused:
        compare_with_saved(saved, now)
    return str(refused.value)


def saved_by_torch(content: object) -> bytes:
    buffer = BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def test_the_backbone_that_earlier_versions_had_by_default_is_kept(tmp_path: Path) -> None:
    saved = run("model.backbone=resnet50")
    now = run()
    assert now.config.model.backbone is None
    kept = keep_settings(now.config, saved, "auto", tmp_path)
    assert compare_with_saved(saved, replace(now, config=kept)) == []
    assert "model.backbone resnet18 -> unset" in refusal(
        run("model.backbone=resnet18"),
        replace(now, config=keep_settings(now.config, run(), "auto", tmp_path)),
    )


def test_a_resumed_run_keeps_its_store_unless_set_or_found_in_another(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    keys = ("logging.mlflow_tracking_uri=http://own", "logging.mlflow_experiment_name=own")
    saved = run(*keys, mlflow_run_id="1" * 32)
    for variable in ("TRACKING_URI", "EXPERIMENT_NAME", "RUN_NAME"):
        monkeypatch.setenv(f"MLFLOW_{variable}", "http://other")

    def stayed(*overrides: str, resume: str = "auto", of: RunFacts = saved) -> tuple[str, str, str | None]:
        logging = keep_settings(load_config(None, overrides), of, resume, tmp_path).logging
        return logging.mlflow_tracking_uri, logging.mlflow_experiment_name, logging.mlflow_run_name

    assert stayed() == ("http://own", "own", saved.config.logging.mlflow_run_name)
    assert stayed("logging.mlflow_tracking_uri=http://moved")[:2] == ("http://moved", "own")
    for resume in ("1" * 32, f"runs:/{'1' * 32}/checkpoints/last"):
        assert stayed(resume=resume)[:2] == ("http://other", "own")
    assert stayed(of=replace(saved, mlflow_run_id=None)) == ("http://other",) * 3  # it was not tracked
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:password@own")
    assert stayed()[0] == "http://user:password@own"  # a checkpoint holds no credentials


def test_the_same_run_has_no_changes() -> None:
    assert compare_with_saved(run(), run(mlflow_run_id="1" * 32)) == []


def test_settings_that_do_not_affect_learning_may_change_with_a_report() -> None:
    changed = compare_with_saved(
        run(),
        run(
            "data.num_workers=0",
            "training.num_epochs=5",
            "training.max_steps=100",
            "training.early_stopping_patience=3",
            "evaluation.every_epochs=1",
            "checkpoint.keep_last=2",
            "logging.mlflow=false",
            versions={"torch": "2.12", "accelerate": "1.15"},
        ),
    )
    assert changed == [
        "data.num_workers auto -> 0",
        "training.num_epochs 300 -> 5",
        "training.max_steps unset -> 100",
        "training.early_stopping_patience 0 -> 3",
        "evaluation.every_epochs 10 -> 1",
        "checkpoint.keep_last unset -> 2",
        "logging.mlflow True -> False",
        "torch 2.11 -> 2.12",
        "accelerate None -> 1.15",
    ]


def test_every_configuration_key_is_classified_for_resuming() -> None:
    keys = {key for key, _, _ in describe_keys()}
    free = {key for key in keys if key in FREE_KEYS or key.split(".")[0] in FREE_SECTIONS}
    assert keys >= FREE_KEYS
    assert keys - free == DECIDE_WHAT_IS_LEARNED
    assert len(compare_with_saved(run(), with_another_value(run(), free))) == len(free)


def test_credentials_are_no_change_and_those_of_the_environment_are_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    uri = "http://bob:s3cret@host"
    saved = run("logging.mlflow_tracking_uri=http://host", mlflow_run_id="0" * 32)
    assert compare_with_saved(saved, run(f"logging.mlflow_tracking_uri={uri}")) == []
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    resumed = keep_settings(load_config(None), saved, "auto", tmp_path)
    assert resumed.logging.mlflow_tracking_uri == uri


def test_all_incompatible_changes_are_named_in_one_error() -> None:
    now = replace(
        with_another_value(run(), DECIDE_WHAT_IS_LEARNED | {"training.num_epochs"}),
        class_names=["ball", "player"],
        num_train_images=81,
    )
    message = refusal(run(), now)
    assert "\n" not in message
    for key in DECIDE_WHAT_IS_LEARNED:
        assert f"{key} " in message
    assert message.count("-> another value") == len(DECIDE_WHAT_IS_LEARNED)
    assert "classes of the data ['player', 'ball'] -> ['ball', 'player']" in message
    assert "number of training images 80 -> 81" in message
    assert "--init-from" in message


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        ("training.seed=7", "training.seed 42 -> 7"),
        ("model.dropout=0.2", "model.dropout unset -> 0.2"),
    ],
)
def test_one_incompatible_key_is_enough(overrides: str, part: str) -> None:
    message = refusal(run(), run(overrides, "training.num_epochs=5"))
    assert part in message
    assert message.count("->") == 1


@pytest.mark.parametrize(
    ("others", "part"),
    [
        ({"class_names": ["player"]}, "classes of the data"),
        ({"num_train_images": 79}, "number of training images 80 -> 79"),
        ({"data_sha256": "1"}, "annotations of the training data"),
        ({"source_weights": (1.0, 2.5)}, "weights of the sources in --train-dir unset -> 1, 2.5"),
    ],
)
def test_other_training_data_are_refused(others: dict[str, object], part: str) -> None:
    assert part in refusal(run(), run(**others))


def test_num_processes_may_change_at_the_same_global_batch() -> None:
    saved = run("training.batch_size=4", "training.gradient_accumulation_steps=2", num_processes=1)
    now = run("training.batch_size=2", "training.gradient_accumulation_steps=1", num_processes=4)
    assert compare_with_saved(saved, now) == [
        "training.batch_size 4 -> 2",
        "training.gradient_accumulation_steps 2 -> 1",
        "number of processes 1 -> 4",
    ]


@pytest.mark.parametrize(
    ("saved", "is_other"), [("1" * 64, False), ("0" * 64, True), (None, False)], ids=["same", "other", "old"]
)
def test_other_validation_data_are_accepted_and_reported(saved: str | None, is_other: bool) -> None:
    facts = run(val_data_sha256=saved), run(val_data_sha256="1" * 64)
    assert has_other_validation(*facts) is is_other
    changes = compare_with_saved(*facts)
    assert len(changes) == is_other
    assert all("validation data" in change for change in changes)


def test_another_zero_stage_is_accepted() -> None:
    assert compare_with_saved(run(), run(zero_stage=3)) == ["ZeRO stage 0 -> 3"]


def test_another_global_batch_is_refused_and_the_fix_is_suggested() -> None:
    saved = run("training.batch_size=4", "training.gradient_accumulation_steps=2", num_processes=2)
    now = run("training.batch_size=4", "training.gradient_accumulation_steps=2", num_processes=1)
    message = refusal(saved, now)
    assert "global batch size 16 -> 8" in message
    assert "training.gradient_accumulation_steps=4 keeps it" in message
    kept = run("training.batch_size=4", "training.gradient_accumulation_steps=4", num_processes=1)
    assert compare_with_saved(saved, kept)


def test_no_accumulation_is_suggested_that_changes_the_global_batch() -> None:
    message = refusal(run("training.batch_size=4"), run("training.batch_size=3"))
    assert "global batch size 4 -> 3" in message
    assert "keeps it" not in message


def test_weights_and_average_are_restored(
    checkpoint: Path, training: Training, detector: Detector, tiny_model: ModelConfig
) -> None:
    torch.manual_seed(1)
    other = build_detector(tiny_model, detector.class_names)
    average = WeightAverage(other, decay=0.9)
    restore_weights(open_checkpoint(checkpoint), other)
    restore_average(open_checkpoint(checkpoint), average)
    for restored, saved in ((other, detector), (average.detector, training.average.detector)):
        torch.testing.assert_close(restored.state_dict(), saved.state_dict(), rtol=0, atol=0)
    assert not torch.equal(next(other.parameters()), next(average.detector.parameters()))


def test_a_restored_optimizer_gives_the_same_next_step(
    checkpoint: Path, training: Training, detector: Detector, tiny_model: ModelConfig
) -> None:
    other = build_detector(tiny_model, detector.class_names)
    restore_weights(open_checkpoint(checkpoint), other)
    optimizer = build_optimizer(other, TrainingConfig(learning_rate=0.5))
    assert restore_optimizer(open_checkpoint(checkpoint), optimizer, scaler=None) == 1
    assert optimizer.param_groups[0]["lr"] == 0.5  # the options are the configuration's
    for group, of_training in zip(optimizer.param_groups, training.optimizer.param_groups, strict=True):
        group["lr"] = of_training["lr"]
    for parameter in (*detector.parameters(), *other.parameters()):
        parameter.grad = torch.full_like(parameter, -0.5)
    optimizer.step()
    training.optimizer.step()
    torch.testing.assert_close(other.state_dict(), detector.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("mixed_precision", ["no", "fp16"])
def test_a_restored_optimizer_never_waits_for_the_gpu(
    checkpoint: Path, detector: Detector, on_fake_gpu: Callable, mixed_precision: str
) -> None:
    with on_fake_gpu(detector):
        optimizer = build_optimizer(detector, TrainingConfig(mixed_precision=mixed_precision))
        restore_optimizer(open_checkpoint(checkpoint), optimizer, scaler=None)
        for parameter in detector.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()  # a fake tensor cannot tell its value: whoever asks for one fails
        assert {value.device.type for of in optimizer.state.values() for value in of.values()} == {"cuda"}


def test_the_loss_scale_is_restored(checkpoint: Path, rewrite: Callable, detector: Detector) -> None:
    grown = torch.amp.GradScaler("cpu", init_scale=1024.0)
    content = open_checkpoint(checkpoint).optimizer() | {"scaler": grown.state_dict()}
    rewrite(checkpoint, OPTIMIZER, saved_by_torch(content))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    restore_optimizer(open_checkpoint(checkpoint), build_optimizer(detector, TrainingConfig()), scaler)
    assert scaler.get_scale() == 1024.0


def test_the_weights_of_another_network_are_refused(checkpoint: Path, tiny_model: ModelConfig) -> None:
    wider = build_detector(tiny_model.model_copy(update={"num_queries": 9}), ["player", "ball"])
    with pytest.raises(CheckpointError, match=f"{checkpoint}: its weights do not fit the network"):
        restore_weights(open_checkpoint(checkpoint), wider)
    with pytest.raises(CheckpointError, match=f"{checkpoint}: its weights do not fit the network"):
        restore_average(open_checkpoint(checkpoint), WeightAverage(wider, decay=0.9))


@pytest.mark.parametrize(
    "content",
    [
        {"optimizer": 7, "scheduler": {"last_epoch": 1}, "scaler": None},
        {"optimizer": {}, "scheduler": {}, "scaler": None},
        {"optimizer": {}, "scheduler": {"last_epoch": "soon"}, "scaler": None},
    ],
)
def test_an_optimizer_state_of_another_kind_is_refused(
    content: dict[str, object], checkpoint: Path, rewrite: Callable, detector: Detector
) -> None:
    rewrite(checkpoint, OPTIMIZER, saved_by_torch(content))
    optimizer = build_optimizer(detector, TrainingConfig())
    with pytest.raises(CheckpointError, match=f"{checkpoint}: its optimizer state does not fit"):
        restore_optimizer(open_checkpoint(checkpoint), optimizer, scaler=None)
