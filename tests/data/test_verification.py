"""What is checked on opening, and by whom; and that shared scenes are found whatever the order and the sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ris_fast.config.schema import Config, Data
from ris_fast.data import fingerprints
from ris_fast.data.arrays import StoredArray
from ris_fast.data.errors import DataError
from ris_fast.data.fingerprints import Overlap, find_copies, find_overlap, scene_hashes
from ris_fast.data.shards import ShardSource
from ris_fast.data.verification import Verification
from ris_fast.data.write import write_shards
from tests.data.make_npz import SMALL

SIZES = {"train": 50, "val": 16, "test": 8}


@pytest.fixture()
def written(tmp_path: Path) -> Path:
    """Seven files of training scenes, two of validation scenes."""
    write_shards(Config(task=SMALL), tmp_path / "set", SIZES, shard_scenes=8)
    return tmp_path / "set"


def opened(path: Path, **data: Any) -> ShardSource:
    return ShardSource(Config(task=SMALL, data=Data(path=str(path), **data)), "cpu")


def flip(path: Path, at: int = -40) -> None:
    """Another value of one number, as finite as the one before."""
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("memory", ["host", "files"])
def test_the_first_damaged_file_is_named_whichever_thread_finds_one(written: Path, memory: str) -> None:
    for number in (5, 2, 3):
        flip(written / f"train-0000{number}.safetensors")
    for _ in range(5):
        with pytest.raises(DataError, match="train-00002.*SHA-256"):
            opened(written, memory=memory)


@pytest.mark.parametrize("memory", ["host", "files"])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_file_is_checked_by_one_process_of_a_machine(
    written: Path, monkeypatch: pytest.MonkeyPatch, ranks: int, memory: str
) -> None:
    flip(written / "train-00004.safetensors")
    flip(written / "val-00001.safetensors")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    found = set()
    for rank in range(ranks):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        try:
            opened(written, memory=memory)
        except DataError as error:
            found.add((rank, Path(error.where).stem))
    assert (4 % ranks, "train-00004") in found
    assert ranks == 1 or 1 % ranks == 4 % ranks or (1 % ranks, "val-00001") in found


@pytest.mark.parametrize("memory", ["host", "files"])
def test_all_processes_serve_the_same_scenes(written: Path, monkeypatch: pytest.MonkeyPatch, memory: str) -> None:
    rows, alone = torch.arange(50), opened(written)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    for rank in range(3):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        found = opened(written, memory=memory).batch("train", rows)
        assert torch.equal(found.channel, alone.batch("train", rows).channel)


def test_without_verification_headers_and_sizes_are_checked_and_it_is_said(written: Path) -> None:
    flip(written / "train-00003.safetensors")
    source = opened(written, verify=False)
    assert source.notes[0] == "only sizes and headers of the files were checked (data.verify = false)"
    assert opened(written.parent / "set", verify=False).batch("train", torch.arange(50)).batch == 50
    path = written / "train-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(DataError, match="train-00003.*bytes, as the manifest says"):
        opened(written, verify=False)


@pytest.mark.parametrize("verify, rank, expected", [(False, 0, 0), (True, 0, 4), (True, 1, 3)])
def test_opening_reads_no_more_than_it_checks(
    written: Path, monkeypatch: pytest.MonkeyPatch, verify: bool, rank: int, expected: int
) -> None:
    """Of the channel of training, in its files: all of two processes together, once; nothing where nothing is asked."""
    read: list[tuple[str, str]] = []
    chunks = StoredArray.chunks

    def counted(self: StoredArray, rows: int, limit: int) -> Any:
        read.append((self.file.name[:5], self.key))
        return chunks(self, rows, limit)

    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    monkeypatch.setattr(StoredArray, "chunks", counted)
    opened(written, memory="files", verify=verify)
    assert read.count(("train", "channel")) == expected
    assert read.count(("train", "snapshots")) == (7 if verify and rank == 0 else expected)


def test_shared_scenes_are_found_by_the_first_process(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import load_file

    from tests.data.test_shards import replace_shard

    copied = load_file(written / "train-00001.safetensors")
    replace_shard(written, "val-00000", lambda t: t.update({k: v for k, v in copied.items() if k != "codes"}))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for rank, expected in ((0, [(8, 16, 8)]), (1, [])):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        for memory in ("host", "files"):
            source = opened(written, memory=memory)
            assert [(o.count, o.total, o.shift) for o in source.overlaps] == expected
            assert (not expected) or "8 of 16 val scenes are copies" in source.notes[0]
    assert opened(written, verify=False).overlaps == []


def test_files_are_shared_out_whole() -> None:
    for ranks in (1, 2, 5):
        owners = [sum(Verification(True, rank, ranks).file(n) for rank in range(ranks)) for n in range(11)]
        assert owners == [1] * 11
    assert not any(Verification(False, 0, 1).file(n) for n in range(3))


def slow_overlap(first: list[int], second: list[int]) -> Overlap:
    shifts = [first.index(value) - i for i, value in enumerate(second) if value in first]
    return Overlap("train", "val", len(shifts), len(second), shifts[0] if len(set(shifts)) == 1 else None)


@pytest.mark.parametrize("piece", [3, 2**20])
def test_find_overlap_equals_comparing_all_pairs(monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    monkeypatch.setattr(fingerprints, "PIECE", piece)
    draw = np.random.default_rng(0)
    cases = [draw.integers(0, most, (2, 12)).tolist() for most in (3, 10, 30, 100) for _ in range(20)]
    cases += [[list(range(10)), list(range(4, 9))], [[], [1, 2]], [[1, 2], []], [[7, 7, 7], [7]], [[1], [2]]]
    for first, second in cases:
        expected = slow_overlap(first, second)
        found = find_overlap("train", np.array(first, np.uint64), "val", np.array(second, np.uint64))
        assert found == expected, (first, second)
        assert find_copies(first) == len(first) - len(set(first))


def test_scene_hashes_tell_scenes_apart_by_any_bit() -> None:
    values = torch.randn(64, 4, 3, 2, generator=torch.Generator().manual_seed(0))
    changed = values.clone()
    changed.view(torch.int32)[torch.arange(64), 3, 2, 1] ^= 1
    hashes = scene_hashes(torch.cat([values, changed]))
    assert hashes.dtype == np.uint64 and len(np.unique(hashes)) == 128
    assert np.array_equal(scene_hashes(values), hashes[:64])
