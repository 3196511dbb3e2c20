"""A notebook that loads, predicts, evaluates and exports gives the results of the commands."""

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import accelerate
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from transformers.utils.logging import get_verbosity, is_progress_bar_enabled

from detr_dist.errors import DetrDistError, UsageError
from detr_dist.inference.evaluate import EvaluationReport, evaluate
from detr_dist.inference.export import export
from detr_dist.inference.model import TrainedModel, load_model


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Compute with one thread, as the commands do: another number sums in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, new_workplace: Callable, easy_data: Path):
    """Train a run of a few steps."""
    place = new_workplace(tmp_path_factory.mktemp("trained"))
    finished = place.train(easy_data, "training.max_steps=4")
    assert finished.returncode == 0, finished.stderr
    return place


@pytest.fixture(scope="module")
def model(trained) -> TrainedModel:
    return load_model(trained.folder / "out" / "model")


def columns(results: list[dict]) -> list[tuple]:
    return [(each["image_id"], each["category_id"], each["bbox"], each["score"]) for each in results]


def test_predictions_equal_those_of_the_command_bit_for_bit(trained, model, easy_data: Path) -> None:
    arguments = ("--model", "out/model", "--input", easy_data / "val", "--output-dir", "found")
    finished = trained.run("predict", *arguments)
    assert finished.returncode == 0, finished.stderr
    expected = columns(json.loads((trained.folder / "found" / "predictions.json").read_text()))
    paths = sorted((easy_data / "val").glob("*.jpg"))
    for images in (paths, [np.asarray(Image.open(path)) for path in paths]):
        found = []
        for image_id, each in enumerate(model.predict(images), start=1):
            boxes = each.boxes_xyxy_px.astype(np.float64)
            boxes[:, 2:] -= boxes[:, :2]
            rows = zip(each.labels.tolist(), boxes.tolist(), each.scores.tolist(), strict=True)
            found += [(image_id, *row) for row in rows]
        assert found == expected
        assert len(found) > 0


@pytest.fixture(scope="module")
def report(model, easy_data: Path) -> EvaluationReport:
    return evaluate(model, easy_data / "val")


def test_an_evaluation_equals_that_of_the_run(trained, report: EvaluationReport) -> None:
    assert report.metrics == trained.results()["metrics"]
    for name, own in report.per_class.items():
        assert own["map"] == report.metrics[f"val_{name}_map"]
    assert list(report.per_class) == list(report.class_names) == ["player", "ball"]
    assert report.confusion.shape == (3, 3)
    assert report.facts["model"] == str(trained.folder / "out" / "model")


def test_a_report_is_shown_without_its_columns(report: EvaluationReport) -> None:
    assert "val_map" in repr(report)
    assert "array(" not in repr(report).replace(repr(report.confusion), "")


def test_evaluation_imports_nothing_that_a_model_names(
    trained, report: EvaluationReport, easy_data: Path, tmp_path: Path
) -> None:
    folder, code = tmp_path / "model", tmp_path / "code.py"
    shutil.copytree(trained.folder / "out" / "model", folder)
    code.write_text("raise SystemExit('was imported')", encoding="utf-8")
    mlmodel = yaml.safe_load((folder / "MLmodel").read_text(encoding="utf-8"))
    config = mlmodel["metadata"]["config"]
    config["loss"]["weights"] = {"center": 2.0, f"{code}:term": 1.0}
    config["training"]["extensions"] = [str(code)]
    (folder / "MLmodel").write_text(yaml.safe_dump(mlmodel), encoding="utf-8")
    assert evaluate(folder, easy_data / "val").metrics == report.metrics


def test_a_custom_metric_sees_every_image(report: EvaluationReport) -> None:
    details = report.details
    assert len(details) == len(details.data) == 7
    assert sum(len(details.detections(row)) for row in range(7)) == len(details.records.scores) == 7 * 8
    assert sum(len(details.truth(row).labels) for row in range(7)) == report.confusion[:2].sum()
    boxes = np.concatenate([details.truth(row).boxes_xyxy_px for row in range(7)])
    assert np.array_equal(boxes[:, 2:] - boxes[:, :2], details.data.boxes_xywh_px[:, 2:])


def test_a_call_leaves_no_global_state(model, easy_data: Path, tmp_path: Path, capfd) -> None:
    """Check process group, Accelerate state, logging handlers and torch settings; nothing is printed."""
    logging.getLogger("detr_dist").handlers.clear()  # as in a notebook
    before = is_progress_bar_enabled(), get_verbosity()
    load_model(model.reference)
    assert (is_progress_bar_enabled(), get_verbosity()) == before
    for batch_size in (2, 3):
        overrides = [f"training.batch_size={batch_size}", "training.tf32=false"]
        evaluate(model, easy_data / "val", overrides=overrides)
        assert not accelerate.PartialState._shared_state
        assert not accelerate.state.AcceleratorState._shared_state
        assert not torch.distributed.is_initialized()
        assert torch.backends.cudnn.allow_tf32
    assert export(model, tmp_path / "exported") == tmp_path / "exported"
    assert logging.getLogger("detr_dist").handlers == []
    assert capfd.readouterr().out == ""


def test_several_processes_do_not_export(model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="export works in one process"):
        export(model, tmp_path / "exported")


def test_a_model_is_exported_unchanged_after_predicting(model, easy_data, tmp_path: Path) -> None:
    image = easy_data / "val" / "001.jpg"
    expected = model.predict(image, threshold=0)
    again = load_model(export(model, tmp_path / "exported")).predict(image, threshold=0)
    assert np.array_equal(again.boxes_xyxy_px, expected.boxes_xyxy_px)
    assert np.array_equal(again.scores, expected.scores)
    with pytest.raises(DetrDistError, match="already exists"):
        export(model, tmp_path / "exported")
