"""Queued records and folders survive crashes, deletions and other processes that deliver them."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from detr_dist.errors import DataError
from detr_dist.storage import link_or_copy
from detr_dist.tracking.outbox import Address, Outbox, OutboxReader

ADDRESS = Address("http://127.0.0.1:5000", "0123abc")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "outbox"


@pytest.fixture
def outbox(folder: Path) -> Iterator[Outbox]:
    outbox = Outbox(folder, ADDRESS)
    yield outbox
    outbox.close()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Make a folder to upload, with a folder in it."""
    source = tmp_path / "source"
    (source / "inner").mkdir(parents=True)
    (source / "a").write_text("a")
    (source / "inner" / "b").write_text("b")
    return source


def steps_in(folder: Path, cursor: str = "values") -> list[int]:
    return [content["step"] for _, content, _ in OutboxReader(folder).records(cursor)]


def names_in(folder: Path) -> list[str]:
    """Return the queued folders, as named in their records."""
    return [content["name"] for _, content, _ in OutboxReader(folder).records("folders")]


def test_records_are_read_as_they_were_written(outbox: Outbox, folder: Path) -> None:
    outbox.append("metrics", step=1, values={"loss": 0.1 + 0.2})
    outbox.append("tags", values={"note": "two\nlines, and ü"})
    reader = OutboxReader(folder)
    assert reader.address == ADDRESS
    first, second = reader.records("values")
    assert (first.kind, first.content) == ("metrics", {"step": 1, "values": {"loss": 0.1 + 0.2}})
    assert (second.kind, second.content) == ("tags", {"values": {"note": "two\nlines, and ü"}})
    assert second.end == (folder / "records.jsonl").stat().st_size


def test_records_of_an_earlier_process_stay(outbox: Outbox, folder: Path) -> None:
    outbox.append("metrics", step=1)
    outbox.close()
    elsewhere = Address("http://127.0.0.1:5001", ADDRESS.run_id)
    again = Outbox(folder, elsewhere)
    again.append("metrics", step=2)
    again.close()
    assert steps_in(folder) == [1, 2]
    assert OutboxReader(folder).address == elsewhere


@pytest.mark.parametrize("num_complete", [0, 2])
@pytest.mark.parametrize("num_written_bytes", [1, 20, 10_000])
def test_a_line_truncated_by_a_crash_is_dropped_and_the_next_is_intact(
    outbox: Outbox, folder: Path, num_complete: int, num_written_bytes: int
) -> None:
    for step in range(num_complete):
        outbox.append("metrics", step=step)
    outbox.close()
    truncated = json.dumps({"kind": "metrics", "step": 99, "values": {"x" * 20_000: 1.0}})[:num_written_bytes]
    with (folder / "records.jsonl").open("a") as file:
        file.write(truncated)
    assert steps_in(folder) == [*range(num_complete)]
    again = Outbox(folder, ADDRESS)
    again.append("metrics", step=100)
    again.close()
    assert steps_in(folder) == [*range(num_complete), 100]


def test_a_reader_does_not_use_an_incomplete_line(outbox: Outbox, folder: Path) -> None:
    line = json.dumps({"kind": "metrics", "step": 1})
    with (folder / "records.jsonl").open("a") as file:
        file.write(line)
        file.flush()
        reader = OutboxReader(folder)
        assert list(reader.records("values")) == []
        file.write("\n")
        file.flush()
        assert [record.content for record in reader.records("values")] == [{"step": 1}]


def test_each_cursor_continues_at_its_position_in_a_reopened_outbox(outbox: Outbox, folder: Path) -> None:
    for step in range(4):
        outbox.append("metrics", step=step)
    reader = OutboxReader(folder)
    ends = [record.end for record in reader.records("values")]
    reader.advance("values", ends[2])
    reader.advance("folders", ends[0])
    assert reader.num_left("values") == 1
    assert reader.num_left("values", "folders") == 3
    again = OutboxReader(folder)
    assert again.position("values") == ends[2]
    assert steps_in(folder, "values") == [3]
    assert steps_in(folder, "folders") == [1, 2, 3]
    outbox.append("metrics", step=4)
    assert steps_in(folder, "values") == [3, 4]
    assert [record.content["step"] for record in again.records("folders", limit=ends[2])] == [1, 2]


def test_a_queued_folder_is_kept_if_the_original_is_deleted_or_replaced(
    outbox: Outbox, folder: Path, source: Path
) -> None:
    outbox.append_folder(source, "model", last="a")
    (record,) = OutboxReader(folder).records("folders")
    assert record.content["artifact_path"] == "model"
    assert record.content["last"] == "a"
    waiting = folder / "files" / record.content["name"]
    for name in ("a", "inner/b"):
        assert (waiting / name).samefile(source / name)  # takes no additional space
    replacement = source / ".a.partial"
    replacement.write_text("newer")
    replacement.replace(source / "a")
    assert (waiting / "a").read_text() == "a"
    shutil.rmtree(source)
    assert (waiting / "inner" / "b").read_text() == "b"


def test_a_queued_file_is_kept_if_the_original_is_written_to(
    outbox: Outbox, folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("first")
    outbox.append_file(path)
    path.write_text("second")
    (name,) = names_in(folder)
    assert (folder / "files" / name / "config.yaml").read_text() == "first"


def test_without_hard_links_files_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_link(*_: object) -> None:
        raise OSError("not supported")

    monkeypatch.setattr(os, "link", no_link)
    (tmp_path / "a").write_text("a")
    link_or_copy(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "a"
    assert not (tmp_path / "b").samefile(tmp_path / "a")


def test_a_newer_folder_replaces_a_queued_one_for_the_same_path(
    outbox: Outbox, folder: Path, source: Path
) -> None:
    outbox.append_folder(source, "checkpoints/last")
    outbox.append_folder(source, "checkpoints/best")
    (source / "a").unlink()
    (source / "a").write_text("newer")
    outbox.append_folder(source, "checkpoints/last")
    superseded, other, newer = names_in(folder)
    assert {path.name for path in (folder / "files").iterdir()} == {other, newer}
    reader = OutboxReader(folder)
    with reader.uploading(superseded) as taken:
        assert taken is None
    with reader.uploading(newer) as taken:
        assert taken is not None
        assert (taken / "a").read_text() == "newer"
    assert {path.name for path in (folder / "files").iterdir()} == {other}


def test_a_newer_folder_does_not_replace_one_that_is_being_uploaded(
    outbox: Outbox, folder: Path, source: Path
) -> None:
    outbox.append_folder(source, "checkpoints/last")
    (name,) = names_in(folder)
    reader = OutboxReader(folder)
    with reader.uploading(name) as taken:
        outbox.append_folder(source, "checkpoints/last")
        assert taken is not None
        assert (taken / "a").read_text() == "a"
        assert (taken / "inner" / "b").read_text() == "b"
    assert [path.name for path in (folder / "files").iterdir()] == names_in(folder)[1:]


def test_a_folder_whose_upload_fails_is_kept_for_the_next_attempt(
    outbox: Outbox, folder: Path, source: Path
) -> None:
    outbox.append_folder(source, "model")
    (name,) = names_in(folder)
    with pytest.raises(ConnectionError), OutboxReader(folder).uploading(name):
        raise ConnectionError
    outbox.close()
    again = Outbox(folder, ADDRESS)
    again.append_folder(source, "model")
    again.close()
    assert len({name, *names_in(folder)}) == 2  # a number is used once
    with OutboxReader(folder).uploading(name) as taken:
        assert taken is not None
        assert (taken / "a").read_text() == "a"
    with OutboxReader(folder).uploading(name) as taken:
        assert taken is None


@pytest.mark.parametrize("content", [None, "", "{}", '["http://127.0.0.1", "0123abc"]'])
def test_a_folder_without_an_outbox_is_named(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(DataError, match=str(tmp_path)):
        OutboxReader(tmp_path)
