"""Measurements are read from every form of file, a few scenes at a time, and what does not fit is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from ris_fast.config.load import load_config
from ris_fast.config.schema import Task
from ris_fast.data.errors import DataError
from ris_fast.data.measurements import Measured, open_measurements, read_chunks
from ris_fast.data.write import write_shards
from ris_fast.physics.random import SceneGenerator
from ris_fast.physics.scenes import Scenes, simulate
from tests.data.make_npz import SMALL, as_complex, original_arrays, write_npz

SCENES = 7


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return simulate(SMALL, SCENES, SceneGenerator(0, "test"))


def arrays(scenes: Scenes) -> dict[str, np.ndarray]:
    return {name: getattr(scenes, name).numpy().copy() for name in ("snapshots", "channel", "codes", "snr_db")}


def read(path: Path, rows: int = 3, limit: int | None = None, split: str | None = None) -> Measured:
    files = open_measurements(path, SMALL, split=split)
    parts = list(read_chunks(files, rows, sum(file.scenes for file in files) if limit is None else limit))
    shared = parts[0].codes.dim() == 3
    join = [None if each[0] is None else torch.cat(each) for each in zip(*(part[:3] for part in parts))]
    codes = parts[0].codes if shared else torch.cat([part.codes for part in parts])
    return Measured(*join, codes, torch.cat([part.snr_db for part in parts]))


def same(measured: Measured, scenes: Scenes) -> None:
    for name in ("snapshots", "channel", "snr_db"):
        torch.testing.assert_close(getattr(measured, name), getattr(scenes, name), rtol=1e-6, atol=0)
    torch.testing.assert_close(measured.codes.expand(scenes.batch, -1, -1, -1), scenes.with_own_codes().codes)


FORMS: dict[str, Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]] = {
    "pairs": lambda given: given,
    "complex": lambda given: {name: v if name == "snr_db" else as_complex(v) for name, v in given.items()},
    "single": lambda given: {
        name: v if name == "snr_db" else as_complex(v).astype(np.complex64) for name, v in given.items()
    },
    "big endian": lambda given: {name: v.astype(">f8") for name, v in given.items()},
    "fortran": lambda given: {name: np.asfortranarray(v) for name, v in given.items()},
    "own codes": lambda given: given | {"codes": np.repeat(given["codes"][None], SCENES, 0)},
    "original names": lambda given: {
        {"snapshots": "y", "channel": "H_full", "snr_db": "snr"}.get(name, name): v for name, v in given.items()
    },
    "other keys": lambda given: given | {"names": np.array(["a", "b"]), "note": np.array(None, dtype=object)},
}


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_measurements_of_npz_are_those_written(form: str, compressed: bool, scenes: Scenes, tmp_path: Path) -> None:
    file = write_npz(tmp_path / "a.npz", FORMS[form](arrays(scenes)), compressed=compressed)
    same(read(file), scenes)


@pytest.mark.parametrize("form", ["pairs", "single", "own codes"])
def test_measurements_of_safetensors_are_those_written(form: str, scenes: Scenes, tmp_path: Path) -> None:
    save_file(FORMS[form](arrays(scenes)), tmp_path / "a.safetensors")
    same(read(tmp_path / "a.safetensors"), scenes)


def test_measurements_limit_takes_the_first_scenes(scenes: Scenes, tmp_path: Path) -> None:
    file = write_npz(tmp_path / "a.npz", arrays(scenes))
    same(read(file, rows=2, limit=5), scenes[:5])


def test_measurements_without_snr_are_nan(scenes: Scenes, tmp_path: Path) -> None:
    given = arrays(scenes)
    given.pop("snr_db")
    assert read(write_npz(tmp_path / "a.npz", given)).snr_db.isnan().all()
    given["snr_db"] = np.where(np.arange(SCENES) == 2, np.nan, 3.0)
    assert read(write_npz(tmp_path / "a.npz", given)).snr_db.isnan().nonzero().tolist() == [[2]]


def test_measurements_of_own_data_set_by_split(tmp_path: Path) -> None:
    names = ("bs_antennas", "ris_horizontal", "ris_vertical", "snapshots", "max_sources")
    settings = [f"task.{name}={getattr(SMALL, name)}" for name in names]
    sizes = {"train": 5, "val": 3, "test": 4}
    write_shards(load_config(preset="laptop", overrides=settings), tmp_path / "set", sizes, shard_scenes=2)
    same(read(tmp_path / "set"), simulate(SMALL, 4, SceneGenerator(0, "test")))
    same(read(tmp_path / "set", split="train"), simulate(SMALL, 5, SceneGenerator(0, "train")))
    shard = tmp_path / "set" / "val-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"!")
    with pytest.raises(DataError, match="val-00001.safetensors: found other bytes than were written"):
        read(tmp_path / "set", split="val")
    with pytest.raises(DataError, match="snapshots 8; expected snapshots 6.*the run of theirs"):
        open_measurements(tmp_path / "set", Task(**{name: getattr(SMALL, name) for name in names} | {"snapshots": 6}))


def test_measurements_of_original_folders_need_no_truth(tmp_path: Path) -> None:
    for split, scenes in (("train", 4), ("test", 3)):
        given = original_arrays(scenes, split=split)
        write_npz(tmp_path / split / "a.npz", {name: given[name] for name in ("y", "H", "H_full", "codes", "snr")})
    assert len(read(tmp_path).snapshots) == 3 and len(read(tmp_path, split="train").snapshots) == 4
    assert read(tmp_path).effective_channel is None  # the channel says more
    with pytest.raises(DataError, match="val: found no such folder"):
        read(tmp_path, split="val")


def test_measurements_without_channel_carry_the_products(tmp_path: Path) -> None:
    given = original_arrays(3)
    write_npz(tmp_path / "a.npz", {name: given[name] for name in ("y", "H", "codes")})
    measured = read(tmp_path / "a.npz")
    assert measured.channel is None and measured.effective_channel is not None
    np.testing.assert_array_equal(measured.effective_channel, given["H"])
    write_npz(tmp_path / "b.npz", {name: given[name] for name in ("y", "H_full", "codes")})
    with pytest.raises(DataError, match="a.npz, key 'channel': found no such array"):
        read(tmp_path)


@pytest.mark.parametrize("own", [False, True])
def test_measurements_have_codes_of_rms_one_whatever_their_scale(own: bool, scenes: Scenes, tmp_path: Path) -> None:
    """H diag(c_l) is all that physics knows: its scale goes into the channel, scene by scene."""
    given, scale = arrays(scenes), np.geomspace(1e-3, 1e3, SCENES)[:, None, None, None] if own else np.float64(40)
    changed_codes = given["codes"] * scale
    same(
        read(write_npz(tmp_path / "a.npz", given | {"codes": changed_codes, "channel": given["channel"] / scale})),
        scenes,
    )


def test_measurements_without_channel_need_the_snr_of_every_scene(tmp_path: Path) -> None:
    given = original_arrays(3)
    given = {name: given[name] for name in ("y", "H", "codes")} | {"snr": np.array([3.0, np.nan, 5.0])}
    with pytest.raises(DataError, match="a.npz, key 'snr': found NaN, the first in scene 1; expected dB"):
        read(write_npz(tmp_path / "a.npz", given))


def test_measurements_are_known_by_endings_of_either_case(scenes: Scenes, tmp_path: Path) -> None:
    save_file(arrays(scenes), tmp_path / "A.SafeTensors")
    same(read(tmp_path), scenes)
    write_npz(tmp_path / "a.npz", arrays(scenes)).rename(tmp_path / "B.NPZ")
    same(read(tmp_path / "B.NPZ"), scenes)


def test_measurements_of_a_flat_folder_come_in_order(scenes: Scenes, tmp_path: Path) -> None:
    given = arrays(scenes)
    for name, rows in (("a", slice(0, 4)), ("b", slice(4, 7))):
        part = {key: value if key == "codes" else value[rows] for key, value in given.items()}
        write_npz(tmp_path / f"{name}.npz", part)
    (tmp_path / ".a.npz").write_bytes(b"another system's note")
    same(read(tmp_path), scenes)
    with pytest.raises(DataError, match="no splits.*Leave --split out"):
        read(tmp_path, split="test")


def test_measurements_are_read_as_they_are_asked_for(scenes: Scenes, tmp_path: Path) -> None:
    given = arrays(scenes)
    given["snapshots"][5, 0, 0, 0] = np.nan
    chunks = read_chunks(open_measurements(write_npz(tmp_path / "a.npz", given), SMALL), 2, SCENES)
    torch.testing.assert_close(next(chunks).snapshots, scenes.snapshots[:2])
    next(chunks)
    with pytest.raises(DataError, match="key 'snapshots': found NaN or infinite values, the first in scene 5"):
        next(chunks)


def without(name: str) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    return lambda given: {key: value for key, value in given.items() if key != name}


def changed(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[dict[str, np.ndarray]], dict]:
    return lambda given: given | {name: change(given[name])}


def spoiled(name: str, scene: int, value: float) -> Callable[[dict[str, np.ndarray]], dict]:
    def change(array: np.ndarray) -> np.ndarray:
        array = array.copy()
        array[scene] = value
        return array

    return changed(name, change)


WRONG = {
    "no snapshots": (without("snapshots"), "snapshots': found no such array, but channel, codes, snr_db"),
    "no channel": (without("channel"), "channel': found no such array"),
    "no codes": (without("codes"), "codes': found no such array"),
    "shape": (changed("snapshots", lambda a: a[:, :5]), r"snapshots': found shape \(7, 5, 4, 2\).*\(scenes, 8, 4\)"),
    "channel shape": (changed("channel", lambda a: a[..., :9, :]), r"channel': found shape \(7, 4, 9, 2\)"),
    "codes shape": (changed("codes", lambda a: a[:3]), r"codes': found shape \(3, 24, 2\).*\(8, 24\) or \(scenes, 8"),
    "no axes": (changed("snr_db", lambda a: a[0]), r"snr_db': found shape \(\).*\(scenes,\)"),
    "scenes": (changed("channel", lambda a: a[:5]), "channel': found 5 scenes; expected 7, as there are snapshots"),
    "none": (lambda given: given | {k: v[:0] for k, v in given.items() if k != "codes"}, r"no scene \(0 rows\)"),
    "text": (changed("snapshots", lambda a: a.astype(str)), "snapshots': found type <U.*numbers, complex"),
    "objects": (changed("channel", lambda a: a.astype(object)), "channel': found type object"),
    "complex snr": (changed("snr_db", lambda a: a + 1j), "snr_db': found type complex.*numbers of dB"),
    "nan": (spoiled("channel", 3, np.nan), "channel': found NaN or infinite values, the first in scene 3"),
    "infinite snr": (
        spoiled("snr_db", 6, np.inf),
        "snr_db': found infinite values or numbers beyond 3.4e38, the first in scene 6",
    ),
    "beyond float32": (spoiled("snapshots", 1, 1e300), "snapshots': found infinite values or numbers beyond 3.4e38"),
    "nan codes": (spoiled("codes", 0, np.nan), "codes': found NaN or infinite values"),
    "zero codes": (changed("codes", np.zeros_like), "codes': found nothing but zeros"),
    "below float32": (changed("snapshots", lambda a: a * 1e-60), "nothing but zeros in scene 0, in float32"),
    "real": (changed("snapshots", lambda a: a[..., 0]), r"found real numbers, \(7, 8, 4\).*\(scenes, 8, 4\) complex"),
    "real codes": (changed("codes", lambda a: a[..., 0]), r"codes': found real numbers, \(8, 24\).*imaginary"),
    "zeros": (spoiled("snapshots", 2, 0.0), "snapshots': found nothing but zeros in scene 2"),
}


@pytest.mark.parametrize("case", WRONG)
def test_measurements_name_what_is_wrong(case: str, scenes: Scenes, tmp_path: Path) -> None:
    change, says = WRONG[case]
    given = {name: value.astype(np.float64) for name, value in arrays(scenes).items()}
    file = write_npz(tmp_path / "a.npz", change(given))
    with pytest.raises(DataError, match=says) as error:
        read(file)
    assert str(file) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("ending", ["npz", "safetensors"])
def test_measurements_of_damaged_files_are_refused(ending: str, scenes: Scenes, tmp_path: Path) -> None:
    file = tmp_path / f"a.{ending}"
    write_npz(file, arrays(scenes)) if ending == "npz" else save_file(arrays(scenes), file)
    whole = file.read_bytes()
    for cut in (0, 1, 8, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:cut])
        with pytest.raises(DataError):
            read(file)
    file.write_bytes(b"\xff" * 64)
    with pytest.raises(DataError):
        read(file)


def test_measurements_of_nothing_and_of_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("1 2 3")
    (tmp_path / "empty").mkdir()
    for name, says in (("b.npz", "no such file"), ("a.txt", "another kind"), ("empty", "no .npz or .safetensors")):
        with pytest.raises(DataError, match=says):
            read(tmp_path / name)
