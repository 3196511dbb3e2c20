"""A checkpoint shows whether it is complete, and nothing in it is ever executed."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import pytest
import torch

from detr_dist.config import override_config
from detr_dist.errors import CheckpointError, DetrDistError, UsageError
from detr_dist.models.average import WeightAverage
from detr_dist.models.build import build_detector
from detr_dist.models.detector import Detector
from detr_dist.training.checkpoint import (
    AVERAGE,
    MANIFEST,
    NETWORK,
    OPTIMIZER,
    STATE,
    STRUCTURE,
    RunFacts,
    Snapshot,
    copy_model,
    newest_checkpoint,
    open_checkpoint,
    take_snapshot,
    write_checkpoint,
)
from detr_dist.training.loop import Training, TrainState
from detr_dist.training.resume import compare_with_saved, keep_settings

LISTED = (NETWORK, AVERAGE, OPTIMIZER, STRUCTURE, STATE)

SnapshotAt = Callable[..., Snapshot]
Rewrite = Callable[[Path, str, bytes], None]


class Trap:
    """Object that creates a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.folder),)


def saved_by_torch(content: object, *, zipped: bool) -> bytes:
    buffer = BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


TRAPS = {
    "plain pickle, protocol 2": lambda trap: pickle.dumps(trap, protocol=2),
    "plain pickle, protocol 4": lambda trap: pickle.dumps(trap, protocol=4),
    "plain pickle within the right keys": lambda trap: pickle.dumps(among_the_right_keys(trap), protocol=2),
    "torch.save": lambda trap: saved_by_torch(trap, zipped=True),
    "torch.save within the right keys": lambda trap: saved_by_torch(among_the_right_keys(trap), zipped=True),
    "torch.save as of old": lambda trap: saved_by_torch(trap, zipped=False),
}


def among_the_right_keys(trap: Trap) -> dict[str, object]:
    return {"optimizer": {}, "scheduler": {"last_epoch": 1, "more": trap}, "scaler": None}


def flip_a_byte(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_a_checkpoint_restores_what_was_saved(
    training: Training, detector: Detector, facts: RunFacts, tmp_path: Path
) -> None:
    state = TrainState(
        13, 10, best_map=0.25, best_step=10, evaluations_since_best=1, metrics={"val_map": 0.2}
    )
    write_checkpoint(tmp_path, ["epoch_1", "last"], take_snapshot(training, detector, state, facts))
    for name in ("epoch_1", "last"):
        opened = open_checkpoint(tmp_path / name)
        assert (opened.state, opened.facts) == (state, facts)
        torch.testing.assert_close(opened.network(), dict(detector.network.state_dict()), rtol=0, atol=0)
        averaged = training.average.detector.network.state_dict()
        torch.testing.assert_close(opened.average(), dict(averaged), rtol=0, atol=0)
        optimizer = opened.optimizer()
        assert optimizer["optimizer"]
        torch.testing.assert_close(
            optimizer["optimizer"], training.optimizer.state_dict()["state"], rtol=0, atol=0
        )
        assert optimizer["scheduler"]["last_epoch"] == 1
    assert {path.name for path in (tmp_path / "last").iterdir()} == {*LISTED, MANIFEST}
    document = json.loads((tmp_path / "last" / STATE).read_text())
    assert (document["epoch"], document["samples_seen"]) == (1.3, 52)


def test_without_an_average_a_checkpoint_stores_none(
    training: Training, detector: Detector, facts: RunFacts, tmp_path: Path
) -> None:
    without = replace(training, average=WeightAverage(detector, decay=0.0))
    write_checkpoint(tmp_path, ["last"], take_snapshot(without, detector, TrainState(), facts))
    opened = open_checkpoint(tmp_path / "last")
    assert opened.average() is None
    assert not (opened.folder / AVERAGE).exists()


@pytest.mark.parametrize("decay", [0.9, 0.0])
def test_a_copy_of_the_model_alone_equals_the_model_of_a_snapshot(
    training: Training, detector: Detector, facts: RunFacts, decay: float
) -> None:
    training = replace(training, average=WeightAverage(detector, decay))
    training.optimizer.step()
    alone = copy_model(training)
    model = take_snapshot(training, detector, TrainState(), facts).model
    torch.testing.assert_close(alone, model, rtol=0, atol=0)
    training.optimizer.step()
    training.average.update(1)
    torch.testing.assert_close(alone, model, rtol=0, atol=0)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(alone, copy_model(training), rtol=0, atol=0)


def test_training_after_the_snapshot_does_not_change_it(snapshot_at: SnapshotAt, training: Training) -> None:
    snapshot, same = snapshot_at(1), snapshot_at(1)
    training.optimizer.step()
    training.average.update(1)
    for part in ("network", "average", "optimizer"):
        torch.testing.assert_close(getattr(snapshot, part), getattr(same, part), rtol=0, atol=0)
        with pytest.raises(AssertionError):
            torch.testing.assert_close(getattr(snapshot, part), getattr(snapshot_at(1), part), rtol=0, atol=0)


@pytest.mark.parametrize("name", LISTED)
@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
def test_one_flipped_byte_is_refused_with_its_file(name: str, place: float, checkpoint: Path) -> None:
    path = checkpoint / name
    flip_a_byte(path, int(place * (path.stat().st_size - 1)))
    with pytest.raises(CheckpointError) as refused:
        open_checkpoint(checkpoint)
    assert str(path) in str(refused.value)


def test_one_flipped_byte_anywhere_in_the_manifest_is_refused(checkpoint: Path) -> None:
    path = checkpoint / MANIFEST
    for position in range(0, path.stat().st_size, 3):
        flip_a_byte(path, position)
        with pytest.raises(CheckpointError, match=str(checkpoint)):
            open_checkpoint(checkpoint)
        flip_a_byte(path, position)
    open_checkpoint(checkpoint)


@pytest.mark.parametrize("name", [*LISTED, MANIFEST])
def test_a_file_that_is_missing_or_cut_short_is_named(name: str, checkpoint: Path) -> None:
    path = checkpoint / name
    content = path.read_bytes()
    # A manifest without its last line end is complete.
    for length in (len(content) - 2, len(content) // 2, 0):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=str(path)):
            open_checkpoint(checkpoint)
    path.unlink()
    with pytest.raises(CheckpointError, match=f"{path}: No such file"):
        open_checkpoint(checkpoint)


def test_a_missing_folder_is_not_complete(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=str(tmp_path / "nowhere")):
        open_checkpoint(tmp_path / "nowhere")


@pytest.mark.parametrize("other", ["../outside", "more.bin", "sub/model.safetensors"])
def test_a_manifest_that_lists_other_files_is_refused(other: str, checkpoint: Path, rewrite: Rewrite) -> None:
    (checkpoint / "sub").mkdir()
    rewrite(checkpoint, other, b"text")
    with pytest.raises(CheckpointError, match=f"{checkpoint / MANIFEST}: does not list the files"):
        open_checkpoint(checkpoint)


@pytest.mark.parametrize("name", [NETWORK, OPTIMIZER, STRUCTURE, STATE])
def test_a_manifest_that_omits_a_file_is_refused(name: str, checkpoint: Path) -> None:
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    del manifest[name]
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=f"{checkpoint / MANIFEST}: does not list the files"):
        open_checkpoint(checkpoint)


@pytest.mark.parametrize("content", ["[]", "7", "null", '"text"', "{}"])
def test_an_invalid_manifest_is_refused(content: str, checkpoint: Path) -> None:
    (checkpoint / MANIFEST).write_text(content)
    with pytest.raises(CheckpointError, match=str(checkpoint / MANIFEST)):
        open_checkpoint(checkpoint)


def test_an_unknown_state_is_refused_by_its_key(checkpoint: Path, rewrite: Rewrite) -> None:
    document = json.loads((checkpoint / STATE).read_text()) | {"step": "many"}
    rewrite(checkpoint, STATE, json.dumps(document).encode())
    with pytest.raises(CheckpointError, match=f"{checkpoint / STATE}: step not as this version writes it"):
        open_checkpoint(checkpoint)


def test_a_run_older_than_shape_grouping_continues_without_grouping(
    checkpoint: Path, rewrite: Rewrite, facts: RunFacts
) -> None:
    state = json.loads((checkpoint / STATE).read_text())
    assert state["config"]["data"].pop("group_by_shape") is True
    rewrite(checkpoint, STATE, json.dumps(state).encode())
    with pytest.raises(UsageError, match=r"data\.group_by_shape False -> True\. Set it as it was to resume"):
        compare_with_saved(open_checkpoint(checkpoint).facts, facts)


def test_a_run_older_than_canvas_rounding_continues_without_rounding(
    checkpoint: Path, rewrite: Rewrite, facts: RunFacts
) -> None:
    state = json.loads((checkpoint / STATE).read_text())
    del state["config"]["data"]["canvas_multiple"], state["config"]["training"]["tf32"]
    rewrite(checkpoint, STATE, json.dumps(state).encode())
    saved = open_checkpoint(checkpoint).facts
    unchanged = replace(facts, config=keep_settings(facts.config, saved, "auto", checkpoint))
    assert unchanged.config.data.canvas_multiple == 1
    assert compare_with_saved(saved, unchanged) == []
    named = override_config(facts.config, ["data.canvas_multiple=32"])
    with pytest.raises(UsageError, match=r"data\.canvas_multiple 1 -> 32\. Set it as it was to resume"):
        compare_with_saved(saved, replace(facts, config=keep_settings(named, saved, "auto", checkpoint)))


def test_a_run_older_than_exif_rotations_resumes_with_the_default_or_without_rotations(
    checkpoint: Path, rewrite: Rewrite, facts: RunFacts
) -> None:
    of_now = open_checkpoint(checkpoint).facts
    state = json.loads((checkpoint / STATE).read_text())
    assert state["config"]["data"].pop("exif") == "auto"
    rewrite(checkpoint, STATE, json.dumps(state).encode())
    saved = open_checkpoint(checkpoint).facts
    assert compare_with_saved(saved, facts) == []
    as_before = replace(facts, config=override_config(facts.config, ["data.exif=ignore"]))
    assert compare_with_saved(saved, as_before) == []
    with pytest.raises(UsageError, match=r"data\.exif auto -> ignore"):
        compare_with_saved(of_now, as_before)
    changed = replace(facts, config=override_config(facts.config, ["data.exif=apply"]))
    with pytest.raises(UsageError, match=r"data\.exif auto -> apply\. Set it as it was to resume"):
        compare_with_saved(saved, changed)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol 4")
@pytest.mark.parametrize("kind", TRAPS)
def test_an_optimizer_file_that_would_run_code_is_refused_and_runs_nothing(
    kind: str, checkpoint: Path, rewrite: Rewrite, tmp_path: Path
) -> None:
    sprung = tmp_path / "sprung"
    rewrite(checkpoint, OPTIMIZER, TRAPS[kind](Trap(sprung)))
    opened = open_checkpoint(checkpoint)
    with pytest.raises(CheckpointError, match=f"{checkpoint / OPTIMIZER}: holds something else than tensors"):
        opened.optimizer()
    assert not sprung.exists()


@pytest.mark.parametrize("kind", TRAPS)
def test_the_malicious_files_of_these_tests_do_run_code(kind: str, tmp_path: Path) -> None:
    content, sprung = TRAPS[kind](Trap(tmp_path / "sprung")), tmp_path / "sprung"
    if kind.startswith("torch.save"):
        torch.load(BytesIO(content), weights_only=False)
    else:
        pickle.loads(content)
    assert sprung.exists()


@pytest.mark.parametrize(("name", "read"), [(NETWORK, "network"), (AVERAGE, "average")])
@pytest.mark.parametrize("kind", TRAPS)
def test_pickled_weights_are_refused_and_run_nothing(
    name: str, read: str, kind: str, checkpoint: Path, rewrite: Rewrite, tmp_path: Path
) -> None:
    rewrite(checkpoint, name, TRAPS[kind](Trap(tmp_path / "sprung")))
    opened = open_checkpoint(checkpoint)
    with pytest.raises(CheckpointError, match=f"{checkpoint / name}: no safetensors file"):
        getattr(opened, read)()
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("content", [{"optimizer": {}}, [1, 2], torch.zeros(2), {}])
def test_an_optimizer_file_without_its_three_parts_is_refused(
    content: object, checkpoint: Path, rewrite: Rewrite
) -> None:
    rewrite(checkpoint, OPTIMIZER, saved_by_torch(content, zipped=True))
    with pytest.raises(CheckpointError, match=f"{checkpoint / OPTIMIZER}: does not hold optimizer"):
        open_checkpoint(checkpoint).optimizer()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x03\x04",
        b"junk" * 100,
        b"\x80\x02.",
    ],
)
def test_an_invalid_optimizer_file_is_refused(content: bytes, checkpoint: Path, rewrite: Rewrite) -> None:
    rewrite(checkpoint, OPTIMIZER, content)
    with pytest.raises(CheckpointError, match=str(checkpoint / OPTIMIZER)):
        open_checkpoint(checkpoint).optimizer()


def test_unclosed_nested_brackets_are_refused_as_a_state(checkpoint: Path, rewrite: Rewrite) -> None:
    rewrite(checkpoint, STATE, b"[" * 100_000)
    with pytest.raises(CheckpointError, match=str(checkpoint / STATE)):
        open_checkpoint(checkpoint)


def test_a_structure_with_custom_code_is_refused_without_a_prompt(
    facts: RunFacts, checkpoint: Path, rewrite: Rewrite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda prompt: pytest.fail(f"asked: {prompt}"))
    (checkpoint / "theirs.py").write_text("raise RuntimeError('this was run')")
    structure = {"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.TheirConfig"}}
    rewrite(checkpoint, STRUCTURE, json.dumps(structure).encode())
    opened = open_checkpoint(checkpoint)
    with pytest.raises(DetrDistError, match=str(checkpoint)):
        build_detector(facts.config.model, facts.class_names, structure=opened.folder)


def test_the_newest_checkpoint_has_the_last_step_then_a_closed_epoch(
    snapshot_at: SnapshotAt, tmp_path: Path
) -> None:
    for name, step, closed_step in (
        ("later_at_20", 20, 20),
        ("best", 10, 10),
        ("at_20", 20, 10),
        ("last", 15, 10),
    ):
        write_checkpoint(tmp_path, [name], snapshot_at(step, closed_step=closed_step))
    (tmp_path / "notes.txt").write_text("no folder")
    write_checkpoint(tmp_path, [".last.partial"], snapshot_at(30))  # what a kill may leave
    newest = newest_checkpoint(tmp_path)
    assert newest is not None
    assert newest.folder == tmp_path / "later_at_20"
    assert newest.age == (20, 20)


def test_incomplete_checkpoints_are_named_and_skipped(
    snapshot_at: SnapshotAt, tmp_path: Path, messages: list[str]
) -> None:
    for step in (1, 2, 3, 4):
        write_checkpoint(tmp_path, [f"step_{step}"], snapshot_at(step))
    flip_a_byte(tmp_path / "step_4" / OPTIMIZER, 100)
    (tmp_path / "step_3" / NETWORK).unlink()
    shutil.rmtree(tmp_path / "step_1")
    (tmp_path / "step_1").mkdir()
    newest = newest_checkpoint(tmp_path)
    assert newest is not None
    assert newest.folder == tmp_path / "step_2"
    assert [
        str(tmp_path / name) in line
        for name, line in zip(("step_1", "step_4", "step_3"), messages, strict=True)
    ]
    assert str(tmp_path / "step_4" / OPTIMIZER) in messages[1]
    assert str(tmp_path / "step_3" / NETWORK) in messages[2]


def test_without_a_complete_checkpoint_none_is_found(
    snapshot_at: SnapshotAt, tmp_path: Path, messages: list[str]
) -> None:
    assert newest_checkpoint(tmp_path / "not_there_yet") is None
    assert newest_checkpoint(tmp_path) is None
    write_checkpoint(tmp_path, ["last"], snapshot_at(1))
    (tmp_path / "last" / MANIFEST).unlink()
    assert newest_checkpoint(tmp_path) is None
    assert len(messages) == 1
    assert str(tmp_path / "last" / MANIFEST) in messages[0]
