"""Data sets in a .zip: unpacked once into a cache, which all processes of a host use."""

import hashlib
import logging
import os
import shutil
import stat
import zipfile
import zlib
from pathlib import Path, PurePosixPath, PureWindowsPath

from filelock import FileLock

from detr_dist.data.formats.annotations import SPLIT_OF_NAME
from detr_dist.errors import DataError
from detr_dist.storage import CACHE_VARIABLE, cache_folder, new_folder

MAX_RATIO = 100
"""An archive that unpacks to more than this many times its size is refused as a bomb. Label files in text
reach about 10."""

ALWAYS_UNPACKED_BYTES = 2**26
"""Whatever the ratio: a few label files of empty images compress better than anything else."""

_BYTES_AT_A_TIME = 2**20

_ENCRYPTED = 1
"""The bit of a ZIP entry's flags that says it needs a password."""

_KEPT_FREE = 0.05
"""Fraction of the disk that unpacking leaves free."""

_logger = logging.getLogger(__name__)


def unpacked(archive: Path) -> Path:
    """Return the folder with the contents of a zip, and unpack it unless the cache has it.

    The folder is complete or absent, and safe to ask for by many processes at once. Its name is a digest of
    the names, sizes and CRCs of the files in the zip.

    Raises:
        DataError: it is no zip, it is damaged, or it holds something that no data set needs.
    """
    try:
        with zipfile.ZipFile(archive) as file:
            entries = _checked_entries(archive, file)
            folder = cache_folder() / "archives" / _digest(entries)
            if not folder.is_dir():
                folder.parent.mkdir(parents=True, exist_ok=True)
                with FileLock(folder.with_name(f"{folder.name}.lock")):
                    if not folder.is_dir():  # another process may have been faster
                        _unpack(archive, file, entries, folder)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise DataError(f"{archive}: a damaged zip: {error}; copy or download it again") from None
    except (NotImplementedError, RuntimeError) as error:  # a compression without a decoder
        raise DataError(
            f"{archive}: cannot be unpacked: {error}; unpack it yourself, and name the folder"
        ) from None
    except OSError as error:
        raise DataError(
            f"{archive}: cannot be unpacked into {cache_folder()}: {error.strerror or error}; set "
            f"{CACHE_VARIABLE} to a folder on a disk with room, or unpack it yourself, and name the folder"
        ) from None
    return _only_folder(folder)


def _checked_entries(archive: Path, file: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Return the files of a zip by the path to unpack them to.

    Raises:
        DataError: an entry would leave the folder, is a link, or is listed twice, or the sizes are a bomb's.
    """
    entries: dict[str, zipfile.ZipInfo] = {}
    for entry in file.infolist():
        name = entry.filename.replace("\\", "/")
        path = PurePosixPath(name)
        if path.is_absolute() or PureWindowsPath(name).drive or ".." in path.parts:
            raise DataError(f"{archive}: {entry.filename!r} leads out of the archive; refused")
        kind = stat.S_IFMT(entry.external_attr >> 16)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            what = "a link" if kind == stat.S_IFLNK else "no file"
            raise DataError(f"{archive}: {entry.filename!r} is {what}; refused: pack the files themselves")
        if name.endswith("/") or path.parts[:1] == ("__MACOSX",) or path.name.startswith("._"):
            continue
        if entry.flag_bits & _ENCRYPTED:
            raise DataError(
                f"{archive}: {entry.filename!r} is protected by a password; unpack it yourself, and name "
                "the folder"
            )
        if entries.setdefault(str(path), entry) is not entry:
            raise DataError(f"{archive}: {entry.filename!r} is in it twice; refused: pack it again")
    if not entries:
        raise DataError(f"{archive}: holds no files; pack the data set again")
    size, packed = sum(entry.file_size for entry in entries.values()), archive.stat().st_size
    if size > max(MAX_RATIO * packed, ALWAYS_UNPACKED_BYTES):
        raise DataError(
            f"{archive}: unpacks to {_mib(size)}, {size / packed:.0f} times its size; refused: more than "
            f"{MAX_RATIO} times is no data set. Unpack it yourself if it is"
        )
    return entries


def _digest(entries: dict[str, zipfile.ZipInfo]) -> str:
    digest = hashlib.sha256()
    for name, entry in sorted(entries.items()):
        digest.update(f"{name}\0{entry.file_size}\0{entry.CRC}\0".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:32]


def _unpack(archive: Path, file: zipfile.ZipFile, entries: dict[str, zipfile.ZipInfo], folder: Path) -> None:
    """Unpack the files into a new folder.

    Raises:
        DataError: the disk has no room.
    """
    size, disk = sum(entry.file_size for entry in entries.values()), shutil.disk_usage(folder.parent)
    if size > disk.free - _KEPT_FREE * disk.total:
        raise DataError(
            f"{archive}: unpacks to {_mib(size)}, but {folder.parent} has {_mib(disk.free)} free; set "
            f"{CACHE_VARIABLE} to a folder on a larger disk, or make room"
        )
    _logger.info(f"{archive}: unpacking {len(entries)} files, {_mib(size)}, into {folder}")
    with new_folder(folder, flush=False) as partial:
        for name, entry in entries.items():
            path = partial / name
            path.parent.mkdir(parents=True, exist_ok=True)
            # Reading ends at the size that was counted above, and fails if the CRC is not that of the entry.
            with file.open(entry) as source, path.open("xb") as target:
                shutil.copyfileobj(source, target, _BYTES_AT_A_TIME)
        os.sync()  # instead of each file for itself, which takes minutes for 100,000 of them


def _only_folder(folder: Path) -> Path:
    """Return the folder, or the only one in it, unless that is named for a split."""
    inside = [path for path in folder.iterdir() if not path.name.startswith(".")]
    is_alone = len(inside) == 1 and inside[0].is_dir() and inside[0].name.lower() not in SPLIT_OF_NAME
    return inside[0] if is_alone else folder


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.0f} MiB"
