"""The common interface and the order of an epoch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ris_fast.config.schema import Config, Data, Model
from ris_fast.data.errors import DataError
from ris_fast.data.fingerprints import scene_hashes
from ris_fast.data.open_source import open_source
from ris_fast.data.source import epoch_batches
from ris_fast.data.write import write_shards
from tests.data.make_npz import SMALL, all_scenes, write_folders


def simulated(**data: object) -> Config:
    sizes: dict[str, object] = {"train_scenes": 50, "val_scenes": 20, "test_scenes": 10}
    return Config(task=SMALL, data=Data(**sizes, **data))  # type: ignore[arg-type]


def files(root: Path) -> dict[str, Config]:
    write_folders(root / "npz", train=50)
    write_shards(simulated(), root / "shards", {"train": 50, "val": 12, "test": 8}, shard_scenes=16)
    return {
        "simulate": simulated(),
        **{kind: Config(task=SMALL, data=Data(path=str(root / kind))) for kind in ("npz", "shards")},
    }


@pytest.mark.parametrize("kind", ["simulate", "npz", "shards"])
@pytest.mark.parametrize("fixed", [False, True])
def test_epoch_batches_have_every_scene_once(tmp_path: Path, kind: str, fixed: bool) -> None:
    source = open_source(files(tmp_path)[kind], "cpu")
    assert source.name == kind
    for epoch in range(3):
        batches = list(epoch_batches(source, "train", epoch, 16, 3, fixed))
        assert [b.numel() for b in batches] == [16, 16, 16, 2]
        start = epoch * 50 if kind == "simulate" and not fixed else 0
        assert torch.equal(torch.cat(batches).sort().values, torch.arange(start, start + 50))


def test_epoch_batches_order_depends_on_seed_and_epoch() -> None:
    source = open_source(simulated(), "cpu")

    def order(epoch: int, seed: int) -> list[int]:
        return [i % 50 for b in epoch_batches(source, "train", epoch, 7, seed, False) for i in b.tolist()]

    assert order(2, 1) == order(2, 1) != order(3, 1) != order(3, 2) != order(2, 2)
    assert order(0, 0) != list(range(50))


@pytest.mark.parametrize("split", ["val", "test"])
def test_epoch_batches_of_val_and_test_never_change(split: str) -> None:
    source = open_source(simulated(), "cpu")
    first, later = (torch.cat(list(epoch_batches(source, split, epoch, 8, epoch, False))) for epoch in (0, 9))
    assert torch.equal(first, torch.arange(source.size(split))) and torch.equal(first, later)


def test_epoch_batches_drop_last_leaves_full_batches() -> None:
    source = open_source(simulated(), "cpu")
    assert [b.numel() for b in epoch_batches(source, "train", 0, 16, 0, False, drop_last=True)] == [16, 16, 16]
    assert list(epoch_batches(source, "test", 0, 16, 0, False, drop_last=True)) == []


def test_epoch_batches_refuse_a_batch_size_of_zero() -> None:
    with pytest.raises(ValueError, match="batch_size is 0"):
        next(epoch_batches(open_source(simulated(), "cpu"), "train", 0, 0, 0, False))


@pytest.mark.parametrize("kind", ["simulate", "npz", "shards"])
def test_source_scene_is_the_same_in_any_batch(tmp_path: Path, kind: str) -> None:
    source = open_source(files(tmp_path)[kind], "cpu")
    whole = all_scenes(source, "val")
    some = source.batch("val", torch.tensor([5, 0, 11, 5]))
    for name in ("snapshots", "channel", "factor", "azimuth", "power", "snr_db", "count"):
        assert torch.equal(getattr(some, name), getattr(whole, name)[[5, 0, 11, 5]]), name
    assert some.index.tolist() == [5, 0, 11, 5] and some.index.dtype == torch.int64
    assert source.channel and source.notes == [n for n in source.notes if kind == "npz"]
    assert "\n" not in source.describe()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["npz", "shards"])
def test_file_sources_live_in_device_memory(tmp_path: Path, kind: str) -> None:
    config = files(tmp_path)[kind]
    here, there = open_source(config, "cpu"), open_source(config, "cuda")
    assert "device memory" in there.describe() and there.index_device.type == "cuda"
    index = next(epoch_batches(there, "train", 0, 16, 0, False))
    a, b = here.batch("train", index.cpu()), there.batch("train", index)
    assert b.factor.is_cuda and torch.equal(a.snapshots, b.snapshots.cpu())
    assert torch.allclose(a.factor, b.factor.cpu(), atol=1e-5)


def test_simulated_source_splits_and_epochs_share_no_scene() -> None:
    source = open_source(simulated(), "cpu")
    parts = [source.batch(split, torch.arange(150)) for split in ("train", "val", "test")]
    hashes = [h for part in parts for h in scene_hashes(part.snapshots)]
    assert len(set(hashes)) == 450


def test_simulated_source_seed_makes_the_scenes() -> None:
    def first(seed: int) -> torch.Tensor:
        source = open_source(Config(task=SMALL, data=Data(seed=seed)), "cpu")
        return source.batch("train", torch.arange(4)).snapshots

    assert torch.equal(first(3), first(3)) and not torch.equal(first(3), first(4))


def test_open_source_refuses_a_lost_channel_unless_asked(tmp_path: Path) -> None:
    """Before training: a network that needs H must not start on H c_l and sit at the baseline."""
    write_folders(tmp_path, drop=("H_full",))
    data = Data(path=str(tmp_path))
    with pytest.raises(DataError, match="model.options.inputs=effective_channel"):
        open_source(Config(task=SMALL, data=data), "cpu")
    asked = Config(task=SMALL, data=data, model=Model(name="hybrid", options={"inputs": "effective_channel"}))
    assert open_source(asked, "cpu").channel is False


def test_open_source_refuses_files_without_a_path() -> None:
    with pytest.raises(DataError, match="--data DIR"):
        open_source(Config(data=Data(source="shards")), "cpu")


def test_open_source_simulate_ignores_a_path(tmp_path: Path) -> None:
    assert open_source(simulated(source="simulate", path=str(tmp_path)), "cpu").name == "simulate"
