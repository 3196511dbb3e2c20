import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F

from detr_dist.data.images import decode_reduced
from detr_dist.serving.decoding import UnreadableImageError, decode_rgb, rgb_of

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
def test_every_format_is_decoded_to_the_rgb_of_pillow(tmp_path: Path, name: str, mode: str) -> None:
    Image.fromarray(COLOURS).convert(mode).save(tmp_path / name)
    decoded = decode_rgb(tmp_path / name).permute(1, 2, 0).numpy()
    expected = np.array(Image.open(tmp_path / name).convert("RGB"))
    assert decoded.dtype == np.uint8
    # Two builds of one JPEG library may round a colour differently; nothing else may differ.
    np.testing.assert_allclose(
        decoded.astype(int), expected.astype(int), atol=2 if name.endswith("jpg") else 0
    )


LEVELS = np.arange(256, dtype=np.uint8).reshape(8, 32)
DEEP = LEVELS.astype(np.uint16) * 257  # 65535 for 255
RGB_LEVELS = np.stack([LEVELS, LEVELS[::-1], LEVELS[:, ::-1]], axis=-1)


def write_png(path: Path, pixels: np.ndarray, colour_type: int) -> None:
    """Write 16 bits per colour, which Pillow only writes for grey images."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        )

    height, width = pixels.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    chunks = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


def write_tiff(path: Path, pixels: bytes, bits: list[int], *, photometric: int = 1, order: str = "<") -> None:
    """Write an uncompressed image of LEVELS' size in variants that Pillow reads but does not write."""
    num_entries, mark = 9, b"II*\0" if order == "<" else b"MM\0*"
    bits_at = 8 + 2 + 12 * num_entries + 4
    pixels_at = bits_at + 2 * len(bits)
    bits_value = bits[0] if len(bits) == 1 else bits_at
    values = {
        256: 32, 257: 8, 258: bits_value, 259: 1, 262: photometric,
        273: pixels_at, 277: len(bits), 278: 8, 279: len(pixels),
    }  # fmt: skip
    entries = b"".join(
        struct.pack(f"{order}HHI", tag, 3, len(bits) if tag == 258 else 1)
        + (struct.pack(f"{order}I", value) if value == bits_at else struct.pack(f"{order}HH", value, 0))
        for tag, value in values.items()
    )
    start = mark + struct.pack(f"{order}IH", 8, num_entries)
    of_bits = struct.pack(f"{order}{len(bits)}H", *bits)
    path.write_bytes(start + entries + bytes(4) + of_bits + pixels)


def in_twelve_bits(values: np.ndarray) -> bytes:
    """Pack two values into three bytes."""
    pairs = values.reshape(-1, 2).astype(np.uint32)
    packed = (pairs[:, 0] << 12) | pairs[:, 1]
    return np.stack([packed >> 16, packed >> 8 & 255, packed & 255], axis=1).astype(np.uint8).tobytes()


ROUNDED_12 = np.rint(LEVELS * (4095 / 255)).astype(np.uint16)
ALPHA = np.full_like(DEEP, 30_000)
DEEP_FILES: dict[str, tuple[Callable[[Path], object], np.ndarray]] = {
    "grey.png": (lambda path: Image.fromarray(DEEP).save(path), LEVELS),
    "grey_alpha.png": (lambda path: write_png(path, np.dstack([DEEP, ALPHA]), 4), LEVELS),
    "rgb.png": (lambda path: write_png(path, RGB_LEVELS.astype(np.uint16) * 257, 2), RGB_LEVELS),
    "rgba.png": (
        lambda path: write_png(path, np.dstack([RGB_LEVELS.astype(np.uint16) * 257, ALPHA]), 6),
        RGB_LEVELS,
    ),
    "grey.tif": (lambda path: Image.fromarray(DEEP).save(path), LEVELS),
    "packed.tif": (lambda path: Image.fromarray(DEEP).save(path, compression="tiff_lzw"), LEVELS),
    "big_endian.tif": (
        lambda path: write_tiff(path, DEEP.astype(">u2").tobytes(), [16], order=">"),
        LEVELS,
    ),
    "zero_is_white.tif": (
        lambda path: write_tiff(path, (65535 - DEEP).tobytes(), [16], photometric=0),
        LEVELS,
    ),
    "12_bits.tif": (lambda path: write_tiff(path, in_twelve_bits(ROUNDED_12), [12]), LEVELS),
    "rgb.tif": (
        lambda path: write_tiff(
            path, (RGB_LEVELS.astype(np.uint16) * 257).tobytes(), [16] * 3, photometric=2
        ),
        RGB_LEVELS,
    ),
    "integers.tif": (lambda path: Image.fromarray(DEEP.astype(np.int32)).save(path), LEVELS),
    "grey.pgm": (lambda path: Image.fromarray(DEEP).save(path), LEVELS),
    "12_bits.pgm": (
        lambda path: path.write_bytes(b"P5 32 8 4095 " + ROUNDED_12.astype(">u2").tobytes()),
        LEVELS,
    ),
    "text.pgm": (lambda path: path.write_text("P2 32 8 65535 " + " ".join(map(str, DEEP.flat))), LEVELS),
    "dark.pgm": (
        lambda path: path.write_bytes(b"P5 32 8 65535 " + LEVELS.astype(">u2").tobytes()),
        np.rint(LEVELS / 257).astype(np.uint8),
    ),
    "grey.jp2": (lambda path: Image.fromarray(DEEP).save(path, irreversible=False), LEVELS),
}


@pytest.mark.parametrize("name", DEEP_FILES)
def test_more_than_eight_bits_per_colour_are_scaled_to_eight(tmp_path: Path, name: str) -> None:
    write, expected = DEEP_FILES[name]
    write(tmp_path / name)
    decoded = decode_rgb(tmp_path / name)
    assert decoded.dtype == torch.uint8
    rgb = expected if expected.ndim == 3 else np.dstack([expected] * 3)
    assert np.array_equal(decoded.permute(1, 2, 0).numpy(), rgb)


def test_sixteen_bits_are_rounded_alike_in_every_format(tmp_path: Path) -> None:
    every = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    for name in ("a.png", "a.tif", "a.pgm"):
        Image.fromarray(every).save(tmp_path / name)
        assert np.array_equal(decode_rgb(tmp_path / name)[1].numpy(), np.rint(every / 257)), name


@pytest.mark.parametrize(
    ("name", "pixels", "mode"),
    [
        ("share.tif", LEVELS.astype(np.float32) / 255, "F"),
        ("nan.tif", np.full((8, 32), np.nan, np.float32), "F"),
        ("levels.pfm", LEVELS.astype(np.float32), "F"),
        ("beyond.tif", LEVELS.astype(np.int32) * 65536, "I"),
        ("below.tif", DEEP.astype(np.int32) - 100, "I"),
        ("of_8_or_of_16.tif", LEVELS.astype(np.int32), "I"),
    ],
)
def test_pixels_without_a_defined_white_are_an_error_that_names_the_mode(
    tmp_path: Path, name: str, pixels: np.ndarray, mode: str
) -> None:
    Image.fromarray(pixels).save(tmp_path / name)
    with pytest.raises(UnreadableImageError, match=f"{name}: values .* mode {mode}, .* 8 or 16 bits"):
        decode_rgb(tmp_path / name)


@pytest.mark.parametrize("mode", sorted({*Image.MODES, "I;16B", "I;16L", "I;16N", "La"} - {"F"}))
def test_black_grey_and_white_are_preserved_in_every_mode(mode: str) -> None:
    levels = [0, 255] if mode == "1" else [0, 153, 255]  # a palette of Pillow's has it
    grey = np.array([levels], dtype=np.uint8)
    if mode.startswith("I;16"):
        order = {"B": ">", "L": "<"}.get(mode[-1], "=" if mode.endswith("N") else "<")
        deep = (grey.astype(np.uint16) * 257).astype(f"{order}u2")
        image = Image.frombytes(mode, (len(levels), 1), deep.tobytes())
    elif mode == "I":
        image = Image.fromarray(grey.astype(np.int32) * 257)
    else:
        image = Image.fromarray(np.dstack([grey] * 3)).convert({"La": "LA", "PA": "P"}.get(mode, mode))
        image = image.convert(mode)
    assert image.mode == mode
    decoded = rgb_of(image).numpy().astype(int)
    # Conversions between colour spaces are rounded to whole levels on the way.
    assert np.abs(decoded - grey).max() <= 1


def test_colours_under_transparency_are_not_darkened(tmp_path: Path) -> None:
    transparent = Image.fromarray(np.dstack([RGB_LEVELS, np.full_like(LEVELS, 128)]))
    for mode in ("RGBA", "RGBa", "LA", "La"):
        image = transparent.convert(mode[:-1] + "A").convert(mode)
        expected = RGB_LEVELS if mode[0] == "R" else np.dstack([transparent.convert("L")] * 3)
        decoded = rgb_of(image).permute(1, 2, 0).numpy().astype(int)
        # Multiplied by half and divided again, in whole levels.
        assert np.abs(decoded - expected).max() <= 2 * mode.endswith("a"), mode


def test_the_pixel_limit_of_pillow_does_not_apply(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.png", "a.tif", "a.jpg"):
        Image.fromarray(COLOURS).save(tmp_path / name)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
        assert decode_rgb(tmp_path / name).shape == (3, 20, 30)


def test_more_pixels_than_the_limit_are_unreadable_in_every_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("detr_dist.serving.decoding.MAX_PIXELS", 20 * 30 - 2)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # restored after the test
    for name in ("a.png", "a.tif", "a.jpg"):
        Image.fromarray(COLOURS).save(tmp_path / name)
        with pytest.raises(UnreadableImageError, match=f"{name}: .*600 pixels"):
            decode_rgb(tmp_path / name)


def test_the_first_frame_of_an_animation_is_used(tmp_path: Path) -> None:
    first, second = (Image.new("RGB", (30, 20), colour) for colour in ("red", "blue"))
    first.save(tmp_path / "a.gif", save_all=True, append_images=[second])
    assert decode_rgb(tmp_path / "a.gif")[:, 0, 0].tolist() == [255, 0, 0]


def test_an_unreadable_file_is_named_with_the_reason(tmp_path: Path) -> None:
    Image.fromarray(COLOURS).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:500])
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("no image")
    for name in ("cut.jpg", "empty.jpg", "text.jpg", "nowhere.jpg", "."):
        with pytest.raises(UnreadableImageError, match=str(tmp_path)):
            decode_rgb(tmp_path / name)


def photograph(height: int, width: int) -> Image.Image:
    """Return noise of several scales, the finest without colour, as cameras and JPEG give it."""
    rng = np.random.default_rng(height)
    image = np.zeros((height, width, 3), np.float32)
    for cell, num_colours in ((40, 3), (10, 3), (2, 1)):
        coarse = rng.integers(0, 256, (height // cell + 1, width // cell + 1, num_colours), dtype=np.uint8)
        octave = Image.fromarray(coarse.repeat(3 // num_colours, axis=2)).resize(
            (width, height), Image.Resampling.BICUBIC
        )
        image += np.asarray(octave) * min(1, cell / 20)
    return Image.fromarray((image * (255 / image.max())).astype(np.uint8))


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
def test_a_large_jpeg_is_decoded_at_the_smallest_sufficient_scale(
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
def test_reduced_and_full_decoding_are_nearly_equal_after_the_resize(
    tmp_path: Path, quality: int, subsampling: str, progressive: bool
) -> None:
    path = tmp_path / "a.jpg"
    photograph(720, 1280).save(path, quality=quality, subsampling=subsampling, progressive=progressive)
    full = decode_rgb(path)
    for needed_hw in ((144, 256), (300, 533), (60, 107)):
        reduced = decode_reduced(path, (720, 1280), needed_hw)
        assert reduced is not None
        one, other, shifted = (
            F.resize(image, list(needed_hw), antialias=True).float()
            for image in (reduced, full, full.roll(1, dims=2))
        )
        difference = (one - other).abs()
        # Both are rounded to whole levels twice, and differ in how they blend the finest detail.
        assert float(difference.max()) <= 12
        assert float(difference.mean()) < float((shifted - other).abs().mean()), "less than a pixel's shift"
        assert float((one - other).mean().abs()) < 0.5, "neither is brighter"


def test_only_intact_colour_jpegs_of_annotated_size_are_decoded_reduced(tmp_path: Path) -> None:
    image = photograph(400, 600)
    others = {"grey.jpg": "L", "cmyk.jpg": "CMYK", "a.png": "RGB", "a.webp": "RGB"}
    for name, mode in others.items():
        image.convert(mode).save(tmp_path / name)
    image.save(tmp_path / "whole.jpg")
    encoded = (tmp_path / "whole.jpg").read_bytes()
    for fraction in (0.02, 0.5, 0.99):
        (tmp_path / f"cut_{fraction}.jpg").write_bytes(encoded[: int(fraction * len(encoded))])
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "png.jpg").write_bytes((tmp_path / "a.png").read_bytes())
    image.save(tmp_path / "uneven.jpg", subsampling="4:2:2")
    names = [path.name for path in tmp_path.iterdir() if path.name != "whole.jpg"]
    assert len(names) == 10
    for name in (*names, "nowhere.jpg", "."):
        assert decode_reduced(tmp_path / name, (400, 600), (100, 150)) is None, name
    assert decode_reduced(tmp_path / "whole.jpg", (400, 600), (100, 150)) is not None
    for other_hw in ((600, 400), (399, 600), (401, 600)):
        assert decode_reduced(tmp_path / "whole.jpg", other_hw, (50, 50)) is None
