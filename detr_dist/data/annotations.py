"""Reading a COCO JSON into columns, with an error that names the record wherever one is wrong."""

import gc
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detr_dist.errors import DataError
from detr_dist.text import value_of

INT64_END = 2**63


@dataclass(frozen=True, slots=True)
class ValueKind:
    """What a value of a record must be."""

    is_right: Callable[[Any], bool]
    wanted: str


@dataclass(frozen=True, slots=True)
class Section:
    """One list of the JSON (images, annotations or categories), read column by column.

    A whole column is converted at once; only when that fails is the record at fault looked for.
    """

    path: Path
    name: str
    records: list[Any]

    def where(self, row: int) -> str:
        record = self.records[row]
        known = f" (id {record['id']!r})" if isinstance(record, dict) and "id" in record else ""
        return f"{self.path}: {self.name}[{row}]{known}"

    def column(self, key: str) -> list[Any]:
        try:
            return [record[key] for record in self.records]
        except (KeyError, TypeError, IndexError):
            row = next(
                i
                for i, record in enumerate(self.records)
                if not isinstance(record, dict) or key not in record
            )
            if not isinstance(self.records[row], dict):
                raise DataError(f"{self.where(row)}: must be an object with keys, as COCO has it") from None
            raise DataError(f"{self.where(row)}: has no {key!r}; add it, COCO requires it") from None

    def optional(self, key: str, default: float) -> list[Any]:
        self.column("id")  # refuses a record that is no object
        values = [record.get(key, default) for record in self.records]
        return [default if value is None else value for value in values] if None in values else values

    def integers(self, key: str, default: int | None = None) -> NDArray[np.int64]:
        values = self.column(key) if default is None else self.optional(key, default)
        array = _as_array(values)
        if array is not None and array.ndim == 1:
            with np.errstate(invalid="ignore"):
                whole = array.astype(np.int64)
            if np.array_equal(whole, array):
                return whole
        raise self._wrong(key, values, WHOLE)

    def numbers(self, key: str, default: float) -> NDArray[np.float64]:
        values = self.optional(key, default)
        array = _as_array(values)
        if array is not None and array.ndim == 1:
            return array.astype(np.float64)
        raise self._wrong(key, values, NUMBER)

    def boxes(self, key: str) -> NDArray[np.float64]:
        """Shape [len, 4]."""
        values = self.column(key)
        array = _as_array(values)
        if array is not None and not values:
            return np.zeros((0, 4))
        if array is not None and array.shape == (len(values), 4) and bool(np.isfinite(array).all()):
            return array.astype(np.float64)
        raise self._wrong(key, values, BOX)

    def texts(self, key: str) -> list[str]:
        values = self.column(key)
        if all(map(_is_text, values)):
            return values
        raise self._wrong(key, values, TEXT)

    def _wrong(self, key: str, values: list[Any], kind: ValueKind) -> DataError:
        row = next((row for row, value in enumerate(values) if not kind.is_right(value)), 0)
        return DataError(f"{self.where(row)}: {complaint(key, values[row], kind)}")


def read_sections(path: Path) -> tuple[Section, Section, Section]:
    """The images, annotations and categories of a COCO JSON.

    Raises:
        DataError: the file cannot be read, is not JSON, or has not the shape of a COCO file.
    """
    document = _read_json(path)
    if not isinstance(document, dict):
        raise DataError(
            f"{path}: holds a {type(document).__name__}, but a COCO file is an object with 'images'"
        )
    images, annotations, categories = (
        _section(path, document, n) for n in ("images", "annotations", "categories")
    )
    return images, annotations, categories


def _read_json(path: Path) -> Any:
    """Outlines are forgotten as they are read: in COCO's own files they are most of the memory."""
    collecting = gc.isenabled()
    gc.disable()  # a million new objects, none of them garbage: the collector would walk them again and again
    try:
        return json.loads(path.read_bytes(), object_pairs_hook=_without_outline)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}: broken JSON at line {error.lineno}, column {error.colno}: {error.msg}; "
            "repair the file or export it again"
        ) from None
    except _RepeatedKeyError as error:
        raise DataError(
            f"{path}: one object has several values for {error}, of which one would count; make them one"
        ) from None
    except (UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{path}: not a JSON file: {error}; export it again") from None
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read: {error.strerror}; check the file and its permissions"
        ) from None
    finally:
        if collecting:
            gc.enable()


class _RepeatedKeyError(Exception):
    pass


def _without_outline(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        for key, value in pairs:
            if value != record[key]:
                raise _RepeatedKeyError(repr(key))
    record.pop("segmentation", None)
    return record


def _section(path: Path, document: dict[str, Any], name: str) -> Section:
    if name not in document:
        raise DataError(
            f"{path}: has no {name!r}; a COCO file holds 'images', 'annotations' and 'categories'"
        )
    if not isinstance(document[name], list):
        raise DataError(f"{path}: {name!r} is {value_of(document[name])}; it must be a list")
    return Section(path, name, document[name])


def _as_array(values: list[Any]) -> NDArray[Any] | None:
    """None where the values are not all numbers, or lists of them of one length."""
    try:
        array = np.array(values)
    except ValueError:
        return None
    return array if array.dtype.kind in "bif" else None


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or _is_in_range(value)


def _is_in_range(value: Any) -> bool:
    return isinstance(value, int | float) and -INT64_END <= value < INT64_END


def _is_whole(value: Any) -> bool:
    return _is_in_range(value) and value == int(value)


def _is_box(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(map(_is_in_range, value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def complaint(key: str, value: Any, kind: ValueKind) -> str:
    """What is wrong with a value that is not of its kind."""
    too_large = isinstance(value, int | float) and math.isfinite(value) and not _is_in_range(value)
    limit = " from -2^63 to 2^63 - 1" if kind is WHOLE and too_large else ""
    return f"{key!r} is {value_of(value)}; it must be {kind.wanted}{limit}"


WHOLE = ValueKind(_is_whole, "a whole number")
NUMBER = ValueKind(_is_number, "a number")
BOX = ValueKind(_is_box, "four finite numbers [x, y, width, height] in pixels")
TEXT = ValueKind(_is_text, "a text that is not empty")
