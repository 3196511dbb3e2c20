from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F

from detr_dist.data.decoding import UnreadableImageError, decode_reduced, decode_rgb

COLOURS = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("a.jpg", "RGB"),
        ("grey.jpg", "L"),
        ("cmyk.jpg", "CMYK"),
        ("a.png", "RGB"),
        ("transparent.png", "RGBA"),
        ("palette.png", "P"),
        ("bits.png", "1"),
        ("a.gif", "P"),
        ("a.webp", "RGB"),
        ("a.bmp", "RGB"),
        ("a.tiff", "RGB"),
    ],
)
def test_every_format_becomes_the_rgb_that_pillow_sees(tmp_path: Path, name: str, mode: str) -> None:
    Image.fromarray(COLOURS).convert(mode).save(tmp_path / name)
    decoded = decode_rgb(tmp_path / name).permute(1, 2, 0).numpy()
    expected = np.array(Image.open(tmp_path / name).convert("RGB"))
    assert decoded.dtype == np.uint8
    # Two builds of one JPEG library may round a colour differently; nothing else may differ.
    np.testing.assert_allclose(
        decoded.astype(int), expected.astype(int), atol=2 if name.endswith("jpg") else 0
    )


def test_sixteen_bits_per_colour_become_eight(tmp_path: Path) -> None:
    deep = COLOURS[:, :, 0].astype(np.uint16) * 257  # 65535 for 255
    Image.fromarray(deep).save(tmp_path / "deep.png")
    decoded = decode_rgb(tmp_path / "deep.png")
    assert np.array_equal(decoded[0].numpy(), COLOURS[:, :, 0])


def test_of_an_animation_the_first_picture_counts(tmp_path: Path) -> None:
    first, second = (Image.new("RGB", (30, 20), colour) for colour in ("red", "blue"))
    first.save(tmp_path / "a.gif", save_all=True, append_images=[second])
    assert decode_rgb(tmp_path / "a.gif")[:, 0, 0].tolist() == [255, 0, 0]


def test_an_exif_rotation_is_not_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees to look at it
    Image.fromarray(COLOURS).save(tmp_path / "turned.jpg", exif=exif)
    assert decode_rgb(tmp_path / "turned.jpg").shape == (3, 20, 30)


def test_what_cannot_be_read_is_named_with_the_reason(tmp_path: Path) -> None:
    Image.fromarray(COLOURS).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:500])
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("no picture")
    for name in ("cut.jpg", "empty.jpg", "text.jpg", "nowhere.jpg", "."):
        with pytest.raises(UnreadableImageError, match=str(tmp_path)):
            decode_rgb(tmp_path / name)


def photograph(height: int, width: int) -> Image.Image:
    """Noise of some scales, the finest without colour: cameras resolve less of it, JPEG keeps less of it."""
    rng = np.random.default_rng(height)
    picture = np.zeros((height, width, 3), np.float32)
    for cell, num_colours in ((40, 3), (10, 3), (2, 1)):
        coarse = rng.integers(0, 256, (height // cell + 1, width // cell + 1, num_colours), dtype=np.uint8)
        octave = Image.fromarray(coarse.repeat(3 // num_colours, axis=2)).resize(
            (width, height), Image.Resampling.BICUBIC
        )
        picture += np.asarray(octave) * min(1, cell / 20)
    return Image.fromarray((picture * (255 / picture.max())).astype(np.uint8))


@pytest.mark.parametrize(
    ("needed_hw", "expected_hw"),
    [
        ((400, 600), (401, 602)),  # 1/2 of 801 and 1203, rounded up as JPEG does
        ((400, 602), None),  # two pixels need more than 1203 to be halved
        ((201, 200), (401, 602)),
        ((200, 300), (201, 301)),
        ((100, 150), (101, 151)),
        ((1, 1), (101, 151)),
        ((801, 1203), None),
        ((2000, 10), None),
    ],
)
def test_a_large_jpeg_is_decoded_at_the_smallest_scale_that_leaves_what_is_needed(
    tmp_path: Path, needed_hw: tuple[int, int], expected_hw: tuple[int, int] | None
) -> None:
    photograph(801, 1203).save(tmp_path / "a.jpg", quality=90)
    reduced = decode_reduced(tmp_path / "a.jpg", (801, 1203), needed_hw)
    assert (reduced is None) == (expected_hw is None)
    if reduced is not None:
        assert reduced.dtype == torch.uint8
        assert tuple(reduced.shape) == (3, *expected_hw)


@pytest.mark.parametrize("quality", [75, 95])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:0"])
@pytest.mark.parametrize("progressive", [True, False])
def test_after_the_resize_a_reduced_picture_is_nearly_the_whole_one(
    tmp_path: Path, quality: int, subsampling: str, progressive: bool
) -> None:
    path = tmp_path / "a.jpg"
    photograph(720, 1280).save(path, quality=quality, subsampling=subsampling, progressive=progressive)
    whole = decode_rgb(path)
    for needed_hw in ((144, 256), (300, 533), (60, 107)):
        reduced = decode_reduced(path, (720, 1280), needed_hw)
        assert reduced is not None
        one, other, shifted = (
            F.resize(image, list(needed_hw), antialias=True).float()
            for image in (reduced, whole, whole.roll(1, dims=2))
        )
        difference = (one - other).abs()
        # Both are rounded to whole levels twice, and differ in how they blend the finest detail.
        assert float(difference.max()) <= 12
        assert float(difference.mean()) < float((shifted - other).abs().mean()), "less than a pixel's shift"
        assert float((one - other).mean().abs()) < 0.5, "neither is brighter"


def test_what_is_no_whole_colour_jpeg_of_the_annotated_size_is_left_to_the_usual_way(tmp_path: Path) -> None:
    picture = photograph(400, 600)
    others = {"grey.jpg": "L", "cmyk.jpg": "CMYK", "a.png": "RGB", "a.webp": "RGB"}
    for name, mode in others.items():
        picture.convert(mode).save(tmp_path / name)
    picture.save(tmp_path / "whole.jpg")
    encoded = (tmp_path / "whole.jpg").read_bytes()
    for share in (0.02, 0.5, 0.99):
        (tmp_path / f"cut_{share}.jpg").write_bytes(encoded[: int(share * len(encoded))])
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "png.jpg").write_bytes((tmp_path / "a.png").read_bytes())
    picture.save(tmp_path / "uneven.jpg", subsampling="4:2:2")
    names = [path.name for path in tmp_path.iterdir() if path.name != "whole.jpg"]
    assert len(names) == 10
    for name in (*names, "nowhere.jpg", "."):
        assert decode_reduced(tmp_path / name, (400, 600), (100, 150)) is None, name
    assert decode_reduced(tmp_path / "whole.jpg", (400, 600), (100, 150)) is not None
    for other_hw in ((600, 400), (399, 600), (401, 600)):
        assert decode_reduced(tmp_path / "whole.jpg", other_hw, (50, 50)) is None
