"""The reader of the original's .npz shards against files written from the original's own formulas."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ris_fast.config.schema import Config, Data, Task
from ris_fast.data import table
from ris_fast.data.arrays import StoredArray, npz_arrays
from ris_fast.data.errors import DataError
from ris_fast.data.geometry import CENTRED, centre, original_offset, recover_powers
from ris_fast.data.npz import NpzSource
from ris_fast.data.open_source import open_source
from ris_fast.data.splits import split_rows
from ris_fast.physics.array import RISArray, cosine_steering, steering
from tests.data.make_npz import (
    SMALL,
    all_scenes,
    as_complex,
    as_pairs,
    original_arrays,
    original_steering,
    write_folders,
    write_npz,
)


def open_npz(path: Path, task: Task = SMALL, **data: Any) -> NpzSource:
    return NpzSource(Config(task=task, data=Data(path=str(path), **data)), "cpu")


def outer(factor: torch.Tensor) -> np.ndarray:
    f = as_complex(factor)
    return f @ f.conj().transpose(0, 2, 1)


def test_npz_source_scenes_are_the_rows_of_the_file(tmp_path: Path) -> None:
    source = open_npz(write_folders(tmp_path))
    arrays = original_arrays(40)
    rows = torch.tensor([39, 0, 13, 12, 0])
    scenes = source.batch("train", rows)
    assert torch.equal(scenes.index, rows) and source.channel and scenes.effective_channel is None
    for key, found in (
        ("y", scenes.snapshots),
        ("H_full", scenes.channel),
        ("K", scenes.count),
        ("snr", scenes.snr_db),
    ):
        assert found is not None and np.array_equal(found.numpy(), arrays[key][rows.numpy()]), key
    assert np.array_equal(scenes.codes.numpy(), arrays["codes"][0])


def test_npz_factor_reproduces_the_dense_target(tmp_path: Path) -> None:
    scenes = all_scenes(open_npz(write_folders(tmp_path)), "train")
    assert scenes.factor is not None and scenes.covariance is None
    target = as_complex(original_arrays(40)["R"])
    error = np.linalg.norm(outer(scenes.factor) - target, axis=(1, 2)) / np.linalg.norm(target, axis=(1, 2))
    assert error.max() < 1e-5
    assert bool(((scenes.power > 0).sum(1) <= scenes.count).all())


@pytest.mark.parametrize("size", [(12, 12), (5, 6), (6, 5)])
@pytest.mark.parametrize("wavefront", ["fresnel", "spherical"])
def test_centre_re_expresses_off_centre_sources_exactly(wavefront: str, size: tuple[int, int]) -> None:
    """Our centred steering vector at the shifted position is the original's, up to a common phase."""
    task = replace(Task(), wavefront=wavefront, ris_horizontal=size[0], ris_vertical=size[1])
    array, rng = RISArray.of(task), np.random.default_rng(1)
    position = [rng.uniform(-1.0, 1.0, (200, 3)), rng.uniform(-0.5, 0.5, (200, 3)), rng.uniform(0.5, 10, (200, 3))]
    theirs = original_steering(task, *position)
    active = torch.ones(200, 3, dtype=torch.bool)
    moved = centre(array, original_offset(array), *map(torch.from_numpy, position), active)
    ours = as_complex(cosine_steering(array, moved.u, moved.v, moved.range_m))
    overlap = np.abs((ours.conj() * theirs).sum(-1))
    assert np.abs(overlap - 1).max() < 1e-12
    by_angle = as_complex(steering(array, moved.azimuth, moved.elevation, moved.range_m))
    exists = ~moved.clamped.numpy()
    assert np.abs(np.abs((by_angle.conj() * theirs).sum(-1)) - 1)[exists].max() < 1e-12
    unshifted = as_complex(steering(array, *map(torch.from_numpy, position)))
    assert np.abs((unshifted.conj() * theirs).sum(-1)).min() < 0.95


def test_centre_marks_a_direction_that_does_not_exist(tmp_path: Path) -> None:
    array, one = RISArray.of(Task()), torch.ones(1, 1, dtype=torch.float64)
    moved = centre(array, original_offset(array), 1.047 * one, 0.5 * one, 0.5 * one, one > 0)
    assert bool(moved.clamped) and float(moved.u**2 + moved.v**2) > 1
    assert float(moved.azimuth) == pytest.approx(np.pi / 2)


def test_recover_powers_survives_coincident_sources() -> None:
    """Two sources in one place: their powers are not unique, the covariance still is."""
    array = RISArray.of(SMALL)
    place = [torch.tensor([[0.3, 0.3, -0.2]]).double(), torch.zeros(1, 3).double(), torch.full((1, 3), 2.0).double()]
    active = torch.tensor([[True, True, True]])
    sources = centre(array, CENTRED, *place, active)
    a = as_complex(cosine_steering(array, sources.u, sources.v, sources.range_m))[0].T
    dense = (a * [3.0, 4.0, 5.0]) @ a.conj().T
    target = torch.from_numpy(np.stack((dense.real, dense.imag), -1).astype(np.float32))[None]
    power, misfit = recover_powers(array, sources, active, target)
    assert float(misfit) < 1e-10 and float(power.min()) >= 0 and float(power.sum()) == pytest.approx(12, rel=1e-5)


def test_recover_powers_is_the_non_negative_optimum() -> None:
    """Karush-Kuhn-Tucker: p >= 0, the slope is >= 0 everywhere and 0 where p > 0, also where R does not fit."""
    array, rng = RISArray.of(SMALL), np.random.default_rng(2)
    azimuth = torch.from_numpy(0.3 + 0.05 * rng.normal(size=(64, 3)))
    active = torch.ones(64, 3, dtype=torch.bool)
    sources = centre(array, CENTRED, azimuth, 0 * azimuth, 2 + 0 * azimuth, active)
    noise = rng.normal(size=(64, 24, 24)) + 1j * rng.normal(size=(64, 24, 24))
    target = noise + noise.conj().transpose(0, 2, 1)
    a = as_complex(cosine_steering(array, sources.u, sources.v, sources.range_m)).transpose(0, 2, 1)
    power = recover_powers(array, sources, active, torch.from_numpy(as_pairs(target)))[0].numpy()
    fitted = (a * power[:, None]) @ a.conj().transpose(0, 2, 1)
    slope = np.einsum("bnk,bnm,bmk->bk", a.conj(), fitted - target, a).real
    assert (power >= 0).all() and ((power == 0).any(1) & (power > 0).any(1)).sum() > 20
    assert slope.min() > -1e-4 and np.abs(slope * (power > 0)).max() < 1e-4


def test_npz_source_recognises_a_centred_array(tmp_path: Path) -> None:
    source = open_npz(write_folders(tmp_path, centred=True))
    assert source._load("train").facts.offset == CENTRED
    assert not any("off-centre" in note for note in source.notes)
    scenes = all_scenes(source, "val")
    assert torch.allclose(scenes.azimuth, torch.from_numpy(original_arrays(12, split="val")["ptr"][:, :3]), atol=1e-6)


def test_npz_source_notes_an_off_centre_array(tmp_path: Path) -> None:
    assert any("off-centre by half an element" in note for note in open_npz(write_folders(tmp_path)).notes)


@pytest.mark.parametrize("wavefront", ["fresnel", "spherical"])
@pytest.mark.parametrize("shift", [(1.0, 0.0), (-0.75, 0.31), (3.5, -2.5)])
def test_npz_source_finds_the_array_offset(tmp_path: Path, shift: tuple[float, float], wavefront: str) -> None:
    task = replace(SMALL, wavefront=wavefront)
    source = open_npz(write_folders(tmp_path, centred=True, shift=shift, task=task), task)
    facts = source._load("train").facts
    assert facts.exact and facts.offset == pytest.approx(shift, abs=1e-4)
    assert any(f"off-centre by {shift[0]:g} elements in x and {shift[1]:g} in y" in note for note in source.notes)
    target = original_arrays(40, centred=True, shift=shift, task=task)["R"]
    assert np.allclose(outer(all_scenes(source, "train").factor), as_complex(target), atol=1e-3)


def test_npz_source_finds_the_array_offset_through_jitter(tmp_path: Path) -> None:
    facts = (
        open_npz(write_folders(tmp_path, centred=True, shift=(1.5, -2.0), jitter=0.003, train=240))._load("train").facts
    )
    assert not facts.exact and facts.offset == pytest.approx((1.5, -2.0), abs=0.1)


def test_npz_source_claims_no_offset_that_explains_nothing(tmp_path: Path) -> None:
    arrays = original_arrays(40)
    arrays["R"] = np.roll(arrays["R"], 1, 0)
    source = open_npz(write_npz(tmp_path / "a.npz", arrays))
    assert not source._load("train").facts.exact
    assert source._load("train").facts.offset in (CENTRED, original_offset(source.array))


def test_npz_source_reach_as_stored_and_as_served(tmp_path: Path) -> None:
    source = open_npz(write_folders(tmp_path, task=Task()), Task())
    stored, served = source.reach
    arrays, scenes = original_arrays(40, task=Task()), all_scenes(source, "train")
    active = np.arange(5) < arrays["K"][:, None]
    for name, columns in (("azimuth", slice(0, 5)), ("elevation", slice(5, 10)), ("range_m", slice(10, 15))):
        assert getattr(stored, name) == pytest.approx(np.abs(arrays["ptr"][:, columns] * active).max(), rel=1e-6)
        assert getattr(served, name) == pytest.approx(float(getattr(scenes, name).abs().max()), rel=1e-6)
    assert stored.azimuth < 1.0472 < served.azimuth


def test_npz_source_scales_targets_to_trace_n(tmp_path: Path) -> None:
    """The original adds 1e-9 to a trace that can be smaller than that, so its R does not always have trace N."""
    for jitter in (0.0, 0.02):
        arrays = original_arrays(20, jitter=jitter)
        arrays["R"] *= np.linspace(0.01, 2, 20, dtype=np.float32)[:, None, None, None]
        scenes = all_scenes(open_npz(write_npz(tmp_path / f"{jitter}.npz", arrays)), "train")
        trace = scenes.power.sum(1) if jitter == 0.0 else scenes.covariance[..., 0].diagonal(dim1=1, dim2=2).sum(1)
        assert torch.allclose(trace, torch.full_like(trace, SMALL.elements), rtol=1e-5)


def test_npz_source_keeps_dense_targets_of_jittered_elements(tmp_path: Path) -> None:
    source = open_npz(write_folders(tmp_path, jitter=0.02))
    scenes = all_scenes(source, "val")
    assert scenes.factor is None and scenes.power is None
    assert np.allclose(scenes.covariance, original_arrays(12, split="val", jitter=0.02)["R"], rtol=1e-5, atol=1e-5)
    assert "dense R" in source.describe() and any("jitter" in note for note in source.notes)


def test_npz_source_notes_a_missing_channel(tmp_path: Path) -> None:
    source = open_npz(write_folders(tmp_path, drop=("H_full",)))
    scenes = all_scenes(source, "train")
    assert source.channel is False and scenes.channel is None
    assert np.array_equal(scenes.effective_channel.numpy(), original_arrays(40)["H"])
    assert "cannot carry the answer" in source.describe() and any("no H_full" in note for note in source.notes)


def test_npz_source_does_not_need_the_effective_channel(tmp_path: Path) -> None:
    assert open_npz(write_folders(tmp_path, drop=("H",))).channel


def test_npz_source_notes_a_wrong_effective_channel(tmp_path: Path) -> None:
    write_folders(tmp_path)
    arrays = original_arrays(40)
    arrays["H"] = np.roll(arrays["H"], 1, 0)
    write_npz(tmp_path / "train" / "shard_000.npz", arrays)
    (tmp_path / "train" / "shard_001.npz").unlink()
    assert any(note.startswith("in 40 scenes H is not H_full c_l") for note in open_npz(tmp_path).notes)


def test_npz_source_counts_copies_between_splits(tmp_path: Path) -> None:
    """The original's own leak: val[i] == train[i + shift]."""
    write_folders(tmp_path)
    leak = {key: value[5:17] for key, value in original_arrays(40).items()}
    write_npz(tmp_path / "val" / "shard_000.npz", leak)
    source = open_npz(tmp_path)
    assert [(o.first, o.second, o.count, o.total, o.shift) for o in source.overlaps] == [("train", "val", 12, 12, 5)]
    assert "12 of 12 val scenes are copies of train scenes (val[i] == train[i+5])" in source.notes[0]


def test_npz_source_counts_copies_within_splits_and_in_test(tmp_path: Path) -> None:
    write_folders(tmp_path)
    write_npz(tmp_path / "train" / "shard_002.npz", {k: v[:3] for k, v in original_arrays(40).items()})
    again = {k: v[::-1][:4] for k, v in original_arrays(12, split="val").items()}
    write_npz(tmp_path / "test" / "shard_000.npz", again)
    notes = "\n".join(open_npz(tmp_path).notes)
    assert "3 of 43 train scenes repeat" in notes and "4 of 4 test scenes are copies of val scenes" in notes


def test_npz_source_finds_no_copies_in_healthy_splits(tmp_path: Path) -> None:
    assert open_npz(write_folders(tmp_path)).overlaps == []


@pytest.mark.parametrize("single", [True, False])
def test_npz_source_splits_one_pool_by_number(tmp_path: Path, single: bool) -> None:
    arrays = original_arrays(60)
    path = write_npz(tmp_path / "a.npz", arrays if single else {k: v[:20] for k, v in arrays.items()})
    if not single:
        write_npz(tmp_path / "b.npz", {k: v[20:] for k, v in arrays.items()})
    source = open_npz(path if single else tmp_path)
    seen = torch.cat([all_scenes(source, split).snapshots for split in ("train", "val", "test")])
    assert sorted(seen.sum((1, 2, 3)).tolist()) == sorted(torch.from_numpy(arrays["y"]).sum((1, 2, 3)).tolist())
    assert (source.size("train"), source.size("val"), source.size("test")) == (47, 11, 2)
    assert any("split by number" in note for note in source.notes) and source.overlaps == []


@pytest.mark.parametrize("total", [3, 4, 7, 208, 1000])
def test_split_rows_are_disjoint_and_repeatable(total: int) -> None:
    wanted = {"train": 160, "val": 40, "test": 8}
    rows = split_rows(Path("x"), total, wanted)
    everything = torch.cat(list(rows.values())).sort().values
    assert torch.equal(everything, torch.arange(min(total, 208))) and min(r.numel() for r in rows.values()) >= 1
    assert all(torch.equal(rows[s], again) for s, again in split_rows(Path("x"), total, wanted).items())


def test_npz_source_limits_splits_to_configured_sizes(tmp_path: Path) -> None:
    source = open_npz(write_folders(tmp_path), train_scenes=20, val_scenes=5)
    assert (source.size("train"), source.size("val"), source.size("test")) == (20, 5, 8)
    assert "20 of 40 train scenes in use (data.train_scenes)" in source.notes
    assert all_scenes(source, "train").batch == 20


def test_npz_source_reads_the_same_from_compressed_files(tmp_path: Path) -> None:
    arrays = original_arrays(30)
    plain = open_npz(write_npz(tmp_path / "plain.npz", arrays))
    packed = open_npz(write_npz(tmp_path / "packed.npz", arrays, compressed=True))
    assert npz_arrays(tmp_path / "packed.npz")["y"].offset is None
    a, b = all_scenes(plain, "train"), all_scenes(packed, "train")
    assert all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("snapshots", "factor", "channel"))


@pytest.mark.parametrize("jitter", [0.0, 0.02])
def test_npz_source_maps_shards_larger_than_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jitter: float
) -> None:
    resident = open_npz(write_folders(tmp_path, jitter=jitter))
    monkeypatch.setattr(table, "free_memory", lambda: 1000)
    mapped = open_npz(tmp_path)
    assert "streamed from files" in mapped.describe() and "host memory" in resident.describe()
    rows = torch.tensor([39, 12, 13, 0, 39])
    a, b = resident.batch("train", rows), mapped.batch("train", rows)
    for name in ("snapshots", "channel", "factor", "covariance", "power", "azimuth", "snr_db", "count"):
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None and y is None) or torch.equal(x, y), name


def test_npz_source_refuses_compressed_beyond_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_npz(tmp_path / "packed.npz", original_arrays(30), compressed=True)
    monkeypatch.setattr(table, "free_memory", lambda: 1000)
    with pytest.raises(DataError, match="numpy.savez .uncompressed"):
        open_npz(tmp_path)


@pytest.mark.parametrize("place", ["host", "mapped"])
def test_npz_source_streams_every_array_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """The original decoded the whole array for each key and each sample."""
    calls: list[tuple[str, str]] = []
    read = StoredArray.chunks

    def counted(self: StoredArray, rows: int, limit: int) -> Any:
        calls.append((str(self.file), self.key))
        return read(self, rows, limit)

    monkeypatch.setattr(StoredArray, "chunks", counted)
    if place == "mapped":
        monkeypatch.setattr(table, "free_memory", lambda: 1000)
    source = open_npz(write_folders(tmp_path, test=0))
    for _ in range(3):
        source.batch("train", torch.arange(40))
    assert len(calls) == len(set(calls)) == 3 * 8


def test_open_source_progress_counts_npz_scenes(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    config = Config(task=SMALL, data=Data(path=str(write_folders(tmp_path))))
    open_source(config, "cpu", progress=lambda done, total: seen.append((done, total)))
    assert seen == [(13, 40), (40, 40), (12, 12)]


def test_npz_arrays_map_equals_numpy(tmp_path: Path) -> None:
    arrays = original_arrays(5)
    path = write_npz(tmp_path / "a.npz", arrays)
    for key, stored in npz_arrays(path).items():
        assert np.array_equal(stored.map(), arrays[key]), key


def test_npz_source_notes_clipped_snr_labels(tmp_path: Path) -> None:
    arrays = original_arrays(60)
    arrays["snr"] = arrays["snr"].clip(0.0, 15.0)
    notes = open_npz(write_npz(tmp_path / "a.npz", arrays)).notes
    assert any("at 0 dB" in note and "at 15 dB" in note for note in notes)


def test_npz_source_names_a_missing_split(tmp_path: Path) -> None:
    source = open_npz(write_folders(tmp_path, test=0))
    assert source.size("test") == 0
    with pytest.raises(DataError, match="no test scenes"):
        source.batch("test", torch.arange(1))


@pytest.mark.parametrize("flat", [False, True])
def test_npz_source_notes_a_split_smaller_than_asked(tmp_path: Path, flat: bool) -> None:
    path = write_npz(tmp_path / "a.npz", original_arrays(50)) if flat else write_folders(tmp_path)
    config = Config(
        task=SMALL,
        data=Data(path=str(path), train_scenes=160, val_scenes=40, test_scenes=8),
        provenance={"data.train_scenes": "flag"},
    )
    told = [note for note in open_source(config, "cpu").notes if "data.train_scenes is 160 (flag)" in note]
    assert len(told) == 1 and "there are 40 train scenes" in told[0]


def test_npz_with_elements_from_a_file_are_seen_from_where_it_puts_the_origin(tmp_path: Path) -> None:
    """The original's off-centre grid as positions: the files' own angles, and R exactly the sum of their sources."""
    x, y = (SMALL.spacing_m * (np.arange(n) - n // 2) for n in (SMALL.ris_horizontal, SMALL.ris_vertical))
    np.save(tmp_path / "grid.npy", np.stack((np.tile(x, len(y)), np.repeat(y, len(x))), 1))
    folder = write_folders(tmp_path / "npz")
    scenes = all_scenes(open_npz(folder, SMALL.changed(elements_file=str(tmp_path / "grid.npy"))), "val")
    with np.load(folder / "val" / "shard_000.npz") as stored:
        assert np.array_equal(scenes.azimuth, stored["ptr"][:, : SMALL.max_sources])
        dense = as_complex(stored["R"])
    assert np.abs(outer(scenes.factor) - dense).max() < 1e-5 * np.abs(dense).max()
