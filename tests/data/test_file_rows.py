"""Rows read from files by number are the rows of the files, and a file that changes underneath is named."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ris_fast.config.schema import Config, Data
from ris_fast.data import file_rows
from ris_fast.data.errors import DataError
from ris_fast.data.file_rows import OpenFiles
from ris_fast.data.npz import NpzSource
from ris_fast.data.shards import ShardSource
from ris_fast.data.write import write_shards
from tests.data.make_npz import SMALL, original_arrays, write_npz

SIZES = {"train": 50, "val": 8, "test": 4}


def config(path: Path, memory: str = "files", **data: Any) -> Config:
    return Config(task=SMALL, data=Data(path=str(path), memory=memory, **data))


@pytest.fixture()
def written(tmp_path: Path) -> Path:
    """Seven files of training scenes."""
    write_shards(Config(task=SMALL), tmp_path / "set", SIZES, shard_scenes=8)
    return tmp_path / "set"


def same(one: Any, other: Any) -> bool:
    pairs = [(getattr(one, item.name), getattr(other, item.name)) for item in fields(one)]
    return all((a is None) == (b is None) and (a is None or torch.equal(a, b)) for a, b in pairs)


@pytest.mark.parametrize("most", [1, 2, 256])
def test_rows_from_files_are_the_rows_in_memory(written: Path, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """In any order, repeated, of few and of many files, with more files than may be open."""
    monkeypatch.setattr(file_rows, "MOST_OPEN", most)
    there, here = ShardSource(config(written), "cpu"), ShardSource(config(written, "host"), "cpu")
    assert "streamed from files" in there.describe() and "in host memory" in here.describe()
    drawn = torch.randint(50, (90,), generator=torch.Generator().manual_seed(1))
    for rows in (
        drawn,
        torch.arange(50),
        torch.tensor([49, 0, 49, 8, 7]),
        torch.tensor([3]),
        torch.tensor([], dtype=int),
    ):
        assert same(there.batch("train", rows), here.batch("train", rows))
    assert 0 < len(there._load("train")[0].files._open) <= most


@pytest.mark.parametrize("rows", [[50], [-1], [0, 50], [-1, 3]])
def test_rows_that_are_not_there_are_refused(written: Path, rows: list[int]) -> None:
    with pytest.raises(IndexError, match="of 50"):
        ShardSource(config(written), "cpu").read("train", torch.tensor(rows))


FORMS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "float32 pairs": lambda a: a,
    "complex64": lambda a: a.astype(np.float32).view(np.complex64)[..., 0],
    "complex128": lambda a: a.astype(np.float64).view(np.complex128)[..., 0],
    "float64": lambda a: a.astype(np.float64),
    "big-endian": lambda a: a.astype(">f4"),
    "Fortran order": np.asfortranarray,
}


@pytest.mark.parametrize("form", FORMS)
def test_rows_of_foreign_files_are_the_rows_in_memory(tmp_path: Path, form: str) -> None:
    arrays = original_arrays(30)
    arrays |= {key: FORMS[form](np.ascontiguousarray(arrays[key], np.float32)) for key in ("y", "H_full")}
    path = write_npz(tmp_path / "a.npz", arrays)
    there, here = (NpzSource(config(path, memory), "cpu") for memory in ("files", "host"))
    rows = torch.tensor([5, 0, 19, 5, 12])
    assert same(there.batch("train", rows), here.batch("train", rows))
    assert there.reads_ahead and not here.reads_ahead


def shrunk(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 4)


def emptied(path: Path) -> None:
    os.truncate(path, 0)


def rewritten(path: Path) -> None:
    raw, before = path.read_bytes(), path.stat()
    path.write_bytes(raw)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1_000_000))


def replaced(path: Path) -> None:
    raw = path.read_bytes()
    path.unlink()
    path.write_bytes(raw[:-8])


@pytest.mark.parametrize(
    "change, most", [(shrunk, 256), (emptied, 256), (rewritten, 256), (replaced, 1), (Path.unlink, 1)]
)
@pytest.mark.parametrize("kind", ["shards", "npz", "npz in Fortran order"])
def test_a_file_that_changes_while_it_is_in_use_is_named(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, change: Callable[[Path], None], most: int
) -> None:
    """A memory map of a file that shrinks would kill the process without a word."""
    monkeypatch.setattr(file_rows, "MOST_OPEN", most)
    path = written / "train-00002.safetensors"
    if kind == "shards":
        source: Any = ShardSource(config(written), "cpu")
    else:
        arrays = original_arrays(12)
        arrays |= {"y": np.asfortranarray(arrays["y"])} if "Fortran" in kind else {}
        for name in ("a", "b", "c"):
            path = write_npz(tmp_path / "npz" / f"{name}.npz", arrays)
        source = NpzSource(config(tmp_path / "npz"), "cpu")
    rows = torch.arange(source.size("train"))
    source.batch("train", rows)
    if most == 1:
        source.batch("train", torch.tensor([0]))  # closes the others
    change(path)
    with pytest.raises(DataError, match=path.name) as caught:
        source.batch("train", rows)
    assert caught.value.exit_code == 3
    assert "changed while it was in use" in str(caught.value) or "cannot be read" in str(caught.value)


def test_a_file_cut_between_two_of_its_rows_is_named(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, read = ShardSource(config(written), "cpu"), os.preadv
    source.batch("train", torch.tensor([0]))

    def cut_before(*given: Any) -> int:
        emptied(written / "train-00000.safetensors")
        return read(*given)

    monkeypatch.setattr(os, "preadv", cut_before)
    with pytest.raises(DataError, match="train-00000.*changed while it was in use"):
        source.batch("train", torch.tensor([0, 1]))


def test_rows_left_alone_by_a_change_are_still_read(written: Path) -> None:
    source = ShardSource(config(written), "cpu")
    shrunk(written / "train-00006.safetensors")
    assert source.batch("train", torch.arange(48)).batch == 48


def test_a_file_cut_while_it_is_verified_is_named(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ris_fast.data.shards.OwnShard.check_contents", lambda shard: os.truncate(shard.path, 4096))
    with pytest.raises(DataError, match="train-00000.*damaged bytes"):
        ShardSource(config(written, "host"), "cpu")


def test_descriptors_are_given_back(written: Path) -> None:
    def held() -> int:
        gc.collect()
        return sum(os.path.realpath(each).startswith(str(written)) for each in Path("/proc/self/fd").iterdir())

    source: Any = ShardSource(config(written), "cpu")
    source.batch("train", torch.arange(50))
    assert held() >= 7
    del source
    assert held() == 0


def test_open_files_close_the_one_used_longest_ago(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_rows, "MOST_OPEN", 2)
    files, paths = OpenFiles(), sorted(written.glob("train*"))[:3]
    first = files.descriptor(paths[0])
    files.descriptor(paths[1])
    assert files.descriptor(paths[0]) == first
    files.descriptor(paths[2])
    assert list(files._open) == [paths[0], paths[2]]
