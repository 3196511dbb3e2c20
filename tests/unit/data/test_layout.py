"""Images in every format of Pillow are found once each, and skipped files are known."""

import os
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image

from detr_dist.data.images import find_images, image_suffixes, read_size_hw
from detr_dist.data.unannotated import read_unannotated
from detr_dist.errors import DataError
from detr_dist.serving.decoding import UnreadableImageError


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_exactly_the_formats_that_pillow_decodes_are_images(tmp_path: Path) -> None:
    suffixes = (".jfif", ".AVIF", ".jp2", ".ppm", ".jpe", ".JPG", ".tga", ".webp", ".mpo")
    images = [f"a{suffix}" for suffix in suffixes]
    others = ["a.txt", "a.json", "a.mp4", "a.mpg", "a.h5", "a.pdf", "a", ".jpg", "._a.jpg"]
    touch(tmp_path, *images, *others)
    found = find_images(tmp_path)
    assert found.names == sorted(images)
    assert found.left_out == sorted(others)


def test_every_format_that_pillow_writes_and_reads_has_a_known_suffix() -> None:
    formats = Image.registered_extensions()
    assert {suffix for suffix, name in formats.items() if name in Image.SAVE and name in Image.OPEN} <= {
        *image_suffixes(), ".bufr", ".grib", ".h5", ".hdf", ".emf", ".wmf"
    }  # fmt: skip


def test_links_are_followed_without_endless_loops(tmp_path: Path) -> None:
    source = tmp_path / "in"
    touch(source, "a.png", "one/b.png", "two/c.png")
    touch(tmp_path, "elsewhere/d.png", "elsewhere/deeper/e.png")
    for link, target in {
        "link.png": "a.png",
        "gone.png": "nowhere",
        "elsewhere": "../elsewhere",
        "self": ".",
        "one/up": "..",
        "one/above": "../..",
        "one/to_two": "../two",
        "two/to_one": "../one",
    }.items():
        (source / link).symlink_to(target)
    found = find_images(source)
    assert found.names == [
        "a.png", "elsewhere/d.png", "elsewhere/deeper/e.png", "gone.png", "link.png",
        "one/b.png", "one/to_two/c.png", "two/c.png", "two/to_one/b.png",
    ]  # fmt: skip
    assert {"self", "one/up", "one/above", "one/to_two/to_one", "two/to_one/to_two"} <= {*found.left_out}


def test_a_pipe_is_skipped_because_reading_it_would_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    touch(tmp_path, "a.png")
    assert find_images(tmp_path) == (tmp_path, ["a.png"], ["pipe.png"])


def test_a_folder_without_images_is_reported_with_what_it_holds(tmp_path: Path) -> None:
    touch(tmp_path, "a.txt", "b.mp4")
    with pytest.raises(DataError, match=r"holds no image .* 2 other files"):
        find_images(tmp_path)


def test_the_size_of_two_hundred_megapixels_is_read(tmp_path: Path) -> None:
    header = struct.pack(">4sIIBBBBB", b"IHDR", 20_000, 10_000, 8, 0, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I4s", 99, b"IDAT"))
    assert read_size_hw(tmp_path / "a.png") == (10_000, 20_000)
    data, unreadable = read_unannotated(tmp_path, ["a.png"], ["ball"], "auto")
    assert (data.sizes_hw.tolist(), unreadable) == ([[10_000, 20_000]], [])


@pytest.mark.parametrize("name", ["nowhere.png", "text.png", ".", "nul\0.png"])
def test_a_file_without_a_size_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(UnreadableImageError, match=str(tmp_path)):
        read_size_hw(tmp_path / name)
