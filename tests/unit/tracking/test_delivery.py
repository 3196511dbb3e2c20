"""The records of an outbox reach a real MLflow store once, whatever happens in between."""

import itertools
import math
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness.outbox import Sender
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import PERMISSION_DENIED

from detr_dist.tracking import delivery as delivery_module
from detr_dist.tracking.delivery import DeliveryThread
from detr_dist.tracking.outbox import Outbox, OutboxReader
from detr_dist.tracking.store import patience


@pytest.fixture
def new_folder(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that makes a folder of files, each with its name and `content` in it."""
    numbers = itertools.count()

    def make(*names: str, content: str = "") -> Path:
        folder = tmp_path / f"source_{next(numbers)}"
        for name in names:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(name + content)
        return folder

    return make


class Away(MlflowClient):
    """Server that loses the connection during the first `num_times` batches, or before it receives them."""

    def __init__(self, uri: str, *, num_times: int, applies: bool) -> None:
        super().__init__(uri)
        self.num_times = num_times
        self.applies = applies

    def log_batch(self, *arguments: Any, **keywords: Any) -> None:
        is_away = self.num_times > 0
        self.num_times -= 1
        if self.applies or not is_away:
            super().log_batch(*arguments, **keywords)
        if is_away:
            raise ConnectionError("the connection\nis gone")


def test_everything_is_delivered_once(sender: Sender) -> None:
    sender.outbox.append("params", values={"learning_rate": "0.1"})
    for step in (1, 2, 3):
        sender.log(step, loss=step / 10, rate=1.0)
    sender.outbox.append("tags", values={"note": "first"})
    sender.outbox.append("tags", values={"note": "second"})
    sender.deliver()
    for step in (4, 5):
        sender.log(step, loss=step / 10)
    sender.deliver()
    sender.deliver()
    assert sender.history("loss") == [(step, step / 10) for step in range(1, 6)]
    assert sender.history("rate") == [(step, 1.0) for step in range(1, 4)]
    assert sender.run.data.params == {"learning_rate": "0.1"}
    assert sender.run.data.tags["note"] == "second"
    assert sender.messages == []


@pytest.mark.parametrize("remaining", ["nothing", "an older one"])
def test_without_its_newest_cursors_nothing_is_logged_twice(sender: Sender, remaining: str) -> None:
    sender.outbox.append("params", values={"learning_rate": "0.1"})
    for step in (1, 2, 3):
        sender.log(step, loss=step / 10)
    sender.deliver()
    older = sender.cursors_path.read_text()
    for step in (4, 5, 6):
        sender.log(step, loss=step / 10, rate=1.0)
    sender.deliver()
    if remaining == "nothing":
        sender.cursors_path.unlink()
    else:
        sender.cursors_path.write_text(older)
    sender.log(7, loss=0.7)
    sender.deliver()
    assert sender.history("loss") == [(step, step / 10) for step in range(1, 8)]
    assert sender.history("rate") == [(step, 1.0) for step in (4, 5, 6)]
    assert sender.run.data.params == {"learning_rate": "0.1"}
    assert sender.messages == []


def test_unreadable_cursors_are_treated_as_missing(sender: Sender) -> None:
    sender.log(1, loss=0.1)
    sender.deliver()
    sender.cursors_path.write_text("")
    sender.log(2, loss=0.2)
    sender.deliver()
    assert sender.history("loss") == [(1, 0.1), (2, 0.2)]


def test_records_after_those_lost_in_a_power_cut_are_delivered(sender: Sender) -> None:
    sender.log(1, loss=0.1)
    records_path = sender.outbox.folder / "records.jsonl"
    content = records_path.read_bytes()
    for step in (2, 3):
        sender.log(step, loss=step / 10)
    sender.deliver()
    sender.outbox.close()
    records_path.write_bytes(content)
    sender.outbox = Outbox(sender.outbox.folder, OutboxReader(sender.outbox.folder).address)
    sender.log(4, loss=0.4)
    sender.deliver()
    assert sender.history("loss") == [(step, step / 10) for step in (1, 2, 3, 4)]


@pytest.mark.parametrize("applies", [True, False])
def test_a_batch_with_a_lost_answer_is_logged_once_and_a_lost_one_resent(
    sender: Sender, applies: bool
) -> None:
    client = Away(sender.client.tracking_uri, num_times=0, applies=applies)
    delivery = sender.delivery(client)
    sender.log(1, loss=0.1)
    delivery.work()
    client.num_times = 1
    sender.outbox.append("params", values={"learning_rate": "0.1"})
    for step in (2, 3):
        sender.log(step, loss=step / 10)
    with pytest.raises(ConnectionError):
        delivery.work()
    assert len(sender.history("loss")) == (3 if applies else 1)
    assert delivery.num_left > 0
    while delivery.work():
        pass
    assert delivery.num_left == 0
    assert sender.history("loss") == [(1, 0.1), (2, 0.2), (3, 0.3)]
    assert sender.run.data.params == {"learning_rate": "0.1"}


def test_steps_that_a_resumed_run_repeats_are_logged_once(sender: Sender) -> None:
    for step in range(1, 6):
        sender.log(step, loss=step / 10)
    sender.deliver()
    for step in range(4, 9):
        sender.log(step, loss=step / 10)
    sender.deliver()
    assert sender.history("loss") == [(step, step / 10) for step in range(1, 9)]


def test_delayed_steps_that_a_resumed_run_repeats_are_logged_once(sender: Sender) -> None:
    for step in (*range(1, 6), *range(4, 9)):
        sender.log(step, loss=step / 10)
    sender.deliver()
    assert sender.history("loss") == [(step, step / 10) for step in range(1, 9)]


def test_the_first_value_of_a_param_is_kept(sender: Sender) -> None:
    sender.outbox.append("params", values={"max_steps": "10"})
    sender.deliver()
    sender.outbox.append("params", values={"max_steps": "20", "new": "1"})
    sender.deliver()
    assert sender.run.data.params == {"max_steps": "10", "new": "1"}
    assert sender.messages == []


def test_the_first_value_of_a_delayed_param_is_kept(sender: Sender) -> None:
    sender.outbox.append("params", values={"max_steps": "10"})
    sender.outbox.append("params", values={"max_steps": "20", "new": "1"})
    sender.deliver()
    assert sender.run.data.params == {"max_steps": "10", "new": "1"}


def test_more_values_than_mlflow_accepts_are_sent_in_several_batches(sender: Sender) -> None:
    for step in range(1, 1202):
        sender.log(step, loss=float(step))
    for group in range(5):
        sender.outbox.append("params", values={f"param_{group}_{n}": str(n) for n in range(50)})
        sender.outbox.append("tags", values={f"tag_{group}_{n}": str(n) for n in range(50)})
    sender.deliver()
    assert sender.history("loss") == [(step, float(step)) for step in range(1, 1202)]
    run = sender.run
    assert len(run.data.params) == 250
    assert len([name for name in run.data.tags if name.startswith("tag_")]) == 250
    assert sender.messages == []


@pytest.mark.parametrize("kind", ["metrics", "params", "tags"])
def test_one_record_larger_than_a_batch_of_mlflow_is_delivered(sender: Sender, kind: str) -> None:
    if kind == "metrics":
        sender.log(1, **{f"x_{n}": float(n) for n in range(1100)})
    else:
        sender.outbox.append(kind, values={f"x_{n}": str(n) for n in range(110)})
    sender.log(2, loss=0.2)
    sender.deliver()
    values = getattr(sender.run.data, kind)
    assert len([name for name in values if name.startswith("x_")]) == (1100 if kind == "metrics" else 110)
    assert sender.history("loss") == [(2, 0.2)]


@pytest.mark.parametrize(
    ("kind", "name"),
    [("params", "no*good?"), ("params", "x" * 300), ("metrics", "no*good?"), ("tags", "x" * 300)],
)
def test_a_value_refused_by_mlflow_is_reported_once_and_blocks_nothing(
    sender: Sender, kind: str, name: str
) -> None:
    sender.log(1, loss=0.1)
    sender.outbox.append("params", values={"learning_rate": "0.1"})
    if kind == "metrics":
        sender.log(1, **{name: 1.0})
    else:
        sender.outbox.append(kind, values={name: "1"})
    sender.log(2, loss=0.2)
    sender.outbox.append("tags", values={"note": "after it"})
    sender.outbox.append("status", status="FINISHED")
    sender.deliver()
    sender.deliver()
    assert sender.history("loss") == [(1, 0.1), (2, 0.2)]
    assert sender.run.data.params == {"learning_rate": "0.1"}
    assert sender.run.data.tags["note"] == "after it"
    assert sender.run.info.status == "FINISHED"
    (warning,) = sender.messages
    assert name in warning
    assert "refuses" in warning
    assert "\n" not in warning


@pytest.mark.parametrize("kind", ["metrics", "params", "tags"])
def test_only_the_refused_values_of_a_record_are_lost(sender: Sender, kind: str) -> None:
    bad = ["x" * 300, "no*good?" if kind != "tags" else "y" * 300]
    if kind == "metrics" and sender.client.tracking_uri.startswith("file:"):
        bad[1] = "ä" * 200  # 400 bytes of a file name
    names = [*(f"good_{n}" for n in range(30)), bad[0], *(f"good_{n}" for n in range(30, 60)), bad[1], "last"]
    for step in (1, 2):
        if kind == "metrics":
            sender.log(step, **dict.fromkeys(names, float(step)))
        else:
            sender.outbox.append(kind, values=dict.fromkeys(names, "1"))
    sender.deliver()
    values = getattr(sender.run.data, kind)
    assert {f"good_{n}" for n in range(60)} | {"last"} <= values.keys()
    assert not set(bad) & values.keys()
    if kind == "metrics":
        assert sender.history("last") == [(1, 1.0), (2, 2.0)]
    (warning,) = sender.messages
    assert all(name in warning for name in bad)
    assert "good_" not in warning


def test_values_longer_than_mlflow_accepts_are_truncated(
    sender: Sender, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRUNCATE_LONG_VALUES", "false")  # then it refuses them
    sender.outbox.append("params", values={"long": "x" * 7000})
    sender.outbox.append("tags", values={"long": "x" * 9000, "path": "a\udcffb"})
    sender.outbox.append("params", values={"class_names": "\ud800, ball"})
    sender.deliver()
    assert sender.run.data.tags["path"] == "a\ufffdb"
    assert sender.run.data.params["class_names"] == "?, ball"
    assert sender.run.data.params["long"] == "x" * 6000
    assert sender.run.data.tags["long"] == "x" * 5000
    assert sender.messages == []


def test_nan_is_delivered_like_any_other_value(sender: Sender) -> None:
    for step, value in ((1, 0.1), (2, math.nan), (3, math.nan)):
        sender.log(step, loss=value)
    sender.deliver()
    sender.cursors_path.unlink()
    sender.log(4, loss=0.4)
    sender.deliver()
    history = sorted(
        sender.client.get_metric_history(sender.run_id, "loss"), key=lambda each: (each.step, each.timestamp)
    )
    assert [(each.step, str(each.value)) for each in history] == [
        (1, "0.1"),
        (2, "nan"),
        (3, "nan"),
        (4, "0.4"),
    ]


def test_a_folder_is_delivered_after_the_values_before_it(
    sender: Sender, new_folder: Callable[..., Path]
) -> None:
    for step in (1, 2, 3):
        sender.log(step, **{f"m{n}": 1.0 for n in range(400)})
    sender.outbox.append_folder(new_folder("a", "inner/b"), "checkpoints/best")
    sender.log(4, m0=1.0)
    delivery = sender.delivery()
    delivery.work()  # two of the three
    assert len(sender.history("m0")) == 2
    assert not (sender.artifacts_dir / "checkpoints").exists()
    delivery.work()
    best = sender.artifacts_dir / "checkpoints" / "best"
    assert len(sender.history("m0")) == 4
    assert (best / "a").read_text() == "a"
    assert (best / "inner" / "b").read_text() == "inner/b"


def test_a_failed_upload_delays_the_last_file_and_the_status(
    sender: Sender, new_folder: Callable[..., Path]
) -> None:
    sender.outbox.append_folder(new_folder("a_manifest", "b", "c"), "checkpoints/last", last="a_manifest")
    sender.log(1, loss=0.1)
    sender.outbox.append("status", status="FINISHED")
    target = sender.artifacts_dir / "checkpoints" / "last"
    (target / "c").mkdir(parents=True)  # in the way
    delivery = sender.delivery()
    for _ in range(2):
        with pytest.raises(OSError, match="c"):
            delivery.work()
        assert (target / "b").exists()
        assert not (target / "a_manifest").exists()
        assert sender.run.info.status == "RUNNING"
        assert delivery.num_left > 0
    assert sender.history("loss") == [(1, 0.1)]  # values do not wait for uploads
    (target / "c").rmdir()
    sender.deliver()
    assert {path.name for path in target.iterdir()} >= {"a_manifest", "b", "c"}
    assert (target / "c").read_text() == "c"
    assert sender.run.info.status == "FINISHED"


def test_the_status_is_delivered_after_everything_before_it(
    sender: Sender, new_folder: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").write_text("seed: 1")
    sender.outbox.append_file(tmp_path / "config.yaml")
    for name in ("first", "second"):
        sender.outbox.append_folder(new_folder("a"), name)
    sender.log(1, loss=0.1)
    sender.outbox.append("status", status="KILLED")
    delivery = sender.delivery()
    num_calls = 0
    while sender.run.info.status == "RUNNING":
        assert delivery.num_left > 0
        delivery.work()
        num_calls += 1
        assert num_calls < 100
    assert sender.run.info.status == "KILLED"
    assert sender.run.info.end_time is not None
    assert {path.name for path in sender.artifacts_dir.iterdir()} == {"config.yaml", "first", "second"}
    assert sender.history("loss") == [(1, 0.1)]
    assert delivery.num_left == 0


def test_a_resumed_run_is_running_until_it_ends_and_keeps_its_last_error(
    sender: Sender,
) -> None:
    sender.outbox.append("status", status="FAILED", error="the first")
    sender.deliver()
    assert sender.run.data.tags["error"] == "the first"
    sender.outbox.append("resumption", step=7, changes=["seed 1 -> 2"])
    sender.deliver()
    assert sender.run.info.status == "RUNNING"
    assert "error" not in sender.run.data.tags
    sender.outbox.append("status", status="FAILED", error="the second")
    sender.outbox.append("resumption", step=9, changes=[])
    sender.outbox.append("status", status="FAILED", error="the third")
    sender.deliver()
    assert sender.run.info.status == "FAILED"
    assert sender.run.data.tags["error"] == "the third"
    assert sender.run.data.tags["resumed_at_steps"] == "7; 9"
    assert sender.run.data.tags["resumed_with"] == "step 7: seed 1 -> 2"
    sender.cursors_path.unlink()  # as after a power cut: all records are read again
    sender.deliver()
    assert sender.run.data.tags["resumed_at_steps"] == "7; 9"
    assert sender.run.data.tags["error"] == "the third"


def test_retention_keeps_the_newest_epoch_folders_and_all_other_folders(
    sender: Sender, new_folder: Callable[..., Path]
) -> None:
    for name in ("epoch_2", "epoch_9", "epoch_10", "epoch_12", "best"):
        sender.outbox.append_folder(new_folder("a", "b/c"), f"models/{name}")
    sender.deliver()
    sender.outbox.append_retention("models", newest=10, keep=1)  # 12 is abandoned
    sender.outbox.append_retention("checkpoints", newest=10, keep=1)  # of which there are none
    sender.deliver()
    left = {path.name for path in (sender.artifacts_dir / "models").iterdir()}
    assert left == {"epoch_10", "epoch_12", "best"}
    sender.cursors_path.unlink()
    sender.deliver()
    assert {path.name for path in (sender.artifacts_dir / "models").iterdir()} == left


def test_folders_that_retention_would_delete_are_not_uploaded(
    sender: Sender, new_folder: Callable[..., Path]
) -> None:
    for epoch in (1, 2, 3):
        sender.outbox.append_folder(new_folder("a"), f"models/epoch_{epoch}")
        sender.outbox.append_retention("models", newest=epoch, keep=2)
    assert len(list((sender.outbox.folder / "files").iterdir())) == 2
    sender.deliver()
    assert {path.name for path in (sender.artifacts_dir / "models").iterdir()} == {"epoch_2", "epoch_3"}


class WithoutRights(MlflowClient):
    """User who may log, but neither register nor delete."""

    def create_registered_model(self, *_: Any, **__: Any) -> Any:
        raise MlflowException("no right to register", error_code=PERMISSION_DENIED)

    def list_artifacts(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError("no deletion here")


def test_a_permanent_refusal_is_reported_and_blocks_nothing(sender: Sender) -> None:
    sender.outbox.append_retention("models", newest=3, keep=1)
    sender.outbox.append("registration", name="players")
    sender.outbox.append("status", status="FINISHED")
    sender.deliver(WithoutRights(sender.client.tracking_uri))
    assert sender.run.info.status == "FINISHED"
    assert [line.split(" {")[0] for line in sender.messages] == [
        "MLflow refuses retention", "MLflow refuses registration"
    ]  # fmt: skip


def test_a_superseded_folder_is_skipped(sender: Sender, new_folder: Callable[..., Path]) -> None:
    sender.outbox.append_folder(new_folder("a", "only_in_the_first"), "model")
    sender.outbox.append_folder(new_folder("a", content=" of the second"), "model")
    sender.outbox.append("status", status="FINISHED")
    sender.deliver()
    model = sender.artifacts_dir / "model"
    assert [path.name for path in model.iterdir()] == ["a"]
    assert (model / "a").read_text() == "a of the second"
    assert sender.run.info.status == "FINISHED"
    assert list((sender.outbox.folder / "files").iterdir()) == []


def test_in_a_local_store_files_take_no_additional_space(
    sender: Sender, new_folder: Callable[..., Path]
) -> None:
    source = new_folder("a", "inner/b")
    sender.outbox.append_folder(source, "model")
    sender.deliver()
    for name in ("a", "inner/b"):
        assert (sender.artifacts_dir / "model" / name).samefile(source / name)
    # A newer file replaces the name, and does not write into the file that other names share.
    newer = new_folder("a", content=" newer")
    sender.outbox.append_folder(newer, "model")
    sender.deliver()
    assert (sender.artifacts_dir / "model" / "a").samefile(newer / "a")
    assert (source / "a").read_text() == "a"


def test_a_file_that_is_already_there_leaves_no_temporary_file(
    sender: Sender, new_folder: Callable[..., Path]
) -> None:
    source = new_folder("a")
    for _ in range(2):
        sender.outbox.append_folder(source, "model")
        sender.deliver()
    assert [path.name for path in (sender.artifacts_dir / "model").iterdir()] == ["a"]


def test_files_in_the_store_are_available_through_mlflow(
    sender: Sender, new_folder: Callable[..., Path]
) -> None:
    sender.outbox.append_folder(new_folder("a", "inner/b"), "checkpoints/best")
    sender.deliver()
    listed = {each.path for each in sender.client.list_artifacts(sender.run_id, "checkpoints/best")}
    assert listed == {"checkpoints/best/a", "checkpoints/best/inner"}


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Poll and retry after milliseconds."""
    monkeypatch.setattr(delivery_module, "_LOOK_EVERY_S", 0.001)
    monkeypatch.setattr(delivery_module, "_FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(delivery_module, "_LONGEST_PAUSE_S", 0.01)


@pytest.mark.usefixtures("impatient")
def test_an_outage_and_its_end_are_each_reported_once(sender: Sender) -> None:
    client = Away(sender.client.tracking_uri, num_times=5, applies=False)
    sender.log(1, loss=0.1)
    thread = DeliveryThread(sender.delivery(client))
    for step in range(2, 12):
        sender.log(step, loss=step / 10)
        time.sleep(0.005)
    assert thread.end(patience_s=60) == 0
    assert sender.history("loss") == [(step, step / 10) for step in range(1, 12)]
    away, back = sender.messages
    assert away.startswith("MLflow cannot be reached (the connection is gone)")
    assert back == "MLflow can be reached again"


@pytest.mark.usefixtures("impatient")
def test_closing_during_an_outage_reports_how_much_is_queued(sender: Sender) -> None:
    client = Away(sender.client.tracking_uri, num_times=1_000_000, applies=False)
    for step in range(1, 8):
        sender.log(step, loss=step / 10)
    thread = DeliveryThread(sender.delivery(client))
    assert thread.end(patience_s=0.2) == 7
    assert not any(each.name == "mlflow-delivery" for each in threading.enumerate())
    sender.deliver()
    assert sender.history("loss") == [(step, step / 10) for step in range(1, 8)]


@pytest.mark.usefixtures("impatient")
def test_records_appended_later_are_found_automatically(sender: Sender) -> None:
    thread = DeliveryThread(sender.delivery())
    deadline = time.monotonic() + 60
    for step in (1, 2, 3):
        sender.log(step, loss=step / 10)
        while "loss" not in (metrics := sender.run.data.metrics) or metrics["loss"] < step / 10:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert thread.end(patience_s=60) == 0
    assert sender.history("loss") == [(step, step / 10) for step in (1, 2, 3)]
    assert not any(each.name == "mlflow-delivery" for each in threading.enumerate())


def test_retry_settings_of_the_user_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "7")
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    with patience(20):
        assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "7"
        assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "0"
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "7"
    assert "MLFLOW_HTTP_REQUEST_MAX_RETRIES" not in os.environ
