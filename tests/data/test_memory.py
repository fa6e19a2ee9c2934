"""Where the scenes of files stay: chosen by what is free, by hand, and for all processes of a machine together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ris_fast import environment
from ris_fast.config.load import load_config
from ris_fast.config.schema import Config, ConfigError, Data
from ris_fast.data import table
from ris_fast.data.errors import DataError
from ris_fast.data.npz import NpzSource
from ris_fast.data.shards import ShardSource
from ris_fast.data.table import Table, choose_memory
from ris_fast.data.write import write_shards
from ris_fast.environment import local_ranks
from tests.data.make_npz import SMALL, original_arrays, write_npz

CPU = torch.device("cpu")
GIB = 2**30


@pytest.fixture()
def free(monkeypatch: pytest.MonkeyPatch) -> None:
    """10 GiB of host memory."""
    monkeypatch.setattr(environment, "_available_memory", lambda: 10 * GIB)
    monkeypatch.setattr(environment, "Path", lambda *_: Path("/no/control/group"))


def choose(gib: float, **options: Any) -> table.TableMemory:
    return choose_memory(Path("set"), 1024, int(gib * GIB / 1024), CPU, **{"streamable": True, **options})


@pytest.mark.parametrize(
    "gib, ranks, wanted, tier",
    [
        (4.9, 1, "auto", "host"),
        (5.1, 1, "auto", "files"),
        (4.9, 2, "auto", "files"),
        (2.4, 2, "auto", "host"),
        (9.9, 1, "host", "host"),
        (9.9, 1, "device", "host"),
        (0.1, 1, "files", "files"),
        (1.2, 4, "auto", "host"),
    ],
)
def test_memory_is_half_of_this_process_share(
    free: None, monkeypatch: pytest.MonkeyPatch, gib: float, ranks: int, wanted: str, tier: str
) -> None:
    """`host` by hand may take all that is free. On a CPU the device is the host."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    assert choose(gib, wanted=wanted).tier == tier


@pytest.mark.parametrize("wanted", ["host", "device"])
def test_memory_by_hand_that_has_too_little_is_refused(free: None, wanted: str) -> None:
    with pytest.raises(DataError, match=r"found 1,024 scenes of .* which are 10.5 GiB; .* at most 10.0 GiB.*auto"):
        choose(10.5, wanted=wanted)


@pytest.mark.parametrize("wanted", ["auto", "files"])
def test_compressed_files_cannot_be_streamed(free: None, wanted: str) -> None:
    with pytest.raises(DataError, match="compressed arrays that need 7.0 GiB.*numpy.savez"):
        choose(7.0, wanted=wanted, streamable=False)


def test_memory_counts_what_reading_takes_besides(free: None) -> None:
    assert choose(4.9).tier == "host" and choose(4.9, extra=GIB).tier == "files"


def test_the_estimate_is_shown_before_anything_is_allocated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    write, allocated = Table.write, len

    def watched(self: Table, *args: Any) -> None:
        assert any("50 scenes" in line for line in said)
        write(self, *args)

    write_shards(Config(task=SMALL), tmp_path / "set", {"train": 50, "val": 8, "test": 4})
    monkeypatch.setattr(table, "stage", said.append)
    monkeypatch.setattr(table, "free_memory", lambda: 10.0 * GIB)
    monkeypatch.setattr(Table, "write", watched)
    source = ShardSource(Config(task=SMALL, data=Data(path=str(tmp_path / "set"))), "cpu")
    row = source._load("train")[2].row_bytes
    assert said[0] == f"reading set: {row:,} B x 50 scenes = {row * 50 / 2**20:.1f} MiB in host memory (10.0 GiB free)"
    assert allocated(said) == 2 and said[0].removeprefix("reading set: ") in source.describe()


def test_data_memory_files_streams_what_would_fit(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "a.npz", original_arrays(20))
    source = NpzSource(Config(task=SMALL, data=Data(path=str(path), memory="files")), "cpu")
    assert "streamed from files" in source.describe() and "snapshots" not in source._load("train").table.columns


def test_columns_that_do_not_fit_beside_the_rest_are_streamed_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thousand million scenes have 90 GB of positions and powers."""
    write_shards(Config(task=SMALL), tmp_path / "set", {"train": 50, "val": 8, "test": 4})
    given = Config(task=SMALL, data=Data(path=str(tmp_path / "set")))
    held = {}
    for count in (1000, 20_000):
        monkeypatch.setattr(table, "free_memory", lambda count=count: count)
        source = ShardSource(given, "cpu")
        held[count] = set(source._load("train")[0].columns)
        assert torch.equal(source.batch("train", torch.tensor([49, 3])).count, reference(given)[[49, 3]])
    assert held[1000] == set() and {"count", "power", "snr_db"} <= held[20_000]


def reference(given: Config) -> torch.Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table, "free_memory", lambda: 10.0 * GIB)
        return ShardSource(given, "cpu").batch("train", torch.arange(50)).count


def test_local_ranks_are_those_that_torchrun_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert local_ranks() == (0, 1)
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert local_ranks() == (3, 4)


def test_data_memory_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="must be one of: auto, device, host, files"):
        load_config(preset="laptop", overrides=["data.memory=disk"])
