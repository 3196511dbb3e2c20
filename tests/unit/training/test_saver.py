"""Checkpoints and models are written, pruned and uploaded in the background."""

import errno
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from detr_dist.errors import TrainingError
from detr_dist.training.callback import Callback, Callbacks, CheckpointEvent
from detr_dist.training.checkpoint import Snapshot, newest_checkpoint, open_checkpoint
from detr_dist.training.saver import ModelCard, Saver

BEST = ModelCard(epoch=1, step=4, is_best=True, metrics={"val_map": 0.5}, thresholds={})

SnapshotAt = Callable[..., Snapshot]
NewSaver = Callable[..., Saver]


class Tracker:
    """Stand-in for a tracker whose uploads take time."""

    def __init__(self, upload: Callable[[Path, str], None]) -> None:
        self._upload = upload

    def log_folder(self, folder: Path, artifact_path: str, *, last: str) -> None:
        assert last == "manifest.json"
        self._upload(folder, artifact_path)

    def keep_newest(self, parent: str, newest: int, keep: int) -> None:
        self._upload(Path(f"keep {keep}"), f"{parent} up to {newest}")


def not_expected(*_: object) -> None:
    pytest.fail("no model is due")


@pytest.fixture
def new_saver(tmp_path: Path) -> Iterator[NewSaver]:
    savers = []

    def make(
        *,
        keep_last: int | None = None,
        upload: Callable[[Path, str], None] | None = None,
        pack_model: Callable[[Mapping[str, Tensor], ModelCard], None] = not_expected,
        callback: Callback | None = None,
    ) -> Saver:
        tracker = None if upload is None else Tracker(upload)
        callbacks = Callbacks([] if callback is None else [callback])
        savers.append(
            Saver(tmp_path, keep_last=keep_last, tracker=tracker, pack_model=pack_model, callbacks=callbacks)
        )
        return savers[-1]

    yield make
    for saver in savers:
        saver.close()


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_only_the_newest_numbered_and_all_named_checkpoints_are_kept(
    new_saver: NewSaver, snapshot_at: SnapshotAt, tmp_path: Path
) -> None:
    for name in ("epoch_final", "my_epoch_1", "step_"):
        (tmp_path / name).mkdir()
    saver = new_saver(keep_last=2)
    for step, names in (
        (5, ["step_5", "last"]),
        (10, ["epoch_1", "best", "last"]),
        (15, ["step_15", "last"]),
        (20, ["epoch_2", "last"]),
    ):
        saver.save(lambda step=step: snapshot_at(step), names)
    saver.finish()
    steps = {"step_15": 15, "epoch_2": 20, "best": 10, "last": 20}
    assert names_in(tmp_path) == {*steps, "epoch_final", "my_epoch_1", "step_"}
    assert {name: open_checkpoint(tmp_path / name).state.step for name in steps} == steps


def test_the_newest_checkpoint_stays_if_only_one_is_kept(
    new_saver: NewSaver, snapshot_at: SnapshotAt, tmp_path: Path
) -> None:
    saver = new_saver(keep_last=1)
    for step in (9, 10, 11):  # by name the last would be the first
        saver.save(lambda step=step: snapshot_at(step), [f"step_{step}"])
        saver.wait()
        assert names_in(tmp_path) == {f"step_{step}"}


def test_damaged_checkpoints_do_not_count_as_the_newest(
    new_saver: NewSaver, snapshot_at: SnapshotAt, tmp_path: Path
) -> None:
    saver = new_saver(keep_last=2)
    for step in (1, 2):
        saver.save(lambda step=step: snapshot_at(step), [f"step_{step}"])
    saver.wait()
    for step in (1, 2):
        (tmp_path / f"step_{step}" / "state.json").write_bytes(b"")
    saver.save(lambda: snapshot_at(3), ["step_3"])
    saver.finish()
    assert open_checkpoint(tmp_path / "step_3").state.step == 3


def test_without_a_limit_all_checkpoints_are_kept(
    new_saver: NewSaver, snapshot_at: SnapshotAt, tmp_path: Path
) -> None:
    saver = new_saver(keep_last=None)
    for step in (1, 2, 3):
        saver.save(lambda step=step: snapshot_at(step), [f"step_{step}", "last"])
    saver.finish()
    assert names_in(tmp_path) == {"step_1", "step_2", "step_3", "last"}


def test_a_copied_output_folder_is_also_pruned_by_step(
    new_saver: NewSaver, snapshot_at: SnapshotAt, tmp_path: Path
) -> None:
    saver = new_saver()
    for step in (10, 9):  # as `cp -r` orders them
        saver.save(lambda step=step: snapshot_at(step), [f"step_{step}"])
    saver.finish()
    saver = new_saver(keep_last=2)
    saver.save(lambda: snapshot_at(11), ["step_11"])
    saver.finish()
    assert names_in(tmp_path) == {"step_10", "step_11"}


def test_a_full_disk_is_one_warning_and_the_next_checkpoint_is_written(
    new_saver: NewSaver,
    snapshot_at: SnapshotAt,
    tmp_path: Path,
    messages: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    saver = new_saver(keep_last=1)
    saver.save(lambda: snapshot_at(1), ["epoch_1", "last"])
    saver.finish()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full_disk)  # the weights are written by then
        saver.save(lambda: snapshot_at(2), ["epoch_2", "last"])
        with pytest.raises(TrainingError, match="the checkpoint of step 2 could not be written"):
            saver.finish()
    (warning,) = messages
    assert warning.startswith(f"{tmp_path / 'epoch_2'}, {tmp_path / 'last'}: ")
    assert "\n" not in warning
    assert "(No space left on device; " in warning
    assert "MiB free" in warning
    assert names_in(tmp_path) == {"epoch_1", "last"}
    newest = newest_checkpoint(tmp_path)
    assert newest is not None
    assert newest.state.step == 1
    saver.save(lambda: snapshot_at(3), ["epoch_3", "last"])
    saver.finish()
    assert {open_checkpoint(path).state.step for path in tmp_path.iterdir()} == {3}
    assert messages == [warning]


def test_an_old_checkpoint_that_cannot_be_deleted_is_only_a_warning(
    new_saver: NewSaver, snapshot_at: SnapshotAt, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(folder: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    uploaded: list[str] = []
    saver = new_saver(keep_last=1, upload=lambda folder, name: uploaded.append(f"{folder.name}: {name}"))
    monkeypatch.setattr("detr_dist.training.saver.remove_folder", refuse)
    for step in (1, 2):
        saver.save(lambda step=step: snapshot_at(step), [f"epoch_{step}"])
    saver.finish()
    assert uploaded == [
        "epoch_1: checkpoints/epoch_1",
        "keep 1: checkpoints up to 1",
        "epoch_2: checkpoints/epoch_2",
        "keep 1: checkpoints up to 2",
    ]


def test_a_checkpoint_that_failed_to_write_is_not_uploaded(
    new_saver: NewSaver, snapshot_at: SnapshotAt, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploaded: list[str] = []
    saver = new_saver(upload=lambda folder, name: uploaded.append(name))
    monkeypatch.setattr(torch, "save", full_disk)
    saver.save(lambda: snapshot_at(1), ["last"])
    saver.wait()
    assert uploaded == []


def test_a_failed_copy_raises_at_once_and_corrupts_nothing(
    new_saver: NewSaver, snapshot_at: SnapshotAt, tmp_path: Path
) -> None:
    saver = new_saver()
    saver.save(lambda: snapshot_at(1), ["last"])
    with pytest.raises(ZeroDivisionError):
        saver.save(lambda: 1 / 0, ["last"])
    saver.finish()
    assert open_checkpoint(tmp_path / "last").state.step == 1


def test_a_failed_upload_is_only_a_warning(
    new_saver: NewSaver, snapshot_at: SnapshotAt, tmp_path: Path, messages: list[str]
) -> None:
    def refuse(folder: Path, name: str) -> None:
        raise OSError("the disk\nis away")

    saver = new_saver(upload=refuse)
    saver.save(lambda: snapshot_at(1), ["epoch_1", "last"])
    saver.finish()
    (warning,) = messages
    assert warning.startswith(f"{tmp_path / 'epoch_1'}, {tmp_path / 'last'}: not uploaded (")
    assert "the disk is away" in warning
    assert open_checkpoint(tmp_path / "last").state.step == 1


def test_checkpoints_are_uploaded_in_order_and_a_lone_last_as_a_copy_first(
    new_saver: NewSaver, snapshot_at: SnapshotAt
) -> None:
    uploaded: list[tuple[str, int, str]] = []

    def upload(folder: Path, name: str) -> None:
        uploaded.append((folder.name, open_checkpoint(folder).state.step, name))

    saver = new_saver(upload=upload)
    saver.save(lambda: snapshot_at(1), ["epoch_1", "best", "last"])
    saver.save(lambda: snapshot_at(2), ["last"])
    saver.finish()
    assert uploaded == [
        ("epoch_1", 1, "checkpoints/epoch_1"),
        ("best", 1, "checkpoints/best"),
        ("last", 1, "checkpoints/last"),
        ("last", 2, "checkpoints/last_copy"),
        ("last", 2, "checkpoints/last"),
    ]


def test_a_save_runs_in_the_background_and_the_next_one_waits_for_it(
    new_saver: NewSaver, snapshot_at: SnapshotAt
) -> None:
    events: list[str] = []
    may_end = threading.Event()

    def upload(folder: Path, name: str) -> None:
        may_end.wait(30)
        events.append("uploaded")

    def copy() -> Snapshot:
        events.append("copied")
        return snapshot_at(1)

    saver = new_saver(upload=upload)
    saver.save(copy, ["epoch_1"])
    assert events == ["copied"]
    timer = threading.Timer(0.2, may_end.set)  # time enough for a second copy, if it did not wait
    timer.start()
    saver.save(copy, ["epoch_2"])
    saver.finish()
    timer.join()
    assert events == ["copied", "uploaded", "copied", "uploaded"]


def test_a_model_is_packed_from_averaged_weights_before_its_checkpoint(
    new_saver: NewSaver, snapshot_at: SnapshotAt, tmp_path: Path
) -> None:
    snapshot, packed = snapshot_at(1), []

    def pack(weights: Mapping[str, Tensor], card: ModelCard) -> None:
        packed.append((weights is snapshot.average, card, names_in(tmp_path)))

    saver = new_saver(pack_model=pack)
    saver.save(lambda: snapshot, ["epoch_1"], BEST)
    saver.save_model(lambda: snapshot.average, BEST)
    saver.finish()
    assert packed == [(True, BEST, set()), (True, BEST, {"epoch_1"})]


def test_a_failed_model_packing_is_a_warning_but_an_error_for_the_best(
    new_saver: NewSaver, snapshot_at: SnapshotAt, tmp_path: Path, messages: list[str]
) -> None:
    saver = new_saver(pack_model=full_disk)
    saver.save(lambda: snapshot_at(1), ["last"], replace(BEST, is_best=False))
    saver.finish()
    (warning,) = messages
    assert warning.startswith(f"{tmp_path.parent}: the model of step 4 could not be saved (")
    assert open_checkpoint(tmp_path / "last").state.step == 1
    saver.save_model(lambda: snapshot_at(2).model, BEST)
    with pytest.raises(TrainingError, match="the model of step 4 could not be saved"):
        saver.finish()


def test_a_new_saver_completes_an_operation_that_a_kill_interrupted(
    new_saver: NewSaver, snapshot_at: SnapshotAt, tmp_path: Path
) -> None:
    saver = new_saver()
    saver.save(lambda: snapshot_at(1), ["last"])
    saver.finish()
    (tmp_path / "last").rename(tmp_path / ".last.replaced")
    (tmp_path / ".step_1.partial").mkdir()
    new_saver()
    assert names_in(tmp_path) == {"last"}
    assert open_checkpoint(tmp_path / "last").state.step == 1


class Slow(Callback):
    """Callback that takes until it is released."""

    def __init__(self) -> None:
        self.begun, self.released = threading.Event(), threading.Event()
        self.steps: list[int] = []

    def on_checkpoint(self, event: CheckpointEvent) -> None:
        self.begun.set()
        assert self.released.wait(60)
        self.steps.append(event.step)


def test_a_save_does_not_wait_for_a_callback_but_a_finished_run_does(
    new_saver: NewSaver, snapshot_at: SnapshotAt, tmp_path: Path
) -> None:
    slow = Slow()
    saver = new_saver(callback=slow)
    saver.save(lambda: snapshot_at(1), ["step_1", "last"])
    assert slow.begun.wait(60)
    saver.save(lambda: snapshot_at(2), ["step_2", "last"])
    saver.finish()
    assert open_checkpoint(tmp_path / "last").state.step == 2
    assert slow.steps == []
    threading.Timer(0.1, slow.released.set).start()
    saver.close()
    assert slow.steps == [1, 2]


def test_a_failed_run_does_not_wait_for_a_callback(new_saver: NewSaver, snapshot_at: SnapshotAt) -> None:
    slow = Slow()
    saver = new_saver(callback=slow)
    for step in (1, 2):
        saver.save(lambda step=step: snapshot_at(step), [f"step_{step}"])
    assert slow.begun.wait(60)
    saver.close()
    assert slow.steps == []
    slow.released.set()
    saver._callback_thread.shutdown()
    assert slow.steps == [1], "the one that had not begun is cancelled"
