"""Fast reader of large COCO JSON files: block by block into columns, without an object for each record.

It takes only what it can prove to read exactly as Python's `json` and the rules for records do. Everything
else, from malformed JSON to an id in quotes, is left to the reader of `coco_json`, with its messages.
"""

import json
import logging
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json
from numpy.typing import NDArray

from detr_dist.data.column_records import DEFAULTS, ColumnRecords
from detr_dist.data.formats.coco_json import RepeatedKeyError, without_outline
from detr_dist.data.formats.json_tokens import STEPS, Tokens, UnusualError, tokens_of

BLOCK_BYTES = 2**24
"""A record, and everything beside the lists of images and annotations, must fit into a few of these."""

_MOST_BLOCKS = 4
_NUM_PARSERS = 2

_SCHEMAS = {
    "images": pa.schema(
        {"id": pa.int64(), "file_name": pa.string(), "height": pa.int64(), "width": pa.int64()}
    ),
    "annotations": pa.schema(
        {
            "id": pa.int64(),
            "image_id": pa.int64(),
            "category_id": pa.int64(),
            "bbox": pa.list_(pa.float64()),
            "iscrowd": pa.int8(),
            "area": pa.float64(),
        }
    ),
}

_OPENING = re.compile(rb"[ \t\r\n]*\{")
_KEY = re.compile(rb'[ \t\r\n]*"([^"\\\x00-\x1f\x80-\xff]*)"[ \t\r\n]*:[ \t\r\n]*(?=[^ \t\r\n])')
_SCALAR = re.compile(rb'("(?:[^"\\]|\\.)*"|[-+.\w]+)(?=[^-+.\w])')
_NEXT = re.compile(rb"[ \t\r\n]*([,}])")
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_SPACE = b" \t\r\n"

_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_OTHER_FACTOR = np.uint64(0xC2B2AE3D27D4EB4F)
_FIRST_BYTES = np.array([2 ** (8 * n) - 1 for n in range(9)], dtype=np.uint64)

_logger = logging.getLogger(__name__)


def stream_document(path: Path) -> dict[str, Sequence[Any]] | None:
    """Return the images, annotations and categories of a COCO JSON; None if the exact reader must read it."""
    try:
        with path.open("rb") as file:
            return _read_document(_Window(file))
    except (UnusualError, RepeatedKeyError, ValueError, RecursionError, OSError, pa.ArrowException) as error:
        _logger.debug(f"{path}: read record by record: {error}")
        return None


class _Window:
    """The part of a file that is in memory, from the first byte that has not been used."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.data = b""

    def extend(self) -> bool:
        """Read another block; return False at the end of the file."""
        if len(self.data) > _MOST_BLOCKS * BLOCK_BYTES:
            raise UnusualError("a single value is very long")
        block = self._file.read(BLOCK_BYTES)
        self.data += block
        return bool(block)

    def skip(self, num_bytes: int) -> None:
        self.data = self.data[num_bytes:]

    def take(self, pattern: re.Pattern[bytes]) -> bytes:
        """Return the first group of a pattern, which the next bytes must match, and skip what matches."""
        while (match := pattern.match(self.data)) is None:
            if not self.extend():
                raise UnusualError(f"unexpected {self.data[:20]!r}")
        self.skip(match.end())
        return match[1] if match.re.groups else b""


def _read_document(window: _Window) -> dict[str, Sequence[Any]]:
    document: dict[str, Any] = {}
    window.take(_OPENING)
    end = b","
    while end == b",":
        key = window.take(_KEY).decode()
        if key in document:
            raise UnusualError(f"{key} again")
        if key in _SCHEMAS and window.data.startswith(b"["):
            window.skip(1)
            document[key] = _read_list(window, key)
        else:
            document[key] = _read_value(window)
        end = window.take(_NEXT)
    while window.extend():
        pass
    if window.data.strip(_SPACE):
        raise UnusualError("more after the end")
    lists = {key: document.get(key) for key in (*_SCHEMAS, "categories")}
    if not all(isinstance(records, Sequence) and not isinstance(records, str) for records in lists.values()):
        raise UnusualError("not the form of a COCO file")
    return {key: records for key, records in lists.items() if records is not None}


def _read_value(window: _Window) -> Any:
    """Read a value that is not a large list, as Python does."""
    if window.data[:1] not in (b"{", b"["):
        return json.loads(window.take(_SCALAR).decode())
    while True:
        tokens = tokens_of(np.frombuffer(window.data, dtype=np.uint8))
        ends = tokens.positions[tokens.depths == 0]
        ends = ends[STEPS[np.frombuffer(window.data, dtype=np.uint8)[ends]] < 0]
        if len(ends):
            text = window.data[: int(ends[0]) + 1]
            window.skip(len(text))
            return json.loads(text.decode(), object_pairs_hook=without_outline)
        if not window.extend():
            raise UnusualError("a list or object does not end")


def _read_list(window: _Window, name: str) -> ColumnRecords:
    """Read the rest of a list of records, whose opening bracket has been read."""
    shapes: set[int] = set()
    tables: list[pa.Table] = []
    with ThreadPoolExecutor(_NUM_PARSERS) as parsers:
        waiting: list[Future[pa.Table]] = []
        for lines, num_records in _lines_of(window, shapes):
            waiting.append(parsers.submit(_parse, lines, num_records, name))
            if len(waiting) > _NUM_PARSERS:
                tables.append(waiting.pop(0).result())
        tables += [future.result() for future in waiting]
    table = pa.concat_tables(tables) if tables else _SCHEMAS[name].empty_table()
    columns: dict[str, Any] = {}
    for key in table.column_names:
        is_text = pa.types.is_string(table[key].type)
        columns[key] = table[key] if is_text else _as_numpy(table[key])
        table = table.drop_columns(key)  # otherwise everything would be in memory twice
        tables = []
    return ColumnRecords(columns)


def _as_numpy(column: pa.ChunkedArray) -> NDArray[Any]:
    if pa.types.is_fixed_size_list(column.type):
        width = column.type.list_size
        values = [chunk.flatten().to_numpy() for chunk in column.chunks]
        return np.concatenate([np.zeros(0), *values]).reshape(-1, width)
    array: NDArray[Any] = column.to_numpy()
    return array


def _lines_of(window: _Window, shapes: set[int]) -> Iterator[tuple[NDArray[np.uint8], int]]:
    """Yield blocks of records, one record a line, and their number; end behind the list's closing bracket."""
    is_first = True
    while True:
        block = np.frombuffer(window.data, dtype=np.uint8).copy()
        tokens = tokens_of(block)
        closing = np.flatnonzero(tokens.depths < 0)
        is_last, end = len(closing) > 0, 0
        if is_last:
            end = int(tokens.positions[closing[0]])
            tokens = tokens.until(int(closing[0]))
        steps = STEPS[block[tokens.positions]]
        ends = np.flatnonzero((steps < 0) & (tokens.depths == 0))
        starts = np.flatnonzero((steps > 0) & (tokens.depths == 1))[: len(ends)]
        if len(ends):
            tokens = tokens.until(int(ends[-1]) + 1)
            first, last = tokens.positions[starts], tokens.positions[ends]
            _check_gap(block[: first[0]], is_first=is_first)
            _separate(block, first, last)
            _check_shapes(block, tokens, starts, first, last, shapes)
            yield block[first[0] : last[-1] + 1], len(ends)
            is_first = False
            window.skip(int(last[-1]) + 1)
            end -= int(last[-1]) + 1
        if is_last:
            if window.data[: end + 1].strip(_SPACE) != b"]":
                raise UnusualError("something else than records in a list")
            window.skip(end + 1)
            return
        if not window.extend():
            raise UnusualError("a list does not end")


def _check_gap(gap: NDArray[np.uint8], *, is_first: bool) -> None:
    if gap.tobytes().strip(_SPACE) != (b"" if is_first else b","):
        raise UnusualError("something else than records in a list")


def _separate(block: NDArray[np.uint8], first: NDArray[np.int64], last: NDArray[np.int64]) -> None:
    """Put each record on its own line: its neighbours must be objects, with one comma between them."""
    if (block[first] != ord("{")).any() or (block[last] != ord("}")).any():
        raise UnusualError("something else than objects in a list")
    lengths = first[1:] - last[:-1] - 1
    gaps = np.repeat(np.arange(len(lengths)), lengths)
    begins = last[:-1] + 1 - (np.cumsum(lengths) - lengths)
    places = begins[gaps] + np.arange(len(gaps))
    between = block[places]
    is_comma = between == ord(",")
    num_commas = np.bincount(gaps[is_comma], minlength=len(lengths))
    if not (is_comma | (between == ord(" ")) | (between == ord("\t"))).all() or (num_commas != 1).any():
        raise UnusualError("something else than commas between records")
    block[places[is_comma]] = ord("\n")


def _check_shapes(
    block: NDArray[np.uint8],
    tokens: Tokens,
    starts: NDArray[np.int64],
    first: NDArray[np.int64],
    last: NDArray[np.int64],
    shapes: set[int],
) -> None:
    """Refuse repeated keys in a record: one record of each new shape is read by Python.

    A record's shape is a hash of its keys and braces in their order. Arrow would not report repeated keys
    that it skips.
    """
    kinds = block[tokens.positions]
    is_named = (kinds == ord(":")) | (kinds == ord("{")) | (kinds == ord("}"))
    codes = kinds.astype(np.uint64)
    colons = np.flatnonzero(kinds == ord(":"))
    codes[colons] = _codes_of_keys(block, tokens, colons)
    begins = np.cumsum(is_named)[starts] - 1
    codes = codes[is_named]
    place = np.arange(len(codes)) - np.repeat(begins, np.diff(np.append(begins, len(codes))))
    powers = np.multiply.accumulate(np.full(place.max() + 1, _FACTOR))
    hashes = np.add.reduceat((codes ^ (codes >> np.uint64(29))) * powers[place], begins)
    values, examples = np.unique(hashes, return_index=True)
    for value, row in zip(values.tolist(), examples.tolist(), strict=True):
        if value not in shapes:
            text = block[first[row] : last[row] + 1].tobytes().decode()
            record = json.loads(text, object_pairs_hook=_unrepeated)
            if "origin" in record:  # messages would name it
                raise UnusualError("a record with an origin")
            shapes.add(value)


def _codes_of_keys(block: NDArray[np.uint8], tokens: Tokens, colons: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Return a hash of the key before each colon."""
    closing = tokens.num_quotes[colons] - 1
    if (closing < 1).any():
        raise UnusualError("a colon without a key")
    begins = tokens.quotes[closing - 1] + 1
    lengths = tokens.quotes[closing] - begins
    padded = np.append(block, np.zeros(8, dtype=np.uint8))
    words = np.ndarray(len(block), dtype="<u8", buffer=padded, strides=(1,))  # at every byte
    codes = lengths.astype(np.uint64) * _OTHER_FACTOR
    for offset in range(0, int(lengths.max(initial=0)), 8):
        rows = np.flatnonzero(lengths > offset)
        rest = np.minimum(lengths[rows] - offset, 8)
        word = words[begins[rows] + offset] & _FIRST_BYTES[rest]
        codes[rows] = (codes[rows] ^ word) * _FACTOR
        codes[rows] ^= codes[rows] >> np.uint64(32)
    return codes


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        raise UnusualError("a repeated key")
    return record


def _parse(lines: NDArray[np.uint8], num_records: int, name: str) -> pa.Table:
    """Return the columns of records, one a line, without the values that a default stands for."""
    text = lines.tobytes()
    if not text.isascii():
        text.decode()  # Arrow would not look
    if b"\\" in text and _SURROGATE.search(text):
        raise UnusualError("surrogates")
    table = pa.json.read_json(
        pa.BufferReader(text),
        read_options=pa.json.ReadOptions(use_threads=False, block_size=len(text) + 1),
        parse_options=pa.json.ParseOptions(
            explicit_schema=_SCHEMAS[name], unexpected_field_behavior="ignore"
        ),
    )
    if len(table) != num_records:
        raise UnusualError("another number of records")
    columns = {key: _checked(key, table[key].combine_chunks()) for key in _SCHEMAS[name].names}
    return pa.table(columns)


def _checked(key: str, column: pa.Array) -> pa.Array:
    """Return a column that the rules for records accept as well, with defaults for absent values."""
    if key in DEFAULTS:
        return _in_range(column.fill_null(pa.scalar(DEFAULTS[key], column.type)))
    if column.null_count:
        raise UnusualError(f"a record without {key}")
    if key == "file_name" and (pc.min(pc.binary_length(column)).as_py() or 0) == 0:
        raise UnusualError("an empty text")
    if key == "bbox":
        values = column.flatten()
        if values.null_count or (np.diff(column.offsets.to_numpy()) != 4).any():
            raise UnusualError("a box of another form")
        return pa.FixedSizeListArray.from_arrays(_in_range(values), 4)
    return column


def _in_range(column: pa.Array) -> pa.Array:
    """Refuse numbers that might have been integers beyond 64 bits, and -0, which Python reads as 0."""
    if pa.types.is_floating(column.type):
        values = column.to_numpy()
        if (np.abs(values) >= 2**63).any() or np.signbit(values[values == 0]).any():
            raise UnusualError("a number that needs care")
    return column
