"""An outbox and a run in each kind of local store."""

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.outbox import Sender
from mlflow import MlflowClient

from detr_dist.tracking.outbox import Address, Outbox


@pytest.fixture(params=["database", "files"])
def sender(
    request: pytest.FixtureRequest, tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Sender]:
    """Use both kinds of local store: a database ignores an entry that it already has, files do not."""
    if request.param == "database":
        shutil.copy(empty_store, tmp_path / "mlflow.db")
        uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    else:
        monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        uri = (tmp_path / "mlruns").as_uri()
    client = MlflowClient(uri)
    experiment_id = client.create_experiment("test", artifact_location=(tmp_path / "artifacts").as_uri())
    run_id = client.create_run(experiment_id).info.run_id
    outbox = Outbox(tmp_path / "outbox", Address(uri, run_id))
    sender = Sender(outbox, client, run_id)
    listener = logging.Handler()
    listener.emit = lambda record: sender.messages.append(record.getMessage())  # type: ignore[method-assign]
    monkeypatch.setattr(logging.getLogger("detr_dist.tracking"), "handlers", [listener])
    yield sender
    outbox.close()
