"""Every kind of damaged .npz is refused with the file, the key, what was found, what was expected, and what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ris_fast.config.schema import Config, Data
from ris_fast.data.arrays import npz_arrays
from ris_fast.data.errors import DataError
from ris_fast.data.open_source import open_source
from tests.data.make_npz import SMALL, original_arrays, write_folders, write_npz

Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folders(tmp_path_factory.mktemp("healthy"))


def refusal(path: Path, source: str = "npz") -> DataError:
    with pytest.raises(DataError) as caught:
        open_source(Config(task=SMALL, data=Data(source=source, path=str(path))), "cpu")
    error = caught.value
    assert error.exit_code == 3 and error.found and error.expected and error.todo.endswith(".")
    assert error.where in str(error) and error.found in str(error) and error.expected in str(error)
    return error


def put(key: str, value: Any, *where: Any) -> Callable[[Arrays], None]:
    def damage(arrays: Arrays) -> None:
        arrays[key][where] = value

    return damage


def change(key: str, how: Callable[[np.ndarray], np.ndarray]) -> Callable[[Arrays], None]:
    def damage(arrays: Arrays) -> None:
        arrays[key] = how(arrays[key])

    return damage


VALUES = {
    "nan in y": (put("y", np.nan, 7, 2, 1, 0), "y", "1 NaN or infinite values, the first in scene 7"),
    "nan in H": (put("H", np.nan, 3), "H", "the first in scene 3"),
    "nan in H_full": (put("H_full", np.nan, 9, 1, 5), "H_full", "2 NaN or infinite values, the first in scene 9"),
    "inf in R": (put("R", np.inf, 11, 0, 0, 0), "R", "the first in scene 11"),
    "minus inf in codes": (put("codes", -np.inf, 0), "codes", "the first in scene 0"),
    "nan in ptr": (put("ptr", np.nan, 4, 0), "ptr", "the first in scene 4"),
    "nan in snr": (put("snr", np.nan, 5), "snr", "the first in scene 5"),
    "K of zero": (put("K", 0, 6), "K", "0 in scene 6"),
    "K too large": (put("K", 4, 6), "K", "4 in scene 6"),
    "silent scene": (put("y", 0.0, 8), "y", "0 in scene 8"),
    "degrees": (change("ptr", lambda a: np.concatenate((np.rad2deg(a[:, :6]), a[:, 6:]), 1)), "ptr", "such scenes"),
    "zero range": (put("ptr", 0.0, 2, slice(6, 9)), "ptr", "0 in scene 2"),
    "no trace": (put("R", 0.0, 10), "R", "0 in scene 10"),
    "not Hermitian": (put("R", 7.0, 0, 0, 1), "R", "in scene 0"),
}
HEADERS = {
    "integer y": (change("y", lambda a: a.astype(np.int32)), "y", "type int32"),
    "objects": (change("H_full", lambda a: np.array([None] * len(a))), "H_full", "type object"),
    "text": (change("snr", lambda a: a.astype(str)), "snr", "type <U"),
    "float K": (change("K", lambda a: a.astype(np.float32)), "K", "type float32"),
    "other antennas": (change("y", lambda a: a[:, :, :3]), "y", "shape (14, 8, 3, 2)"),
    "no last axis": (change("H", lambda a: a[..., 0]), "H", "shape (14, 8, 4)"),
    "flat R": (change("R", lambda a: a.reshape(len(a), -1)), "R", "shape (14, 1152)"),
    "other K_max": (change("ptr", lambda a: a[:, :6]), "ptr", "shape (14, 6)"),
    "scalar": (change("snr", lambda a: a[0]), "snr", "shape ()"),
    "fewer rows": (change("R", lambda a: a[:9]), "R", "9 rows"),
    "missing key": (lambda arrays: arrays.pop("R") is None, "R", "only the keys"),
    "no channel at all": (lambda arrays: arrays.pop("H") is arrays.pop("H_full"), "H or H_full", "only the keys"),
    "no rows": (lambda arrays: arrays.update({k: v[:0] for k, v in arrays.items()}), "y", "no scene (0 rows)"),
}


@pytest.mark.parametrize("name", [*VALUES, *HEADERS])
@pytest.mark.parametrize("compressed", [False, True])
def test_damage_is_named(tmp_path: Path, name: str, compressed: bool) -> None:
    damage, key, found = (VALUES | HEADERS)[name]
    arrays = {k: v.copy() for k, v in original_arrays(14).items()}
    damage(arrays)
    error = refusal(write_npz(tmp_path / "bad.npz", arrays, compressed=compressed))
    assert error.where.endswith("bad.npz") and error.key == key and found in error.found, str(error)


def test_npz_damage_in_a_later_chunk_has_its_own_row(tmp_path: Path) -> None:
    arrays = original_arrays(300)
    arrays["y"][290] = np.nan
    assert "the first in scene 290" in refusal(write_npz(tmp_path / "bad.npz", arrays)).found


@pytest.mark.parametrize("split", ["train", "val"])
def test_npz_damage_in_a_folder_names_the_shard(tmp_path: Path, split: str) -> None:
    write_folders(tmp_path)
    arrays = original_arrays(9)
    arrays["H_full"][1] = np.nan
    write_npz(tmp_path / split / "shard_000.npz", arrays)
    assert refusal(tmp_path).where == str(tmp_path / split / "shard_000.npz")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.999])
def test_truncated_npz_is_named(tmp_path: Path, healthy: Path, share: float) -> None:
    whole = (healthy / "val" / "shard_000.npz").read_bytes()
    path = tmp_path / "cut.npz"
    path.write_bytes(whole[: int(share * len(whole))])
    error = refusal(path)
    assert error.where == str(path) and "copy or generate it again" in error.todo


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("key", ["y", "R"])
def test_npz_flipped_bytes_fail_the_checksum(tmp_path: Path, key: str, compressed: bool) -> None:
    path = write_npz(tmp_path / "flipped.npz", original_arrays(14), compressed=compressed)
    raw = bytearray(path.read_bytes())
    at = raw.index(f"{key}.npy".encode()) + 1500
    raw[at : at + 4] = bytes(b ^ 0xA5 for b in raw[at : at + 4])
    path.write_bytes(raw)
    error = refusal(path)
    assert error.key == key and error.where == str(path)


def test_npz_member_with_a_ruined_header_is_named(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "header.npz", original_arrays(14))
    raw = bytearray(path.read_bytes())
    at = raw.index(b"\x93NUMPY", raw.index(b"ptr.npy"))
    raw[at : at + 6] = b"garble"
    path.write_bytes(raw)
    assert refusal(path).key == "ptr"


def test_npz_header_that_announces_too_much_is_named(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "header.npz", original_arrays(14))
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b"'shape': (14, 24, 24, 2)", b"'shape': (19, 24, 24, 2)"))
    error = refusal(path)
    assert error.key == "R" and "bytes" in error.found


def test_open_source_refuses_text_named_npz(tmp_path: Path) -> None:
    path = tmp_path / "notes.npz"
    path.write_text("not a zip")
    assert "no readable .npz" in refusal(path).found


def test_open_source_refuses_npy_named_npz(tmp_path: Path) -> None:
    path = tmp_path / "array.npz"
    with open(path, "wb") as file:
        np.save(file, np.zeros(3, np.float32))
    assert "no readable .npz" in refusal(path).found


def test_open_source_names_empty_and_missing_folders(tmp_path: Path) -> None:
    assert refusal(tmp_path).found == "an empty folder"
    (tmp_path / "notes.txt").touch()
    assert "no .npz file" in refusal(tmp_path).found
    assert "no such file or folder" in refusal(tmp_path / "nowhere").found
    (tmp_path / "train").mkdir()
    assert refusal(tmp_path).where.endswith("train")
    write_npz(tmp_path / "train" / "a.npz", original_arrays(5))
    error = refusal(tmp_path)
    assert error.where.endswith("val") and error.found == "no such folder"


def test_npz_of_two_scenes_cannot_be_split(tmp_path: Path) -> None:
    assert refusal(write_npz(tmp_path / "few.npz", original_arrays(2))).found == "2 scenes to split"


def test_npz_shards_must_agree_on_the_channel(tmp_path: Path) -> None:
    write_npz(tmp_path / "a.npz", original_arrays(5))
    write_npz(tmp_path / "b.npz", {k: v for k, v in original_arrays(5, seed=1).items() if k != "H_full"})
    error = refusal(tmp_path)
    assert error.key == "H_full" and error.where.endswith("b.npz")


def test_open_source_reads_a_healthy_npz(healthy: Path) -> None:
    source = open_source(Config(task=SMALL, data=Data(path=str(healthy))), "cpu")
    assert source.name == "npz" and set(npz_arrays(healthy / "val" / "shard_000.npz")) == set(original_arrays(3))
