"""The lists of a data set as columns, and the faults of their records."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from math import isfinite, nan
from operator import itemgetter
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from detr_dist.data.column_records import ColumnRecords
from detr_dist.text import MAX_NAMES, printable, value_of

MAX_EXAMPLES = 10

Mask = NDArray[np.bool_]
Integers = NDArray[np.int64]
Floats = NDArray[np.float64]

Values = list[Any] | NDArray[Any]

Level = Literal["error", "warning"]
"""`error`: training or evaluation refuses the data, loses some of them, or gives metrics that cannot be
trusted. `warning`: repaired automatically, or unusual."""

_PLURALS = {"box": "boxes", "category": "categories", "class": "classes", "process": "processes"}


def counted(count: int, noun: str) -> str:
    """Return a count with its noun in singular or plural."""
    return f"{count} {noun if count == 1 else _PLURALS.get(noun, noun + 's')}"


@dataclass(frozen=True, slots=True)
class Finding:
    """One kind of fault in one data set."""

    kind: str
    level: Level
    count: int
    message: str
    examples: tuple[str, ...]  # the first few: file names, records, classes

    def __str__(self) -> str:
        names = [printable(name) for name in self.examples[:MAX_NAMES]]
        rest = self.count - len(names)
        more = f" and {rest} more" if names and rest > 0 else ""
        return ": ".join([self.message, *([", ".join(names) + more] if names else [])])


def found(
    kind: str,
    noun: str,
    what: str,
    examples: Iterable[str],
    *,
    count: int | None = None,
    level: Level = "error",
) -> list[Finding]:
    """Return a list with the finding, empty if the count is 0; without `count` each example counts once."""
    named = list(examples) if count is None else list(islice(examples, MAX_EXAMPLES))
    count = len(named) if count is None else count
    if count == 0:
        return []
    return [Finding(kind, level, count, f"{counted(count, noun)} {what}", tuple(named[:MAX_EXAMPLES]))]


class _Kind(NamedTuple):
    """The rule for a value of a record, and the value that replaces a wrong one."""

    is_right: Callable[[Any], bool]
    wanted: str
    filler: Any

    def complaint(self, key: str, value: Any) -> str:
        if value is _ABSENT:
            return f"has no {key!r}"
        too_large = isinstance(value, int | float) and isfinite(value) and not _is_in_range(value)
        limit = " from -2^63 to 2^63 - 1" if self is _WHOLE and too_large else ""
        return f"{key!r} is {value_of(value)}; it must be {self.wanted}{limit}"


def _is_in_range(value: Any) -> bool:
    return isinstance(value, int | float) and -(2**63) <= value < 2**63


_ABSENT = object()
_WHOLE = _Kind(lambda value: _is_in_range(value) and value == int(value), "a whole number", 0)
_NUMBER = _Kind(lambda value: isinstance(value, float) or _is_in_range(value), "a number", nan)
_BOX = _Kind(
    lambda value: isinstance(value, list) and len(value) == 4 and all(map(_is_in_range, value)),
    "four finite numbers [x, y, width, height] in pixels",
    [0.0] * 4,
)
_TEXT = _Kind(lambda value: isinstance(value, str) and value != "", "a text that is not empty", "")


class Faults:
    """Broken rules, each with the number of violations and the first examples.

    `rules` has, for each kind of fault, the noun for what is counted, and the problem or the remedy.
    """

    def __init__(self, rules: dict[str, tuple[str, str]]) -> None:
        self._rules = rules
        self._counts: Counter[str] = Counter()
        self._examples: dict[str, list[str]] = {}

    def add(self, kind: str, count: int = 1, examples: Iterable[str] = ()) -> None:
        """Count violations of one rule, with examples for the message."""
        self._counts[kind] += count
        self._examples.setdefault(kind, []).extend(examples)

    def findings(self) -> list[Finding]:
        """Return one finding of level `error` for each broken rule."""
        return [
            each
            for kind, examples in self._examples.items()
            for each in found(kind, *self._rules[kind], examples, count=self._counts[kind])
        ]


class Section:
    """One list of the JSON, read column by column; `sound` marks the records that have broken no rule yet.

    A column is converted at once; values are examined one by one only if that fails. A wrong value is
    replaced by a filler.
    """

    def __init__(self, name: str, document: Mapping[str, Sequence[Any]], faults: Faults) -> None:
        self._name = name
        self._records = document[name]
        self._faults = faults
        self.sound = np.ones(len(self._records), dtype=bool)
        are_columns = isinstance(self._records, ColumnRecords)
        if not are_columns and not set(map(type, self._records)) <= {dict}:
            originals = self._records
            self._records = [record if isinstance(record, dict) else {} for record in originals]
            is_other = np.array([not isinstance(record, dict) for record in originals])
            self.refuse("malformed_record", is_other, lambda row: f"{value_of(originals[row])} is no object")
        self.ids = self.integers("id")
        self.listed_ids = self.ids[self.sound]

    def column(self, key: str, default: Any = _ABSENT) -> Values:
        """Return the values of a key; with a default, null counts as absent."""
        if isinstance(self._records, ColumnRecords):
            return self._records.column(key, default)
        try:
            values = list(map(itemgetter(key), self._records))
        except KeyError:
            values = [record.get(key, default) for record in self._records]
        if default is not _ABSENT and None in values:
            values = [default if value is None else value for value in values]
        return values

    def integers(self, key: str, default: Any = _ABSENT) -> Integers:
        """Return the values of a key as int64 [len]; refuse records with another value."""
        values = self.column(key, default)
        array = _as_array(values)
        if array is not None and array.ndim == 1:
            with np.errstate(invalid="ignore"):
                whole = array.astype(np.int64, copy=False)
            if np.array_equal(whole, array):
                return whole
        return np.array(self._only_right("malformed_record", key, values, _WHOLE), dtype=np.int64)

    def numbers(self, key: str, default: float) -> Floats:
        """Return the values of a key as float64 [len]; refuse records with another value."""
        values = self.column(key, default)
        array = _as_array(values)
        if array is None or array.ndim != 1:
            array = np.array(self._only_right("malformed_record", key, values, _NUMBER))
        return array.astype(np.float64, copy=False)

    def boxes(self, key: str) -> Floats:
        """Return the values of a key as float64 [len, 4]; refuse records with another value."""
        values = self.column(key)
        array = _as_array(values)
        if array is None or array.shape != (len(values), 4) or not np.isfinite(array).all():
            array = np.array(self._only_right("malformed_box", key, values, _BOX))
        return array.astype(np.float64, copy=False).reshape(-1, 4)

    def texts(self, key: str) -> list[str]:
        """Return the values of a key as texts that are not empty; refuse records with another value."""
        return self._only_right("malformed_record", key, self.column(key), _TEXT)

    def refuse(self, kind: str, is_broken: Mask, describe: Callable[[int], str]) -> None:
        """Record which of the sound records break a rule; they stop being sound."""
        rows = np.flatnonzero(is_broken & self.sound)
        if len(rows):
            self.sound[rows] = False
            examples = [f"{self._where(row)}: {describe(row)}" for row in rows[:MAX_EXAMPLES].tolist()]
            self._faults.add(kind, len(rows), examples)

    def refuse_repeated(self, kind: str, names: list[str]) -> None:
        """Refuse the sound records with the id of an earlier one."""
        rows = np.flatnonzero(self.sound)
        is_repeated = self.sound.copy()
        is_repeated[rows[np.unique(self.ids[rows], return_index=True)[1]]] = False
        self.refuse(kind, is_repeated, lambda row: names[row])

    def look_up(self, kind: str, key: str, others: "Section") -> tuple[Integers, Integers]:
        """Return the ids in a key, and the positions of these ids among the sound records of another section.

        Refuses records whose id is not listed there, and leaves out those that refer to a faulty record.
        """
        wanted = self.integers(key)
        ids = others.ids[others.sound]
        order = np.argsort(ids)
        places, is_lost = np.zeros(len(wanted), dtype=np.int64), np.ones(len(wanted), dtype=bool)
        if len(ids):
            places = order[np.searchsorted(ids, wanted, sorter=order).clip(max=len(ids) - 1)]
            is_lost = ids[places] != wanted
        if is_lost.any():
            self.refuse(
                kind, is_lost & ~np.isin(wanted, others.listed_ids), lambda row: f"{key} {wanted[row]}"
            )
            self.sound &= ~is_lost
        return wanted, places

    def _only_right(self, rule: str, key: str, values: Values, kind: _Kind) -> list[Any]:
        is_wrong = np.array([not kind.is_right(value) for value in values], dtype=bool)
        if not is_wrong.any():
            return list(values)
        self.refuse(rule, is_wrong, lambda row: kind.complaint(key, values[row]))
        return [kind.filler if wrong else value for value, wrong in zip(values, is_wrong, strict=True)]

    def origin(self, row: int) -> str | None:
        """Return the file and line of a record, if its format has one for each."""
        origin: str | None = self._records[row].get("origin")
        return origin

    def _where(self, row: int) -> str:
        record = self._records[row]
        if "origin" in record:
            return str(record["origin"])
        known = f" (id {value_of(record['id'])})" if "id" in record else ""
        return f"{self._name}[{row}]{known}"


def _as_array(values: Values) -> NDArray[Any] | None:
    """Return the values as an array; None unless all are numbers, or lists of numbers of one length."""
    try:
        array = np.asarray(values)
    except ValueError:
        return None
    return array if array.dtype.kind in "bif" else None
