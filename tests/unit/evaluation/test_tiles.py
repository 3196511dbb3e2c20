"""Detection in windows of images equals a run of the network on each window alone, however it is split."""

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState
from harness.data import TINY_BACKBONE
from torchvision.transforms.v2 import functional as F

from detr_dist.config import Config, override_config
from detr_dist.config_tiles import Tiles
from detr_dist.data.coco import CocoData, load_data
from detr_dist.distributed import HostGroup
from detr_dist.evaluation.detections import DetectionRecords
from detr_dist.evaluation.evaluator import Evaluator
from detr_dist.evaluation.image_pass import ImagePass, Views
from detr_dist.models.build import build_detector
from detr_dist.models.criterion import SetCriterion, StepCounts
from detr_dist.models.detector import Detector
from detr_dist.resize import Resize
from detr_dist.serving.decoding import decode_rgb
from detr_dist.serving.postprocess import postprocess
from detr_dist.serving.tiles import merge_windows

TILES = {"size": 40, "overlap": 0.25}


@pytest.fixture(scope="module")
def data(tiny_data: Path) -> CocoData:
    """Return images of several shapes, some smaller than a window."""
    return load_data(tiny_data / "val")


def config(batch_size: int, tiles: dict[str, object] | None = TILES) -> Config:
    return Config.model_validate(
        {
            "data": {"num_workers": 0, "shortest_edge": 64, "longest_edge": 96, "tiles": tiles},
            "model": {
                "backbone": TINY_BACKBONE,
                "pretrained_backbone": False,
                "hidden_dim": 32,
                "num_encoder_layers": 1,
                "num_decoder_layers": 2,
                "num_queries": 8,
            },
            "training": {"batch_size": batch_size, "mixed_precision": "no"},
        }
    )


@pytest.fixture(scope="module")
def detector(data: CocoData) -> Detector:
    torch.manual_seed(0)
    detector = build_detector(config(1).model, data.class_names).eval()
    with torch.no_grad():  # untrained queries would be nearly the same, rounding would choose
        for parameter in detector.network.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return detector


@torch.no_grad()
def one_by_one(data: CocoData, detector: Detector, settings: Config) -> DetectionRecords:
    """Run the network on every window alone."""
    tiles, parts = settings.data.tiles, []
    assert isinstance(tiles, Tiles)
    for row in range(len(data)):
        image = decode_rgb(data.image_path(row))
        windows = np.array(tiles.grid.windows(*image.shape[-2:]))
        boxes, scores, labels, rows = [], [], [], []
        for number, (left, top, right, bottom) in enumerate(windows.tolist()):
            size_hw = (bottom - top, right - left)
            resized_hw = Resize.of(settings.data).size_hw(*size_hw)
            window = F.resize(image[:, top:bottom, left:right], [*resized_hw], antialias=True)
            outputs = detector(window[None], torch.tensor([resized_hw]), False)
            found = postprocess(outputs, torch.tensor([size_hw]), detector.loss_settings.kind)
            boxes.append(found.boxes_xyxy_px[0] + torch.tensor([left, top, left, top]))
            scores.append(found.scores[0])
            labels.append(found.labels[0])
            rows += [number] * len(found.scores[0])
        of_image = [torch.cat(each).numpy() for each in (boxes, scores, labels)]
        kept = merge_windows(*of_image, np.array(rows), windows, most=300)
        columns = [each[kept] for each in of_image]
        parts.append(DetectionRecords(np.array([row]), np.full(len(kept), row), *columns))
    return DetectionRecords.concatenate(parts)


def detect(data: CocoData, detector: Detector, settings: Config, num_processes: int = 1) -> DetectionRecords:
    parts = []
    for index in range(num_processes):
        place = {"num_processes": num_processes, "process_index": index}
        images = ImagePass(data, settings, torch.device("cpu"), **place)
        with closing(images.run(detector)) as all_predicted:
            parts += [predicted.records for predicted in all_predicted]
    return DetectionRecords.concatenate(parts)


@pytest.fixture(scope="module", params=[True, False], ids=["with_full_image", "windows_only"])
def alone(request, data, detector) -> tuple[dict[str, object], DetectionRecords]:
    """Return the settings of windows, and the detections of each window alone."""
    tiles = TILES | {"full_image": request.param}
    return tiles, one_by_one(data, detector, config(1, tiles))


@pytest.mark.parametrize(("batch_size", "num_processes"), [(1, 1), (3, 1), (8, 2)])
def test_windows_give_the_detections_of_each_alone(data, detector, batch_size, num_processes, alone):
    tiles, expected = alone
    found = detect(data, detector, config(batch_size, tiles), num_processes)
    for name in ("evaluated_rows", "image_rows", "labels"):
        assert np.array_equal(getattr(found, name), getattr(expected, name)), name
    assert np.allclose(found.scores, expected.scores, rtol=0, atol=1e-5)
    assert np.allclose(found.boxes_xyxy_px, expected.boxes_xyxy_px, rtol=0, atol=1e-3)


def test_windows_that_hold_every_image_change_nothing(data, detector):
    with_tiles = detect(data, detector, config(3, {"size": 4000}))
    without = detect(data, detector, config(3, None))
    assert np.array_equal(with_tiles.boxes_xyxy_px, without.boxes_xyxy_px)
    assert np.array_equal(with_tiles.scores, without.scores)


def test_losses_are_those_of_all_windows_whatever_the_batch_size(data, detector):
    def metrics(batch_size: int) -> dict[str, float]:
        processes = PartialState()
        evaluator = Evaluator(data, config(batch_size), processes, HostGroup(processes))
        return evaluator.evaluate(detector).metrics

    one, many = metrics(1), metrics(7)
    assert one == pytest.approx(many, rel=1e-6)
    assert one["loss"] > 0


def test_the_loss_is_that_of_each_window_divided_by_what_all_of_them_hold(data, detector):
    """Ignored regions have no part in the denominator of the softmax."""
    settings, processes = config(1, TILES | {"min_visible": 1.0}), PartialState()
    evaluated = Evaluator(data, settings, processes, HostGroup(processes)).evaluate(detector)
    with closing(ImagePass(data, settings, torch.device("cpu")).run(detector)) as all_predicted:
        alone = [(predicted.outputs, predicted.batch) for predicted in all_predicted]
    num_boxes = sum(min(batch.num_boxes[0], 8) for _, batch in alone)
    num_ignored = sum(
        min(batch.ignored.num_boxes[0], 8 - min(batch.num_boxes[0], 8))
        for _, batch in alone
        if batch.ignored is not None
    )
    assert num_ignored > 0
    counts = StepCounts(num_boxes, len(alone), num_ignored=num_ignored)
    criterion = SetCriterion(detector.loss_settings)
    losses = [
        criterion(
            outputs, batch.labels, batch.boxes_cxcywh, batch.num_boxes, counts, ignored=batch.ignored
        ).logged
        for outputs, batch in alone
    ]
    for name in ("loss", "loss_ce", "loss_bbox"):
        assert evaluated.metrics[name] == pytest.approx(sum(float(each[name]) for each in losses), rel=1e-6)


def test_an_unreadable_image_is_reported_once_and_has_no_detections(data, detector, tmp_path):
    names = data.file_names.copy()
    names[0] = b"missing.jpg"
    broken = replace(data, file_names=names)
    images = ImagePass(broken, config(2), torch.device("cpu"))
    with closing(images.run(detector)) as all_predicted:
        predicted = list(all_predicted)
    assert [row for each in predicted for row in each.unreadable] == [0]
    assert all(0 not in each.records.image_rows for each in predicted)
    assert sorted(row for each in predicted for row in each.rows) == list(range(len(data)))


def test_each_loader_process_gets_the_windows_of_its_own_images(data):
    """They take batches in turns, and would all decode every image."""
    settings = override_config(config(2, {"size": 32, "overlap": 0.5}), ["data.num_workers=2"])
    images = ImagePass(replace(data, sizes_hw=np.full((len(data), 2), 96)), settings, torch.device("cpu"))
    rows = [[images.views.rows[view] for view in batch.indices] for batch in images._batches]
    own = [set(np.concatenate(rows[process::2]).tolist()) for process in (0, 1)]
    assert set.union(*own) == set(range(len(data)))
    assert own[0] & own[1] <= {4, 5}  # of the last turn, in which there was less for one of them
    assert sorted(view for batch in images._batches for view in batch.indices) == list(
        range(len(images.views))
    )


def test_views_of_images_smaller_and_larger_than_a_window():
    views = Views.of(np.array([[30, 30], [40, 41], [400, 300]]), Tiles(size=40, overlap=0.0))
    assert views.windows[: len(views.of_image(0))].tolist() == [[0, 0, 30, 30]]
    assert views.windows[list(views.of_image(1))].tolist() == [[0, 0, 40, 40], [1, 0, 41, 40], [0, 0, 41, 40]]
    assert len(views.of_image(2)) == 10 * 8 + 1
