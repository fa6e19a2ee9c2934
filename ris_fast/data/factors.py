"""Covariances from elsewhere, in a file: factors, or dense matrices, of which factors are made as they are read.

Legend: B batch, N RIS elements, Q factor columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ris_fast.config.schema import Task
from ris_fast.data.arrays import npz_arrays, npz_keys, safetensors_arrays, safetensors_keys
from ris_fast.data.column import Column
from ris_fast.data.errors import DataError
from ris_fast.data.geometry import leading_factor
from ris_fast.data.measurements import ENDINGS, KINDS, OTHER_TASK, expected_shape

MOST_COLUMNS = 32  # of a factor that a spectrum can be made of
ROWS = 512  # read at a time
SKEW = 1e-3  # |R - R^H| over |R| of a matrix that is no covariance
EXPECTED = "a .npz or .safetensors file with factor (scenes, N, Q) or covariance (scenes, N, N)"
CLEAN = "Leave these scenes out, or predict them again."


@dataclass(frozen=True)
class FactorFile:
    """A file whose header is in order."""

    column: Column
    dense: bool
    columns: int  # Q

    @property
    def scenes(self) -> int:
        return self.column.rows

    def reader(self, limit: int) -> Callable[[int], Tensor]:
        """A function that returns the factors (B, N, Q, 2) of the next B of the first `limit` scenes, their values
        unchecked. Raises: DataError."""
        chunks, done = self._chunks(limit), 0
        held = next(chunks)

        def read(batch: int) -> Tensor:
            nonlocal held, done
            while len(held) < batch:
                held = torch.cat((held, next(chunks)))
            taken, held, done = held[:batch], held[batch:], done + batch
            if done == limit:
                next(chunks, None)  # a zip's checksum is compared at the end of its array
            return taken

        return read

    def check_values(self, limit: int) -> None:
        """Reads the first `limit` scenes once, before work on them begins. Raises: DataError."""
        for number, chunk in enumerate(self.column.chunks(ROWS, limit)):
            self._check(torch.from_numpy(chunk), number * ROWS)

    def _chunks(self, limit: int) -> Iterator[Tensor]:
        for chunk in self.column.chunks(ROWS, limit):
            values = torch.from_numpy(chunk)
            yield leading_factor(values, self.columns) if self.dense else values

    def _check(self, values: Tensor, start: int) -> None:
        wrong = ~values.flatten(1).isfinite().all(1)
        found, expected = "NaN or infinite values", "finite numbers"
        if self.dense and not bool(wrong.any()):
            matrix = torch.view_as_complex(values)
            wrong = torch.linalg.matrix_norm(matrix - matrix.mH) > SKEW * torch.linalg.matrix_norm(matrix)
            found, expected = "no Hermitian matrix", f"|R - R^H| below {SKEW:g} |R|"
        if bool(wrong.any()):
            stored, first = self.column.stored, start + int(wrong.nonzero()[0])
            raise DataError(stored.file, stored.key, f"{found}, first in scene {first}", expected, CLEAN)


def open_factors(path: Path, task: Task) -> FactorFile:
    """A file of predictions, its shapes and types checked against the task; reads no array. Raises: DataError."""
    if not path.exists():
        raise DataError(path, "", "no such file", EXPECTED, "Give the right --predictions.")
    if path.suffix.lower() not in ENDINGS:
        raise DataError(path, "", "a file of another kind", EXPECTED, "Give a file whose name ends in one of these.")
    read, keys = (npz_arrays, npz_keys) if path.suffix.lower() == ".npz" else (safetensors_arrays, safetensors_keys)
    found = read(path, ("factor", "covariance"))
    if len(found) != 1:
        there = "both of them" if found else f"no such array, but {', '.join(keys(path)) or 'nothing'}"
        raise DataError(path, "factor, covariance", there, "one of them", "Write it into the file.")
    (key, stored), elements = *found.items(), task.elements
    if stored.dtype.kind not in KINDS:
        todo = "Convert it, and write it again."
        raise DataError(path, key, f"type {stored.dtype}", "numbers, complex or as pairs (re, im)", todo)
    dense, axes = key == "covariance", len(stored.shape) + (stored.dtype.kind == "c")
    columns = stored.shape[2] if axes == 4 else 0
    column = Column(stored, (elements, columns, 2))
    width = elements if dense else columns
    if axes != 4 or not column.fits or columns != width or not 1 <= (1 if dense else columns) <= MOST_COLUMNS:
        expected = expected_shape(key, (elements, elements if dense else "Q", 2))
        more = "" if dense else f", Q at most {MOST_COLUMNS}"
        raise DataError(path, key, f"shape {stored.shape}", expected + more, OTHER_TASK)
    if column.rows == 0:
        raise DataError(path, key, "no scene (0 rows)", "at least one", "Give another file.")
    kept = min(2 * task.max_sources, MOST_COLUMNS - 4, elements)
    return FactorFile(column, dense, kept if dense else columns)
