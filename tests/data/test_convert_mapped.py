"""Other people's HDF5 and .mat files: read by the mapping files that docs/data.md shows, or refused with what fits."""

from __future__ import annotations

import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import scipy.io
import torch

from ris_fast.commands.cli import main
from ris_fast.config.load import load_config
from ris_fast.data.check_set import check_set
from ris_fast.data.open_source import open_source
from ris_fast.data.shards import ShardSource
from tests.data.make_npz import all_scenes, original_arrays
from tests.data.their_files import lab_arrays, mapping_of_docs, save_mat, scenes_of, write_hdf5, write_lab


def convert(*words: object) -> int:
    return main(["convert", *map(str, words)])


def opened(folder: Path) -> ShardSource:
    return open_source(load_config(preset="laptop", flags={"data.path": folder}), "cpu")


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def near(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-6) -> bool:
    return float((a.double() - b.double()).norm() / b.double().norm()) < tolerance


def test_the_matlab_lab_of_the_docs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lab, text = write_lab(tmp_path / "lab"), written(tmp_path / "lab.toml", mapping_of_docs(0))
    assert convert("--map", text, "--data", lab, "--check") == 0
    said = capsys.readouterr().out
    assert (
        "3 files" in said and "40 train, 12 val, 0 test" in said and "range" in said and not (tmp_path / "set").exists()
    )
    assert convert("--map", text, "--data", lab, "--out", tmp_path / "set") == 0, capsys.readouterr().err
    assert "train on it: ris-fast train --data" in capsys.readouterr().out
    source = opened(tmp_path / "set")
    for split, made in (("train", scenes_of(40)), ("val", scenes_of(12, "val"))):
        found = all_scenes(source, split)
        for name in ("snapshots", "channel", "codes", "snr_db", "azimuth", "elevation", "range_m"):
            assert near(getattr(found, name), getattr(made, name)), name
        assert torch.equal(found.count, made.count)
        scale = (found.power.sum(1) / made.power.sum(1)).sqrt()
        assert near(found.factor, made.factor * scale[:, None, None, None], 1e-5)
    assert check_set(tmp_path / "set", 1).whole


@pytest.mark.parametrize("options", [{}, {"chunks": True, "compression": "gzip"}], ids=["plain", "compressed"])
def test_the_hdf5_file_of_the_docs(tmp_path: Path, options: dict[str, object]) -> None:
    arrays = original_arrays(60)
    file, text = write_hdf5(tmp_path / "a.h5", arrays, **options), written(tmp_path / "a.toml", mapping_of_docs(1))
    assert convert("--map", text, "--data", file, "--out", tmp_path / "set") == 0
    source = opened(tmp_path / "set")
    assert source.lacks == () and any("half an element" in note for note in source.notes)
    found = all_scenes(source, "val")
    assert torch.equal(found.snapshots, torch.from_numpy(arrays["y"][40:52]))
    assert torch.equal(found.channel, torch.from_numpy(arrays["H_full"][40:52]))
    assert bool((found.snr_db == 20).all())
    factor = torch.view_as_complex(found.factor)
    assert near(torch.view_as_real(factor @ factor.mH), torch.from_numpy(arrays["R"][40:52]), 1e-4)


def test_a_covariance_alone_is_a_target(tmp_path: Path) -> None:
    text = mapping_of_docs(1)
    for name in ("azimuth", "elevation", "range"):
        text = text.replace(f"[{name}]", f"[gone_{name}]")
    lines = text.split("\n\n")
    text = "\n\n".join(each for each in lines if "gone_" not in each) + "\n[count]\nkey = 'truth/K'\n"
    arrays = original_arrays(60)
    file = write_hdf5(tmp_path / "a.h5", arrays)
    with h5py.File(file, "r+") as there:
        there["truth/K"] = arrays["K"]
    assert convert("--map", written(tmp_path / "a.toml", text), "--data", file, "--out", tmp_path / "set") == 0
    source = opened(tmp_path / "set")
    assert source.lacks == ("factor", "power", "azimuth", "elevation", "range_m")
    assert near(all_scenes(source, "train").covariance, torch.from_numpy(arrays["R"][:40]), 1e-5)


def test_an_old_mat_is_read_by_scipy(tmp_path: Path) -> None:
    arrays = lab_arrays(scenes_of(40))
    (tmp_path / "lab").mkdir()
    for name in ("day1", "holdout"):
        scipy.io.savemat(tmp_path / "lab" / f"{name}.mat", arrays)
    text = written(tmp_path / "lab.toml", mapping_of_docs(0))
    assert convert("--map", text, "--data", tmp_path / "lab", "--out", tmp_path / "set") == 0
    assert near(all_scenes(opened(tmp_path / "set"), "train").snapshots, scenes_of(40).snapshots)


WRONG = {
    "degrees as radians": (
        'axes = "0 source scene"\nunit = "deg"',
        'axes = "0 source scene"\nunit = "rad"',
        3,
        "unit = 'deg' in [azimuth] fits",
    ),
    "centimetres as millimetres": ('unit = "cm"', 'unit = "mm"', 3, "unit = 'cm' in [range] fits"),
    "dB as a ratio": ('axes = "0 scene"\nunit = "dB"', 'axes = "0 scene"\nunit = "linear"', 3, "unit = 'dB' fits"),
    "powers in dB as ratios": (
        'axes = "source scene"\nunit = "dB"',
        'axes = "source scene"',
        3,
        "unit = 'dB' in [power] fits",
    ),
    "no unit": (
        'unit = "deg"\n\n[elevation]',
        "\n[elevation]",
        2,
        "[azimuth] has no unit; expected unit = 'rad' or unit = 'deg'",
    ),
    "no such array": ('key = "dist"', 'key = "dists"', 3, "Did you mean 'dist'?"),
    "axes in another order": ("antenna snapshot scene", "snapshot antenna scene", 3, "mend them"),
    "an axis too few": ("antenna snapshot scene", "antenna scene", 2, "the names of all of the array's axes"),
    "another array": ("bs_antennas = 4", "bs_antennas = 5", 3, "--set task.bs_antennas=4"),
    "no snapshots": ("[snapshots]", "[task2]", 2, "there is no section 'task2'. Did you mean 'task'?"),
    "no file": ("holdout.mat", "held.mat", 3, "nothing that fits held.mat"),
    "no powers": (
        '[power]\nkey = "p_dB"\naxes = "source scene"\nunit = "dB"\n',
        "",
        2,
        "no section [power (or covariance)]",
    ),
    "no TOML": ("[files]", "[files", 2, "not valid TOML"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_mistake_in_a_mapping_is_one_line(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    before, after, code, answer = WRONG[name]
    text = mapping_of_docs(0)
    assert before in text
    write_lab(tmp_path / "lab")
    mapping = written(tmp_path / "lab.toml", text.replace(before, after, 1))
    assert convert("--map", mapping, "--data", tmp_path / "lab", "--out", tmp_path / "set") == code
    said = capsys.readouterr().err
    assert answer in said and said.count("\n") == 1, said
    assert not (tmp_path / "set").exists() and not (tmp_path / "set.partial").exists()


@pytest.mark.parametrize(
    "key, change, answer",
    [
        ("snr", lambda t: 10 ** ((t + 25) / 10), "unit = 'linear' in [snr] fits"),
        ("doa", np.radians, "unit = 'rad' in [azimuth] and [elevation] fits"),
        ("doa", lambda t: np.stack((t[0], 90 - t[1])), "Write 90 minus these: they are angles from the vertical"),
        ("doa", lambda t: np.stack((t[0] % 360, t[1])), "between -90 and 90"),
        ("Y", lambda t: np.where(np.arange(t.size).reshape(t.shape) == 7, np.nan, t), "key 'Y': found 1 NaN"),
        ("doa", lambda t: np.where(np.arange(t.size).reshape(t.shape) == 7, np.nan, t), "key 'doa, dist': found 1 NaN"),
        ("dist", np.zeros_like, "key 'dist': found 0 in scene 0"),
    ],
)
def test_values_of_another_unit_are_refused(
    tmp_path: Path, key: str, change: object, answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arrays = lab_arrays(scenes_of(40))
    arrays[key] = change(arrays[key])  # type: ignore[operator]
    for name in ("day1", "holdout"):
        save_mat(tmp_path / "lab" / f"{name}.mat", arrays)
    text = written(tmp_path / "lab.toml", mapping_of_docs(0))
    assert convert("--map", text, "--data", tmp_path / "lab", "--out", tmp_path / "set") == 3
    said = capsys.readouterr().err
    assert answer in said and "key '" in said and said.count("\n") == 1, said


def test_a_split_beyond_the_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_hdf5(tmp_path / "a.h5", original_arrays(51))
    text = written(tmp_path / "a.toml", mapping_of_docs(1))
    assert convert("--map", text, "--data", file, "--check") == 3
    said = capsys.readouterr().err
    assert "found 51 scenes; expected scenes 40 to 51 for val, counted from 0. Mend [split] val = [40, 52]." in said


def test_a_new_map_lists_the_arrays_and_says_what_is_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_hdf5(tmp_path / "a.h5", original_arrays(12))
    assert convert("--new-map", tmp_path / "a.toml", "--data", file) == 0
    text = (tmp_path / "a.toml").read_text()
    assert "rx/channel" in text and "12x4x4x6x2 float32" in text and "key = 'truth/azimuth'" in text
    assert "--check" in capsys.readouterr().out
    assert convert("--new-map", tmp_path / "a.toml", "--data", file) == 2
    assert convert("--map", tmp_path / "a.toml", "--data", file, "--check") == 2  # units are to be said


def test_train_says_convert_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lab = write_lab(tmp_path / "lab")
    for data in (lab, lab / "day0.mat"):
        assert main(["train", "--data", str(data), "--device", "cpu"]) == 3
        said = capsys.readouterr().err
        assert "ris-fast convert --new-map" in said and said.count("\n") == 1
    assert convert("--data", lab, "--out", tmp_path / "set") == 2
    assert "needs a mapping file" in capsys.readouterr().err


def test_without_h5py_the_error_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lab, text = write_lab(tmp_path / "lab"), written(tmp_path / "lab.toml", mapping_of_docs(0))
    monkeypatch.setitem(sys.modules, "h5py", None)
    assert convert("--map", text, "--data", lab, "--check") == 2
    assert "pip install 'ris-fast[hdf5]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "mistake, said",
    [
        (("[covariance]\n", "[covariance]\nconjugate = true\n"), "the covariance conjugated"),
        (("truth/azimuth", "truth/elevation", "truth/elevation", "truth/azimuth"), "azimuth and elevation exchanged"),
    ],
    ids=["conjugate", "exchanged"],
)
def test_covariances_of_other_sources_are_refused_with_what_was_mistaken(
    mistake: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = mapping_of_docs(1)
    if len(mistake) == 4:
        text = text.replace(mistake[0], "#").replace(mistake[1], mistake[0]).replace("#", mistake[1])
    else:
        text = text.replace(*mistake)
    lab = write_hdf5(tmp_path / "lab.h5", original_arrays(60))
    assert convert("--map", written(tmp_path / "lab.toml", text), "--data", lab, "--out", tmp_path / "set") == 3
    assert f"They fit with {said}" in capsys.readouterr().err and not (tmp_path / "set").exists()
