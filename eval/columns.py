"""Columns of Arrow tables from and to numpy, through their buffers.

`pa.array` and `to_numpy` import pandas wherever it is installed, as it is with datasets, and `cast` imports
pyarrow.compute. Together they took a quarter of a small evaluation of an artifact.
"""

from collections.abc import Iterable
from itertools import accumulate

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray


def number_column(values: NDArray) -> pa.Array:
    """Return a column of those integers or floats, `[n]`: not a copy, if they are contiguous."""
    buffer = pa.py_buffer(np.ascontiguousarray(values))
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [None, buffer])


def text_column(texts: Iterable[str]) -> pa.Array:
    """Return a column of those texts. Raises `OverflowError` if they have 2 GiB or more in UTF-8."""
    encoded = [text.encode() for text in texts]
    ends = np.array([0, *accumulate(map(len, encoded))], dtype=np.int32)
    return pa.StringArray.from_buffers(len(encoded), pa.py_buffer(ends), pa.py_buffer(b"".join(encoded)))


def as_numpy(column: pa.ChunkedArray) -> NDArray:
    """Return the numbers of a column without nulls, `[n]`, read-only. Raises pyarrow's error if it has nulls."""
    return np.from_dlpack(column.combine_chunks())
