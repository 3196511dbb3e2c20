"""Data sets of any format in the commands: the same training as from COCO, and `detr-dist convert`."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from harness.data import TINY_CONFIG
from harness.formats import WRITERS, zipped

from detr_dist.config import Config
from detr_dist.data.coco import CocoData, load_data
from detr_dist.data.formats import Split
from detr_dist.evaluation.coco_metrics import compute_coco_metrics
from detr_dist.evaluation.detections import DetectionRecords
from detr_dist.training.callback import Callback, StepEvent
from detr_dist.training.trainer import train

JSON = "_annotations.coco.json"
SPLITS = ("train", "val")


@pytest.fixture(scope="module")
def coco(easy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy `easy_data` with class names whose alphabetical order, as in Pascal VOC, is that of the ids."""
    folder = Path(shutil.copytree(easy_data, tmp_path_factory.mktemp("formats") / "coco"))
    for path in folder.glob(f"*/{JSON}"):
        document = json.loads(path.read_text())
        document["categories"] = [{"id": 1, "name": "ball"}, {"id": 2, "name": "player"}]
        path.write_text(json.dumps(document))
    return folder


@pytest.fixture(scope="module")
def originals(coco: Path) -> dict[str, CocoData]:
    return {split: load_data(coco / split) for split in SPLITS}


class Losses(Callback):
    """Keeps the loss of every step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_step(self, event: StepEvent) -> None:
        self.values.append(event.metrics["train_loss"])


def ap_of_shifted_boxes(data: CocoData) -> dict[str, float]:
    """Return the metrics of detections at random distances from the boxes of a data set."""
    rng = np.random.default_rng(0)
    xyxy_px = np.hstack([data.boxes_xywh_px[:, :2], data.boxes_xywh_px[:, :2] + data.boxes_xywh_px[:, 2:]])
    records = DetectionRecords(
        evaluated_rows=np.arange(len(data)),
        image_rows=data.image_rows,
        boxes_xyxy_px=(xyxy_px + rng.uniform(-3, 3, xyxy_px.shape)).astype(np.float32),
        scores=rng.random(len(xyxy_px)).astype(np.float32),
        labels=data.box_classes,
    )
    return compute_coco_metrics(data, records).metrics


def test_losses_and_ap_are_the_same_from_all_formats(
    coco: Path, originals: dict[str, CocoData], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DETR_DIST_CACHE", str(tmp_path / "cache"))
    sources = {name: write(originals, tmp_path / "data" / name) for name, write in WRITERS.items()}
    sources["zip"] = zipped(tmp_path / "data" / "yolo")
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY_CONFIG))
    config = Config.load(tmp_path / "tiny.yaml", ["training.max_steps=10", "logging.mlflow=false"])
    losses, metrics, scores = {}, {}, {}
    for name, train_dir in {"coco": coco / "train", **sources}.items():
        steps, val_dir = Losses(), coco / "val" if name == "coco" else None
        run = train(
            config, train_dir=train_dir, val_dir=val_dir, output_dir=tmp_path / name, callbacks=[steps]
        )
        losses[name] = steps.values
        metrics[name] = {key: value for key, value in run.metrics.items() if "seconds" not in key}
        scores[name] = ap_of_shifted_boxes(load_data(Split(val_dir or train_dir, "val")))
    assert len(losses["coco"]) == 10
    assert 0.1 < scores["coco"]["map"] < 0.9
    for name in ("voc", "cvat"):
        assert losses[name] == losses["coco"]
        assert metrics[name] == metrics["coco"]
        assert scores[name] == scores["coco"]
    # Boxes as fractions of the image differ in their last digit, and so may the sums of float32.
    np.testing.assert_allclose(losses["yolo"], losses["coco"], rtol=1e-4)
    assert metrics["yolo"] == pytest.approx(metrics["coco"], rel=1e-3, abs=1e-4)
    assert scores["yolo"] == pytest.approx(scores["coco"], abs=1e-9)
    assert (losses["zip"], metrics["zip"], scores["zip"]) == (losses["yolo"], metrics["yolo"], scores["yolo"])


def test_training_needs_a_split_to_validate_on(workplace, coco: Path) -> None:
    command = ("train", "--config", workplace.config, "--output-dir", "out", "--train-dir")
    finished = workplace.run(*command, coco / "train")
    assert finished.returncode == 2
    (line,) = finished.stderr.splitlines()
    assert f"--val-dir is missing, and {coco / 'train'} has no split 'val'" in line


def test_check_data_checks_all_splits_of_a_source(workplace, originals: dict[str, CocoData]) -> None:
    source = WRITERS["yolo"](originals, workplace.folder / "yolo")
    (workplace.folder / "yolo" / "labels" / "val" / "val_001.txt").write_text("5 0.5 0.5 0.1 0.1\n")
    report = json.loads(workplace.run("check-data", "--json", "--quick", source).stdout)
    assert [each["split"] for each in report["splits"]] == [f"{source} (train)", f"{source} (val)"]
    (error,) = (each for each in report["findings"] if each["level"] == "error")
    assert (error["split"], error["kind"]) == (f"{source} (val)", "unknown_class")
    assert error["examples"] == ["labels/val/val_001.txt:1: class '5', but 'names' has 0 to 1"]


def test_converted_data_give_the_same_columns(workplace, originals: dict[str, CocoData]) -> None:
    source = WRITERS["yolo"](originals, workplace.folder / "yolo")
    finished = workplace.run("convert", source, "coco")
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.splitlines()[-2:] == [
        f"coco/train: 96 images, {len(originals['train'].box_classes)} boxes",
        f"coco/valid: 7 images, {len(originals['val'].box_classes)} boxes",
    ]
    assert sorted(path.name for path in workplace.folder.glob("coco/*")) == ["train", "valid"]
    for split, folder in (("train", "train"), ("val", "valid")):
        before, after = load_data(Split(source, split)), load_data(workplace.folder / "coco" / folder)
        assert after.fingerprint() == before.fingerprint()
        for column in ("image_ids", "annotation_ids", "areas"):
            np.testing.assert_array_equal(getattr(after, column), getattr(before, column))
        assert (after.class_names, after.category_ids) == (before.class_names, before.category_ids)
        assert Path(after.image_path(0)).samefile(before.image_path(0)), "a hard link"
    assert load_data(Split(workplace.folder / "coco", "val")).class_names == ("ball", "player")


def test_conversion_keeps_ids_crowds_and_sub_folders(workplace, tiny_data: Path) -> None:
    document = json.loads((tiny_data / "val" / JSON).read_text())
    source = workplace.folder / "source"
    for i, image in enumerate(document["images"][:2]):
        target = source / "ab"[i] / "1.jpg"
        target.parent.mkdir(parents=True)
        shutil.copy(tiny_data / "val" / image["file_name"], target)
        image |= {"file_name": f"{'ab'[i]}/1.jpg", "id": 1000 - i}
    boxes = [
        {"id": 70, "image_id": 999, "category_id": 5, "bbox": [1, 2, 3, 4.5], "area": 7.25, "iscrowd": 1},
        {"id": 60, "image_id": 1000, "category_id": 9, "bbox": [1, 2, 3, 4]},
    ]
    categories = [{"id": 9, "name": "ball", "supercategory": "all"}, {"id": 5, "name": "player"}]
    document = {"images": document["images"][:2], "annotations": boxes, "categories": categories}
    (source / JSON).write_text(json.dumps(document))
    finished = workplace.run("convert", "source", "out")
    assert finished.returncode == 0, finished.stderr
    before, after = load_data(source), load_data(workplace.folder / "out")
    assert after.fingerprint() == before.fingerprint()
    assert after.image_ids.tolist() == [1000, 999]
    assert after.annotation_ids.tolist() == [60, 70]
    assert after.category_ids == (5, 9)
    assert after.areas.tolist() == [12, 7.25]
    assert after.image_path(1) == workplace.folder / "out" / "b" / "1.jpg"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["data", "full"], 2, "OUT full: already exists; delete it or choose another"),
        (["nowhere", "out"], 1, "nowhere: does not exist"),
        (["broken", "out"], 1, "1 image of 7 missing in broken"),
    ],
)
def test_what_cannot_be_converted_leaves_nothing(
    arguments: list[str], code: int, message: str, workplace, tiny_data: Path
) -> None:
    folder = workplace.folder
    (folder / "full").mkdir()
    (folder / "full" / "a").touch()
    shutil.copytree(tiny_data / "val", folder / "data")
    shutil.copytree(tiny_data / "val", folder / "broken")
    (folder / "broken" / "001.jpg").unlink()
    finished = workplace.run("convert", *arguments)
    assert finished.returncode == code
    (line,) = finished.stderr.splitlines()
    assert message in line
    assert not (folder / "out").exists()
    assert not list(folder.glob(".*.partial"))
