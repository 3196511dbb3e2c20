"""A photograph that is stored rotated is read as it was annotated."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from detr_dist.config_types import ExifRule
from detr_dist.data.coco import load_data
from detr_dist.data.dataset import CocoDetectionDataset, Sample
from detr_dist.data.images import decode_reduced, read_size_hw
from detr_dist.data.transforms import build_transform
from detr_dist.data.unannotated import read_unannotated
from detr_dist.resize import Resize
from detr_dist.serving.decoding import decode_rgb

Document = dict[str, Any]
WriteCoco = Callable[..., Path]

STORED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.swapaxes(0, 1),
    6: np.rot90,
    7: lambda upright: upright[::-1, ::-1].swapaxes(0, 1),
    8: lambda upright: np.rot90(upright, -1),
}
"""The pixels that a file holds for an upright image, by the EXIF orientation, as the standard defines it."""

FORMATS = {
    "a.png": {},
    "a.webp": {"lossless": True},
    "a.tif": {},
    "packed.tif": {"compression": "tiff_lzw"},
    "a.jpg": {"quality": 95},
    "a.mpo": {"quality": 95},
}


def exif_of(orientation: object) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def smooth(height: int, width: int) -> np.ndarray:
    """Return a slope of other colours in every corner, which JPEG hardly changes."""
    corners = np.array([[[250, 0, 0], [0, 250, 0]], [[0, 0, 250], [250, 250, 0]]], dtype=np.uint8)
    return np.asarray(Image.fromarray(corners).resize((width, height), Image.Resampling.BICUBIC))


def save(path: Path, upright: np.ndarray, orientation: int, **options: object) -> None:
    """Write an image as a camera does that was held so that it stores this orientation."""
    pixels = np.ascontiguousarray(STORED[orientation](upright))
    Image.fromarray(pixels).save(path, exif=exif_of(orientation), **options)


def assert_alike(image: torch.Tensor, expected: np.ndarray, *, exact: bool) -> None:
    pixels = image.permute(1, 2, 0).numpy().astype(int)
    assert pixels.shape == expected.shape
    # JPEG rounds, and smooths colours; another turn of this image differs by 80 levels on average.
    assert np.abs(pixels - expected).mean() <= (0 if exact else 2)


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("name", FORMATS)
def test_every_orientation_is_undone_in_every_format(tmp_path: Path, name: str, orientation: int) -> None:
    upright, path = smooth(24, 40), tmp_path / name
    save(path, upright, orientation, **FORMATS[name])
    exact = not name.endswith(("jpg", "mpo"))
    assert_alike(decode_rgb(path, "apply"), upright, exact=exact)
    assert read_size_hw(path, "apply") == read_size_hw(path, "auto") == (24, 40)
    with Image.open(path) as image:
        seen = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))  # as transformers' pipelines do
    assert torch.equal(decode_rgb(path, "apply"), torch.from_numpy(seen.copy()).permute(2, 0, 1))

    stored = STORED[orientation](upright)
    ignored = upright if name.endswith("tif") else stored  # Pillow applies the orientation of TIFF itself
    assert_alike(decode_rgb(path, "ignore"), ignored, exact=exact)
    assert read_size_hw(path, "ignore") == ignored.shape[:2]

    has_other_sides = orientation >= 5
    assert_alike(decode_rgb(path, "auto"), upright, exact=exact)
    assert_alike(decode_rgb(path, "auto", (24, 40)), upright if has_other_sides else ignored, exact=exact)
    if has_other_sides:
        assert_alike(decode_rgb(path, "auto", (40, 24)), stored, exact=exact)
    assert_alike(decode_rgb(path, "auto", (24, 41)), ignored, exact=exact)  # which is then of another size


@pytest.mark.parametrize("orientation", STORED)
def test_sixteen_bits_and_a_square_are_rotated_too(tmp_path: Path, orientation: int) -> None:
    deep = np.arange(16 * 16, dtype=np.uint16).reshape(16, 16) * 257
    save(tmp_path / "deep.png", deep, orientation)
    rotated, levels = decode_rgb(tmp_path / "deep.png", "apply"), (deep // 257).astype(np.uint8)
    assert all(np.array_equal(channel, levels) for channel in rotated.numpy())
    # It fits as it is stored.
    stored = decode_rgb(tmp_path / "deep.png", "auto", (16, 16))
    assert np.array_equal(stored[0], STORED[orientation](levels))


@pytest.mark.parametrize(
    "exif",
    [
        *(
            b"Exif\0\0",
            b"Exif\0\0no header",
            b"Exif\0\0II*\0\xff\xff\xff\xff",
            b"Exif\0\0MM\0*\0\0\0\x08\0\x01",
        ),
        *(exif_of(value) for value in (0, 9, 65535)),
    ],
    ids=range(7),
)
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp"])
def test_damaged_exif_data_count_as_none(tmp_path: Path, name: str, exif: bytes | Image.Exif) -> None:
    Image.fromarray(smooth(24, 40)).save(tmp_path / name, exif=exif)
    for rule in ("apply", "auto"):
        assert torch.equal(decode_rgb(tmp_path / name, rule), decode_rgb(tmp_path / name))
        assert read_size_hw(tmp_path / name, rule) == (24, 40)


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("rule", ["auto", "apply", "ignore"])
def test_decoding_at_a_reduced_scale_rotates_alike(tmp_path: Path, orientation: int, rule: ExifRule) -> None:
    upright, path = smooth(401, 602), tmp_path / "a.jpg"
    save(path, upright, orientation, quality=95)
    annotated_hw = STORED[orientation](upright).shape[:2] if rule == "ignore" else (401, 602)
    needed_hw = (100, 100)
    reduced = decode_reduced(path, annotated_hw, needed_hw, rule)
    assert reduced is not None
    full = decode_rgb(path, rule, annotated_hw)
    assert tuple(full.shape[1:]) == annotated_hw
    assert tuple(reduced.shape[1:]) == tuple(-(-side // 4) for side in annotated_hw)
    height, width = reduced.shape[1:]
    shrunk = Image.fromarray(full.permute(1, 2, 0).numpy()).resize((width, height), Image.Resampling.BOX)
    assert_alike(reduced, np.asarray(shrunk), exact=False)


def sample_of(folder: Path, *, train: bool, rule: ExifRule = "auto") -> Sample:
    """Return the sample of the image with two boxes."""
    transform = build_transform("detr" if train else "none", Resize(64, 96), train)
    dataset = CocoDetectionDataset(load_data(folder, exif=rule), transform, seed=0, train=train)
    return dataset[3, 1]


def swapped(document: Document) -> Document:
    """Return the document as annotated in the stored pixels of orientation 6, [x, y] becoming [y, W - x]."""
    document = json.loads(json.dumps(document))
    for annotation in document["annotations"]:
        x, y, w, h = annotation["bbox"]
        annotation["bbox"] = [y, 60 - x - w, h, w]
    for image in document["images"]:
        image["width"], image["height"] = image["height"], image["width"]
    return document


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_rotated_photograph_trains_however_it_was_annotated(
    document: Document, write_coco: WriteCoco, suffix: str, train: bool
) -> None:
    for image in document["images"]:
        image["file_name"] = f"{image['id']}.{suffix}"
    folders = [write_coco(document, name) for name in ("upright", "as_seen", "applied")]
    stored = [write_coco(swapped(document), name) for name in ("plain", "as_stored")]
    upright = smooth(40, 60)
    for folder, orientation in zip(folders, (1, 6, 6), strict=True):
        save(folder / f"3.{suffix}", upright, orientation)
    save(stored[0] / f"3.{suffix}", np.rot90(upright), 1)
    save(stored[1] / f"3.{suffix}", upright, 6)
    for one, other, rule in (
        (folders[0], folders[1], "auto"),
        (folders[0], folders[2], "apply"),
        (stored[0], stored[1], "auto"),
        (stored[0], stored[1], "ignore"),
    ):
        expected, found = sample_of(one, train=train), sample_of(other, train=train, rule=rule)
        assert found.unreadable == expected.unreadable == ()
        assert found.original_size_hw == expected.original_size_hw
        assert torch.equal(found.boxes_cxcywh, expected.boxes_cxcywh)
        assert found.image.stride() == expected.image.stride()
        difference = (found.image.float() - expected.image.float()).abs()
        assert float(difference.mean()) <= (0 if suffix == "png" else 2)


def test_a_size_that_does_not_fit_names_the_rule(document: Document, write_coco: WriteCoco) -> None:
    folder = write_coco(document)
    save(folder / "3.jpg", smooth(60, 40), 6)  # stored in the annotated size
    (_, reason), *_ = sample_of(folder, train=False, rule="apply").unreadable
    assert "is 40x60 but its annotation says 60x40 (data.exif=apply; auto applies" in reason
    save(folder / "3.jpg", smooth(40, 60), 6)
    (_, reason), *_ = sample_of(folder, train=False, rule="ignore").unreadable
    assert "is 40x60 but its annotation says 60x40 (data.exif=ignore; auto applies" in reason
    save(folder / "3.jpg", smooth(60, 40), 3)
    (_, reason), *_ = sample_of(folder, train=False).unreadable
    assert "is 40x60 but its annotation says 60x40; it has no EXIF rotation that" in reason


def test_an_image_without_annotated_size_has_that_of_the_rotated_one(
    document: Document, write_coco: WriteCoco
) -> None:
    del document["images"][1]["width"], document["images"][1]["height"]
    folder = write_coco(document)
    save(folder / "3.jpg", smooth(40, 60), 6)
    for rule, size_hw in (("auto", (40, 60)), ("apply", (40, 60)), ("ignore", (60, 40))):
        assert load_data(folder, exif=rule).size_hw(1) == size_hw
        assert sample_of(folder, train=False, rule=rule).unreadable == ()


def test_an_image_to_predict_on_is_upright_unless_ignored(tmp_path: Path) -> None:
    for orientation in (1, 3, 6):
        save(tmp_path / f"{orientation}.png", smooth(24, 40), orientation)
    names = ["1.png", "3.png", "6.png"]
    for rule, last_hw in (("auto", (24, 40)), ("apply", (24, 40)), ("ignore", (40, 24))):
        data, unreadable = read_unannotated(tmp_path, names, ["ball"], rule)
        assert unreadable == []
        assert data.size_hw(2) == last_hw
        dataset = CocoDetectionDataset(
            data, build_transform("none", Resize(32, 64), train=False), seed=0, train=False
        )
        upright, *others = (dataset[0, row].image for row in range(3))
        assert [torch.equal(upright, other) for other in others] == [rule != "ignore"] * 2
