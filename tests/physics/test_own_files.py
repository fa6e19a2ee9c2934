"""Arrays and code books from files: the same physics as the built-in ones, and a line for every file of no use."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ris_fast.config.own_physics import CODES, POSITIONS, read_codes, read_positions
from ris_fast.config.schema import ConfigError, Task
from ris_fast.models.beams import FieldPrior
from ris_fast.models.pursuit import geometry_of
from ris_fast.physics.array import RISArray
from ris_fast.physics.random import SceneGenerator
from ris_fast.physics.scenes import check_physics, simulate

RNG = np.random.default_rng(0)
PLACES = RNG.uniform(-0.6, 0.6, (30, 2))
BOOK = np.exp(2j * np.pi * RNG.random((8, 30)))


def saved(path: Path, array: np.ndarray) -> str:
    np.save(path, array)
    return str(path)


def grid(task: Task) -> np.ndarray:
    return torch.stack(RISArray.of(task).positions(dtype=torch.float64), 1).numpy()


def test_a_grid_in_a_file_is_the_grid(tmp_path: Path) -> None:
    """The same scenes bit for bit, and a pursuit that still searches by rows and columns."""
    plain = Task(ris_horizontal=8, ris_vertical=6)
    filed = Task(elements_file=saved(tmp_path / "grid.npy", grid(plain)))
    assert filed.elements == 48
    one, other = (simulate(task, 6, SceneGenerator(3)) for task in (plain, filed))
    for name in ("codes", "channel", "snapshots", "factor"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert geometry_of(filed)[0].along_x.shape == geometry_of(plain)[0].along_x.shape


def test_codes_in_a_file_are_the_codes_in_every_form(tmp_path: Path) -> None:
    task, own = Task(snapshots=8, elements_file=saved(tmp_path / "p.npy", PLACES)), {}
    pairs = np.stack([BOOK.real, BOOK.imag], -1)
    np.savez(tmp_path / "both.npz", codes=BOOK, other=BOOK * 0)
    forms = {"complex": BOOK, "pairs": pairs, "single": pairs.astype(np.float32), "phases": np.angle(BOOK)}
    files = {name: saved(tmp_path / f"{name}.npy", each) for name, each in forms.items()}
    for name, file in {**files, "npz": str(tmp_path / "both.npz")}.items():
        own[name] = simulate(task.changed(codes_file=file), 2, SceneGenerator(0)).codes
        assert torch.allclose(own[name], torch.from_numpy(pairs).float(), atol=1e-6), name


def test_codes_that_may_be_degrees_are_noted(tmp_path: Path) -> None:
    task = Task(snapshots=8, elements_file=saved(tmp_path / "p.npy", PLACES))
    phases = np.angle(BOOK)
    assert check_physics(task.changed(codes_file=saved(tmp_path / "rad.npy", phases)), "cpu") == []
    (note,) = check_physics(task.changed(codes_file=saved(tmp_path / "deg.npy", np.degrees(phases))), "cpu")
    assert "If they are degrees, convert them" in note


def test_prior_of_elements_anywhere_is_that_of_a_grid(tmp_path: Path) -> None:
    """Entry by entry over all pairs of elements, what the grid has as a product of its axes."""
    plain = Task(ris_horizontal=5, ris_vertical=4)
    filed = plain.changed(elements_file=saved(tmp_path / "grid.npy", grid(plain)))
    (column, row), (whole, one) = (
        [torch.view_as_complex(each.double()) for each in FieldPrior(task).root] for task in (plain, filed)
    )
    product = torch.kron(column, row)
    assert torch.equal(one.abs(), torch.ones(1, 1, dtype=torch.float64))
    assert torch.allclose(whole @ whole, product @ product, atol=1e-5)


def test_text_positions_are_the_numbers_in_them(tmp_path: Path) -> None:
    expected = np.array([[0.0, 0.5], [1.0, -2.0]])
    for number, text in enumerate(
        ("x,y\n0,0.5\n1,-2\n", "# metres\n0 0.5\n\n1 -2  # last\n", "x;y;z\n0;0.5;0\n1;-2;0\n")
    ):
        (tmp_path / f"{number}.csv").write_text(text)
        assert np.array_equal(read_positions(str(tmp_path / f"{number}.csv")), expected)


@pytest.mark.parametrize(
    "array, said",
    [
        (PLACES.T, r"shape \(2, 30\).* Transpose it"),
        (np.c_[PLACES, np.eye(30)[4]], "z = 1 m at element 4"),
        (np.where(PLACES == PLACES[3, 1], np.nan, PLACES), r"nan at \[3, 1\]"),
        (np.r_[PLACES, PLACES[5:6]], "elements 5 and 30 in one place"),
        (PLACES * 1000, "beyond the farthest source .* Give metres"),
        (np.array([{}]), "holds Python objects"),
    ],
)
def test_positions_of_no_use_are_named(tmp_path: Path, array: np.ndarray, said: str) -> None:
    with pytest.raises(ConfigError, match=f"{POSITIONS} = '.*p.npy'.*{said}") as raised:
        np.save(tmp_path / "p.npy", array, allow_pickle=True)
        check_physics(Task(elements_file=tmp_path / "p.npy"), "cpu")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "array, said",
    [
        (BOOK.T, "30 codes of 8 elements; the task has 8 snapshots of 30 elements. Give it transposed"),
        (BOOK[:5], "--set task.snapshots=5"),
        (BOOK[:, 1:], "an array of as many elements"),
        (BOOK * 1.5, "modulus 1.5 at code"),
        (BOOK * (np.arange(8) != 2)[:, None], "zero at every element of code 2"),
        (np.round(np.degrees(np.angle(BOOK))), "whole numbers.* degrees"),
        (np.where(BOOK == BOOK[0, 5], np.nan, BOOK), r"at \[0, 5\]"),
        (np.zeros((8, 30, 3)), r"shape \(8, 30, 3\)"),
    ],
)
def test_codes_of_no_use_are_named(tmp_path: Path, array: np.ndarray, said: str) -> None:
    task = Task(snapshots=8, elements_file=saved(tmp_path / "p.npy", PLACES))
    with pytest.raises(ConfigError, match=f"{CODES} = '.*c.npy'.*{said}"):
        check_physics(task.changed(codes_file=saved(tmp_path / "c.npy", array)), "cpu")


@pytest.mark.parametrize("name", ["gone.npy", "p.mat", "folder.npy", "ragged.csv", "words.txt", "noise.npz"])
def test_files_that_cannot_be_read_are_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder.npy").mkdir()
    for file, text in (("p.mat", "0"), ("ragged.csv", "0,1\n2\n"), ("words.txt", "0 1\n2 x\n"), ("noise.npz", "?")):
        (tmp_path / file).write_text(text)
    with pytest.raises(ConfigError, match=f"{POSITIONS} = '.*{name}'") as raised:
        Task(elements_file=tmp_path / name)
    assert "\n" not in str(raised.value)


def test_task_is_its_content_and_not_the_place_of_its_files(tmp_path: Path) -> None:
    """Equal with the same file elsewhere, another with another file there, which is named when it is read."""
    (tmp_path / "b").mkdir()
    here, there = (Task(elements_file=saved(tmp_path / name, PLACES)) for name in ("p.npy", "b/p.npy"))
    assert here == there and hash(here) == hash(there) and here.identity() == there.identity()
    saved(tmp_path / "p.npy", PLACES + 0.01)
    assert Task(elements_file=tmp_path / "p.npy") != here and RISArray.of(there).elements == 30
    from ris_fast.physics import array

    array._of_file.cache_clear()  # as in a new process
    with pytest.raises(ConfigError, match="p.npy': the file has changed"):
        RISArray.of(here)
    with pytest.raises(ConfigError, match="ris_elements = 9, and there are 30"):
        Task(elements_file=tmp_path / "p.npy", ris_elements=9)
    with pytest.raises(ConfigError, match="codes_hash = 'ab' without task.codes_file"):
        Task(codes_hash="ab")


def test_read_codes_takes_a_shard_of_a_data_set(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    pairs = np.stack([BOOK.real, BOOK.imag], -1).astype(np.float32)
    save_file({"codes": pairs, "snr_db": np.zeros(3, np.float32)}, tmp_path / "train-00000.safetensors")
    assert np.abs(read_codes(str(tmp_path / "train-00000.safetensors")) - BOOK).max() < 1e-6
