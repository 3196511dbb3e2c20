from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detr_dist.data.decoding import UnreadableImageError, decode_rgb

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
