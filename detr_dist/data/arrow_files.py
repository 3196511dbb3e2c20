"""Arrow files of numpy columns, which readers map into memory instead of reading them."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray


def write_columns(path: Path, columns: Mapping[str, NDArray[Any]]) -> None:
    """Write columns of one length as an Arrow file of one batch, so that readers can map each column."""
    arrays = [_as_arrow(column) for column in columns.values()]
    kinds = [column.dtype.str for column in columns.values()]
    fields = [
        pa.field(name, array.type, nullable=False, metadata={"numpy": kind})
        for name, array, kind in zip(columns, arrays, kinds, strict=True)
    ]
    schema = pa.schema(fields)
    with path.open("wb") as file:
        with pa.ipc.new_file(file, schema) as writer:
            writer.write_batch(pa.record_batch(arrays, schema=schema))
        file.flush()
        os.fsync(file.fileno())


def _as_arrow(column: NDArray[Any]) -> pa.Array:
    """Return [N], or [N, K] as a list of fixed size; bytes and truth values are bytes of fixed width."""
    data = pa.py_buffer(np.ascontiguousarray(column))
    if column.dtype.kind in "Sb":
        width = column.dtype.itemsize
        return pa.Array.from_buffers(pa.binary(width), len(column), [None, data])
    values = pa.Array.from_buffers(pa.from_numpy_dtype(column.dtype), column.size, [None, data])
    if column.ndim == 1:
        return values
    return pa.FixedSizeListArray.from_arrays(values, column.shape[1])


def mapped_columns(path: Path) -> dict[str, NDArray[Any]]:
    """Return the columns of a file without reading them: the system loads the pages that are used."""
    reader = pa.ipc.open_file(pa.memory_map(str(path)))
    batch = reader.get_batch(0)
    columns = {}
    for field, column in zip(batch.schema, batch.columns, strict=True):
        is_list = pa.types.is_fixed_size_list(field.type)
        values = column.flatten() if is_list else column
        dtype = np.dtype(field.metadata[b"numpy"].decode())
        data = np.frombuffer(values.buffers()[1], dtype=dtype, count=len(values))
        columns[field.name] = data.reshape(-1, field.type.list_size) if is_list else data
    return columns
