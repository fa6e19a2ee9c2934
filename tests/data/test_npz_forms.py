"""The same scenes come out of a shard in whatever types, byte orders, axis orders and company its keys are stored."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ris_fast.config.schema import Config, Data
from ris_fast.data import table
from ris_fast.data.errors import DataError
from ris_fast.data.npz import NpzSource
from ris_fast.data.open_source import open_source
from ris_fast.physics.scenes import Scenes
from tests.data.make_npz import SMALL, all_scenes, as_complex, original_arrays, write_folders, write_npz

PAIRS = ("y", "H", "H_full", "codes", "R")
Change = Callable[[str, np.ndarray], np.ndarray]


def pairs(how: Callable[[np.ndarray], Any]) -> Change:
    return lambda key, value: how(value) if key in PAIRS else value


def only(name: str, how: Callable[[np.ndarray], Any]) -> Change:
    return lambda key, value: how(value) if key == name else value


def every(how: Callable[[np.ndarray], Any]) -> Change:
    return lambda key, value: how(value)


FORMS: dict[str, Change] = {
    **{
        f"K as {kind}": only("K", lambda a, kind=kind: a.astype(kind))
        for kind in (">i4", ">i8", "uint8", "uint16", "uint32", "uint64", "int8", "int64", ">u2")
    },
    **{f"{name} as a column": only(name, lambda a: a[:, None]) for name in ("K", "snr")},
    "big-endian floats": every(lambda a: a.astype(a.dtype.newbyteorder(">"))),
    "float64": every(lambda a: a.astype("f8") if a.dtype.kind == "f" else a),
    "long double": every(lambda a: a.astype("g") if a.dtype.kind == "f" else a),
    "complex64": pairs(lambda a: as_complex(a).astype("c8")),
    "big-endian complex128": pairs(lambda a: as_complex(a).astype(">c16")),
    "Fortran order": every(np.asfortranarray),
    "Fortran order of complex64": pairs(lambda a: np.asfortranarray(as_complex(a).astype("c8"))),
    "an axis of length one": pairs(lambda a: a[:, None]),
}


def read(path: Path) -> Scenes:
    return all_scenes(NpzSource(Config(task=SMALL, data=Data(path=str(path))), "cpu"), "train")


@pytest.mark.parametrize("place", ["compressed", "host", "mapped"])
@pytest.mark.parametrize("form", [*FORMS])
def test_npz_source_reads_any_storage_form(
    tmp_path: Path, form: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = original_arrays(8)
    changed = {key: FORMS[form](key, value) for key, value in plain.items()}
    wanted = read(write_npz(tmp_path / "plain.npz", plain))
    if place == "mapped":
        monkeypatch.setattr(table, "free_memory", lambda: 1000)
    found = read(write_npz(tmp_path / "other.npz", changed, compressed=place == "compressed"))
    for name in ("snapshots", "channel", "codes", "factor", "count", "snr_db", "azimuth", "range_m"):
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name


def test_npz_source_reads_integer_snr(tmp_path: Path) -> None:
    arrays = original_arrays(8)
    arrays["snr"] = arrays["snr"].astype(np.int16)
    assert read(write_npz(tmp_path / "a.npz", arrays)).snr_db.dtype == torch.float32


def test_npz_source_ignores_keys_of_other_tools(tmp_path: Path) -> None:
    arrays = original_arrays(8)
    wanted = read(write_npz(tmp_path / "plain.npz", arrays))
    others = {
        "note": np.array([{"a": 1}, None], object),
        "R_samp": np.asfortranarray(np.zeros((3, 4), ">f8")),
        "names": np.array(["a", "b"]),
        "rows": np.zeros((), "i4"),
        "table": np.zeros(2, [("a", "f4"), ("b", "i4")]),
    }
    path = write_npz(tmp_path / "other.npz", arrays | others)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("broken.npy", b"no header at all")
        archive.writestr("readme.txt", "hello")
    assert torch.equal(read(path).factor, wanted.factor)


@pytest.mark.parametrize("lost", [("R",), ("K", "snr", "H", "H_full")])
def test_npz_source_names_all_missing_keys(tmp_path: Path, lost: tuple[str, ...]) -> None:
    arrays = {key: value for key, value in original_arrays(8).items() if key not in lost}
    with pytest.raises(DataError) as caught:
        read(write_npz(tmp_path / "a.npz", arrays))
    assert caught.value.key == ("R" if lost == ("R",) else "K, snr, H or H_full")


def test_open_source_names_all_settings_that_fit(tmp_path: Path) -> None:
    write_npz(tmp_path / "a.npz", original_arrays(8, task=SMALL))
    square = Config(data=Data(path=str(tmp_path)))
    with pytest.raises(
        DataError,
        match=(
            "--set task.snapshots=8 --set task.bs_antennas=4 --set task.max_sources=3, and task.ris_horizontal and "
            "task.ris_vertical with the product 24"
        ),
    ):
        open_source(square, "cpu")


def test_npz_counts_memory_of_compressed_fortran_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = {key: np.asfortranarray(value) for key, value in original_arrays(20).items()}
    path = write_npz(tmp_path / "a.npz", arrays, compressed=True)
    monkeypatch.setattr(table, "free_memory", lambda: arrays["R"].nbytes)
    with pytest.raises(DataError, match="compressed arrays that need"):
        read(path)


# ---- codes that differ by scene -------------------------------------------------------------------------------------


def randomised(scenes: int, split: str = "train") -> dict[str, np.ndarray]:
    """The original's domain randomisation: phases, amplitudes and elements that drop out, scene by scene."""
    arrays, rng = original_arrays(scenes, split=split), np.random.default_rng(scenes)
    codes = as_complex(arrays["codes"])
    codes = (
        codes
        * np.exp(1j * rng.normal(0, 0.04, codes.shape))
        * rng.uniform(0.95, 1.05, codes.shape)
        * (rng.random(codes.shape) > 0.03)
    )
    collapsed = np.einsum("bmn,bln->blm", as_complex(arrays["H_full"]), codes)
    for key, value in (("codes", codes), ("H", collapsed)):
        arrays[key] = np.stack((value.real, value.imag), -1).astype(np.float32)
    return arrays


@pytest.mark.parametrize("place", ["host", "mapped"])
def test_npz_source_reads_codes_per_scene(tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = randomised(30)
    write_npz(tmp_path / "train" / "a.npz", arrays)
    write_npz(tmp_path / "val" / "a.npz", original_arrays(6, split="val"))
    if place == "mapped":
        monkeypatch.setattr(table, "free_memory", lambda: 1000)
    source = NpzSource(Config(task=SMALL, data=Data(path=str(tmp_path))), "cpu")
    rows = torch.tensor([29, 0, 7])
    error = source.batch("train", rows).codes.numpy() - arrays["codes"][rows]
    assert np.abs(error).max() < (2e-5 if place == "host" else 1e-9)
    assert source.batch("val", rows[1:2]).codes.shape == (1, 8, 24, 2)
    assert any("each scene has codes of its own" in note for note in source.notes)
    assert not any("is not H_full c_l" in note for note in source.notes)


def test_npz_source_counts_memory_of_codes_per_scene(tmp_path: Path) -> None:
    write_npz(tmp_path / "a.npz", randomised(10))
    same = write_npz(tmp_path / "same" / "a.npz", original_arrays(10))
    source = NpzSource(Config(task=SMALL, data=Data(path=str(tmp_path / "a.npz"))), "cpu")
    shared = NpzSource(Config(task=SMALL, data=Data(path=str(same))), "cpu")
    bytes_of = [each._load("train").memory.bytes for each in (source, shared)]
    held = sum(source._load("train").table.columns[name].nbytes for name in ("codes", "codes_unit"))
    assert bytes_of[0] - bytes_of[1] == held == 10 * (8 * 24 * 4 + 4)


def test_npz_source_compares_codes_in_their_own_unit(tmp_path: Path) -> None:
    arrays = randomised(10)
    for key in ("codes", "H", "y"):
        arrays[key] *= np.float32(1e-6)
    scenes = read(write_npz(tmp_path / "a.npz", arrays))
    assert scenes.codes.dim() == 4 and float(scenes.codes.abs().max()) == pytest.approx(
        float(np.abs(arrays["codes"]).max()), rel=0.1
    )


# ---- what lies beside the shards
# --------------------------------------------------------------------------------------


def test_open_source_skips_hidden_files(tmp_path: Path) -> None:
    write_folders(tmp_path)
    for split in ("train", "val"):
        (tmp_path / split / "._shard_000.npz").write_bytes(b"\x00\x05\x16\x07Mac OS X")
    assert open_source(Config(task=SMALL, data=Data(path=str(tmp_path))), "cpu").size("train") == 40


@pytest.mark.parametrize("what", ["link", "folder", "pipe"])
def test_open_source_names_a_shard_that_is_no_file(tmp_path: Path, what: str) -> None:
    place = write_folders(tmp_path) / "train" / "shard_009.npz"
    if what == "link":
        place.symlink_to("/nowhere/shard.npz")
    elif what == "folder":
        place.mkdir()
    else:
        os.mkfifo(place)
    found = {
        "link": "a link to /nowhere/shard.npz, which is not there",
        "folder": "a folder",
        "pipe": "something that is no file",
    }[what]
    with pytest.raises(DataError) as caught:
        open_source(Config(task=SMALL, data=Data(path=str(tmp_path))), "cpu")
    assert caught.value.where == str(place) and caught.value.found == found


def test_open_source_takes_undecodable_folder_names(tmp_path: Path) -> None:
    place = Path(f"{tmp_path}/caf\udce9")
    write_folders(place)
    assert open_source(Config(task=SMALL, data=Data(path=str(place))), "cpu").size("val") == 12
