"""Model references: folders, checkpoints, hub ids, and invalid ones."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from detr_dist.errors import CheckpointError, UsageError
from detr_dist.training.checkpoint import AVERAGE
from detr_dist.training.sources import find_model

URI = "sqlite:///mlflow.db"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scratch").mkdir()
    monkeypatch.chdir(tmp_path)


def find(reference: str):
    return find_model(reference, URI, Path("scratch").absolute())


def test_a_model_folder_is_used_in_place() -> None:
    Path("model").mkdir()
    Path("model/config.json").write_text("{}")
    assert find("model").location == "model"
    assert find("model").checkpoint is None


def test_a_checkpoint_yields_its_averaged_weights_and_its_state(checkpoint: Path) -> None:
    found = find(str(checkpoint))
    assert found.checkpoint is not None
    assert found.checkpoint.state.step == 10
    taken, averaged = load_file(f"{found.location}/model.safetensors"), load_file(checkpoint / AVERAGE)
    trained = load_file(checkpoint / "model.safetensors")
    assert all(taken[key].equal(averaged[key]) for key in averaged)
    assert not all(taken[key].equal(trained[key]) for key in trained)


def test_a_changed_checkpoint_is_refused(checkpoint: Path) -> None:
    (checkpoint / AVERAGE).write_bytes(b"other")
    with pytest.raises(CheckpointError, match="not as it was written"):
        find(str(checkpoint))


def test_a_hub_id_is_left_to_transformers() -> None:
    assert find("facebook/detr-resnet-50").location == "facebook/detr-resnet-50"


@pytest.mark.parametrize(
    "reference",
    [
        *("./model", "/no/such/model", "~/no-such-model", "models/first/model", "scratch/model", "../x"),
        *("model/", "model"),
    ],
)
def test_a_missing_path_is_no_hub_id(reference: str) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        find(reference)


def test_another_folder_is_refused_with_what_it_lacks() -> None:
    with pytest.raises(UsageError, match=r"scratch: neither a model nor a checkpoint .*config\.json"):
        find("scratch")


def test_a_missing_database_is_an_error_and_is_not_created() -> None:
    with pytest.raises(UsageError, match="there is no database"):
        find("runs:/0/model")
    assert not Path("mlflow.db").exists()
