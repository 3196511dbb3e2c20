"""The store that the pages are opened on, and their port."""

import shutil
import socket
import threading
from pathlib import Path

import pytest

from detr_dist.config import LoggingConfig
from detr_dist.errors import UsageError
from detr_dist.tracking.mlflow import MLflowTracker
from detr_dist.tracking.ui import find_free_port, find_tracking_uri, newest_page, server_address


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


def configure(path: Path, uri: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"logging:\n  mlflow_tracking_uri: {uri}\n")
    return path


def test_the_most_explicit_store_is_chosen(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("given", "variable", "project", "option", "mlflow"):
        (here / f"{name}.db").touch()
    (here / "mlruns" / "0").mkdir(parents=True)
    (here / "mlruns" / "0" / "meta.yaml").touch()
    assert find_tracking_uri(None, None) == "sqlite:///mlflow.db"
    configure(here / "configs" / "training.yaml", "sqlite:///project.db")
    assert find_tracking_uri(None, None) == "sqlite:///project.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///variable.db")
    assert find_tracking_uri(None, None) == "sqlite:///variable.db"
    option = configure(here / "other.yaml", "sqlite:///option.db")
    assert find_tracking_uri(None, option) == "sqlite:///option.db"
    assert find_tracking_uri("sqlite:///given.db", option) == "sqlite:///given.db"


@pytest.mark.parametrize("content", ["sqlite:///away.db", "file:./mlruns", "[1"], ids=str)
def test_a_remote_store_of_the_project_hides_no_local_runs(here: Path, content: str) -> None:
    (here / "mlflow.db").touch()
    (here / "mlruns" / "1").mkdir(parents=True)  # artifacts of the database
    configure(here / "configs" / "training.yaml", content)
    assert find_tracking_uri(None, None) == "sqlite:///mlflow.db"


def test_artifacts_of_a_database_are_not_opened_as_a_store(here: Path) -> None:
    (here / "mlruns" / "1" / "a_run" / "artifacts").mkdir(parents=True)
    with pytest.raises(UsageError, match=r"file:\./mlruns: no runs of MLflow in .*/mlruns;"):
        find_tracking_uri("file:./mlruns", None)


@pytest.mark.parametrize(
    "uri", ["file:./my runs", "file:my%20runs", "my runs", "{here}/my runs", "file://{here}/my runs"]
)
def test_a_folder_may_be_specified_in_every_form_of_mlflow(here: Path, uri: str) -> None:
    (here / "my runs" / "0").mkdir(parents=True)
    (here / "my runs" / "0" / "meta.yaml").touch()
    uri = uri.format(here=here)
    assert find_tracking_uri(uri, None) == uri


def test_a_busy_port_is_replaced_by_the_next_free_one() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        busy = other.getsockname()[1]
        assert find_free_port("127.0.0.1", busy) > busy


@pytest.mark.parametrize(("host", "port"), [("127.0.0.1", 70000), ("192.0.2.1", 5000)], ids=["port", "host"])
def test_an_unusable_address_is_reported(host: str, port: int) -> None:
    with pytest.raises(UsageError, match=rf"cannot serve at {host}, port {port}"):
        find_free_port(host, port)


def test_a_server_that_answers_is_named_without_its_password() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"HTTP/1.0 401 Unauthorized\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        assert server_address(f"http://me:secret@127.0.0.1:{port}") == f"http://127.0.0.1:{port}"
        thread.join()


def test_the_link_opens_the_experiment_that_trained_last(here: Path, empty_store: Path) -> None:
    uri = f"sqlite:///{shutil.copy(empty_store, here / 'mlflow.db')}"
    assert newest_page(uri, "http://host") == "http://host", "there is no run yet"
    for name in ("first", "second"):
        tracker = MLflowTracker(LoggingConfig(mlflow_tracking_uri=uri, mlflow_experiment_name=name))
    experiment = tracker.client.get_experiment_by_name("second")
    (key,) = (tag for tag in experiment.tags if tag.startswith("mlflow.sharedViewState."))
    link = newest_page(uri, "http://host")
    assert link.startswith(f"http://host/#/experiments/{experiment.experiment_id}/runs?")
    assert f"={key.removeprefix('mlflow.sharedViewState.')}&" in link
    assert link in tracker.ways_to_see()[-1].replace("http://127.0.0.1:5000", "http://host")
    assert newest_page("http://127.0.0.1:9", "http://host") == "http://host"
