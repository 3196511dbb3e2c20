"""A tracker whose server is unavailable, and the messages about a tracking URI."""

import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient

from detr_dist.config import LoggingConfig
from detr_dist.errors import UsageError
from detr_dist.tracking.artifacts import fetch, register_artifact, upload_model
from detr_dist.tracking.mlflow import MLflowTracker
from detr_dist.tracking.outbox import OutboxReader
from detr_dist.tracking.store import open_client
from detr_dist.tracking.tracker import Trackers, tracked
from detr_dist.tracking.uris import absolute_uri, way_to_see

FOR_FILES = "MLFLOW_ALLOW_FILE_STORE=true mlflow ui --backend-store-uri"
TIMEOUT = "MLFLOW_HTTP_REQUEST_TIMEOUT"


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """Return a port that refuses connections until it listens; then it accepts them and never answers."""
    for name in (TIMEOUT, "MLFLOW_HTTP_REQUEST_MAX_RETRIES"):
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        yield listener


@pytest.fixture
def tracker(port: socket.socket) -> MLflowTracker:
    """Return the tracker of a resumed run, which needs no server."""
    uri = f"http://127.0.0.1:{port.getsockname()[1]}"
    return MLflowTracker(LoggingConfig(mlflow_tracking_uri=uri), run_id="0" * 32, known_uri=uri)


def test_a_run_that_fails_before_its_outbox_opens_ends_within_seconds(
    tracker: MLflowTracker, capsys: pytest.CaptureFixture[str]
) -> None:
    began_at = time.monotonic()
    trackers = Trackers()
    trackers.add(tracker)
    with pytest.raises(ZeroDivisionError), tracked(trackers):
        raise ZeroDivisionError
    assert time.monotonic() - began_at < 15  # MLflow's own seven retries pause for minutes
    assert "could not be closed" in capsys.readouterr().out


def test_a_request_that_outlives_the_run_keeps_its_timeouts(
    tracker: MLflowTracker,
    port: socket.socket,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    port.listen()
    tracker.open(tmp_path / "outbox")
    tracker.log_metrics({"loss": 1.0}, 1)
    connection, _ = port.accept()
    with connection:
        tracker.close("FINISHED", patience_s=0.1)
        assert os.environ[TIMEOUT] == "120"
    for each in threading.enumerate():
        if each.name == "mlflow-delivery":
            each.join(30)
    assert "2 records are not in MLflow yet" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["database", "files"])
def test_a_deleted_experiment_is_named_with_the_command_that_restores_it(
    kind: str, empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = {
        "database": f"sqlite:///{shutil.copy(empty_store, tmp_path / 'mlflow.db')}",
        "files": str(tmp_path / "mlruns"),
    }[kind]
    config = LoggingConfig(mlflow_tracking_uri=uri, mlflow_experiment_name="sweep")
    tracker = MLflowTracker(config)
    experiment_id = tracker.client.get_run(tracker.run_id).info.experiment_id
    tracker.client.delete_experiment(experiment_id)
    restore = f"sweep.*mlflow experiments restore --experiment-id {experiment_id}"
    with pytest.raises(UsageError, match=restore):
        MLflowTracker(config)
    with pytest.raises(UsageError, match=restore):
        upload_model(tracker.client, tmp_path, experiment="sweep", source="")
    if kind == "database":  # in the other a run of a deleted experiment cannot be found
        with pytest.raises(UsageError, match=restore):
            MLflowTracker(config, run_id=tracker.run_id, known_uri=uri)
    tracker.client.restore_experiment(experiment_id)
    MLflowTracker(config)


@pytest.mark.parametrize(
    ("uri", "absolute", "way"),
    [
        ("sqlite:///a.db", "sqlite:///{here}/a.db", "with: mlflow ui --backend-store-uri sqlite:///a.db"),
        ("file:./runs", "file://{here}/runs", f"with: {FOR_FILES} file:./runs"),
        ("my runs", "file://{here}/my%20runs", f"with: {FOR_FILES} 'my runs'"),
        (
            "postgresql+psycopg2://host/a?b=1&c=2",
            "postgresql+psycopg2://host/a?b=1&c=2",
            "with: mlflow ui --backend-store-uri 'postgresql+psycopg2://host/a?b=1&c=2'",
        ),
        (
            "sqlite:///a.db?timeout=9",
            "sqlite:///{here}/a.db?timeout=9",
            "with: mlflow ui --backend-store-uri 'sqlite:///a.db?timeout=9'",
        ),
        ("file:a%23b", "file://{here}/a%23b", f"with: {FOR_FILES} file:a%23b"),
        ("a #?b", "file://{here}/a%20%23%3Fb", f"with: {FOR_FILES} 'a #?b'"),
        ("http://a:b@host:5000", "http://a:b@host:5000", "at http://host:5000"),
        ("databricks", "databricks", "at databricks"),
        ("databricks-uc", "databricks-uc", "at databricks-uc"),
        ("databricks:profile", "databricks:profile", "at databricks:profile"),
        ("uc:http://host", "uc:http://host", "at uc:http://host"),
    ],
)
def test_a_uri_means_one_store_in_every_folder_with_its_view_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uri: str, absolute: str, way: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute_uri(uri) == absolute.format(here=tmp_path)
    assert way_to_see(uri) == way


@pytest.mark.parametrize("store", ["sqlite:///{}.db?timeout=60", "file:./mlruns"])
@pytest.mark.parametrize("name", ["run #3", "50%25 off?", "é ü;a"])
def test_runs_are_stored_in_a_folder_under_any_of_its_names(
    tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch, name: str, store: str
) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    here = tmp_path / name
    (here / "source").mkdir(parents=True)
    (here / "source" / "weights").write_text("trained")
    shutil.copy(empty_store, here / f"{tmp_path.name}.db")
    store = store.format(tmp_path.name)  # MLflow knows one URI as one store, wherever it is
    monkeypatch.chdir(here)
    tracker = MLflowTracker(LoggingConfig(mlflow_tracking_uri=store))
    tracker.open(Path("outbox"))
    tracker.log_folder(Path("source"), "model")
    tracker.close("FINISHED")

    model = f"runs:/{tracker.run_id}/model"
    register_artifact(open_client(store), "players", tracker.run_id, "model")
    open_client(store).set_registered_model_alias("players", "best", "1")
    for each in (model, "models:/players/1", "models:/players@best"):
        assert (fetch(each, store, tmp_path / "ours") / "weights").read_text() == "trained"
    plain = mlflow.artifacts.download_artifacts(
        model, dst_path=str(tmp_path / "plain"), tracking_uri=store, registry_uri=store
    )
    assert (Path(plain) / "weights").read_text() == "trained"
    monkeypatch.chdir(tmp_path)
    elsewhere = MlflowClient(OutboxReader(here / "outbox" / tracker.run_id).address.tracking_uri)
    assert elsewhere.get_run(tracker.run_id).info.status == "FINISHED"
    assert len(list(here.glob("mlruns/**/model/weights"))) == 1
    assert {path.name for path in tmp_path.iterdir()} == {name, "ours", "plain"}


@pytest.mark.parametrize(
    "uri",
    [
        "file:./run #3",
        "file:///a?/mlruns",
        "sqlite:////a/what?/mlflow.db",
        "sqlite:////a/what?/mlflow.db?timeout=60",
        "sqlite:////a?b=c?/mlflow.db",
    ],
)
def test_a_uri_that_would_be_truncated_is_refused(uri: str) -> None:
    with pytest.raises(UsageError, match=f"{re.escape(uri)}.*%3F"):
        open_client(uri)
