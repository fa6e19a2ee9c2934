"""What a conversion reads: files of scenes, whatever their format, as chunks by the keys of the .npz format.

Legend: B rows of a chunk, L snapshots, M base-station antennas, N RIS elements, K sources (padded to K_max).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from ris_fast.config.schema import Task
from ris_fast.data.data_path import find_npz
from ris_fast.data.errors import DataError
from ris_fast.data.npz_format import NpzShard, open_shard
from ris_fast.data.npz_load import shard_chunks

Chunks = Iterator[tuple[int, dict[str, Tensor]]]
Wanted = Callable[[int, int], bool]


class SceneFile(Protocol):
    """One file of scenes whose header is in order.

    `keys`: of its chunks: y, codes, snr, K; H or H_full; ptr and R or power, or R alone. `checked_at_end`: its bytes
    are known to be right only when all of them were read. `names`: of the keys, as errors say them.
    """

    path: Path
    keys: frozenset[str]
    checked_at_end: bool
    names: Mapping[str, str]

    @property
    def scenes(self) -> int: ...

    def chunks(self, wanted: Wanted) -> Chunks:
        """(first row, {key: rows}) of the chunks for which wanted(first row, end) says so. Raises: DataError."""
        ...


@dataclass(frozen=True)
class NpzFile:
    """A shard of the original pipeline, each array of which is decoded once. Its checksums come last."""

    shard: NpzShard
    checked_at_end: bool = True
    names: Mapping[str, str] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        return self.shard.path

    @property
    def keys(self) -> frozenset[str]:
        return frozenset(self.shard.columns)

    @property
    def scenes(self) -> int:
        return self.shard.scenes

    def chunks(self, wanted: Wanted) -> Chunks:
        for at, chunk in shard_chunks(self.shard, self.scenes):
            if wanted(at, at + len(chunk["K"])):
                yield at, chunk


@dataclass(frozen=True)
class Files:
    """All that is converted: files by split, or in one pool that is split by number.

    `origin`: what they are, in words. `offset`: of the array, in spacings; None: found in the covariances. `settings`:
    what else determines the result.
    """

    root: Path
    parts: Mapping[str, list[SceneFile]]
    origin: str
    offset: tuple[float, float] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    rows: Mapping[str, Tensor] = field(default_factory=dict)  # of each split in the one pool; empty: by number

    def listing(self) -> list[list[Any]]:
        """Name, size and time of every file: a changed one begins another data set."""
        found = []
        for part, files in self.parts.items():
            for file in files:
                state = os.stat(file.path)
                found.append([part, file.path.name, state.st_size, state.st_mtime_ns])
        return found


def npz_files_of(root: Path, task: Task) -> Files:
    """The original pipeline's shards at a path, their headers checked. Raises: DataError."""
    parts: dict[str, list[SceneFile]] = {
        part: [NpzFile(open_shard(path, task)) for path in paths] for part, paths in find_npz(root).items()
    }
    check_alike(parts)
    return Files(root, parts, "the original pipeline's .npz")


def check_alike(parts: Mapping[str, list[SceneFile]]) -> None:
    """Every file has what the first one has. Raises: DataError."""
    files = [file for each in parts.values() for file in each]
    for file in files:
        if lost := sorted(files[0].keys - file.keys):
            raise DataError(
                file.path,
                file.names.get(lost[0], lost[0]),
                "no such key",
                f"it, because {files[0].path.name} has it",
                "Convert files with and without it one after the other, from different folders.",
            )
