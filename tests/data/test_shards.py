"""Our own data sets: what is stored is what was simulated, bit for bit; damage and half-written sets are named."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ris_fast.config.load import load_config
from ris_fast.config.schema import Config, Data, Task
from ris_fast.data import table
from ris_fast.data.errors import DataError
from ris_fast.data.manifest import file_hash, sealed
from ris_fast.data.open_source import open_source
from ris_fast.data.shards import ShardSource, verify_manifest
from ris_fast.data.simulated import SimulatedSource
from ris_fast.data.statistics import measure
from ris_fast.data.write import write_shards
from tests.data.make_npz import SMALL, all_scenes

SIZES = {"train": 50, "val": 12, "test": 8}


def config(path: Path | str = "", seed: int = 5, task: Task = SMALL, **data: Any) -> Config:
    return Config(task=task, data=Data(path=str(path), seed=seed, **data))


@pytest.fixture()
def written(tmp_path: Path) -> Path:
    write_shards(config(), tmp_path / "set", SIZES, shard_scenes=16)
    return tmp_path / "set"


@pytest.mark.parametrize("split", ["train", "val", "test"])
@pytest.mark.parametrize("mapped", [False, True])
def test_shard_source_equals_the_simulator(
    written: Path, monkeypatch: pytest.MonkeyPatch, split: str, mapped: bool
) -> None:
    if mapped:
        monkeypatch.setattr(table, "free_memory", lambda: 1000)
    source = ShardSource(config(written), "cpu")
    assert ("streamed from files" in source.describe()) == mapped
    index = torch.randperm(SIZES[split], generator=torch.Generator().manual_seed(0))
    found, made = source.batch(split, index), SimulatedSource(config(), "cpu").batch(split, index)
    assert float((found.factor - made.factor).norm() / made.factor.norm()) < 1e-5
    for item in fields(made):
        if item.name == "factor":  # made again from the stored geometry, by another kernel than the simulator's
            continue
        a, b = getattr(found, item.name), getattr(made, item.name)
        assert (a is None and b is None) or torch.equal(a, b), item.name


def test_write_shards_does_not_depend_on_the_shard_size(written: Path, tmp_path: Path) -> None:
    write_shards(config(), tmp_path / "one", SIZES, shard_scenes=4096)
    one, many = (ShardSource(config(path), "cpu") for path in (tmp_path / "one", written))
    assert torch.equal(all_scenes(one, "train").snapshots, all_scenes(many, "train").snapshots)
    assert len(list(written.glob("train-*.safetensors"))) == 4


def test_write_shards_stores_no_dense_matrix(written: Path) -> None:
    tensors = load_file(written / "train-00000.safetensors")
    n = SMALL.elements
    assert not any(t.shape[-3:-1] == (n, n) for t in tensors.values())
    assert all(t.dtype == (torch.int64 if name == "count" else torch.float32) for name, t in tensors.items())


def test_manifest_describes_the_set(written: Path) -> None:
    manifest = json.loads((written / "manifest.json").read_text())
    assert manifest["seed"] == 5 and manifest["task"]["bs_antennas"] == 4 and manifest["scenes"] == SIZES
    scenes = all_scenes(ShardSource(config(written), "cpu"), "train")
    expected, found = measure(scenes, 3), manifest["splits"]["train"]["statistics"]
    for key in ("snapshots_rms", "channel_rms", "snr_db_mean"):
        assert found[key] == pytest.approx(expected[key], rel=1e-6), key
    assert found["count_histogram"] == expected["count_histogram"] and sum(found["count_histogram"]) == 50
    assert expected["channel_rms"] == pytest.approx(float(scenes.channel.square().sum(-1).mean().sqrt()), rel=1e-5)


def test_verify_manifest_accepts_what_was_written(written: Path) -> None:
    assert verify_manifest(ShardSource(config(written), "cpu")) == []
    assert verify_manifest(SimulatedSource(config(), "cpu")) == []


def flip(path: Path, at: int = -40) -> None:
    """Another value of one number, as finite as the one before."""
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def test_verify_manifest_finds_a_byte_changed_after_opening(written: Path) -> None:
    source = ShardSource(config(written), "cpu")
    source.batch("test", torch.arange(1))
    flip(written / "train-00002.safetensors")
    problems = verify_manifest(source)
    assert len(problems) == 1 and "train-00002" in problems[0] and "SHA-256" in problems[0]
    assert verify_manifest(source, contents=False) == []


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("name", ["train-00003", "val-00000"])
def test_shard_source_refuses_a_changed_byte_on_opening(
    written: Path, monkeypatch: pytest.MonkeyPatch, name: str, mapped: bool
) -> None:
    if mapped:
        monkeypatch.setattr(table, "free_memory", lambda: 1000)
    flip(written / f"{name}.safetensors")
    with pytest.raises(DataError, match=f"{name}.*SHA-256.*copy or generate it again") as caught:
        ShardSource(config(written), "cpu")
    assert caught.value.exit_code == 3


def test_shard_source_hashes_only_what_it_reads(written: Path) -> None:
    flip(written / "train-00003.safetensors")
    assert ShardSource(config(written, train_scenes=20), "cpu").size("train") == 20


def test_shard_source_hashes_test_shards_on_first_use(written: Path) -> None:
    path = written / "test-00000.safetensors"
    flip(path)
    source = ShardSource(config(written), "cpu")
    with pytest.raises(DataError, match="test-00000.*SHA-256"):
        source.batch("test", torch.arange(1))
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(DataError, match="test-00000.*bytes, as the manifest says"):
        ShardSource(config(written), "cpu")
    path.unlink()
    with pytest.raises(DataError, match="test-00000.*no such file"):
        ShardSource(config(written), "cpu")
    with pytest.raises(DataError, match="test-00000.*cannot be read"):
        source.batch("test", torch.arange(1))


def test_open_source_progress_counts_shard_scenes(written: Path) -> None:
    seen: list[tuple[int, int]] = []
    source = open_source(config(written), "cpu", progress=lambda done, total: seen.append((done, total)))
    assert seen == [(16, 50), (32, 50), (48, 50), (50, 50), (12, 12)]
    source.batch("test", torch.arange(1))
    assert seen[-1] == (8, 8)


def test_verify_manifest_finds_inputs_changed_on_the_way(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = ShardSource(config(written), "cpu")
    batch = source.batch
    monkeypatch.setattr(source, "batch", lambda split, index: batch(split, index).apply(lambda t: t * 2))
    problems = verify_manifest(source)
    assert {word for p in problems for word in ("snapshots_rms", "channel_rms", "snr_db_mean") if word in p} == {
        "snapshots_rms",
        "channel_rms",
        "snr_db_mean",
    }


def test_shard_source_limits_splits_to_configured_sizes(written: Path) -> None:
    source = ShardSource(config(written, train_scenes=20), "cpu")
    assert source.size("train") == 20 and source.notes == ["20 of 50 train scenes in use (data.train_scenes)"]
    assert all_scenes(source, "train").batch == 20 and verify_manifest(source) == []


@pytest.mark.parametrize(
    "origin, told", [("flag", True), ("--set", True), ("default", False), ("preset original", False), (None, False)]
)
def test_shard_source_notes_a_split_smaller_than_asked(written: Path, origin: str | None, told: bool) -> None:
    asked = replace(
        config(written, train_scenes=60, val_scenes=12),
        provenance={"data.train_scenes": origin, "data.val_scenes": origin} if origin else {},
    )
    notes = ShardSource(asked, "cpu").notes
    assert notes == (
        [f"data.train_scenes is 60 ({origin}), but there are 50 train scenes: all are in use"] if told else []
    )


def test_shard_source_counts_copies_between_splits(written: Path) -> None:
    replace_shard(
        written,
        "val-00000",
        lambda t: t.update(
            {k: v[:12] for k, v in load_file(written / "train-00000.safetensors").items() if k != "codes"}
        ),
    )
    source = ShardSource(config(written), "cpu")
    assert [(o.count, o.total, o.shift) for o in source.overlaps] == [(12, 12, 0)] and "copies" in source.notes[0]


def replace_shard(folder: Path, name: str, damage: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change tensors of a shard, and let the manifest agree about its bytes, so that only the damage is wrong."""
    path = folder / f"{name}.safetensors"
    tensors = load_file(path)
    damage(tensors)
    path.unlink()
    save_file({k: v.contiguous() for k, v in tensors.items()}, path)
    edit_manifest(
        folder,
        lambda m: [
            e.update(bytes=path.stat().st_size, sha256=file_hash(path))
            for s in m["splits"].values()
            for e in s["shards"]
            if e["file"] == path.name
        ],
    )


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(sealed(manifest)))


def cut(share: float) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "train-00001.safetensors"
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])

    return damage


def garble(start: int, raw: bytes) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "train-00001.safetensors"
        whole = path.read_bytes()
        path.write_bytes(whole[:start] + raw + whole[start + len(raw) :])

    return damage


def tensor(name: str, how: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    return lambda folder: replace_shard(folder, "train-00001", lambda t: t.update({name: how(t[name])}))


def with_nan(values: torch.Tensor) -> torch.Tensor:
    values[3] = np.nan
    return values


DAMAGE = {
    "cut short": (cut(0.7), "train-00001", "", "bytes"),
    "emptied": (cut(0.0), "train-00001", "", "0 bytes"),
    "removed": (lambda f: (f / "train-00001.safetensors").unlink(), "train-00001", "", "no such file"),
    "header length": (garble(0, b"\xff" * 8), "train-00001", "", "no readable safetensors header"),
    "header text": (garble(8, b"}}}}"), "train-00001", "", "no readable safetensors header"),
    "nan in snapshots": (tensor("snapshots", with_nan), "train-00001", "snapshots", "the first in scene 3"),
    "nan in channel": (tensor("channel", with_nan), "train-00001", "channel", "the first in scene 3"),
    "inf in power": (tensor("power", lambda t: t * np.inf), "train-00001", "power", "NaN or infinite"),
    "mis-shaped": (tensor("channel", lambda t: t[:, :2]), "train-00001", "channel", "shape (16, 2, 24, 2)"),
    "mistyped": (tensor("snr_db", lambda t: t.double()), "train-00001", "snr_db", "float64"),
    "no such tensor": (
        lambda f: replace_shard(f, "train-00001", lambda t: t.pop("power")),
        "train-00001",
        "power",
        "no such",
    ),
    "other codes": (tensor("codes", lambda t: -t), "train-00001", "codes", "other codes"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "set", "", "no manifest.json"),
    "manifest cut": (lambda f: (f / "manifest.json").write_text("{"), "manifest", "", "no readable JSON"),
    "manifest of another tool": (lambda f: (f / "manifest.json").write_text("{}"), "manifest", "format", "None"),
    "manifest is a list": (lambda f: (f / "manifest.json").write_text("[]"), "manifest", "format", "[]"),
    "no seed": (lambda f: edit_manifest(f, lambda m: m.pop("seed")), "manifest", "seed", "no such entry"),
    "no val": (lambda f: edit_manifest(f, lambda m: m["splits"].pop("val")), "manifest", "val", "no such entry"),
    "no hashes": (
        lambda f: edit_manifest(f, lambda m: m["splits"]["test"]["shards"][0].pop("sha256")),
        "manifest",
        "splits.test",
        "no whole list",
    ),
    "a shard not listed": (
        lambda f: edit_manifest(f, lambda m: m["splits"]["train"]["shards"].pop()),
        "manifest",
        "splits.train",
        "no whole list",
    ),
    "splits are a list": (
        lambda f: edit_manifest(f, lambda m: m.update(splits=["train", "val", "test"])),
        "manifest",
        "splits",
        "no such entry",
    ),
    "other task": (
        lambda f: edit_manifest(f, lambda m: m["task"].update(snr_min_db=-9.0)),
        "manifest",
        "task",
        "snr_min_db -9.0",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_shard_damage_is_named(written: Path, name: str) -> None:
    damage, where, key, found = DAMAGE[name]
    damage(written)
    with pytest.raises(DataError) as caught:
        open_source(config(written, source="shards"), "cpu")
    error = caught.value
    assert error.exit_code == 3 and where in error.where and error.key == key and found in error.found, str(error)
    assert error.expected in str(error) and error.todo.endswith(".")


def test_shard_source_of_another_task_lists_all_differences(written: Path) -> None:
    """All that differs at once; the task of the data set is what load_config takes."""
    said = (
        "found bs_antennas 4, ris_horizontal 6, .* max_sources 3; expected bs_antennas 16, .* max_sources 5, as"
        " configured"
    )
    with pytest.raises(DataError, match=said):
        ShardSource(config(written, task=Task()), "cpu")
    assert ShardSource(load_config(preset="laptop", flags={"data.path": written}), "cpu").size("train")


@pytest.mark.parametrize("surface", [0, 3])
def test_shards_of_a_miscalibrated_task_hold_what_its_receiver_is_told(tmp_path: Path, surface: int) -> None:
    task = replace(SMALL, phase_error_deg=30.0, phase_error_surface=surface, channel_snr_db=15.0)
    write_shards(config(task=task), tmp_path / "set", SIZES)
    loaded = load_config(preset="laptop", flags={"data.path": tmp_path / "set"})
    assert loaded.task == task
    source, index = ShardSource(loaded, "cpu"), torch.arange(SIZES["test"])
    found, made = source.batch("test", index), SimulatedSource(config(task=task), "cpu").batch("test", index)
    assert all(torch.equal(getattr(found, name), getattr(made, name)) for name in ("snapshots", "channel", "codes"))
    assert verify_manifest(source) == []
    with pytest.raises(DataError, match="found phase_error_deg 30.0, .*; expected phase_error_deg 0.0"):
        ShardSource(config(tmp_path / "set"), "cpu")


def test_shards_written_before_a_setting_was_there_have_its_default(written: Path) -> None:
    edit_manifest(
        written, lambda manifest: [manifest["task"].pop(key) for key in ("phase_error_deg", "channel_snr_db")]
    )
    assert ShardSource(load_config(preset="laptop", flags={"data.path": written}), "cpu").task == SMALL
    with pytest.raises(DataError, match="found channel_snr_db 0.0; expected channel_snr_db 20.0"):
        ShardSource(config(written, task=replace(SMALL, channel_snr_db=20.0)), "cpu")
