"""What MLflow is to be told, on disk first.

A run appends each record to a file before anything else happens to it. Delivering it is somebody else's
business and may take until long after the run; files to upload are hard-linked beside it, so that they can
neither change nor vanish meanwhile.

    run.json        tracking URI and run id: where everything goes
    records.jsonl   the records, in the order they were made
    delivered.json  how far each kind of delivery has come, in bytes of records.jsonl
    files/          folders that wait to be uploaded
"""

import json
import os
import re
import shutil
import threading
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from detr_dist.errors import DataError
from detr_dist.redaction import redact, redact_value


@dataclass(frozen=True)
class Address:
    """Where the records of an outbox go."""

    tracking_uri: str
    run_id: str


class Record(NamedTuple):
    kind: str
    content: dict[str, Any]
    end: int
    """Bytes of the file up to the end of this record."""


class Outbox:
    """Appends records; thread-safe. A record that a crash cut in two was never made."""

    def __init__(self, folder: Path, address: Address) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        _replace_text(folder / "run.json", json.dumps(asdict(address), indent=2))  # may hold a password
        self.folder = folder
        self._lock = threading.Lock()
        path = folder / "records.jsonl"
        size = _whole_size(path)
        with path.open("ab") as file:
            file.truncate(size)
        if any(position > size for position in _read_cursors(folder).values()):
            (folder / "delivered.json").unlink()  # a power cut has taken records, but not the cursors
        self._file = path.open("ab")
        self._waiting: dict[str, Path] = {}  # the latest folder for each artifact path

    def append(self, kind: str, **content: Any) -> None:
        """Note something of a kind that `delivery` knows. Costs some microseconds, whatever the server
        does."""
        line = json.dumps({"kind": kind} | redact_value(content)).encode() + b"\n"
        with self._lock:
            self._file.write(line)
            self._file.flush()

    def append_folder(self, source: Path, artifact_path: str, *, last: str | None = None) -> None:
        """Note the files of a folder for upload below `artifact_path`, the one named `last` after all others.

        One that still waits for the same place is given up for it: an outage must not fill the disk.
        """
        waiting = self._new_place()
        shutil.copytree(source, waiting, copy_function=link_or_copy)
        self.append("folder", name=waiting.name, artifact_path=artifact_path, last=last)
        self._give_up(artifact_path)
        self._waiting[artifact_path] = waiting

    def append_retention(self, parent: str, newest: int, keep: int) -> None:
        """Note that of `parent`/epoch_<N>, N up to `newest`, only the last `keep` stay."""
        self.append("retention", parent=parent, newest=newest, keep=keep)
        for artifact_path in outdated(self._waiting, parent, keep=keep, newest=newest):
            self._give_up(artifact_path)

    def _give_up(self, artifact_path: str) -> None:
        """Drop the folder that waits for this place, unless it is being uploaded."""
        waiting = self._waiting.pop(artifact_path, None)
        if waiting is not None and waiting.exists():
            with suppress(OSError):
                shutil.rmtree(waiting.replace(waiting.with_suffix(".superseded")), ignore_errors=True)

    def _new_place(self) -> Path:
        """Where files wait; never the place of an earlier record, which a power cut may bring back."""
        return self.folder / "files" / uuid.uuid4().hex

    def append_file(self, source: Path) -> None:
        """Note a copy of a file for upload beside the folders."""
        waiting = self._new_place()
        waiting.mkdir(parents=True)
        shutil.copyfile(source, waiting / source.name)
        self.append("folder", name=waiting.name, artifact_path="", last=None)

    def close(self) -> None:
        self._file.close()


class OutboxReader:
    """What is in an outbox, and how far it has been delivered. One reader may deliver at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.address = Address(**json.loads((folder / "run.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise DataError(
                f"{folder}: holds nothing for MLflow (run.json cannot be read: {error})"
            ) from error
        self._records_path = folder / "records.jsonl"
        self._cursors = _read_cursors(folder)

    def records(self, cursor: str, limit: int | None = None) -> Iterator[Record]:
        """The records from a cursor on, up to byte `limit`."""
        position = self._cursors.get(cursor, 0)
        with self._records_path.open("rb") as file:
            file.seek(position)
            for line in file:
                end = position + len(line)
                if not line.endswith(b"\n") or (limit is not None and end > limit):
                    return
                content = json.loads(line)
                yield Record(content.pop("kind"), content, end)
                position = end

    def position(self, cursor: str) -> int:
        return self._cursors.get(cursor, 0)

    def advance(self, cursor: str, position: int) -> None:
        """Note that everything before `position` is delivered."""
        if position == self.position(cursor):
            return
        self._cursors[cursor] = position
        _replace_text(self.folder / "delivered.json", json.dumps(self._cursors))

    def num_left(self, *cursors: str) -> int:
        """Records that one of the cursors has not passed."""
        first = min(cursors, key=self.position)
        return sum(1 for _ in self.records(first))

    @contextmanager
    def uploading(self, name: str) -> Iterator[Path | None]:
        """The folder of that name, out of reach for what supersedes it; None if it is gone or was
        delivered."""
        waiting = self.folder / "files" / name
        taken = waiting.with_suffix(".uploading")
        if waiting.exists():
            waiting.replace(taken)
        yield taken if taken.exists() else None
        shutil.rmtree(taken, ignore_errors=True)


def with_credentials(uri: str, folder: Path) -> str:
    """Return `uri` with the credentials that the outbox in `folder` has for the same store, if any."""
    try:
        kept = OutboxReader(folder).address.tracking_uri
    except DataError:
        return uri
    return kept if redact(kept) == uri else uri


def outdated(
    artifact_paths: Iterable[str], parent: str, *, keep: int, newest: int | None = None
) -> list[str]:
    """Of the `parent`/epoch_<N> among some artifact paths, N up to `newest`, all but the last `keep`.

    What is newer is of a future that a run which went back has left: it will be written again.
    """
    pattern = re.compile(rf"{re.escape(parent)}/epoch_(\d+)")
    numbers = [int(match[1]) for match in map(pattern.fullmatch, artifact_paths) if match]
    past = sorted(number for number in numbers if newest is None or number <= newest)
    return [f"{parent}/epoch_{number}" for number in past[:-keep]]


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """The same file under another name, as a hard link where the file system has them."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _read_cursors(folder: Path) -> dict[str, int]:
    """None after a power cut: then everything is gone through again, and the server knows what it has."""
    with suppress(OSError, ValueError):
        return dict(json.loads((folder / "delivered.json").read_text(encoding="utf-8")))
    return {}


def _replace_text(path: Path, text: str) -> None:
    """Write a file that its owner alone can read, complete or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)  # a crash may have left it, with other permissions
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    with os.fdopen(os.open(partial, flags, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
    partial.replace(path)


def _whole_size(path: Path) -> int:
    """Bytes up to the end of the last whole line."""
    if not path.exists():
        return 0
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        while size:
            chunk_start = max(0, size - 4096)
            file.seek(chunk_start)
            newline = file.read(size - chunk_start).rfind(b"\n")
            if newline >= 0:
                return chunk_start + newline + 1
            size = chunk_start
    return 0
