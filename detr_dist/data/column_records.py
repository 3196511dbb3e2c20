"""Records of a large annotation file as columns instead of dictionaries."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pyarrow as pa  # only a large annotation file needs it

DEFAULTS: dict[str, float] = {"height": -1, "width": -1, "iscrowd": 0, "area": np.nan}
"""What stands for an absent value in a column; the other keys of a record are always present."""


class ColumnRecords(Sequence[dict[str, Any]]):
    """The records of one list of a COCO JSON; a dictionary exists only while somebody looks at it.

    Arrays are [N] or [N, 4] numbers; texts are Arrow columns, with Python's texts made on demand.
    """

    def __init__(self, columns: dict[str, "NDArray[Any] | pa.ChunkedArray"]) -> None:
        self._columns = columns

    def __len__(self) -> int:
        return len(self._columns["id"])

    @overload
    def __getitem__(self, row: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, row: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, row: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(row, slice):
            return [self[each] for each in range(*row.indices(len(self)))]
        values = {key: _value(column[row]) for key, column in self._columns.items()}
        return {key: value for key, value in values.items() if not _is_default(key, value)}

    def column(self, key: str, default: Any) -> NDArray[Any] | list[Any]:
        """Return the values of a key, with `DEFAULTS` for absent ones; the default if no value is kept."""
        column = self._columns.get(key)
        if column is None:
            return [default] * len(self)
        texts: list[Any] | None = None if isinstance(column, np.ndarray) else column.to_pylist()
        return column if texts is None else texts


def _value(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value.as_py()


def _is_default(key: str, value: Any) -> bool:
    return key in DEFAULTS and (value == DEFAULTS[key] or value != value)
