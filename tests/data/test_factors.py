"""Factors and dense covariances are read from files of other programs as the same covariances, in any portions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from ris_fast.data.errors import DataError
from ris_fast.data.factors import open_factors
from ris_fast.physics.random import SceneGenerator
from ris_fast.physics.scenes import simulate
from tests.data.make_npz import SMALL, as_complex, write_npz

SCENES = 9


@pytest.fixture(scope="module")
def factor() -> np.ndarray:
    return as_complex(simulate(SMALL, SCENES, SceneGenerator(0, "test")).factor).astype(np.complex64)


def covariance(factor: np.ndarray) -> np.ndarray:
    return factor @ factor.conj().swapaxes(1, 2)


@pytest.mark.parametrize("ending", ["npz", "safetensors"])
def test_factors_are_read_as_written_in_any_portions(ending: str, factor: np.ndarray, tmp_path: Path) -> None:
    given = {"factor": np.stack((factor.real, factor.imag), -1)}
    file = tmp_path / f"a.{ending}"
    write_npz(file, given) if ending == "npz" else save_file(given, file)
    opened = open_factors(file, SMALL)
    for portions in ([9], [1, 3, 5], [4, 4]):
        read = opened.reader(sum(portions))
        found = torch.cat([read(size) for size in portions])
        np.testing.assert_array_equal(found, given["factor"][: sum(portions)])


def test_dense_covariances_become_their_factors(factor: np.ndarray, tmp_path: Path) -> None:
    dense = covariance(factor)
    opened = open_factors(write_npz(tmp_path / "a.npz", {"covariance": dense}), SMALL)
    found = as_complex(opened.reader(SCENES)(SCENES))
    np.testing.assert_allclose(covariance(found), dense, atol=2e-6 * np.abs(dense).max())


WRONG = {
    "neither": (lambda f: {"R": covariance(f)}, "key 'factor, covariance': found no such array, but R"),
    "both": (lambda f: {"factor": f, "covariance": covariance(f)}, "found both of them"),
    "elements": (lambda f: {"factor": f[:, :9]}, r"key 'factor': found shape \(9, 9, 3\); expected .*24, Q"),
    "columns": (lambda f: {"factor": np.repeat(f, 11, 2)}, r"found shape \(9, 24, 33\).*Q at most 32"),
    "no columns": (lambda f: {"factor": f[..., :0]}, r"found shape \(9, 24, 0\)"),
    "one scene": (lambda f: {"factor": f[0]}, r"found shape \(24, 3\)"),
    "not square": (lambda f: {"covariance": covariance(f)[..., :9]}, r"key 'covariance': found shape \(9, 24, 9\)"),
    "skew": (lambda f: {"covariance": covariance(f) * 1j}, "found no Hermitian matrix, first in scene 0"),
    "nan": (
        lambda f: {"factor": f * np.where(np.arange(SCENES) == 4, np.nan, 1)[:, None, None]},
        "found NaN or infinite values, first in scene 4",
    ),
    "text": (lambda f: {"factor": f.astype(str)}, "key 'factor': found type <U"),
    "none": (lambda f: {"factor": f[:0]}, r"no scene \(0 rows\)"),
}


@pytest.mark.parametrize("case", WRONG)
def test_factors_name_what_is_wrong(case: str, factor: np.ndarray, tmp_path: Path) -> None:
    change, says = WRONG[case]
    file = write_npz(tmp_path / "a.npz", change(factor))
    with pytest.raises(DataError, match=says) as error:
        opened = open_factors(file, SMALL)
        opened.check_values(opened.scenes)
    assert str(file) in str(error.value) and "\n" not in str(error.value)
