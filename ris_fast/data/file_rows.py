"""Rows of arrays in their files, by number: each is read where it lies, and nothing beside it.

They are read, not memory-mapped. A map brings in 128 kB around each row that is not in memory yet, of which a scene is
20 kB; each file that is mapped keeps a descriptor, of which a process has about 1,000; and a file that shrinks under a
map kills the process. The system hears of all rows of a batch before the first one is read, so that the disk has more
than one to work on.

Legend: B rows asked for.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ris_fast.data.arrays import COPY_AGAIN, StoredArray
from ris_fast.data.errors import DataError

MOST_OPEN = 256


class OpenFiles:
    """The files of a data set, at most MOST_OPEN of them open. Each must stay as it was when it was first seen.

    `lock`: to be held while a descriptor is in use.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._seen: dict[Path, tuple[int, int]] = {}  # size in bytes, time of the last change in ns
        self._open: OrderedDict[Path, int] = OrderedDict()  # the one used last is the last
        weakref.finalize(self, _close, self._open)

    def see(self, path: Path) -> None:
        """Remembers how the file is now. Raises: DataError where it is not as it was."""
        self.descriptor(path)

    def descriptor(self, path: Path) -> int:
        """An open descriptor, good until the lock is released. Raises: DataError for a file that has changed."""
        with self.lock:
            try:
                found = self._open.pop(path) if path in self._open else os.open(path, os.O_RDONLY)
                self._open[path] = found
                if len(self._open) > MOST_OPEN:
                    os.close(self._open.popitem(last=False)[1])
                status = os.fstat(found)
            except OSError as problem:
                raise unreadable(path, problem) from None
            now = status.st_size, status.st_mtime_ns
            before = self._seen.setdefault(path, now)
            if now != before:
                raise DataError(
                    path,
                    "",
                    f"a file that was changed while it was in use ({before[0]} bytes before, {now[0]} now)",
                    "the bytes that were there when it was opened",
                    "Leave a data set alone while it is trained on; resume the run once it is whole again.",
                )
            return found


def _close(descriptors: OrderedDict[Path, int]) -> None:
    for descriptor in descriptors.values():
        os.close(descriptor)


def unreadable(path: Path, problem: OSError) -> DataError:
    """What to raise for a file that the system does not give."""
    return DataError(path, "", f"a file that cannot be read ({problem.strerror})", "a shard", COPY_AGAIN)


@dataclass(frozen=True)
class FileRows:
    """The rows of an array that is neither compressed nor in Fortran order."""

    stored: StoredArray
    files: OpenFiles

    def __len__(self) -> int:
        return self.stored.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    @property
    def dtype(self) -> np.dtype:
        return self.stored.dtype

    def announce(self, rows_B: np.ndarray) -> None:
        """Has the system begin to bring in rows that are not in memory yet; returns at once."""
        if hasattr(os, "posix_fadvise"):
            with self.files.lock:
                descriptor, size = self.files.descriptor(self.stored.file), self.stored.row_bytes
                for offset in self._offsets(rows_B):
                    os.posix_fadvise(descriptor, offset, size, os.POSIX_FADV_WILLNEED)

    def read(self, rows_B: np.ndarray, out: np.ndarray, places_B: np.ndarray) -> None:
        """Rows of the file to rows `places_B` of `out`, which has rows of as many bytes, in C order.

        Raises: DataError for a file that changed, ends early or cannot be read.
        """
        size = self.stored.row_bytes
        if size == 0:
            return
        room = memoryview(out.reshape(-1).view(np.uint8))
        with self.files.lock:
            descriptor = self.files.descriptor(self.stored.file)
            try:
                for offset, place in zip(self._offsets(rows_B), (places_B * size).tolist()):
                    if os.preadv(descriptor, [room[place : place + size]], offset) != size:
                        self.files.see(self.stored.file)  # one that shrank only now is said to have changed
                        raise DataError(self.stored.file, self.stored.key, "an early end", "all rows", COPY_AGAIN)
            except OSError as problem:
                raise unreadable(self.stored.file, problem) from None

    def _offsets(self, rows_B: np.ndarray) -> list[int]:
        assert self.stored.offset is not None
        return (self.stored.offset + rows_B * self.stored.row_bytes).tolist()
