"""Every ending holds what was predicted, chunk after chunk; what fails leaves the file that was there."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file

from ris_fast.config.schema import ConfigError
from ris_fast.files import StorageError
from ris_fast.inference.located import Located
from ris_fast.inference.output import HEADER, WRITERS, check_output, predictions_file
from ris_fast.localize.sources import Deviations, Sources

COUNTS = [0, 1, 2, 3, 0, 3, 1]


def located(*, known: bool = True) -> Located:
    """Seven scenes of 0 to 3 sources."""
    random = torch.Generator().manual_seed(0)
    count = torch.tensor(COUNTS)
    values = [torch.rand(7, 3, generator=random) + 0.1 for _ in range(8)]
    chance = torch.rand(7, 4, generator=random).softmax(1)
    more = {"deviations": Deviations(*values[4:]), "count_probability": chance, "snr_db": 10 * values[0][:, 0]}
    return Located.of(torch.rand(7, 4, 2, 2, generator=random), Sources(*values[:4], count), **(more if known else {}))


def write(path: Path, given: Located, sizes: tuple[int, ...], **options: bool) -> None:
    with predictions_file(path, len(given.count), {"run": "mine"}, **options) as file:
        for part in zip(*(each.split(sizes) for each in given)):
            file.write(Located(*part))


@pytest.mark.parametrize("sizes", [(7,), (3, 4), (1,) * 7])
@pytest.mark.parametrize("ending, read", [("npz", lambda path: dict(np.load(path))), ("safetensors", load_file)])
def test_array_files_hold_every_field(ending: str, read, sizes: tuple[int, ...], tmp_path: Path) -> None:
    file, given = tmp_path / f"a.{ending}", located()
    write(file, given, sizes)
    found, expected = read(file), given.numpy()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        np.testing.assert_array_equal(found[name], value)
    write(file, given, sizes, factor=False)
    assert read(file).keys() == expected.keys() - {"factor"}
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_safetensors_file_says_what_made_it(tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors", located(), (7,))
    with safe_open(tmp_path / "a.safetensors", "np") as file:
        assert file.metadata() == {"run": "mine"}


@pytest.mark.parametrize("known", [True, False])
def test_csv_has_a_row_a_source_and_one_for_a_scene_without(known: bool, tmp_path: Path) -> None:
    given = located(known=known)
    write(tmp_path / "a.csv", given, (3, 4))
    rows = list(csv.DictReader((tmp_path / "a.csv").read_text().splitlines()))
    expected = [(b, k) for b, count in enumerate(COUNTS) for k in (range(1, count + 1) if count else [0])]
    assert [(int(row["scene"]), int(row["source"])) for row in rows] == expected
    assert tuple(rows[0]) == HEADER
    for row, (scene, source) in zip(rows, expected):
        assert int(row["count"]) == COUNTS[scene]
        for name in HEADER[4:-1]:
            value = float(getattr(given, name)[scene, source - 1]) if source else math.nan
            assert row[name] == "" if math.isnan(value) else math.isclose(float(row[name]), value, rel_tol=1e-6)
        chance = float(given.count_probability[scene, COUNTS[scene]])
        assert row["count_probability"] == "" if not known else abs(float(row["count_probability"]) - chance) < 1e-6
        assert (row["snr_db"] == "") == (not known)


@pytest.mark.parametrize("ending", WRITERS)
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_failure_leaves_the_file_that_was_there(ending: str, error: type[BaseException], tmp_path: Path) -> None:
    file = tmp_path / f"a{ending}"
    file.write_text("old")
    with pytest.raises(error), predictions_file(file, 7, {}) as writer:
        writer.write(Located(*(each[:3] for each in located())))
        raise error
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


def test_check_output_refuses_what_cannot_be_written(tmp_path: Path) -> None:
    for name in ("a", "a.txt", "a.npz.gz"):
        with pytest.raises(ConfigError, match=r"Give a name in \.npz, \.safetensors, \.csv"):
            check_output(tmp_path / name)
    (tmp_path / "folder.npz").mkdir()
    with pytest.raises(StorageError, match="Is a directory"):
        check_output(tmp_path / "folder.npz")
    (tmp_path / "old.csv").write_text("old")
    for name in ("old.csv", "new.csv", "new.NPZ"):
        check_output(tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.npz", "old.csv"]
    assert (tmp_path / "old.csv").read_text() == "old"
