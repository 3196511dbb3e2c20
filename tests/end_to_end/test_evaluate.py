"""`detr-dist evaluate` gives the metrics of training for every model reference and number of processes."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from mlflow import MlflowClient


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, new_workplace: Callable, easy_data: Path):
    """Train a run with one evaluation, at its end, with averaged weights and trained batch norm."""
    place = new_workplace(tmp_path_factory.mktemp("trained"))
    settings = (
        *("training.max_steps=120", "training.num_epochs=5", "training.ema_decay=0.9"),
        *(
            "training.learning_rate=3e-3",
            "training.learning_rate_backbone=1e-3",
            "evaluation.every_epochs=5",
        ),
        *("checkpoint.every_epochs=5", "logging.register_model_as=detector"),
    )
    finished = place.train(easy_data, *settings)
    assert finished.returncode == 0, finished.stderr
    return place


def report_of(place, *arguments: str | Path, num_processes: int = 1) -> dict:
    finished = place.run("evaluate", "--report", "report.json", *arguments, num_processes=num_processes)
    assert (finished.returncode, finished.stderr) == (0, "")  # no library has warned of anything
    return json.loads((place.folder / "report.json").read_text())


def error_of(finished: subprocess.CompletedProcess[str], code: int = 2) -> str:
    assert finished.returncode == code, finished.stderr
    (line,) = finished.stderr.splitlines()
    return line


@pytest.mark.parametrize(
    "model", ["out/checkpoints/last", "out/model", "RUN", "runs:/RUN/model", "models:/detector@best"]
)
def test_every_model_reference_gives_the_metrics_of_the_run(trained, easy_data: Path, model: str) -> None:
    logged = trained.results()["metrics"]
    model = model.replace("RUN", trained.results()["run_id"])
    report = report_of(trained, "--model", model, "--data-dir", easy_data / "val")
    assert report["metrics"] == logged
    assert len(logged) > 20
    assert (report["model"], report["num_images"], report["thresholds"]) == (model, 7, "auto")
    assert (report["run_id"] in (trained.results()["run_id"], None), report["step"]) == (True, 120)


TILES = ("data.tiles={size: 48}",)


@pytest.fixture(scope="module")
def alone(trained, easy_data: Path) -> Callable[[tuple[str, ...]], tuple[dict, list[dict]]]:
    """Return report and predictions of one process with one image at a time and more loaders than cores."""

    @cache
    def evaluate(overrides: tuple[str, ...]) -> tuple[dict, list[dict]]:
        data = ("--data-dir", easy_data / "val", "--predictions", "new/alone.json")
        settings = ("training.batch_size=1", "data.num_workers=9", *overrides)
        report = report_of(trained, "--model", "out/model", *data, *settings)
        return report, json.loads((trained.folder / "new" / "alone.json").read_text())

    return evaluate


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_processes", "batch_size", "overrides"),
    [(1, 8, ()), (2, 8, ()), (3, 1, ()), (4, 1, ()), (2, 3, TILES)],
)
def test_num_processes_and_batch_size_change_no_result(
    trained, alone, easy_data: Path, num_processes: int, batch_size: int, overrides: tuple[str, ...]
) -> None:
    report = report_of(
        *(trained, "--model", "out/model", "--data-dir", easy_data / "val", "--predictions", "n.json"),
        *(f"training.batch_size={batch_size}", *overrides),
        num_processes=num_processes,
    )
    assert report["num_processes"] == num_processes
    expected_report, expected = alone(overrides)
    found = json.loads((trained.folder / "n.json").read_text())
    if overrides == TILES:
        assert len(expected) > 7 * 8  # of several windows
    else:
        assert len(expected) == 7 * 8  # queries of each image
    for one, other in zip(expected, found, strict=True):
        assert (one["image_id"], one["category_id"]) == (other["image_id"], other["category_id"])
        assert other["score"] == pytest.approx(one["score"], abs=1e-6)  # float32
        assert other["bbox"] == pytest.approx(one["bbox"], abs=1e-3)  # in pixels of up to 120
    assert report["confusion"] == expected_report["confusion"]
    metrics, expected_metrics = report["metrics"], expected_report["metrics"]
    assert metrics == pytest.approx(expected_metrics, abs=1e-5)  # losses of about 10, scores as thresholds
    ranking = [name for name in metrics if not re.search("loss|threshold|calibration", name)]
    assert [metrics[name] for name in ranking] == [expected_metrics[name] for name in ranking]


def test_thresholds_of_the_model_replace_the_best_thresholds(trained, easy_data: Path) -> None:
    arguments = ("--model", "out/model", "--data-dir", easy_data / "train")
    best, brought = report_of(trained, *arguments), report_of(trained, *arguments, "--model-thresholds")
    of_training = trained.results()["metrics"]["val_player_threshold"]
    assert brought["metrics"]["val_player_threshold"] == of_training
    assert best["metrics"]["val_player_threshold"] != of_training
    assert best["metrics"]["val_player_f1"] > brought["metrics"]["val_player_f1"]
    assert best["metrics"]["val_map"] == brought["metrics"]["val_map"]


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (("--model", "models:/detector"), 2, "models:/detector: names no version; add one"),
        (("--model", "out/model", "--model-thresholds", "evaluation.score_threshold=0.3"), 2, "give one of"),
        (("--model", "out/modle"), 2, "out/modle: no such folder"),
        (("--model", "out/model", "--report", "out/model/config.json/x.json"), 2, "--report "),
        (
            ("--model", "out/model", "evaluation.score_treshold=0.5"),
            2,
            "did you mean evaluation.score_threshold",
        ),
        (("--model", "runs:/0/model", "--tracking-uri", "sqlite:///none.db"), 2, "correct --tracking-uri"),
        (("--model", "out/model", "--data-dir", "empty"), 1, "empty: no JSON file"),
    ],
)
def test_invalid_arguments_fail_with_one_line(
    trained, easy_data: Path, arguments, code: int, part: str
) -> None:
    (trained.folder / "empty").mkdir(exist_ok=True)
    finished = trained.run("evaluate", "--data-dir", easy_data / "val", *arguments)
    assert part in error_of(finished, code)


@pytest.fixture
def val(easy_data: Path, tmp_path: Path) -> dict:
    """Return the document of the validation data, to be changed before `tmp_path` is used as data."""
    for each in (easy_data / "val").glob("*.jpg"):
        (tmp_path / each.name).symlink_to(each)
    return json.loads((easy_data / "val" / "_annotations.coco.json").read_text())


def test_data_with_a_class_unknown_to_the_model_are_refused(trained, val: dict, tmp_path: Path) -> None:
    val["categories"][0]["name"] = "referee"
    (tmp_path / "a.json").write_text(json.dumps(val))
    line = error_of(trained.run("evaluate", "--model", "out/model", "--data-dir", tmp_path), 1)
    assert "1 class not shared with out/model" in line
    assert "referee only here" in line


def test_a_class_unknown_to_the_data_has_no_metrics(trained, val: dict, tmp_path: Path) -> None:
    val["categories"] = [{"id": 7, "name": "player"}]
    players = [each for each in val["annotations"] if each["category_id"] == 1]
    val["annotations"] = [each | {"category_id": 7} for each in players]
    (tmp_path / "a.json").write_text(json.dumps(val))
    report = report_of(
        trained, "--model", "out/model", "--data-dir", tmp_path, "--predictions", "players.json"
    )
    assert report["class_names"] == ["player", "ball"]
    assert "val_ball_map" not in report["metrics"]
    assert report["metrics"]["val_map"] == report["metrics"]["val_player_map"]
    assert {each["category_id"] for each in json.loads((trained.folder / "players.json").read_text())} == {7}


def test_a_setting_that_conflicts_with_the_defaults_can_be_overridden(trained, easy_data: Path) -> None:
    """Use a model trained with 64 to 96 pixels; the default shortest edge is 800."""
    report = report_of(
        trained, "--model", "out/model", "--data-dir", easy_data / "val", "data.longest_edge=90"
    )
    assert report["config"]["data"]["shortest_edge"] == 64
    assert report["config"]["data"]["longest_edge"] == 90


def test_log_adds_test_metrics_and_plots_to_the_run_of_the_model(
    trained, easy_data: Path, empty_store: Path
) -> None:
    run_id = trained.results()["run_id"]
    shutil.copy(empty_store, trained.folder / "other.db")
    test_data = shutil.copytree(easy_data / "val", trained.folder / "test")
    for model, store, has_run in (
        ("out/model", "other.db", False),
        ("models:/detector@best", "mlflow.db", True),
    ):
        client = MlflowClient(f"sqlite:///{trained.folder / store}")
        override = f"logging.mlflow_tracking_uri=sqlite:///{store}"
        finished = trained.run("evaluate", "--model", model, "--data-dir", test_data, "--log", override)
        assert finished.returncode == 0, finished.stderr
        (line,) = [line for line in finished.stdout.splitlines() if line.startswith("MLflow run")]
        assert (line.split()[2] == run_id) is has_run
        run = client.get_run(line.split()[2])
        assert run.info.status == "FINISHED"
        assert run.data.metrics["test_map"] == trained.results()["metrics"]["val_map"]
        contexts = [tag.value for each in run.inputs.dataset_inputs for tag in each.tags]
        assert "test" in contexts
        names = {
            Path(each.path).name.split("+")[0] for each in client.list_artifacts(run.info.run_id, "images")
        }
        assert "test_confusion_matrix" in names
    (history,) = client.get_metric_history(run_id, "test_map")
    assert history.step == 120
    models = client.search_logged_models([client.get_run(run_id).info.experiment_id])
    assert "test_map" in {metric.key for each in models for metric in each.metrics}
