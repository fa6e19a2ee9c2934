"""The scenes of one split, as columns: in device memory, in host memory, or left in their files, as they fit.

Legend: B rows asked for.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ris_fast.data.arrays import StoredArray
from ris_fast.data.column import Column, ColumnRows
from ris_fast.data.errors import DataError
from ris_fast.data.file_rows import FileRows, OpenFiles
from ris_fast.environment import free_memory, local_ranks
from ris_fast.streams import stage

GIB = 2.0**30
SHARE = 0.5  # of the free memory that a table may take: the network and its activations need the rest
PLACES = {"device": "device memory", "host": "host memory"}


@dataclass(frozen=True)
class TableMemory:
    """Where a table lives and what that takes; made, and shown on a command's terminal, before anything is allocated.

    `free`: bytes of that memory, of the host's where the scenes stay in their files, for this one of the processes
    that share it.
    """

    tier: str  # device | host | files
    rows: int
    row_bytes: int
    free: int

    @property
    def bytes(self) -> int:
        return self.rows * self.row_bytes

    def __str__(self) -> str:
        count = f"{self.row_bytes:,} B x {self.rows:,} scenes = {_size(self.bytes)}"
        if self.tier == "files":
            return f"{count}, streamed from files ({_size(self.free)} of host memory free)"
        return f"{count} in {PLACES[self.tier]} ({_size(self.free)} free)"


def choose_memory(
    where: Path,
    rows: int,
    row_bytes: int,
    device: torch.device,
    *,
    streamable: bool,
    wanted: str = "auto",
    extra: int = 0,
) -> TableMemory:
    """Device memory if half of what is free holds the table, else host memory, else the files; or as `wanted`.

    Args: streamable: whether rows can be read from the files one by one. wanted: data.memory; on a CPU, "device" is
        the host. extra: bytes that reading takes besides the rows.
    Raises: DataError where the memory that is wanted has too little free, or nothing fits and the files are compressed.
    """
    free = {"host": free_memory()}  # of which the processes of a machine have each its part
    if device.type == "cuda":
        sharing = math.ceil(local_ranks()[1] / max(1, torch.cuda.device_count()))
        free = {"device": torch.cuda.mem_get_info(device)[0] / sharing, **free}
    elif wanted == "device":
        wanted = "host"
    needed = rows * row_bytes + extra
    fitting = [tier for tier, there in free.items() if needed <= (SHARE * there if wanted == "auto" else there)]
    tier = next(iter(fitting), "files") if wanted == "auto" else wanted
    if tier == "files" and not streamable:
        raise _compressed(where, needed, free["host"])
    if tier != "files" and tier not in fitting:
        raise DataError(
            where,
            "",
            f"{rows:,} scenes of {row_bytes:,} B, which are {_size(needed)}",
            f"at most {_size(free[tier])}, what {PLACES[tier]} has free (data.memory is '{wanted}')",
            "Set data.memory=auto, which streams from the files what does not fit, or lower data.train_scenes.",
        )
    memory = TableMemory(tier, rows, row_bytes, int(free.get(tier, free["host"])))
    stage(f"reading {where.name}: {memory}")
    return memory


def _compressed(where: Path, needed: float, free: float) -> DataError:
    return DataError(
        where,
        "",
        f"compressed arrays that need {_size(needed)} in memory",
        f"at most {_size(SHARE * free)} (half of what is free)",
        "Write the shards with numpy.savez (uncompressed, so that they can be streamed), or lower data.train_scenes.",
    )


def _size(count: float) -> str:
    return f"{count / GIB:,.1f} GiB" if count > 0.1 * GIB else f"{count / 2**20:.1f} MiB"


@dataclass
class Table:
    """Columns of `rows` scenes. A column is one tensor, or rows of several files, one after the other.

    `pinned`: what is taken lies in page-locked memory, from which a GPU copies while the host goes on.
    """

    rows: int
    device: torch.device
    pinned: bool = False
    columns: dict[str, Tensor] = field(default_factory=dict)
    parts: dict[str, list[FileRows | ColumnRows]] = field(default_factory=dict)
    files: OpenFiles = field(default_factory=OpenFiles)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def write(self, start: int, name: str, values: Tensor) -> None:
        """Rows start, start + 1, ... of a column; the first write allocates it. Threads may write different rows."""
        with self._lock:
            if name not in self.columns:
                shape = (self.rows, *values.shape[1:])
                self.columns[name] = torch.empty(shape, dtype=values.dtype, device=self.device)
        self.columns[name][start : start + values.shape[0]] = values

    def attach(self, name: str, stored: StoredArray | Column) -> None:
        """The next file's rows of a column that stays in its files."""
        part = stored.by_number(self.files) if isinstance(stored, Column) else FileRows(stored, self.files)
        self.parts.setdefault(name, []).append(part)

    def take(self, name: str, rows_B: Tensor) -> Tensor | None:
        """Rows of a column by number, on the table's device; None if there is no such column.

        Raises: DataError where a file has changed or cannot be read any more.
        """
        if name in self.columns:
            column = self.columns[name]
            out = self._room(len(rows_B), column.shape[1:], column.dtype) if self.pinned else None
            return torch.index_select(column, 0, rows_B, out=out)
        return self._take_from_files(self.parts[name], rows_B.numpy()) if name in self.parts else None

    def _take_from_files(self, parts: list[FileRows | ColumnRows], rows_B: np.ndarray) -> Tensor:
        """In the order of the files, so that neighbours are read together."""
        starts = np.cumsum([0, *(len(part) for part in parts)])
        order_B = np.argsort(rows_B, kind="stable")
        sorted_B = rows_B[order_B]
        if len(sorted_B) and not 0 <= sorted_B[0] <= sorted_B[-1] < self.rows:
            raise IndexError(f"Table: rows {sorted_B[0]} to {sorted_B[-1]} of {self.rows}")
        part_B = np.searchsorted(starts, sorted_B, side="right") - 1
        cuts = np.flatnonzero(np.diff(part_B, prepend=-1))
        here = [
            (parts[part], sorted_B[a:b] - starts[part], order_B[a:b])
            for a, b, part in zip(cuts, [*cuts[1:], len(part_B)], part_B[cuts])
        ]
        out = self._room(len(rows_B), parts[0].shape[1:], torch.from_numpy(np.empty(0, parts[0].dtype)).dtype)
        with self.files.lock:
            if len(rows_B) > 1:
                for part, rows, _ in here:
                    part.announce(rows)
            for part, rows, places in here:
                part.read(rows, out.numpy(), places)
        return out

    def _room(self, rows: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty((rows, *shape), dtype=dtype, pin_memory=self.pinned)
