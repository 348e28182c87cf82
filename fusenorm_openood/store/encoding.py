"""Columns as the bytes of a Parquet file, and back, bit by bit."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusenorm_openood.errors import DamagedShardError, StoreError

Columns = dict[str, NDArray[Any]]

_LABEL = b"fusenorm"
_NUMBERS = (np.float32, np.float64, np.int64, np.bool_)


def encode(columns: Mapping[str, NDArray[Any]], label: str) -> bytes:
    """A Parquet file of one row group; the same columns in any order give the same bytes.

    Args:
        columns: name -> float32, float64, int64, bool or str (dtype object) [N], or float32 or
            float64 [N, D].
        label: kept in the file; `decode` returns it.

    Raises:
        StoreError: an array of another kind.
    """
    import pyarrow as pa  # takes longer to import than the rest of the package
    from pyarrow import parquet

    arrays = {name: _to_arrow(name, columns[name]) for name in sorted(columns)}
    table = pa.table(arrays).replace_schema_metadata({_LABEL: label.encode()})
    sink = pa.BufferOutputStream()
    parquet.write_table(
        table,
        sink,
        row_group_size=len(table),
        compression="zstd",
        compression_level=1,
        use_dictionary=False,
        write_statistics=False,
    )
    data: bytes = sink.getvalue().to_pybytes()
    return data


def decode(data: bytes, names: Sequence[str] | None = None) -> tuple[str, Columns]:
    """The label and the columns of a file of `encode`; the arrays own their memory.

    Args:
        names: the columns to decode; None = all.

    Raises:
        DamagedShardError: these bytes are no such file.
        StoreError: the file has no column of such a name.
    """
    import pyarrow as pa
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(pa.BufferReader(data))
        label = file.schema_arrow.metadata[_LABEL].decode()
        found = file.schema_arrow.names
        wanted = [name for name in (found if names is None else names) if name in found]
        table = file.read(columns=wanted, use_threads=False)
        columns = {name: _to_numpy(table.column(name)) for name in wanted}
    except MemoryError:
        raise
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedShardError(f"not a shard ({type(error).__name__})") from None
    if names is not None and (unknown := set(names) - set(found)):
        raise StoreError(f"no column {min(unknown)!r}: choose from {', '.join(found)}")
    return label, columns


def _to_arrow(name: str, values: NDArray[Any]) -> Any:
    import pyarrow as pa

    try:
        if values.ndim == 1 and values.dtype in _NUMBERS:
            return pa.array(values)
        if values.ndim == 1 and values.dtype == object and all(isinstance(v, str) for v in values):
            return pa.array(values, pa.string())
        if values.ndim == 2 and values.dtype in (np.float32, np.float64) and values.shape[1]:
            return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
    except UnicodeError:
        raise StoreError(f"column {name!r} has a string that is not valid Unicode") from None
    raise StoreError(
        f"column {name!r} is {values.dtype} {list(values.shape)}, not float32, float64, int64, "
        "bool or str of one dimension, or float32 or float64 of two"
    )


def _to_numpy(column: Any) -> NDArray[Any]:
    import pyarrow as pa

    if pa.types.is_fixed_size_list(column.type):
        flat = np.concatenate([chunk.flatten().to_numpy() for chunk in column.chunks])
        return flat.reshape(-1, column.type.list_size)
    return np.array(column.to_numpy())
