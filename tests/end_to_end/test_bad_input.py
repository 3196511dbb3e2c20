"""Bad input gives one clear line and a non-zero exit code before training starts, on every process."""

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pytest
from harness.data import TINY_BACKBONE

from detr_dist.cli import main

Document = dict[str, Any]
JSON = "_annotations.coco.json"


def edit(path: Path, change: Callable[[Document], object]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def first_box(document: Document) -> Document:
    box: Document = document["annotations"][0]
    return box


BAD_DATA: dict[str, tuple[Callable[[Path], object], str]] = {
    "no_such_folder": (lambda d: shutil.rmtree(d / "train"), "train"),
    "no_json": (lambda d: (d / "train" / JSON).unlink(), "JSON"),
    "two_json_files": (
        lambda d: [
            shutil.copy(d / "train" / JSON, d / "train" / "a.json"),
            (d / "train" / JSON).rename(d / "train" / "b.json"),
        ],
        "b.json",
    ),
    "broken_json": (lambda d: (d / "train" / JSON).write_text('{"images": [}'), "column 13"),
    "missing_image": (lambda d: (d / "train" / "003.jpg").unlink(), "003.jpg"),
    "annotation_without_image": (
        lambda d: edit(d / "train" / JSON, lambda doc: first_box(doc).update(image_id=999)),
        "999",
    ),
    "negative_box": (
        lambda d: edit(d / "train" / JSON, lambda doc: first_box(doc).update(bbox=[5, 5, -3, 4])),
        "-3",
    ),
    "no_box_to_train_on": (
        lambda d: edit(d / "train" / JSON, lambda doc: [box.update(iscrowd=1) for box in doc["annotations"]]),
        "no box to train on",
    ),
    "other_classes": (
        lambda d: edit(d / "val" / JSON, lambda doc: doc["categories"][1].update(name="referee")),
        "referee",
    ),
}


@pytest.fixture
def data(tiny_data: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_data, tmp_path / "data"))


def error_lines(workplace, data: Path, capsys, *overrides: str) -> tuple[int, list[str]]:
    folders = [
        "--train-dir",
        data / "train",
        "--val-dir",
        data / "val",
        "--output-dir",
        workplace.folder / "out",
    ]
    with pytest.raises(SystemExit) as exit_info:
        main([str(part) for part in ["train", "--config", workplace.config, *folders, *overrides]])
    assert not list((workplace.folder / "out").glob("*"))
    return exit_info.value.code, capsys.readouterr().err.strip().splitlines()


@pytest.mark.parametrize("name", BAD_DATA)
def test_unusable_data_fails_with_one_line_that_names_the_culprit(name, workplace, data, capsys) -> None:
    corrupt, culprit = BAD_DATA[name]
    corrupt(data)
    code, lines = error_lines(workplace, data, capsys)
    assert code == 1
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert culprit in lines[0]


@pytest.mark.parametrize(
    ("override", "code", "fragment"),
    [
        ("training.batch_sise=4", 2, "training.batch_size"),
        ("training.batch_size=many", 2, "training.batch_size"),
        ("training.batch_size=0", 2, "training.batch_size"),
        ("data.longest_edge=32", 2, "longest_edge"),
        ("batch_size", 2, "section.key=value"),
        ("model.num_classes=5", 2, "model.num_classes is 5"),
        ("model.num_queries=2", 1, "3 boxes"),
        ("data.augmentation=[light, nowhere.Blur]", 2, "data.augmentation: nowhere.Blur cannot be imported"),
        ("training.batch_size=999", 2, "training data has 40"),
        ("logging.mlflow_tracking_uri=sqlite:////no/such/folder/x.db", 2, "logging.mlflow_tracking_uri"),
        ("logging.mlflow_tracking_uri=gopher://x", 2, "logging.mlflow_tracking_uri"),
        ("model.config_overrides.num_feature_levels=3", 2, "num_feature_levels"),
        ("model.backbone=resnet_of_nobody", 2, "resnet_of_nobody"),
        ("model.pretrained=/no/such/folder", 2, "/no/such/folder"),
    ],
)
def test_an_invalid_setting_fails_with_one_line(override, code, fragment, workplace, data, capsys) -> None:
    found, lines = error_lines(workplace, data, capsys, override)
    assert (found, len(lines)) == (code, 1), lines
    assert fragment in lines[0]


@pytest.mark.parametrize("options", [(), ("--dry-run",)])
def test_sizes_that_a_family_does_not_take_fail_with_one_line(options, workplace, data, capsys) -> None:
    backbone = TINY_BACKBONE | {"out_features": ["stage2", "stage3", "stage4"]}
    settings = ("data.resize=shortest_edge", "data.shortest_edge=80", "data.multi_scale=[64, 100]")
    network = ("model.model_architecture=rt_detr_v2", f"model.backbone={json.dumps(backbone)}")
    code, lines = error_lines(workplace, data, capsys, *options, *network, *settings)
    assert code == 2
    assert lines == [
        "error: rt_detr_v2 takes images with sides that are multiples of 32: set data.resize=square or "
        "rectangle (it is shortest_edge), data.shortest_edge=64 or 96 (it is 80), data.multi_scale=96 or 128 "
        "(it is 100)"
    ]


def test_all_wrong_settings_are_reported_together(workplace, data, capsys) -> None:
    code, lines = error_lines(
        workplace, data, capsys, "training.seed=-1", "logging.tensorbord=true", "dta.x=1"
    )
    assert code == 2
    assert len(lines) == 3


def test_boxes_are_clipped_and_empty_boxes_dropped_with_a_warning(workplace, data) -> None:
    def corrupt(document: Document) -> None:
        document["annotations"][0]["bbox"] = [-5, 2, 20, 20]
        document["annotations"][1]["bbox"] = [300, 300, 10, 10]

    edit(data / "train" / JSON, corrupt)
    finished = workplace.train(data, "training.max_steps=1", "logging.mlflow=false")
    assert finished.returncode == 0, finished.stderr
    clipped, dropped = (
        next(line for line in finished.stdout.splitlines() if word in line) for word in ("clipped", "extent")
    )
    assert "1 " in clipped
    assert "1 " in dropped


@pytest.mark.dist
def test_every_process_reports_the_error_and_none_hangs(workplace, data) -> None:
    (data / "train" / "003.jpg").unlink()
    finished = workplace.train(data, num_processes=2)
    assert finished.returncode != 0
    for process in (0, 1):
        assert f"[process {process}] error: " in finished.stderr
    assert "003.jpg" in finished.stderr


@pytest.mark.dist
def test_batch_norm_cannot_be_synchronised_on_the_cpu(workplace, data) -> None:
    finished = workplace.train(data, "training.sync_batch_norm=true", num_processes=2)
    assert finished.returncode != 0
    for process in (0, 1):
        refused = "training.sync_batch_norm: torch synchronises batch norm on GPUs only"
        assert f"[process {process}] error: {refused}" in finished.stderr
    assert not (workplace.folder / "out").exists()  # nothing has been written or tracked


@pytest.mark.dist
def test_an_error_on_one_process_during_training_is_reported_on_all(workplace, data) -> None:
    for path in (data / "train").glob("*.jpg"):
        path.write_bytes(b"not an image")
    finished = workplace.train(data, "logging.mlflow=false", "data.num_workers=1", num_processes=2)
    assert finished.returncode != 0
    for process in (0, 1):
        stopped = f"stopped at step 0: process 0 ({socket.gethostname()}): 10 images in a row"
        assert f"[process {process}] error: {stopped}" in finished.stderr


@pytest.mark.dist
def test_a_failing_transform_is_named_with_its_image_on_every_process(workplace, data) -> None:
    (workplace.folder / "own.py").write_text("def fail(example, rng):\n    raise ValueError('mine')\n")
    overrides = "logging.mlflow=false", "data.num_workers=1", "data.augmentation=[light, mosaic, own.py:fail]"
    finished = workplace.train(data, *overrides, num_processes=2)
    assert finished.returncode != 0
    for process in (0, 1):
        (line,) = (each for each in finished.stderr.splitlines() if f"[process {process}] error: " in each)
        assert "data.augmentation: own.py:fail failed on image " in line
        assert "ValueError: mine" in line


def test_an_error_in_a_loader_process_fails_the_run_with_one_line(workplace, data) -> None:
    for path in (data / "train").glob("*.jpg"):
        path.write_bytes(b"not an image")
    finished = workplace.train(data, "data.num_workers=2")
    assert finished.returncode == 1
    (line,) = finished.stderr.splitlines()
    assert "10 images in a row" in line
    client = mlflow.MlflowClient(f"sqlite:///{workplace.folder / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("detr_training").experiment_id])
    assert run.info.status == "FAILED"
    assert "10 images in a row" in run.data.tags["error"]
