"""Writing our own data sets: whole or not there at all, continued where it was interrupted, refused before it is
long."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from ris_fast.config.schema import Config, ConfigError, Data
from ris_fast.data import write
from ris_fast.data.errors import DataError
from ris_fast.data.shards import ShardSource, verify_manifest
from ris_fast.data.splits import split_sizes
from ris_fast.data.write import write_shards
from ris_fast.files import StorageError
from tests.data.make_npz import SMALL

SIZES = {"train": 50, "val": 12, "test": 8}


def config(path: Path | str = "", seed: int = 5) -> Config:
    return Config(task=SMALL, data=Data(path=str(path), seed=seed))


def test_write_shards_continues_an_interrupted_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop_after(done: int, total: int) -> None:
        if done >= 32:
            raise KeyboardInterrupt

    out = tmp_path / "set"
    with pytest.raises(KeyboardInterrupt):
        write_shards(config(), out, SIZES, shard_scenes=16, progress=stop_after)
    assert not out.exists() and len(list((tmp_path / "set.partial").glob("train-*.safetensors"))) == 2
    (tmp_path / "set.partial" / "train-00001.safetensors").write_bytes(b"half")
    (tmp_path / "set.partial" / ".train-00002.safetensors.1.partial").write_bytes(b"what a killed writer leaves")
    made: list[int] = []
    simulate = write.simulated_columns
    monkeypatch.setattr(write, "simulated_columns", lambda *a: (made.append(a[2]), simulate(*a))[1])
    seen: list[tuple[int, int]] = []
    write_shards(config(), out, SIZES, shard_scenes=16, progress=lambda done, total: seen.append((done, total)))
    assert made == [16, 32, 48, 0, 0] and seen[-1] == (70, 70) and not (tmp_path / "set.partial").exists()
    assert verify_manifest(ShardSource(config(out), "cpu")) == []
    assert {path.suffix for path in out.iterdir()} == {".safetensors", ".json"} and not (out / "plan.json").exists()
    straight = write_shards(config(), tmp_path / "straight", SIZES, shard_scenes=16)
    assert straight.read_text() == (out / "manifest.json").read_text()


def test_write_shards_keeps_unfinished_work_of_another_set(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(config(), tmp_path / "set", SIZES, progress=stop)
    with pytest.raises(DataError, match="unfinished work of another data set"):
        write_shards(config(seed=6), tmp_path / "set", SIZES)
    assert list((tmp_path / "set.partial").glob("train-*"))


def test_write_shards_refuses_a_folder_that_is_not_empty(tmp_path: Path) -> None:
    written = write_shards(config(), tmp_path / "set", SIZES).parent
    before = (written / "manifest.json").read_bytes()
    with pytest.raises(DataError, match="choose another --out"):
        write_shards(config(), written, SIZES)
    assert (written / "manifest.json").read_bytes() == before
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="something there already"):
        write_shards(config(), tmp_path / "file", SIZES)


def test_write_shards_fills_an_empty_folder_and_makes_parents(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert write_shards(config(), tmp_path / "empty", SIZES).exists()
    assert write_shards(config(), tmp_path / "a" / "b", 8).exists()


def test_write_shards_names_a_full_disk_and_finishes_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    simulate = write.simulated_columns
    with monkeypatch.context() as patch, pytest.raises(StorageError, match="train-00000.* No space left on device"):
        patch.setattr(write, "simulated_columns", lambda *a: (patch.setattr("os.fsync", full), simulate(*a))[1])
        write_shards(config(), tmp_path / "set", SIZES)
    assert not (tmp_path / "set").exists()
    assert write_shards(config(), tmp_path / "set", SIZES).exists()


def test_write_shards_ignores_a_plan_without_scenes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(write, "simulated_columns", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        write_shards(config(), tmp_path / "set", SIZES)
    assert (tmp_path / "set.partial" / "plan.json").exists()
    assert write_shards(config(seed=6), tmp_path / "set", SIZES).exists()


def test_write_shards_refuses_more_than_the_disk_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = sum(
        path.stat().st_size for path in write_shards(config(), tmp_path / "a", SIZES).parent.glob("*.safetensors")
    )
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(write, "simulated_columns", lambda *_: pytest.fail("simulated"))
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=size // 2))
    with pytest.raises(DataError, match="0.0 GB free; expected .* for 70 scenes"):
        write_shards(config(), tmp_path / "b", SIZES)
    assert not (tmp_path / "b.partial").exists()


def test_write_shards_refuses_a_mount_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mounted").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda _: True)
    with pytest.raises(DataError, match="mount point.*--out .*mounted/scenes"):
        write_shards(config(), tmp_path / "mounted", SIZES)


def test_write_shards_fills_the_current_folder_and_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    monkeypatch.chdir(tmp_path / "here")
    assert write_shards(config(), ".", SIZES) == tmp_path / "here" / "manifest.json"
    assert write_shards(config(), tmp_path / "link", SIZES) == tmp_path / "there" / "manifest.json"


def test_split_sizes_follow_the_training_scenes() -> None:
    assert split_sizes(160_000) == {"train": 160_000, "val": 40_000, "test": 8_000}
    assert split_sizes(1) == {"train": 1, "val": 1, "test": 1}


@pytest.mark.parametrize("sizes", [0, {"train": 5}, {"train": 5, "val": 0, "test": 1}])
def test_write_shards_refuses_empty_splits(tmp_path: Path, sizes: Any) -> None:
    with pytest.raises(ConfigError, match="at least one scene"):
        write_shards(config(), tmp_path / "set", sizes)
