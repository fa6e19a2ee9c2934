"""One key of a foreign shard as training needs it, whatever its type, byte order and order of axes in the file.

Legend: B rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ris_fast.data.arrays import StoredArray
from ris_fast.data.file_rows import FileRows, OpenFiles


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

    @property
    def as_stored(self) -> bool:
        """Whether the file has the very bytes of this column, in C order."""
        number = np.dtype(np.complex64) if self.stored.dtype.kind == "c" else self.dtype
        return not self.stored.fortran and self.stored.dtype == number

    def plain(self, raw_B: np.ndarray) -> np.ndarray:
        """Rows as they are in the file -> (B, *row); a number beyond float32 becomes infinite."""
        with np.errstate(over="ignore", invalid="ignore"):
            if raw_B.dtype.kind == "c":
                raw_B = np.ascontiguousarray(raw_B, np.complex64).view(np.float32)
            return np.ascontiguousarray(raw_B, self.dtype).reshape(len(raw_B), *self.row)

    def chunks(self, rows: int, limit: int) -> Iterator[np.ndarray]:
        """The first `limit` rows in order, `rows` at a time. Raises: DataError for damaged bytes."""
        return (self.plain(raw) for raw in self.stored.chunks(rows, limit))

    def by_number(self, files: OpenFiles) -> ColumnRows:
        """The rows by number, without reading any. Only where the file is not compressed."""
        return ColumnRows(self, None if self.stored.fortran else FileRows(self.stored, files), files)


@dataclass(frozen=True)
class ColumnRows:
    """A column's rows in their file, made plain when they are taken; in Fortran order, where they lie apart, through a
    memory map (`rows` is None then)."""

    column: Column
    rows: FileRows | None
    files: OpenFiles

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self), *self.column.row)

    @property
    def dtype(self) -> np.dtype:
        return self.column.dtype

    def __len__(self) -> int:
        return self.column.rows

    def announce(self, rows_B: np.ndarray) -> None:
        if self.rows is not None:
            self.rows.announce(rows_B)

    def read(self, rows_B: np.ndarray, out: np.ndarray, places_B: np.ndarray) -> None:
        """Rows of the file to rows `places_B` of `out`. Raises: DataError for a file that changed or ends early."""
        stored = self.column.stored
        if self.rows is None:
            self.files.descriptor(stored.file)  # refuses one that shrank: reading its map would kill the process
            out[places_B] = self.column.plain(stored.map()[rows_B])
        elif self.column.as_stored:
            self.rows.read(rows_B, out, places_B)
        else:
            raw = np.empty((len(rows_B), *stored.shape[1:]), stored.dtype)
            self.rows.read(rows_B, raw, np.arange(len(rows_B)))
            out[places_B] = self.column.plain(raw)


def without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(length for length in shape if length != 1)
