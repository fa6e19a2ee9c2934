"""A data set in device memory is fetched by scene numbers without a copy from the host and without a host read.

The device is "meta", which holds no values: an operation that reads one raises, one that touches the CPU is counted.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ris_fast.config.schema import Config, Data
from ris_fast.data.npz import NpzSource
from ris_fast.data.shards import ShardSource
from ris_fast.data.write import write_shards
from tests.data.make_npz import SMALL, original_arrays, write_npz
from tests.operation_watch import Watch


def config(path: Path | str) -> Config:
    return Config(task=SMALL, data=Data(path=str(path)))


def shards(folder: Path) -> Any:
    write_shards(config(""), folder / "set", {"train": 20, "val": 4, "test": 4})
    return ShardSource(config(folder / "set"), "cpu")


def npz_pool(folder: Path, **options: Any) -> Any:
    """One file, whose scenes are split by number."""
    return NpzSource(config(write_npz(folder / "a.npz", original_arrays(40, **options))), "cpu")


def npz_dense(folder: Path) -> Any:
    return npz_pool(folder, jitter=0.01)


def moved(source: Any) -> Any:
    """The source as it is where its table fits into device memory."""
    device = torch.device("meta")
    for part, loaded in source._loaded.items():
        table, codes = (loaded[0], loaded[1]) if isinstance(loaded, tuple) else (loaded.table, loaded.codes)
        table.columns, table.device = {name: value.to(device) for name, value in table.columns.items()}, device
        if isinstance(loaded, tuple):
            source._loaded[part] = (table, codes.to(device), loaded[2])
        else:
            loaded.codes = codes.to(device)
    if getattr(source, "_rows", None):
        source._rows = {split: rows.to(device) for split, rows in source._rows.items()}
    source.device = device
    return source


@pytest.mark.parametrize("make", [shards, npz_pool, npz_dense])
def test_source_batch_on_a_device_never_syncs(make: Any, tmp_path: Path) -> None:
    source = moved(make(tmp_path))
    assert source.index_device.type == "meta"
    with Watch("meta") as seen:
        scenes = source.batch("train", torch.empty(8, dtype=torch.int64, device="meta"))
    assert scenes.batch == 8 and (scenes.factor is None) == (make is npz_dense)
    assert seen.names["index_select"] >= 5 and not seen.waits and not seen.solvers
