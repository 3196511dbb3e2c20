"""The losses of the validation images, normalised over all of them."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from harness.data import TINY_BACKBONE
from PIL import Image

from detr_dist.config import Config, LossConfig
from detr_dist.data.coco import CocoData, load_data
from detr_dist.data.dataset import CocoDetectionDataset, collate
from detr_dist.data.transforms import build_transform
from detr_dist.distributed import HostGroup
from detr_dist.errors import DetrDistError
from detr_dist.evaluation.evaluator import Evaluator
from detr_dist.extensions import LOSSES
from detr_dist.models.build import build_detector
from detr_dist.models.criterion import SetCriterion, StepCounts
from detr_dist.models.detector import Detector
from detr_dist.resize import Resize


@pytest.fixture(scope="module")
def data(tiny_data: Path) -> CocoData:
    """Return seven images of several shapes with 0 to 3 boxes, of which the first is a crowd."""
    data = load_data(tiny_data / "val")
    iscrowd = np.zeros_like(data.iscrowd)
    iscrowd[0] = True
    return replace(data, iscrowd=iscrowd)


def config(architecture: str = "detr", *, batch_size: int = 3, num_queries: int = 8) -> Config:
    return Config.model_validate(
        {
            "data": {"num_workers": 0, "shortest_edge": 64, "longest_edge": 64},
            "model": {
                "model_architecture": architecture,
                "backbone": TINY_BACKBONE | {"hidden_sizes": [8, 8, 8, 8]},
                "pretrained_backbone": False,
                "hidden_dim": 32,
                "num_encoder_layers": 1,
                "num_decoder_layers": 2,
                "num_queries": num_queries,
                "dropout": 0.5,
            },
            "training": {"batch_size": batch_size, "mixed_precision": "no"},
        }
    )


def new_detector(settings: Config, data: CocoData) -> Detector:
    torch.manual_seed(0)
    return build_detector(settings.model, data.class_names).train()


def evaluated(settings: Config, data: CocoData, detector: Detector) -> dict[str, float]:
    accelerator = Accelerator(cpu=True)
    return Evaluator(data, settings, accelerator, HostGroup(accelerator)).evaluate(detector).metrics


@pytest.mark.parametrize("architecture", ["detr", "conditional_detr"])  # softmax and sigmoid
@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_the_loss_is_the_sum_over_images_that_are_not_padded(
    architecture: str, batch_size: int, data: CocoData
) -> None:
    settings = config(architecture, batch_size=batch_size)
    detector = new_detector(settings, data)
    metrics = evaluated(settings, data, detector)
    assert detector.training

    transform = build_transform("none", Resize(64, 64), train=False)
    images = CocoDetectionDataset(data, transform, seed=0, train=False)
    batches = [collate([images[0, row]]) for row in range(7)]
    num_boxes = sum(sum(batch.num_boxes) for batch in batches)
    assert num_boxes == len(data.box_classes) - 1  # all but the crowd
    detector.eval()
    with torch.no_grad():
        parts = [
            SetCriterion(detector.loss_settings)(
                detector(batch.images, batch.sizes_hw),
                batch.labels,
                batch.boxes_cxcywh,
                batch.num_boxes,
                StepCounts(num_boxes, 7),
            ).logged
            for batch in batches
        ]
    for name in ("loss", "loss_ce", "loss_bbox", "loss_giou"):
        expected = sum(float(part[name]) for part in parts)
        assert metrics[name] == pytest.approx(expected, rel=1e-5), name  # float32 in another order


def test_photographs_that_are_stored_rotated_have_the_metrics_of_upright_ones(
    data: CocoData, tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    names = [f"{row}.png" for row in range(len(data))]
    for folder, is_rotated in ((tmp_path / "upright", False), (tmp_path / "rotated", True)):
        folder.mkdir()
        for row, name in enumerate(names):
            with Image.open(data.image_path(row)) as image:
                pixels = image.transpose(Image.Transpose.ROTATE_90) if is_rotated else image
                pixels.save(folder / name, exif=exif if is_rotated else None)
    as_png = replace(data, file_names=np.array([name.encode() for name in names]))
    settings = config()
    detector = new_detector(settings, data)
    upright, rotated = (
        evaluated(settings, replace(as_png, images_dir=tmp_path / name), detector)
        for name in ("upright", "rotated")
    )
    assert rotated == upright


@pytest.mark.parametrize("architecture", ["detr", "conditional_detr"])
@pytest.mark.parametrize("batch_size", [1, 7])
def test_class_weights_apply_to_the_validation_loss(
    architecture: str, batch_size: int, data: CocoData
) -> None:
    settings = config(architecture, batch_size=batch_size)
    weighted = settings.model_copy(update={"loss": LossConfig(class_weights={"ball": 5.0})})
    detector = new_detector(settings, data)
    plain, found = evaluated(settings, data, detector), evaluated(weighted, data, detector)
    assert found["loss_bbox"] == plain["loss_bbox"]
    assert found["loss_ce"] != pytest.approx(plain["loss_ce"], rel=1e-3)
    expected = evaluated(
        weighted.model_copy(update={"training": config(batch_size=3).training}), data, detector
    )
    assert found["loss_ce"] == pytest.approx(expected["loss_ce"], rel=1e-5)  # float32 in another order


def test_an_image_counts_at_most_as_many_boxes_as_there_are_queries(data: CocoData) -> None:
    settings = config(num_queries=2)
    detector = new_detector(settings, data)
    torch.nn.init.zeros_(detector.network.class_labels_classifier.weight)
    torch.nn.init.zeros_(detector.network.class_labels_classifier.bias)
    # Where every class is as likely, the mean cross entropy is log 3 whatever is matched with what.
    assert evaluated(settings, data, detector)["loss_ce"] == pytest.approx(np.log(3), rel=1e-6)


def test_curves_and_confusion_matrix_come_with_the_metrics(data: CocoData) -> None:
    settings = config()
    accelerator = Accelerator(cpu=True)
    scores = Evaluator(data, settings, accelerator, HostGroup(accelerator)).evaluate(
        new_detector(settings, data)
    )
    assert scores.details is not None
    points = scores.details.operating_points
    assert points.metrics(data.class_names).items() <= scores.metrics.items()
    assert points.confusion[:2].sum() == len(data.box_classes) - 1


def test_an_unreadable_image_has_boxes_and_no_detections(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_data / "val", tmp_path / "val")
    (tmp_path / "val" / "003.jpg").write_bytes(b"no image")
    settings, data = config(), load_data(tmp_path / "val")
    accelerator = Accelerator(cpu=True)
    scores = Evaluator(data, settings, accelerator, HostGroup(accelerator)).evaluate(
        new_detector(settings, data)
    )
    assert scores.details is not None
    assert set(scores.details.records.image_rows) == {0, 1, 2, 4, 5, 6}
    assert scores.details.operating_points.confusion[:2].sum() == len(data.box_classes)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"warning: {tmp_path / 'val' / '003.jpg'}: ")


def test_weights_with_non_finite_outputs_are_an_error(data: CocoData) -> None:
    settings = config()
    detector = new_detector(settings, data)
    torch.nn.init.constant_(detector.network.class_labels_classifier.bias, float("nan"))
    with pytest.raises(Exception, match=r"not finite.*training\.learning_rate"):
        evaluated(settings, data, detector)


def test_a_loss_that_is_not_finite_is_named_and_the_weights_are_not(
    data: CocoData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LOSSES._objects, "own", lambda matched: matched.logits.sum((1, 2, 3)) / 0)
    settings = config()
    settings = settings.model_copy(update={"loss": LossConfig(weights={"own": 1.0})})
    with pytest.raises(DetrDistError, match=r"NaN or Inf is val_loss, val_loss_own; correct"):
        evaluated(settings, data, new_detector(settings, data))
