"""Folders are complete or absent, also after a kill."""

import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from detr_dist.storage import describe_disk_error, finish_interrupted, link_folder, new_folder, remove_folder

# Kills itself before its n-th change to the file system (or opening of a file), n from 0.
KILLED = """
import os, signal, sys
from pathlib import Path
from detr_dist.storage import finish_interrupted, link_folder, new_folder, remove_folder

def replace(folder):
    with new_folder(folder) as partial:
        (partial / "a").write_text("new a")
        (partial / "b").write_text("new b")

def link(folder):
    link_folder(folder.with_name("new"), folder)

def finish(folder):
    finish_interrupted(folder.parent)

def kill(event, arguments):
    global left
    if event in ("open", "os.chmod", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir"):
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1

operation = {"replace": replace, "link": link, "remove": remove_folder, "finish": finish}[sys.argv[1]]
folder, left = Path(sys.argv[2]), int(sys.argv[3])
sys.addaudithook(kill)
operation(folder)
"""
OLD, NEW = {"a": "old a", "c": "old c"}, {"a": "new a", "b": "new b"}


@pytest.fixture
def umask() -> Iterator[None]:
    """Restore the mask of this process that a test sets."""
    before = os.umask(0o022)
    yield
    os.umask(before)


def write(folder: Path, content: dict[str, str]) -> None:
    folder.mkdir(parents=True)
    for name, text in content.items():
        (folder / name).write_text(text)


def content_of(folder: Path) -> dict[str, str] | None:
    return {path.name: path.read_text() for path in folder.iterdir()} if folder.exists() else None


def hidden(parent: Path) -> list[str]:
    return [path.name for path in parent.iterdir() if path.name.startswith(".")]


def after_kills(operation: str, parent: Path, before: dict[str, dict[str, str]]) -> Iterator[Path]:
    """Yield the repaired folder after a kill of `operation` at each of its moments.

    The last one is the folder of the operation that completed.
    """
    for moment in itertools.count():
        place = parent / str(moment)
        place.mkdir()
        for name, content in before.items():
            write(place / name, content)
        command = [sys.executable, "-c", KILLED, operation, place / "folder", str(moment)]
        code = subprocess.run(command, timeout=30, check=False).returncode
        assert code in (0, -signal.SIGKILL)
        finish_interrupted(place)
        assert hidden(place) == []
        yield place / "folder"
        if code == 0:
            return


@pytest.mark.parametrize("operation", ["replace", "link"])
def test_a_folder_replacement_killed_at_any_moment_leaves_old_or_new(operation: str, tmp_path: Path) -> None:
    before = {"folder": OLD, "new": NEW}
    outcomes = [content_of(folder) for folder in after_kills(operation, tmp_path, before)]
    num_old = outcomes.count(OLD)
    assert num_old > 8  # moments before the new one is on disk
    assert outcomes == [OLD] * num_old + [NEW] * (len(outcomes) - num_old)
    assert outcomes.count(NEW) > 4  # between the renames, and while the old one is deleted


def test_a_killed_first_write_leaves_a_complete_folder_or_none(tmp_path: Path) -> None:
    outcomes = [content_of(folder) for folder in after_kills("replace", tmp_path, {})]
    num_absent = outcomes.count(None)
    assert num_absent > 8
    assert outcomes == [None] * num_absent + [NEW] * (len(outcomes) - num_absent)


def test_a_killed_removal_leaves_a_complete_folder_or_none(tmp_path: Path) -> None:
    outcomes = [content_of(folder) for folder in after_kills("remove", tmp_path, {"folder": OLD})]
    num_whole = outcomes.count(OLD)
    assert num_whole > 0
    assert outcomes == [OLD] * num_whole + [None] * (len(outcomes) - num_whole)
    assert outcomes.count(None) > 3  # one for each file of it at least


def test_a_killed_repair_loses_nothing(tmp_path: Path) -> None:
    between_the_renames = {".folder.replaced": OLD, ".folder.partial": NEW}
    outcomes = [content_of(folder) for folder in after_kills("finish", tmp_path, between_the_renames)]
    assert len(outcomes) > 4
    assert outcomes == [NEW] * len(outcomes)


def test_an_old_folder_is_restored_if_the_new_one_is_gone(tmp_path: Path) -> None:
    write(tmp_path / ".folder.replaced", OLD)
    finish_interrupted(tmp_path)
    assert content_of(tmp_path / "folder") == OLD
    assert hidden(tmp_path) == []


def test_a_repair_does_not_touch_complete_folders(tmp_path: Path) -> None:
    write(tmp_path / "folder", OLD)
    write(tmp_path / ".hidden", NEW)
    (tmp_path / "notes.txt").write_text("mine")
    finish_interrupted(tmp_path)
    assert content_of(tmp_path / "folder") == OLD
    assert content_of(tmp_path / ".hidden") == NEW
    assert (tmp_path / "notes.txt").read_text() == "mine"
    finish_interrupted(tmp_path / "not_there_yet")
    assert not (tmp_path / "not_there_yet").exists()


def test_a_repair_reports_incomplete_folders(tmp_path: Path) -> None:
    for name in (".complete.replaced", ".cut.partial", "cut", ".first.partial"):
        write(tmp_path / name, OLD)
    assert sorted(finish_interrupted(tmp_path)) == ["cut", "first"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["complete", "cut"]


def test_a_new_folder_replaces_the_old_one_when_it_is_complete(tmp_path: Path) -> None:
    folder = tmp_path / "deeper" / "folder"
    write(folder, OLD)
    with new_folder(folder) as partial:
        write(partial / "within", NEW)
        assert content_of(folder) == OLD
    assert content_of(folder / "within") == NEW
    assert [path.name for path in folder.iterdir()] == ["within"]
    assert hidden(folder.parent) == []


def fail_on_the_way(folder: Path, error: type[BaseException]) -> None:
    with new_folder(folder) as partial:
        (partial / "a").write_text("half")
        raise error


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("before", [OLD, None])
def test_an_exception_leaves_the_old_folder_and_removes_the_new_one(
    error: type[BaseException], before: dict[str, str] | None, tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    if before is not None:
        write(folder, before)
    with pytest.raises(error):
        fail_on_the_way(folder, error)
    assert content_of(folder) == before
    assert hidden(tmp_path) == []


def test_an_exception_keeps_the_folder_that_a_kill_left_unrenamed(tmp_path: Path) -> None:
    write(tmp_path / ".folder.replaced", OLD)
    write(tmp_path / ".folder.partial", NEW)
    with pytest.raises(KeyboardInterrupt):
        fail_on_the_way(tmp_path / "folder", KeyboardInterrupt)
    finish_interrupted(tmp_path)
    assert content_of(tmp_path / "folder") == NEW


@pytest.mark.usefixtures("umask")
@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_files_are_as_readable_as_their_folder(mask: int, mode: int, tmp_path: Path) -> None:
    os.umask(mask)
    with new_folder(tmp_path / "folder") as partial:
        write(partial / "within", {"private": "text"})
        (partial / "within" / "private").chmod(0o600)
        os.close(os.open(partial / "private", os.O_CREAT, 0o600))
    for path in ("private", "within/private"):
        assert (tmp_path / "folder" / path).stat().st_mode & 0o777 == mode


def test_a_linked_folder_keeps_its_files_when_the_source_is_removed(tmp_path: Path) -> None:
    source, folder = tmp_path / "source", tmp_path / "folder"
    write(source, NEW)
    write(folder, OLD)
    link_folder(source, folder)
    assert {p.name: p.stat().st_ino for p in folder.iterdir()} == {
        p.name: p.stat().st_ino for p in source.iterdir()
    }
    remove_folder(source)
    assert not source.exists()
    assert content_of(folder) == NEW
    assert hidden(tmp_path) == []


def test_without_hard_links_the_files_are_copied(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError("Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    write(tmp_path / "source", NEW)
    link_folder(tmp_path / "source", tmp_path / "folder")
    assert content_of(tmp_path / "folder") == NEW
    assert not (tmp_path / "folder" / "a").samefile(tmp_path / "source" / "a")


def test_a_disk_failure_is_one_line_with_the_free_space(tmp_path: Path) -> None:
    full = OSError(28, "No space left on device", "some/file")
    assert describe_disk_error(full, tmp_path).startswith("No space left on device; ")
    assert describe_disk_error(full, tmp_path).endswith(" MiB free")
    assert describe_disk_error(RuntimeError("two\n  lines"), tmp_path / "gone") == "two lines"
