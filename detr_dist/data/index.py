"""The index of a large annotation file: its checked columns in Arrow files, which all readers map.

In the cache, `indices/CONTENT/` belongs to the content of an annotation file, and `sources/PATH.json` to the
path of one: it has the content that the path had when it was last read.
"""

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from detr_dist import __version__
from detr_dist.data.columns import Finding
from detr_dist.data.images import decoded_name, missing_images, path_of
from detr_dist.data.records import Category
from detr_dist.storage import cache_folder, remove_folder, write_text

VERSION = 1
"""Part of an index's name. Raise it whenever an annotation file may give other columns or findings."""

SPOT_CHECKS = 100
"""How many image files, spread over the set, must exist when an index is opened again."""

_FACTS = "facts.json"

Columns = Mapping[str, NDArray[Any]]

_logger = logging.getLogger(__name__)


class Index:
    """The columns of a data set with its classes in the order of their ids, and what was found in it.

    Pickling it, or columns of it in a `CocoData`, passes on the folder only.
    """

    def __init__(self, folder: Path) -> None:
        """Map the index of a folder.

        Raises:
            OSError, ValueError, KeyError: it is incomplete.
        """
        from detr_dist.data.arrow_files import mapped_columns  # imports Arrow, which only this needs

        self.folder = folder
        facts = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
        self.columns: dict[str, NDArray[Any]] = {}
        for name, num_bytes in facts["num_bytes"].items():
            if (folder / name).stat().st_size != num_bytes:
                raise ValueError(f"{name} is not of {num_bytes} bytes")
            self.columns |= mapped_columns(folder / name)
        self.class_names: tuple[str, ...] = tuple(facts["class_names"])
        self.categories = [Category(*values) for values in facts["categories"]]
        self.findings = [_finding(values) for values in facts["findings"]]
        self.fingerprint: str = facts["fingerprint"]

    def __reduce__(self) -> tuple[type["Index"], tuple[Path]]:
        return Index, (self.folder,)

    def holds(self, *columns: NDArray[Any]) -> bool:
        """Return whether these very arrays are columns of the index."""
        return all(any(column is own for own in self.columns.values()) for column in columns)

    def computed_once(self, name: str, compute: Callable[[], list[Finding]]) -> list[Finding]:
        """Return findings that depend on the columns and on `name` alone; compute them the first time."""
        key = hashlib.sha256(f"{__version__} {name}".encode()).hexdigest()[:16]
        path = self.folder / f"findings-{key}.json"
        with suppress(OSError, ValueError, TypeError):
            return [_finding(values) for values in json.loads(path.read_text(encoding="utf-8"))]
        findings = compute()
        with suppress(OSError):
            write_text(path, json.dumps([asdict(finding) for finding in findings]))
        return findings


class Entry:
    """The place of an annotation file in the cache; `index` is None if there is none for its content yet."""

    def __init__(self, path: Path) -> None:
        self.index: Index | None = None
        self.path, self.cache = path, cache_folder()
        key = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]
        self.source = self.cache / "sources" / f"{key}.json"
        self.state = _state_of(path)
        self.known: dict[str, Any] = {}

    def find(self) -> Index | None:
        """Return the index of the content that the path had, if the file is unchanged since then."""
        with suppress(OSError, ValueError, TypeError):
            self.known = dict(json.loads(self.source.read_text(encoding="utf-8")))
        if self.known.get("state") == self.state:
            self.index = self._opened(str(self.known.get("sha256")))
        return self.index

    def find_by_content(self) -> Index | None:
        """Return the index of the content, which is read for it."""
        with self.path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        self.known = {
            "path": str(self.path),
            "state": self.state,
            "sha256": sha256,
            "images_were_there": False,
        }
        self.index = self._opened(sha256)
        if self.index is not None:
            self._write_source()
        return self.index

    def has_images(self, images_dir: Path) -> bool:
        """Return whether the image files exist: all of them once, later only some of them are looked for."""
        assert self.index is not None
        names = self.index.columns["file_names"]
        if self.known.get("images_were_there"):
            rows = np.linspace(0, len(names) - 1, min(SPOT_CHECKS, len(names))).astype(np.int64)
            return all(path_of(images_dir, decoded_name(name)).exists() for name in names[rows].tolist())
        if missing_images(images_dir, map(decoded_name, names)):
            return False
        self.known["images_were_there"] = True
        self._write_source()
        return True

    def store(
        self,
        tables: Iterable[Columns],
        *,
        images_were_there: bool,
        findings: list[Finding],
        **facts: Any,
    ) -> Index | None:
        """Write the index of the content, and open it; None if that fails or the file has changed meanwhile.

        Whichever process renames its folder first has written the index.
        """
        from detr_dist.data.arrow_files import write_columns  # as above

        if _state_of(self.path) != self.state:
            return None
        folder = self._folder_of(self.known["sha256"])
        facts |= {"findings": [asdict(finding) for finding in findings], "num_bytes": {}}
        try:
            with tempfile.TemporaryDirectory(
                prefix=".", dir=folder.parent, ignore_cleanup_errors=True
            ) as made:
                partial = Path(made, "index")
                partial.mkdir()
                for number, columns in enumerate(tables):
                    path = partial / f"columns-{number}.arrow"
                    write_columns(path, columns)
                    facts["num_bytes"][path.name] = path.stat().st_size
                write_text(partial / _FACTS, json.dumps(facts))
                with suppress(OSError):  # another node was faster
                    partial.rename(folder)
            self.index = self._opened(self.known["sha256"])
            self.known["images_were_there"] = images_were_there
            self._write_source()
        except OSError as error:
            _logger.debug(f"{folder}: no index is kept: {error}")
        return self.index

    def _folder_of(self, sha256: str) -> Path:
        return self.cache / "indices" / f"{sha256}-{VERSION}"

    def _opened(self, sha256: str) -> Index | None:
        folder = self._folder_of(sha256)
        if not folder.exists():
            return None
        try:
            return Index(folder)
        except (OSError, ValueError, KeyError, TypeError) as error:
            _logger.debug(f"{folder}: incomplete, and made again: {error}")
            with suppress(OSError):
                remove_folder(folder)
            return None

    def _write_source(self) -> None:
        with suppress(OSError):
            write_text(self.source, json.dumps(self.known))


@contextmanager
def entry_of(path: Path) -> Iterator[Entry]:
    """Yield the entry of an annotation file; while it has no index, other processes of the host wait for it.

    They also wait where the cache is shared by several nodes, if its file system has locks.
    """
    entry = Entry(path)
    with ExitStack() as held:
        if entry.find() is None:
            try:
                for name in ("sources", "indices"):
                    (entry.cache / name).mkdir(parents=True, exist_ok=True)
                held.enter_context(FileLock(entry.source.with_suffix(".lock")))
            except (OSError, NotImplementedError) as error:
                _logger.debug(f"{entry.cache}: no lock: {error}")
            if entry.find() is None:  # another process may have made it meanwhile
                entry.find_by_content()
        yield entry


def _state_of(path: Path) -> list[int]:
    """Return what changes whenever a file is written."""
    state = path.stat()
    return [state.st_size, state.st_mtime_ns]


def _finding(values: dict[str, Any]) -> Finding:
    return Finding(**values | {"examples": tuple(values["examples"])})
