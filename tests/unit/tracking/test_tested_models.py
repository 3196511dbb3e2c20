"""Results on test data are logged to the model's run, or to a new one where that cannot be."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from harness.outbox import Sender
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import ENDPOINT_NOT_FOUND, INTERNAL_ERROR, PERMISSION_DENIED
from PIL import Image

from detr_dist.data.coco import CocoData, load_data
from detr_dist.errors import DetrDistError
from detr_dist.tracking import tested_models
from detr_dist.tracking.datasets import describe_dataset
from detr_dist.tracking.tested_models import ModelOrigin, log_test


@pytest.fixture
def data(tiny_data: Path) -> CocoData:
    return load_data(tiny_data / "val")


def log(sender: Sender, data: CocoData, folder: Path) -> str:
    """Log a metric and a plot for the model of an epoch, and return the run that has them."""
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (9, 9)).save(folder / "curve.png")
    origin = ModelOrigin(f"runs:/{sender.run_id}/model", sender.run_id, epoch=1, step=10)
    uri, experiment = sender.outbox_uri, "test"
    return log_test(origin, {"test_map": 0.5}, data, folder, tracking_uri=uri, experiment=experiment)


class WithoutLoggedModels(MlflowClient):
    """Client of a server that is too old for LoggedModels."""

    def search_logged_models(self, *_: Any, **__: Any) -> Any:
        raise MlflowException("no such endpoint", error_code=ENDPOINT_NOT_FOUND)


class OfOthers(MlflowClient):
    """Client of a user who may write to no run but the user's own."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self.own: set[str] = set()

    def create_run(self, *arguments: Any, **more: Any) -> Any:
        run = super().create_run(*arguments, **more)
        self.own.add(run.info.run_id)
        return run

    def log_inputs(self, run_id: str, *arguments: Any, **more: Any) -> Any:
        if run_id not in self.own:
            raise MlflowException("not yours", error_code=PERMISSION_DENIED)
        super().log_inputs(run_id, *arguments, **more)


class LosingImages(OfOthers):
    """Client of a server whose artifact store fails in the end."""

    def set_tag(self, *_: Any, **__: Any) -> Any:
        raise MlflowException("the bucket is gone", error_code=INTERNAL_ERROR)


def test_a_server_without_logged_models_gets_the_results(
    sender: Sender, data: CocoData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tested_models, "open_client", WithoutLoggedModels)
    assert log(sender, data, tmp_path / "plots") == sender.run_id
    assert sender.history("test_map") == [(10, 0.5)]
    assert not sender.messages


def test_a_run_that_cannot_be_written_to_gets_a_run_below_it(
    sender: Sender, data: CocoData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tested_models, "open_client", OfOthers)
    run = sender.client.get_run(log(sender, data, tmp_path / "plots"))
    assert run.data.tags["mlflow.parentRunId"] == sender.run_id
    assert (run.info.status, run.data.metrics) == ("FINISHED", {"test_map": 0.5})
    assert "not yours" in sender.messages[0]


def test_a_new_run_without_all_results_has_failed(
    sender: Sender, data: CocoData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tested_models, "open_client", LosingImages)
    with pytest.raises(DetrDistError, match="the bucket is gone"):
        log(sender, data, tmp_path / "plots")
    runs = sender.client.search_runs([sender.run.info.experiment_id])
    (new,) = (each for each in runs if each.info.run_id != sender.run_id)
    assert new.info.status == "FAILED"


def test_metrics_may_name_a_data_set_whose_folder_has_no_valid_name(
    sender: Sender, tiny_data: Path, tmp_path: Path
) -> None:
    data = load_data(shutil.copytree(tiny_data / "val", tmp_path / os.fsdecode(b"val\xff")))
    described = describe_dataset(data)
    assert described["profile"]["num_boxes"] == sum(described["profile"]["boxes_per_class"].values())
    sender.outbox.append("dataset", context="validation", **described)
    names = {"epoch": 1, "dataset": [described["name"], described["digest"]]}
    sender.outbox.append("metrics", step=1, at_ms=1, values={"val_map": 0.5}, **names)
    sender.deliver()
    assert sender.history("val_map") == [(1, 0.5)]
