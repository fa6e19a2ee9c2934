"""The columns that our shards may have, by the names of `Scenes`, with the shape of one scene.

Version 1 has the eight columns of a simulated scene and one set of codes. Version 2 lists its columns: scenes of
other people may lack the channel or exact sources, and have codes of their own.
Legend: L snapshots, M base-station antennas, N RIS elements, K sources (padded to K_max).
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from ris_fast.config.schema import Task

FORMAT = "ris-fast scenes"
VERSIONS = (1, 2)
COLUMNS = ("snapshots", "channel", "azimuth", "elevation", "range_m", "power", "snr_db", "count")
CODES = "codes"  # as a column: a set for each scene; every shard without it has one set for all its scenes
ALWAYS = ("snapshots", "snr_db", "count")
BIG = ("snapshots", "channel", "effective_channel", "covariance", CODES)


def row_shapes(task: Task) -> dict[str, tuple[int, ...]]:
    """The shape of one scene in each column that there may be."""
    length, m, n, k = task.snapshots, task.bs_antennas, task.elements, task.max_sources
    return {
        "snapshots": (length, m, 2),
        "channel": (m, n, 2),
        "effective_channel": (length, m, 2),
        "covariance": (n, n, 2),
        CODES: (length, n, 2),
        **{name: (k,) for name in ("azimuth", "elevation", "range_m", "power", "u", "v")},
        **{name: () for name in ("snr_db", "count", "target_nmse")},
    }


def shard_shapes(task: Task, columns: Collection[str], rows: int) -> dict[str, tuple[int, ...]]:
    """The shape of every array of a shard of so many scenes."""
    shapes = row_shapes(task)
    return {CODES: shapes[CODES], **{name: (rows, *shapes[name]) for name in columns}}


def column_type(name: str) -> np.dtype:
    return np.dtype(np.int64 if name == "count" else np.float32)


def scene_bytes(task: Task, columns: Collection[str]) -> int:
    """What one scene takes in a shard."""
    return sum(row_bytes(task, name) for name in columns)


def row_bytes(task: Task, name: str) -> int:
    """What one scene takes in a column."""
    return column_type(name).itemsize * int(np.prod(row_shapes(task)[name], dtype=np.int64))


def known_columns(columns: Collection[str]) -> bool:
    """Whether these are columns of one set: inputs, and exact sources or a dense target."""
    there = set(columns)
    return (
        len(there) == len(columns)
        and there <= set(row_shapes(Task()))
        and there >= set(ALWAYS)
        and bool({"channel", "effective_channel"} & there)
        and bool({"power", "covariance"} & there)
        and ("power" not in there or there >= {"azimuth", "elevation", "range_m"})
    )
