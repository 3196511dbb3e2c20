"""A loaded model predicts on every type of image, without the extensions of its training."""

import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from detr_dist.config import Config
from detr_dist.distributed import group_of_processes
from detr_dist.errors import DataError, DetrDistError, UsageError
from detr_dist.evaluation.detections import Detections
from detr_dist.inference.images import as_data_set
from detr_dist.inference.model import TrainedModel, load_model
from detr_dist.models.detector import plain_network
from detr_dist.tracking.packaging import write_model

EDGES = {"shortest_edge": 64, "longest_edge": 96}
SETTINGS = {"data": EDGES, "training": {"batch_size": 2}}


@pytest.fixture
def saved(tiny_detector: Callable, tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a model, with a configuration of its training."""

    def write(config: dict | None = None) -> Path:
        settings = Config.model_validate(SETTINGS)
        metadata = {"config": SETTINGS | (config or {}), "thresholds": {"player": 0.2, "ball": 0.3}}
        write_model(plain_network(tiny_detector("detr")), tmp_path / "m", config=settings, metadata=metadata)
        return tmp_path / "m"

    return write


@pytest.fixture
def model(saved: Callable[..., Path]) -> TrainedModel:
    return load_model(saved())


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)


def same(left: Detections, right: Detections) -> bool:
    columns = ("boxes_xyxy_px", "scores", "labels")
    return left.names == right.names and all(
        np.array_equal(getattr(left, name), getattr(right, name)) for name in columns
    )


def test_every_image_type_gives_the_same_detections(
    model: TrainedModel, pixels: np.ndarray, tmp_path: Path
) -> None:
    Image.fromarray(pixels).save(tmp_path / "image.png")
    expected = model.predict(tmp_path / "image.png", threshold=0)
    assert len(expected) == len(expected.names) == 6  # queries
    assert (np.diff(expected.scores) <= 0).all()
    assert [column.dtype for column in (expected.boxes_xyxy_px, expected.scores, expected.labels)] == [
        *(np.float32, np.float32, np.int64)
    ]
    opaque = np.dstack([pixels, np.full((70, 90), 7, np.uint8)])
    pixels.setflags(write=False)  # as NumPy gives those of Pillow
    for image in (
        str(tmp_path / "image.png"),
        Image.fromarray(pixels),
        Image.fromarray(opaque),
        pixels,
        opaque,
        pixels[..., ::-1][..., ::-1],
        torch.tensor(pixels).permute(2, 0, 1),
        torch.tensor(pixels).permute(2, 0, 1).contiguous(),
    ):
        assert same(model.predict(image, threshold=0), expected)
    grey = model.predict(pixels[..., 0], threshold=0)
    assert same(model.predict(np.repeat(pixels[..., :1], 3, axis=2), threshold=0), grey)


def test_a_list_of_images_gives_detections_in_its_order(model: TrainedModel, pixels: np.ndarray) -> None:
    images = [pixels, pixels[:50], pixels[::-1], pixels[:, :60], pixels[:50, ::-1]]
    found = model.predict(iter(images), threshold=0)
    assert [each.boxes_xyxy_px.max() <= 90 for each in found] == [True] * 5
    for image, each in zip(images, found, strict=True):
        alone = model.predict(image, threshold=0)
        assert np.allclose(each.boxes_xyxy_px, alone.boxes_xyxy_px, atol=1e-3)  # float32, another batch size
        assert np.allclose(each.scores, alone.scores, atol=1e-6)
    assert model.predict([]) == []


def test_thresholds_of_the_model_apply_unless_specified(model: TrainedModel, pixels: np.ndarray) -> None:
    everything = model.predict(pixels, threshold=0)
    least = np.array([0.2, 0.3])[everything.labels]
    assert model.predict(pixels).scores.tolist() == everything.scores[everything.scores >= least].tolist()
    middle = float(everything.scores[2])
    for found in (
        model.predict(pixels, threshold=middle),
        model.predict(pixels, overrides=[f"evaluation.score_threshold={middle}"]),
    ):
        assert len(found) == 3
    for wrong in (50, "0.5"):
        with pytest.raises(UsageError, match=f"threshold {wrong!r}"):
            model.predict(pixels, threshold=wrong)


@pytest.mark.parametrize(
    ("image", "part"),
    [
        (np.zeros((9, 9, 3)), "ndarray float64 [9, 9, 3]"),
        (np.zeros((3, 9, 9), np.uint8), "ndarray uint8 [3, 9, 9]"),
        (np.zeros((2, 9, 9, 3), np.uint8), "uint8 [2, 9, 9, 3]"),
        (np.zeros((0, 9, 3), np.uint8), "uint8 [0, 9, 3]"),
        (torch.zeros(3, 9, 9), "Tensor torch.float32 [3, 9, 9]"),
        (torch.zeros(9, 9, 3, dtype=torch.uint8), "Tensor torch.uint8 [9, 9, 3] is no image; give a path"),
        (Image.fromarray(np.zeros((9, 9), np.float32)), "Pillow's mode F"),
        (7, "int is no image; give a path"),
        ([None], "NoneType is no image"),
    ],
    ids=range(9),  # an image's own text holds its address, which differs between test processes
)
def test_a_value_that_is_no_image_is_refused_with_one_line(
    model: TrainedModel, image: object, part: str
) -> None:
    with pytest.raises(DetrDistError) as caught:
        model.predict(image)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unreadable_file_is_named(model: TrainedModel, pixels: np.ndarray, tmp_path: Path) -> None:
    Image.fromarray(pixels).save(tmp_path / "whole.jpg")
    (tmp_path / "half.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:700])
    for name in ("half.jpg", "none.jpg", ""):
        with pytest.raises(DataError, match=str(tmp_path / name)):
            model.predict([tmp_path / "whole.jpg", tmp_path / name])


def test_prediction_changes_neither_the_model_nor_torch_settings(
    model: TrainedModel, pixels: np.ndarray
) -> None:
    before = torch.backends.cudnn.allow_tf32, model.network.config.to_json_string()
    loss = model.network.loss_function
    model.predict(pixels, overrides=["training.tf32=false", "training.deterministic=true"])
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.allow_tf32 == before[0]
    assert model.network.config.to_json_string() == before[1]
    assert model.network.loss_function is loss


def test_a_drawing_is_a_copy_with_the_boxes(model: TrainedModel, pixels: np.ndarray) -> None:
    image = Image.fromarray(pixels[..., 0])
    drawn = model.predict(image, threshold=0).draw(image)
    assert (drawn.mode, drawn.size) == ("RGB", image.size)
    assert not np.array_equal(np.asarray(drawn), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize(("orientation", "stored"), [(3, lambda pixels: pixels[::-1, ::-1]), (6, np.rot90)])
def test_boxes_are_in_pixels_of_the_rotated_photograph(
    model: TrainedModel, pixels: np.ndarray, tmp_path: Path, orientation: int, stored: Callable
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "rotated.png"
    Image.fromarray(np.ascontiguousarray(stored(pixels))).save(path, exif=exif)
    upright = model.predict(pixels, threshold=0)
    with Image.open(path) as image:
        assert same(model.predict(path, threshold=0), upright)
        assert same(model.predict(image, threshold=0), upright)
        drawn, expected = upright.draw(image), upright.draw(Image.fromarray(pixels))
        assert np.array_equal(np.asarray(drawn), np.asarray(expected))
        ignored = model.predict(stored(pixels), threshold=0)
        assert not same(ignored, upright)
        for given in (path, image):
            assert same(model.predict(given, threshold=0, overrides=["data.exif=ignore"]), ignored)


def test_extensions_of_the_training_are_not_imported(
    saved: Callable[..., Path], pixels: np.ndarray, tmp_path: Path
) -> None:
    """Use names that only the training registers, and a file that must not be executed."""
    imported = tmp_path / "imported"
    (tmp_path / "mine.py").write_text(f"open({str(imported)!r}, 'w').close()")
    training = {"batch_size": 2, "callbacks": ["gone.Callback"], "extensions": [str(tmp_path / "mine.py")]}
    for extensions in ({}, {"extensions": []}):
        folder = saved(
            {
                "training": training | extensions,
                "data": EDGES | {"augmentation": ["detr", "gone"]},
                "logging": {"trackers": ["gone.Tracker"]},
            }
        )
        found = load_model(folder).predict(pixels, threshold=0, overrides=["training.batch_size=1"])
        assert len(found) > 0
        assert not imported.exists()
        for path in sorted(folder.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        folder.rmdir()


def test_an_unregistered_family_fails_with_one_line(saved: Callable[..., Path]) -> None:
    folder = saved({"model": {"model_architecture": "mine"}, "training": {"extensions": ["my.families"]}})
    with pytest.raises(UsageError, match=r"'mine', which is not registered; import .* \(.*my\.families\) or"):
        load_model(folder)


def test_extensions_among_the_overrides_are_imported(
    model: TrainedModel, pixels: np.ndarray, tmp_path: Path
) -> None:
    (tmp_path / "mine_imported.py").write_text(f"open({str(tmp_path / 'seen')!r}, 'w').close()")
    model.predict(pixels, overrides=[f"training.extensions=[{tmp_path / 'mine_imported.py'}]"])
    assert (tmp_path / "seen").exists()


def test_a_loaded_model_has_its_metadata(saved: Callable[..., Path]) -> None:
    folder = saved()
    written = yaml.safe_load((folder / "MLmodel").read_text())["metadata"]
    model = load_model(str(folder))
    assert (model.metadata, model.reference, model.is_mlflow_model) == (written, str(folder), True)


def test_a_prediction_during_a_training_leaves_its_settings_unchanged(model: TrainedModel) -> None:
    image = np.zeros((64, 96, 3), np.uint8)
    expected = model.predict(image, threshold=0, overrides=["training.tf32=false"])
    with group_of_processes():
        data, pixels = as_data_set([image], model.class_names, "auto")
        config, environment = model.prediction_settings(["training.tf32=false"]), dict(os.environ)
        with closing(model.find_objects(data, config, pixels)) as all_predicted:
            records = next(all_predicted).records
            assert torch.backends.cudnn.allow_tf32
            assert dict(os.environ) == environment
    assert np.array_equal(np.sort(records.scores), np.sort(expected.scores))
