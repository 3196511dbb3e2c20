"""Models, images, tables, notes and versions are in a real MLflow store once, however often delivered."""

import json
from pathlib import Path
from typing import Any

import mlflow
import pytest
import yaml
from harness.outbox import Sender
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import ENDPOINT_NOT_FOUND, PERMISSION_DENIED
from PIL import Image

from detr_dist.tracking.artifacts import fetch, register_artifact, run_of
from detr_dist.tracking.run_note import run_note

VALIDATION = ["val", "0123abcd"]

ECHO = """
class Echo:
    def predict(self, data, params=None):
        return [f"found in {each}" for each in data]

def _load_pyfunc(path):
    return Echo()
"""


def evaluate(sender: Sender, epoch: int, val_map: float, **content: Any) -> None:
    """Record an evaluation, as a run does."""
    values = {"val_map": val_map}
    step = 10 * epoch
    at_ms = next(sender.clock)
    sender.outbox.append(
        "metrics", step=step, at_ms=at_ms, values=values, epoch=epoch, dataset=VALIDATION, **content
    )


def save_model(sender: Sender, epoch: int, tmp_path: Path) -> None:
    """Record the model of an epoch: a python function that answers."""
    folder = tmp_path / f"model_{epoch}"
    (folder / "code").mkdir(parents=True)
    (folder / "code" / "echo.py").write_text(ECHO)
    flavor = {"python_function": {"loader_module": "echo", "code": "code"}, "pytorch": {"model_data": "data"}}
    document = {"flavors": flavor, "metadata": {"epoch": epoch}, "mlflow_version": mlflow.__version__}
    (folder / "MLmodel").write_text(yaml.safe_dump(document))
    (folder / "requirements.txt").write_text("mlflow")
    (folder / "model.safetensors").write_bytes(bytes(1000))
    sender.outbox.append_folder(folder, f"models/epoch_{epoch}")
    sender.outbox.append("model", epoch=epoch, step=10 * epoch)


def models_of(sender: Sender) -> list[Any]:
    """Return the models of the experiment, the best first."""
    experiment_ids = [sender.run.info.experiment_id]
    order_by = [{"field_name": "metrics.val_map", "ascending": False}]
    return list(sender.client.search_logged_models(experiment_ids, order_by=order_by))


def set_uri(monkeypatch: pytest.MonkeyPatch, uri: str) -> None:
    """Set MLflow's default store for the test."""
    monkeypatch.setattr(mlflow.tracking._tracking_service.utils, "_tracking_uri", uri)
    monkeypatch.setattr(mlflow.tracking._model_registry.utils, "_registry_uri", uri)


def deliver_twice(sender: Sender) -> None:
    """Deliver everything, and again as if a crash had come before any of it was noted."""
    sender.deliver()
    sender.cursors_path.unlink()
    sender.deliver()


def test_evaluated_epochs_are_logged_models_that_the_best_can_be_found_among(
    sender: Sender, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for epoch, val_map in ((1, 0.1), (2, 0.3), (3, 0.2)):
        evaluate(sender, epoch, val_map)
        save_model(sender, epoch, tmp_path)
    deliver_twice(sender)
    assert sender.history("val_map") == [(10, 0.1), (20, 0.3), (30, 0.2)]
    best, *others = models_of(sender)
    assert [best.name, *(each.name for each in others)] == ["epoch_2", "epoch_3", "epoch_1"]
    assert best.status == "READY"
    assert best.params == {"epoch": "2", "step": "20"}
    (metric,) = best.metrics
    assert (metric.key, metric.value, metric.step) == ("val_map", 0.3, 20)
    if sender.outbox_uri.startswith("sqlite"):  # in a file store the step would be lost
        assert [metric.dataset_name, metric.dataset_digest] == VALIDATION
    outputs = sender.run.outputs.model_outputs
    assert sorted(each.step for each in outputs) == [10, 20, 30]

    uri = sender.outbox_uri
    set_uri(monkeypatch, uri)
    loaded = mlflow.pyfunc.load_model(f"models:/{best.model_id}")
    assert loaded.predict(["a.jpg"]) == ["found in a.jpg"]
    assert loaded.metadata.metadata == {"epoch": 2}
    reference = f"models:/{best.model_id}"
    assert run_of(reference, sender.client) == sender.run_id
    assert (fetch(reference, uri, tmp_path / "fetched") / "model.safetensors").stat().st_size == 1000
    copies = [path for path in tmp_path.rglob("model.safetensors") if "artifacts" in path.parts]
    assert len(copies) == 3, "a file was uploaded twice"


def test_models_of_deleted_epochs_are_deleted(sender: Sender, tmp_path: Path) -> None:
    for epoch in (1, 2, 3):
        evaluate(sender, epoch, epoch / 10)
        save_model(sender, epoch, tmp_path)
        sender.outbox.append_retention("models", epoch, 2)
    deliver_twice(sender)
    assert [each.name for each in models_of(sender)] == ["epoch_3", "epoch_2"]


class WithoutLoggedModels(MlflowClient):
    """Client of a server that is too old for LoggedModels."""

    def search_logged_models(self, *_: Any, **__: Any) -> Any:
        raise MlflowException("no such endpoint", error_code=ENDPOINT_NOT_FOUND)


def test_a_server_without_logged_models_gets_all_else_after_one_warning(
    sender: Sender, tmp_path: Path
) -> None:
    for epoch in (1, 2):
        evaluate(sender, epoch, epoch / 10)
        save_model(sender, epoch, tmp_path)
    facts = {"epoch": 2, "step": 20, "val_map": 0.2, "validation_data": "val 1234"}
    sender.outbox.append("registration", name="players", **facts)
    sender.outbox.append("status", status="FINISHED")
    sender.deliver(WithoutLoggedModels(sender.outbox_uri))
    assert sender.history("val_map") == [(10, 0.1), (20, 0.2)]
    assert sender.client.get_model_version_by_alias("players", "best").tags["step"] == "20"
    assert sender.run.info.status == "FINISHED"
    (message,) = sender.messages
    assert "LoggedModels" in message


class WithoutTags(MlflowClient):
    """User who may upload, but not set tags."""

    def set_tag(self, *_: Any, **__: Any) -> Any:
        raise MlflowException("no right to tag", error_code=PERMISSION_DENIED)


def test_refused_images_are_one_warning_and_leave_no_files(sender: Sender, tmp_path: Path) -> None:
    for step in (1, 2):
        sender.outbox.append_image(draw(tmp_path / "plot.png", "red"), "val_plot", step, 1000 * step)
    sender.deliver(WithoutTags(sender.outbox_uri))
    (message,) = sender.messages
    assert message.startswith("MLflow refuses image {")
    assert not list((sender.outbox.folder / "files").iterdir())


def draw(path: Path, colour: str) -> Path:
    Image.new("RGB", (900, 30), colour).save(path)
    return path


def test_each_image_of_a_step_is_there_once(sender: Sender, tmp_path: Path) -> None:
    plot, photo = draw(tmp_path / "plot.png", "red"), draw(tmp_path / "photo.jpg", "blue")
    for step in (1, 2):
        sender.outbox.append_image(plot, "val_plot", step, 1000 * step)
        sender.outbox.append_image(photo, "val_photo", step, 1000 * step)
    deliver_twice(sender)
    sender.outbox.append_image(draw(plot, "green"), "val_plot", 2, 9999)  # a resumed run repeats the step
    sender.deliver()
    paths = sorted((sender.artifacts_dir / "images").iterdir())
    assert [path.name.rsplit("+", 2 if "compressed" in path.name else 1)[0] for path in paths] == [
        f"val_{kind}+step+{step}+timestamp+{step}000"
        for kind in ("photo", "plot")
        for step in (1, 2)
        for _ in range(2)
    ]
    assert {path.suffix for path in paths} == {".png", ".webp"}
    (second,) = (path for path in paths if path.name.startswith("val_plot+step+2+") and path.suffix == ".png")
    assert Image.open(second).getpixel((0, 0)) == (0, 128, 0)
    previews = [Image.open(path) for path in paths if "+compressed" in path.name]
    assert {each.width for each in previews} == {512}
    assert sender.run.data.tags["mlflow.loggedImages"] == "True"


def test_a_table_is_replaced_and_others_stay_listed(sender: Sender, monkeypatch: pytest.MonkeyPatch) -> None:
    set_uri(monkeypatch, sender.outbox_uri)
    sender.client.log_table(sender.run_id, {"a": [1]}, "users.json")
    for step in (1, 2):
        table = {"columns": ["step", "class", "map"], "data": [[step, "ball", 0.5], [step, "player", None]]}
        sender.outbox.append_table("per_class.json", json.dumps(table))
    deliver_twice(sender)
    listed = json.loads(sender.run.data.tags["mlflow.loggedArtifacts"])
    assert [each["path"] for each in listed] == ["users.json", "per_class.json"]
    found = sender.client.load_table(sender.run.info.experiment_id, "per_class.json", [sender.run_id])
    assert found["step"].tolist() == [2, 2]
    assert found["class"].tolist() == ["ball", "player"]


def note(best: str) -> str:
    metrics = {"val_map": 0.5}
    return run_note("0" * 32, command="detr-dist train", data=["train: 9 images"], best=best, metrics=metrics)


def test_the_note_is_updated_until_a_person_edits_it(sender: Sender) -> None:
    for best in ("first", "second"):
        sender.outbox.append("note", text=note(best))
        deliver_twice(sender)
        assert sender.run.data.tags["mlflow.note.content"] == note(best)
    edited = note("second").replace("### Data", "### Data\n\nThe third camera was out of focus.")
    sender.client.set_tag(sender.run_id, "mlflow.note.content", edited)
    sender.outbox.append("note", text=note("third"))
    sender.deliver()
    assert sender.run.data.tags["mlflow.note.content"] == edited


def test_the_note_stays_ours_although_the_outbox_removes_credentials(sender: Sender) -> None:
    for best in ("first", "second"):
        command = "detr-dist train 'password: hunter2'"
        text = run_note("0" * 32, command=command, data=[], best=best, metrics={})
        assert "hunter2" not in text
        sender.outbox.append("note", text=text)
        sender.deliver()
        assert best in sender.run.data.tags["mlflow.note.content"]


def test_the_note_fits_into_a_tag() -> None:
    metrics = {f"val_{number}_map": 0.5 for number in range(500)}
    text = run_note("0" * 32, command="x" * 9000, data=["a"], best="b", metrics=metrics)
    assert len(text) <= 5000


def test_a_registered_epoch_of_the_run_is_not_taken_for_its_best_model(sender: Sender) -> None:
    epoch = register_artifact(sender.client, "players", sender.run_id, "models/epoch_1")
    facts = {"epoch": 2, "step": 20, "val_map": 0.2, "validation_data": "val 1234"}
    sender.outbox.append("registration", name="players", **facts)
    deliver_twice(sender)
    best = sender.client.get_model_version_by_alias("players", "best")
    assert best.source.endswith("/model")
    assert [each.version for each in sender.client.search_model_versions("name = 'players'")] == [
        best.version,
        epoch.version,
    ]
    assert not sender.client.get_model_version("players", epoch.version).tags


def test_the_alias_best_moves_only_to_a_better_model_on_the_same_data(sender: Sender, tmp_path: Path) -> None:
    experiment_id = sender.run.info.experiment_id

    def register(val_map: float, data: str, epoch: int) -> str:
        """Register the model of a new run, and return the version that has the alias then."""
        run_id = sender.client.create_run(experiment_id).info.run_id
        other = sender.for_run(run_id, tmp_path / f"outbox_{run_id}")
        evaluate(other, epoch, val_map)
        facts = {"epoch": epoch, "step": 10 * epoch, "val_map": val_map, "classes": "ball, player"}
        other.outbox.append("registration", name="players", validation_data=data, **facts)
        deliver_twice(other)
        other.outbox.close()
        return str(sender.client.get_model_version_by_alias("players", "best").version)

    assert register(0.5, "val 1234", 3) == "1"
    assert register(0.4, "val 1234", 3) == "1"
    assert register(0.9, "val 5678", 3) == "1"
    assert register(0.6, "val 1234", 4) == "4"
    kept = [line for line in sender.messages if "alias best stays" in line]
    assert len(kept) == 4  # each was delivered twice
    assert "0.5000 is not lower" in kept[0]
    assert "other data (val 1234)" in kept[2]
    version = sender.client.get_model_version("players", "4")
    assert version.tags["step"] == "40"
    assert version.tags["classes"] == "ball, player"
    assert "val_map 0.6000 on val 1234" in version.description
    assert [each.name for each in models_of(sender) if each.model_id == version.tags["model_id"]] == [
        "epoch_4"
    ]
    assert len(sender.client.search_model_versions("name = 'players'")) == 4
