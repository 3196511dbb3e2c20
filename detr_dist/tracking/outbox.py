"""The queue on disk between a run and MLflow.

A run appends each record to a file first. Another thread delivers the records, possibly until long after the
run. Files to upload are hard-linked beside the records, so that they can neither change nor vanish before.

    run.json        tracking URI and run id: where everything goes
    records.jsonl   the records, in the order they were made
    delivered.json  how far each kind of delivery has come, in bytes of records.jsonl
    files/          folders that wait to be uploaded
"""

import json
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
from detr_dist.storage import link_or_copy, write_text


@dataclass(frozen=True)
class Address:
    """Where the records of an outbox go."""

    tracking_uri: str
    run_id: str


class Record(NamedTuple):
    """One record of the queue."""

    kind: str
    content: dict[str, Any]
    end: int
    """Bytes of the file up to the end of this record."""


class Outbox:
    """Appends records; thread-safe. A record that a crash has left incomplete is discarded."""

    def __init__(self, folder: Path, address: Address) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # Readable by its owner only: it may hold a password.
        write_text(folder / "run.json", json.dumps(asdict(address), indent=2), mode=0o600)
        self.folder = folder
        self._lock = threading.Lock()
        path = folder / "records.jsonl"
        size = path.read_bytes().rfind(b"\n") + 1 if path.exists() else 0
        self._file = path.open("ab")
        self._file.truncate(size)
        if max(_read_cursors(folder).values(), default=0) > size:
            (folder / "delivered.json").unlink()  # a power cut has lost records, but not the cursors
        self._waiting: dict[str, Path] = {}  # the latest folder for each artifact path

    def append(self, kind: str, **content: Any) -> None:
        """Append a record of a kind that `delivery` knows; takes some microseconds, even in an outage."""
        line = json.dumps({"kind": kind} | redact_value(content)).encode() + b"\n"
        with self._lock:
            self._file.write(line)
            self._file.flush()

    def append_folder(self, source: Path, artifact_path: str, *, last: str | None = None) -> None:
        """Queue the files of a folder for upload below `artifact_path`, the one named `last` at the end.

        A folder that still waits for the same place is dropped: an outage must not fill the disk.
        """
        waiting = self._new_place()
        shutil.copytree(source, waiting, copy_function=link_or_copy)
        self.append("folder", name=waiting.name, artifact_path=artifact_path, last=last)
        self._drop(artifact_path)
        self._waiting[artifact_path] = waiting

    def append_file(self, source: Path, artifact_path: str = "") -> None:
        """Queue a copy of a file in its current state for upload into the folder `artifact_path`."""
        name = self._copy(source)
        self.append("folder", name=name, artifact_path=artifact_path, last=None)

    def append_image(self, source: Path, key: str, step: int, at_ms: int) -> None:
        """Queue an image file as the image `key` of a step."""
        name = self._copy(source)
        self.append("image", name=name, key=key, step=step, at_ms=at_ms)

    def append_table(self, file_name: str, content: str) -> None:
        """Queue a table, as JSON in the format of MLflow's tables."""
        waiting = self._new_place()
        waiting.mkdir(parents=True)
        (waiting / file_name).write_text(content, encoding="utf-8")
        self.append("table", name=waiting.name, artifact_file=file_name)

    def append_retention(self, parent: str, newest: int, keep: int) -> None:
        """Queue the deletion of all but the newest `keep` folders `parent`/epoch_<N>, N <= `newest`."""
        self.append("retention", parent=parent, newest=newest, keep=keep)
        for artifact_path in outdated(self._waiting, parent, keep=keep, newest=newest):
            self._drop(artifact_path)

    def close(self) -> None:
        """Close the file of records."""
        self._file.close()

    def _new_place(self) -> Path:
        """Return a new folder for waiting files, never that of a record that a power cut may restore."""
        return self.folder / "files" / uuid.uuid4().hex

    def _copy(self, source: Path) -> str:
        """Copy a file into a new folder of waiting files, and return the name of that folder."""
        waiting = self._new_place()
        waiting.mkdir(parents=True)
        shutil.copyfile(source, waiting / source.name)
        return waiting.name

    def _drop(self, artifact_path: str) -> None:
        """Delete the folder that waits for upload to this path, unless it is being uploaded."""
        waiting = self._waiting.pop(artifact_path, None)
        if waiting is not None and waiting.exists():
            with suppress(OSError):
                shutil.rmtree(waiting.replace(waiting.with_suffix(".superseded")), ignore_errors=True)


class OutboxReader:
    """The records of an outbox, and the progress of their delivery. Only one reader may deliver at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.address = Address(**json.loads((folder / "run.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise DataError(
                f"{folder}: holds nothing for MLflow (run.json cannot be read: {error})"
            ) from error
        self._cursors = _read_cursors(folder)

    def records(self, cursor: str, limit: int | None = None) -> Iterator[Record]:
        """Yield the records from a cursor on, up to byte `limit`."""
        position = self.position(cursor)
        with (self.folder / "records.jsonl").open("rb") as file:
            file.seek(position)
            for line in file:
                position += len(line)
                if not line.endswith(b"\n") or (limit is not None and position > limit):
                    return
                content = json.loads(line)
                yield Record(content.pop("kind"), content, position)

    def position(self, cursor: str) -> int:
        """Return how far a cursor has come, in bytes of the file of records."""
        return self._cursors.get(cursor, 0)

    def advance(self, cursor: str, position: int) -> None:
        """Save that everything before `position` is delivered."""
        if position != self.position(cursor):
            self._cursors[cursor] = position
            write_text(self.folder / "delivered.json", json.dumps(self._cursors))

    def num_left(self, *cursors: str) -> int:
        """Return the number of records that one of the cursors has not passed."""
        return sum(1 for _ in self.records(min(cursors, key=self.position)))

    @contextmanager
    def uploading(self, name: str) -> Iterator[Path | None]:
        """Yield the folder of that name, protected from replacement; None if it is gone or was delivered."""
        waiting = self.folder / "files" / name
        taken = waiting.with_suffix(".uploading")
        if waiting.exists():
            waiting.replace(taken)
        yield taken if taken.exists() else None
        shutil.rmtree(taken, ignore_errors=True)


def with_credentials(uri: str, folder: Path) -> str:
    """Return `uri` with the credentials for the same store in the outbox in `folder`, if there are any."""
    try:
        kept = OutboxReader(folder).address.tracking_uri
    except DataError:
        return uri
    return kept if redact(kept) == uri else uri


def outdated(
    artifact_paths: Iterable[str], parent: str, *, keep: int, newest: int | None = None
) -> list[str]:
    """Return all but the newest `keep` paths `parent`/epoch_<N>, N <= `newest`, among artifact paths.

    Epochs after `newest` are excluded: a run that was resumed from an earlier epoch will write them again.
    """
    pattern = re.compile(rf"{re.escape(parent)}/epoch_(\d+)")
    numbers = [int(match[1]) for match in map(pattern.fullmatch, artifact_paths) if match]
    past = sorted(number for number in numbers if newest is None or number <= newest)
    return [f"{parent}/epoch_{number}" for number in past[:-keep]]


def _read_cursors(folder: Path) -> dict[str, int]:
    """Return the cursors; none after a power cut, so that records the server lacks are delivered again."""
    with suppress(OSError, ValueError):
        return dict(json.loads((folder / "delivered.json").read_text(encoding="utf-8")))
    return {}
