"""The notebook in examples/ as a person runs it: all cells, in a real kernel."""

import shutil
from pathlib import Path

import nbclient
import nbformat
import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_notebook_trains_plots_predicts_evaluates_and_exports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "examples").mkdir()
    shutil.copytree(REPOSITORY / "configs", tmp_path / "configs")
    for name in ("MLFLOW_TRACKING_URI", "MPLBACKEND"):
        monkeypatch.delenv(name, raising=False)
    notebook = nbformat.read(REPOSITORY / "examples" / "train_and_predict.ipynb", as_version=4)
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    parameters.source = "num_scenes, num_epochs = 16, 1"
    resources = {"metadata": {"path": str(tmp_path / "examples")}}
    nbclient.NotebookClient(notebook, timeout=250, resources=resources).execute()
    outputs = {
        cell.id: [
            output.get("text") or "/".join(sorted(output.get("data", ())))
            for output in cell.get("outputs", ())
        ]
        for cell in notebook.cells
    }
    assert any("val_map" in text and "MLflow run" in text for text in outputs["train"])
    assert any("image/png" in kind for kind in outputs["plot"])
    assert any("image/png" in kind for kind in outputs["predict"])
    assert any("player" in text for text in outputs["evaluate"])
    assert (tmp_path / "examples" / "football" / "production" / "model.safetensors").is_file()


def test_the_notebook_is_committed_without_outputs() -> None:
    notebook = nbformat.read(REPOSITORY / "examples" / "train_and_predict.ipynb", as_version=4)
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in notebook.cells)
