"""Conversion of the original's .npz: the same scenes as the .npz itself, whole or not at all, continued when broken."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ris_fast.config.load import load_config
from ris_fast.config.schema import Config, Data
from ris_fast.data import table
from ris_fast.data.check_set import check_set
from ris_fast.data.conversion import convert as conversion
from ris_fast.data.conversion.convert import convert
from ris_fast.data.conversion.scene_file import npz_files_of
from ris_fast.data.errors import DataError
from ris_fast.data.npz import NpzSource
from ris_fast.data.open_source import open_source
from ris_fast.data.shards import verify_manifest
from tests.data.make_npz import SMALL, all_scenes, original_arrays, write_folders, write_npz


def config(path: Path, **data: Any) -> Config:
    return Config(task=SMALL, data=Data(path=str(path), **data))


def converted(source: Path, out: Path, **options: Any) -> Path:
    return convert(config(source), npz_files_of(source, SMALL), out, **options).parent


def opened(folder: Path) -> Any:
    return open_source(load_config(preset="laptop", flags={"data.path": folder}), "cpu")


def assert_same_scenes(one: Any, other: Any, splits: tuple[str, ...] = ("train", "val", "test")) -> None:
    assert one.lacks == other.lacks and one.channel == other.channel and one.reach == other.reach
    for split in splits:
        order = torch.randperm(one.size(split), generator=torch.Generator().manual_seed(1))
        first, second = one.batch(split, order), other.batch(split, order)
        for item in fields(first):
            a, b = getattr(first, item.name), getattr(second, item.name)
            assert (a is None) == (b is None) and (a is None or torch.equal(a, b)), (split, item.name)


@pytest.mark.parametrize(
    "options",
    [{}, {"jitter": 0.05}, {"drop": ("H_full",)}, {"centred": True}, {"task": replace(SMALL, symbols="per_snapshot")}],
    ids=["exact", "jitter", "no channel", "centred", "symbols"],
)
@pytest.mark.parametrize("mapped", [False, True])
def test_a_converted_set_has_the_scenes_of_the_npz(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], mapped: bool
) -> None:
    source = write_folders(tmp_path / "npz", **options)
    monkeypatch.setattr(conversion, "SHARD_SCENES", 16)
    out = converted(source, tmp_path / "set")
    if mapped:
        monkeypatch.setattr(table, "free_memory", lambda: 1000)
    if "drop" in options:
        with pytest.raises(DataError, match="H c_l cannot carry the answer"):
            opened(out)
        mine = open_source(
            load_config(preset="original", flags={"data.path": out, "model.options.inputs": "effective_channel"}), "cpu"
        )
    else:
        mine = opened(out)
    theirs = NpzSource(config(source), "cpu")
    assert_same_scenes(theirs, mine)
    assert check_set(out, 2).wrong == [] and verify_manifest(mine) == []
    if "jitter" in options:
        assert float((mine.target_fit("train") / theirs.target_fit("train") - 1).abs().max()) < 1e-5
        assert mine.labels("val", torch.arange(3))[2].shape == (3, 24, 24, 2)
    assert [note for note in theirs.notes if note not in mine.notes] == []


def test_scenes_with_codes_of_their_own_keep_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("val", 8), ("test", 4)):
        arrays = original_arrays(count, split=split)
        arrays["codes"] = rng.normal(size=arrays["codes"].shape).astype(np.float32)
        arrays.pop("H")
        write_npz(tmp_path / "npz" / split / "a.npz", arrays)
    out = converted(tmp_path / "npz", tmp_path / "set")
    theirs = NpzSource(config(tmp_path / "npz"), "cpu")
    assert_same_scenes(theirs, opened(out))
    monkeypatch.setattr(table, "free_memory", lambda: 1000)
    assert torch.equal(
        all_scenes(opened(out), "val").codes[:, 0], torch.from_numpy(load(tmp_path / "npz/val/a.npz", "codes"))[:, 0]
    )


def load(path: Path, key: str) -> np.ndarray:
    with np.load(path) as file:
        return file[key]


@pytest.mark.parametrize("compressed", [False, True])
def test_one_pool_is_split_as_the_reader_splits_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compressed: bool
) -> None:
    monkeypatch.setattr(conversion, "SHARD_SCENES", 16)
    arrays = original_arrays(300)
    for number, rows in enumerate((slice(0, 280), slice(280, 300))):
        shard = {key: value[rows] for key, value in arrays.items()}
        write_npz(tmp_path / "npz" / f"{number}.npz", shard, compressed=compressed)
    out = converted(tmp_path / "npz", tmp_path / "set")
    assert_same_scenes(NpzSource(config(tmp_path / "npz"), "cpu"), opened(out))


def test_a_broken_conversion_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion, "SHARD_SCENES", 8)
    source = write_folders(tmp_path / "npz")
    whole = converted(source, tmp_path / "straight")

    def stop(done: int, total: int) -> None:
        if done >= 42:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="40 of 60 scenes are in .*continues there"):
        converted(source, tmp_path / "set", progress=stop)
    assert "5 of 8 shards are whole" in check_set(tmp_path / "set", 1).summary
    taken: list[int] = []
    take = conversion._Pass.take
    monkeypatch.setattr(conversion._Pass, "take", lambda *a: (taken.append(len(a[3]["K"])), take(*a))[1])
    out = converted(source, tmp_path / "set")
    assert taken == [12, 8]
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {p.name: p.read_bytes() for p in whole.iterdir()}


def test_shards_of_a_damaged_file_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A zip's checksum comes at its end: until then nothing that came from it counts as right."""
    monkeypatch.setattr(conversion, "SHARD_SCENES", 8)
    source = write_folders(tmp_path / "npz", train=60)
    path = source / "train" / "shard_001.npz"
    raw = bytearray(path.read_bytes())
    at = raw.index(b"y.npy") + 1000
    raw[at] ^= 1
    path.write_bytes(raw)
    with pytest.raises(DataError, match="shard_001.npz, key 'y'.*damaged bytes"):
        converted(source, tmp_path / "set")
    receipts = sorted(each.name for each in (tmp_path / "set.partial").glob("train-*.json"))
    assert receipts == ["train-00000.json", "train-00001.json"]  # 20 of 60 scenes are in the first file


def test_changed_files_begin_another_conversion(tmp_path: Path) -> None:
    source = write_folders(tmp_path / "npz")

    def stop(done: int, total: int) -> None:
        if done > 50:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        converted(source, tmp_path / "set", progress=stop)
    write_npz(source / "val" / "shard_000.npz", original_arrays(12, split="val", seed=8))
    with pytest.raises(DataError, match="unfinished work of another data set"):
        converted(source, tmp_path / "set")


def test_files_without_test_scenes(tmp_path: Path) -> None:
    out = converted(write_folders(tmp_path / "npz", test=0), tmp_path / "set")
    source = opened(out)
    assert source.size("test") == 0 and check_set(out, 1).whole
    with pytest.raises(DataError, match="no test scenes"):
        source.batch("test", torch.arange(1))


def test_the_manifest_says_where_the_scenes_come_from(tmp_path: Path) -> None:
    manifest = json.loads((converted(write_folders(tmp_path / "npz"), tmp_path / "set") / "manifest.json").read_text())
    assert manifest["version"] == 2 and "covariance" not in manifest["columns"]
    assert manifest["origin"]["files"] == ["shard_000.npz", "shard_001.npz", "shard_000.npz", "shard_000.npz"]
    assert manifest["task"]["azimuth_deg"] > SMALL.azimuth_deg  # a sector that holds the shifted sources
