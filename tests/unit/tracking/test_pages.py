"""The tags of an experiment that MLflow's UI reads, and the links to its pages."""

import base64
import json
import shutil
import zlib
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from detr_dist.tracking.pages import newest_view, prepare_experiment, view_tag, ways_to_see

KIND = "mlflow.experimentKind"
METRICS = ["val_map", "val_player_map", "val_ball_map"]


@pytest.fixture
def client(empty_store: Path, tmp_path: Path) -> MlflowClient:
    return MlflowClient(f"sqlite:///{shutil.copy(empty_store, tmp_path / 'mlflow.db')}")


def state_of(envelope: dict[str, str]) -> dict[str, object]:
    """Return the state of a view as MLflow's UI reads it from its envelope."""
    packed = envelope["state"].removeprefix("deflate;")
    return dict(json.loads(zlib.decompress(base64.b64decode(packed))))


def test_a_view_has_a_column_for_each_metric_and_is_sorted_by_the_first() -> None:
    _, value = view_tag(METRICS)
    envelope = json.loads(value)
    state = state_of(envelope)
    assert state["selectedColumns"][:3] == [f"metrics.`{name}`" for name in METRICS]  # type: ignore[index]
    assert (state["orderByKey"], state["orderByAsc"]) == ("metrics.`val_map`", False)
    assert envelope["name"] == "Best val_map, val_player_map, val_ball_map"
    assert envelope.items() >= state.items(), "MLflow 3.10 reads it without an envelope"


def test_the_key_of_a_view_depends_on_its_metrics_alone() -> None:
    assert view_tag(METRICS)[0] == view_tag(METRICS)[0] != view_tag(METRICS[:2])[0]


def test_a_view_of_hundreds_of_classes_fits_into_a_tag() -> None:
    metrics = ["val_map", *(f"val_class_{i}_{'x' * 20}_map" for i in range(365))]
    _, value = view_tag(metrics)
    assert len(value) <= 5000
    assert state_of(json.loads(value))["selectedColumns"][20] == f"metrics.`{metrics[20]}`"  # type: ignore[index]


def test_an_experiment_gets_its_tags_once(client: MlflowClient) -> None:
    experiment_id = client.create_experiment("of an earlier version")
    key = prepare_experiment(client, experiment_id, METRICS)
    tags = client.get_experiment(experiment_id).tags
    assert tags.keys() == {KIND, f"mlflow.sharedViewState.{key}"}
    assert tags[KIND] == "custom_model_development"
    assert prepare_experiment(client, experiment_id, METRICS) == key
    assert client.get_experiment(experiment_id).tags == tags
    assert newest_view(tags) == key


def test_a_persons_choices_are_not_overwritten(client: MlflowClient) -> None:
    chosen = {KIND: "genai_development", view_tag(METRICS)[0]: "changed in the UI"}
    experiment_id = client.create_experiment("chosen", tags=chosen)
    prepare_experiment(client, experiment_id, METRICS)
    assert client.get_experiment(experiment_id).tags == chosen


def test_a_server_that_refuses_tags_is_one_warning(
    client: MlflowClient, messages: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: str) -> None:
        raise MlflowException("no permission")

    monkeypatch.setattr(client, "set_experiment_tag", refuse)
    assert prepare_experiment(client, "0", METRICS) is None
    (warning,) = messages
    assert "no permission" in warning


def test_tags_that_another_run_sets_at_the_same_time_are_no_warning(
    client: MlflowClient, messages: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose_the_race(*tag: str) -> None:
        monkeypatch.undo()
        client.set_experiment_tag(*tag)
        raise MlflowException("UNIQUE constraint failed")

    monkeypatch.setattr(client, "set_experiment_tag", lose_the_race)
    assert prepare_experiment(client, "0", METRICS) is not None
    assert not messages


@pytest.mark.parametrize(
    ("uri", "server"),
    [
        ("http://bob:hidden@host:5000/mlflow/", "http://host:5000/mlflow"),
        ("sqlite:///mlflow.db", "http://127.0.0.1:5000"),
        ("file:./mlruns", "http://127.0.0.1:5000"),
    ],
)
def test_links_open_the_workspace_for_training(uri: str, server: str) -> None:
    _, run, runs = ways_to_see(uri, "7", "abc", "detr_dist_1")
    assert run.split(": ", 1)[1] == f"{server}/#/experiments/7/runs/abc?workflowType=machine_learning"
    query = "viewStateShareKey=detr_dist_1&workflowType=machine_learning"
    assert runs.split(": ", 1)[1] == f"{server}/#/experiments/7/runs?{query}"


@pytest.mark.parametrize(("uri", "experiment_id"), [("databricks", "7"), ("http://host", None)])
def test_without_a_known_page_no_link_is_shown(uri: str, experiment_id: str | None) -> None:
    (way,) = ways_to_see(uri, experiment_id, "abc", None)
    assert way == f"see it at {uri}"
