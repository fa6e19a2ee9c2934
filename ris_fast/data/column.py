"""One key of a foreign shard as training needs it, whatever its type, byte order and order of axes in the file.

Legend: B rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ris_fast.data.arrays import StoredArray


@dataclass(frozen=True)
class Column:
    """Rows of shape `row`: float32, C order, complex numbers as a last axis (re, im); int64 where they are `whole`
    numbers.

    The file may have any float or complex type, either byte order, Fortran order, and axes of length one beyond these.
    """

    stored: StoredArray
    row: tuple[int, ...]
    whole: bool = False

    @property
    def rows(self) -> int:
        return self.stored.shape[0]

    @property
    def axes(self) -> tuple[int, ...]:
        """The file's own shape of one row, complex numbers as pairs."""
        return self.stored.shape[1:] + ((2,) if self.stored.dtype.kind == "c" else ())

    @property
    def fits(self) -> bool:
        """Whether rows of the file are rows of this column, up to axes of length one."""
        return len(self.stored.shape) > 0 and without_ones(self.axes) == without_ones(self.row)

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.int64 if self.whole else np.float32)

    @property
    def row_bytes(self) -> int:
        return self.dtype.itemsize * int(np.prod(self.row, dtype=np.int64))

    def plain(self, raw_B: np.ndarray) -> np.ndarray:
        """Rows as they are in the file -> (B, *row); a number beyond float32 becomes infinite."""
        with np.errstate(over="ignore", invalid="ignore"):
            if raw_B.dtype.kind == "c":
                raw_B = np.ascontiguousarray(raw_B, np.complex64).view(np.float32)
            return np.ascontiguousarray(raw_B, self.dtype).reshape(len(raw_B), *self.row)

    def chunks(self, rows: int, limit: int) -> Iterator[np.ndarray]:
        """The first `limit` rows in order, `rows` at a time. Raises: DataError for damaged bytes."""
        return (self.plain(raw) for raw in self.stored.chunks(rows, limit))

    def map(self) -> MappedColumn:
        """The rows by number, without reading more. Only where the file is not compressed."""
        return MappedColumn(self, self.stored.map())


@dataclass(frozen=True)
class MappedColumn:
    """A column's rows in their file, made plain when they are taken."""

    column: Column
    array: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.array), *self.column.row)

    @property
    def dtype(self) -> np.dtype:
        return self.column.dtype

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, rows_B: np.ndarray) -> np.ndarray:
        return self.column.plain(self.array[rows_B])


def without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(length for length in shape if length != 1)
