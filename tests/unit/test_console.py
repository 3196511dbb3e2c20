"""Standard output and error accept any character, and a reader may close them."""

import io
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from detr_dist.console import log_to_file, make_robust


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_characters_that_the_console_cannot_encode_are_escaped(
    encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict"))
    make_robust()
    for stream in (sys.stdout, sys.stderr):
        print("球 \udce9", file=stream, flush=True)
        assert stream.buffer.getvalue() == b"\\u7403 \\udce9\n"


def test_a_missing_console_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    make_robust()
    assert sys.stdout is None


def test_a_report_on_a_console_of_another_encoding_is_complete(tmp_path: Path) -> None:
    document = {
        "images": [{"id": 1, "file_name": "été.jpg", "width": 60, "height": 40}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [5, 5, 20, 20]}],
        "categories": [{"id": 1, "name": "球"}],
    }
    (tmp_path / "été.jpg").touch()
    (tmp_path / "a.json").write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8-sig")
    (tmp_path / "a.yaml").write_text("# größer\ndata: {shortest_edge: 100}\n", encoding="utf-8")
    finished = subprocess.run(
        [
            sys.executable,
            "-m",
            "detr_dist",
            "check-data",
            "--quick",
            tmp_path,
            "--config",
            tmp_path / "a.yaml",
        ],
        env=os.environ | {"LC_ALL": "C", "PYTHONIOENCODING": "latin-1", "PYTHONUTF8": "0"},
        capture_output=True,
        timeout=300,
        check=False,
    )
    assert finished.stderr == b""
    lines = finished.stdout.splitlines()
    assert lines[-1] == b"verdict: 0 errors, 0 warnings: ready to train"
    assert any(line.split()[:2] == [b"\\u7403", b"1"] for line in lines)


@pytest.mark.parametrize("options", [(), ("-u",)])
def test_output_without_a_reader_is_dropped(options: tuple[str, ...], tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from detr_dist.console import make_robust; make_robust()\n"
        "for i in range(100000): print(i); print(i, file=sys.stderr)\n"
        "Path('done').touch()"
    )
    process = subprocess.Popen(
        [sys.executable, *options, "-c", script], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout.readline() == b"0\n"
    process.stdout.close()
    process.stderr.close()
    assert process.wait(60) == 0
    assert (tmp_path / "done").exists()


@pytest.mark.parametrize(
    ("level", "shown"), [(logging.WARNING, ["warned"]), (logging.INFO, ["informed", "warned"])]
)
def test_the_log_file_is_complete_and_console_output_is_unchanged(
    level: int, shown: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Configure the root logger, as Python code of a user may do."""
    package, root, received = logging.getLogger("detr_dist"), logging.getLogger(), []
    monkeypatch.setattr(package, "handlers", [])
    monkeypatch.setattr(package, "propagate", True)
    monkeypatch.setattr(package, "level", logging.NOTSET)
    above = logging.Handler()
    monkeypatch.setattr(above, "emit", lambda record: received.append(record.getMessage()))
    monkeypatch.setattr(root, "handlers", [above])
    before = root.level
    root.setLevel(level)
    try:
        file = log_to_file(tmp_path / "train.log")
        for each in ("informed", "warned"):
            (package.info if each == "informed" else package.warning)(each)
        file.close()
        package.info("later")
        package.warning("later, too")
    finally:
        root.setLevel(before)
    lines = (tmp_path / "train.log").read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == ["informed", "warning: warned"]
    assert [each for each in received if "later" not in each] == shown
    assert ("later" in received) is (level == logging.INFO)
    assert (package.handlers, package.level, package.propagate) == ([], logging.NOTSET, True)
