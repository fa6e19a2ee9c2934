"""The scenes of one split, as columns: in device memory, in host memory, or mapped from their files, as they fit.

Legend: B rows asked for.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ris_fast.data.column import MappedColumn
from ris_fast.data.errors import DataError
from ris_fast.environment import free_memory

GIB = 2.0**30
SHARE = 0.5  # of the free memory that a table may take: the network and its activations need the rest


@dataclass(frozen=True)
class TableMemory:
    """Where a table lives and what that takes; made before anything is allocated."""

    tier: str  # device | host | mapped
    bytes: int
    free: int

    def __str__(self) -> str:
        where = {"device": "device memory", "host": "host memory", "mapped": "files, memory-mapped"}[self.tier]
        size = f"{self.bytes / GIB:.1f} GiB" if self.bytes > 0.1 * GIB else f"{self.bytes / 2**20:.1f} MiB"
        return f"{size} in {where} ({self.free / GIB:.1f} GiB free)"


def choose_memory(where: Path, bytes_needed: int, device: torch.device, *, mappable: bool) -> TableMemory:
    """Device memory if half of what is free holds the table, else host memory, else mapped files.

    Raises: DataError where nothing fits and the files are compressed, so that they cannot be mapped.
    """
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        if bytes_needed <= SHARE * free:
            return TableMemory("device", bytes_needed, free)
    free = free_memory()
    if bytes_needed <= SHARE * free:
        return TableMemory("host", bytes_needed, free)
    if not mappable:
        raise DataError(
            where,
            "",
            f"compressed arrays that need {bytes_needed / GIB:.2f} GiB in memory",
            f"at most {SHARE * free / GIB:.2f} GiB (half of what is free)",
            "Write the shards with numpy.savez (uncompressed, so that they can be streamed), or lower "
            "data.train_scenes.",
        )
    return TableMemory("mapped", bytes_needed, free)


@dataclass
class Table:
    """Columns of `rows` scenes. A column is one tensor, or arrays mapped from several files, one after the other."""

    rows: int
    device: torch.device
    columns: dict[str, Tensor] = field(default_factory=dict)
    mapped: dict[str, list[np.ndarray | MappedColumn]] = field(default_factory=dict)

    def write(self, start: int, name: str, values: Tensor) -> None:
        """Rows start, start + 1, ... of a column; the first write allocates it."""
        if name not in self.columns:
            self.columns[name] = torch.empty((self.rows, *values.shape[1:]), dtype=values.dtype, device=self.device)
        self.columns[name][start : start + values.shape[0]] = values

    def attach(self, name: str, array: np.ndarray | MappedColumn) -> None:
        """The next file's rows of a mapped column."""
        self.mapped.setdefault(name, []).append(array)

    def take(self, name: str, rows_B: Tensor) -> Tensor | None:
        """Rows of a column by number, on the table's device; None if there is no such column."""
        if name in self.columns:
            return self.columns[name].index_select(0, rows_B)
        return self._take_mapped(self.mapped[name], rows_B.numpy()) if name in self.mapped else None

    @staticmethod
    def _take_mapped(parts: list[np.ndarray | MappedColumn], rows_B: np.ndarray) -> Tensor:
        starts = np.cumsum([0, *(len(part) for part in parts)])
        part_B = np.searchsorted(starts, rows_B, side="right") - 1
        out = np.empty((rows_B.size, *parts[0].shape[1:]), parts[0].dtype)
        for part in np.unique(part_B):
            here = np.flatnonzero(part_B == part)
            out[here] = parts[part][rows_B[here] - starts[part]]
        return torch.from_numpy(out)
