"""A .zip is unpacked once, complete or not at all, and nothing leaves its folder."""

import json
import stat
import threading
import zipfile
from pathlib import Path

import pytest

from detr_dist.data.formats import archives
from detr_dist.data.formats.archives import unpacked
from detr_dist.errors import DataError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DETR_DIST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_zip(path: Path, *entries: tuple[str | zipfile.ZipInfo, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in entries:
            file.writestr(name, content)
    return path


def test_a_zip_is_unpacked_once_for_each_content(tmp_path: Path, messages: list[str]) -> None:
    entries = ("ds/", b""), ("ds/a b.txt", b"1"), ("ds/été/c.txt", b"2"), ("__MACOSX/ds/._a", b"")
    folder = unpacked(write_zip(tmp_path / "a.zip", *entries))
    assert (folder.name, (folder / "a b.txt").read_text()) == ("ds", "1"), "the only folder is the data set"
    assert (folder / "été" / "c.txt").read_text() == "2"
    assert unpacked(tmp_path / "a.zip") == unpacked(write_zip(tmp_path / "copy.zip", *entries)) == folder
    assert len(messages) == 1
    changed = unpacked(write_zip(tmp_path / "a.zip", ("ds/a b.txt", b"3")))
    assert (changed / "a b.txt").read_text() == "3"


def test_backslashes_of_windows_are_folders(tmp_path: Path) -> None:
    entry = zipfile.ZipInfo("x")
    entry.filename = "train\\images\\a.txt"
    folder = unpacked(write_zip(tmp_path / "a.zip", (entry, b"1"), ("data.yaml", b"")))
    assert (folder / "train" / "images" / "a.txt").is_file()


def test_several_that_start_at_once_unpack_it_once(tmp_path: Path, messages: list[str]) -> None:
    path = write_zip(tmp_path / "a.zip", *((f"{i}.txt", b"x" * 1000) for i in range(200)))
    counts: list[int] = []
    threads = [
        threading.Thread(target=lambda: counts.append(len(list(unpacked(path).iterdir())))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts == [200] * 4
    assert len(messages) == 1


def special(kind: int) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo("odd")
    entry.external_attr = (kind | 0o777) << 16
    return entry


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../x", r"'\.\./x' leads out of the archive; refused"),
        ("a/../../x", "leads out of the archive"),
        ("/etc/x", "leads out of the archive"),
        ("C:\\x", "leads out of the archive"),
        ("..\\x", "leads out of the archive"),
        (special(stat.S_IFLNK), "'odd' is a link; refused"),
        (special(stat.S_IFIFO), "'odd' is no file; refused"),
        ("ok.txt", "'ok.txt' is in it twice"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_entries_that_no_data_set_needs_are_refused(
    name: str | zipfile.ZipInfo, message: str, tmp_path: Path, cache: Path
) -> None:
    path = write_zip(tmp_path / "a.zip", ("ok.txt", b"1"), (name, b"x"))
    with pytest.raises(DataError, match=message) as caught:
        unpacked(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.zip"]


def test_bombs_are_refused_before_unpacking(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "ALWAYS_UNPACKED_BYTES", 2**20)
    path = write_zip(tmp_path / "a.zip", ("a", bytes(2**21)))
    with pytest.raises(DataError, match=r"unpacks to 2 MiB, \d+ times its size; refused"):
        unpacked(path)
    assert not cache.exists()


def test_an_archive_with_a_password_or_without_files_is_refused_before_unpacking(
    tmp_path: Path, cache: Path
) -> None:
    path = write_zip(tmp_path / "a.zip", ("ok.txt", b"1"))
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1  # the flag in the table of contents
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"'ok\.txt' is protected by a password; unpack it yourself"):
        unpacked(path)
    with pytest.raises(DataError, match=r"b\.zip: holds no files"):
        unpacked(write_zip(tmp_path / "b.zip"))
    assert not cache.exists()


def test_sizes_that_lie_are_noticed_while_unpacking(tmp_path: Path, cache: Path) -> None:
    path = write_zip(tmp_path / "a.zip", ("first", b"1"), ("a", bytes(2**20)))
    content, size = path.read_bytes(), (2**20).to_bytes(4, "little")
    assert content.count(size) == 2, "in the header of the entry and in the table of contents"
    path.write_bytes(content.replace(size, (10).to_bytes(4, "little")))
    with pytest.raises(DataError, match="a damaged zip: Bad CRC-32"):
        unpacked(path)
    assert not [each for each in cache.rglob("*") if each.suffix != ".lock" and each.name != "archives"]


def test_too_little_room_is_reported_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "_KEPT_FREE", 1.0)
    path = write_zip(tmp_path / "a.zip", ("a", b"1"))
    with pytest.raises(DataError, match="MiB free; set DETR_DIST_CACHE to a folder on a larger disk"):
        unpacked(path)
    (tmp_path / "cache").rename(tmp_path / "old")
    (tmp_path / "cache").write_text(json.dumps({}))
    with pytest.raises(DataError, match=r"cannot be unpacked into .*cache: .*; set DETR_DIST_CACHE"):
        unpacked(path)
