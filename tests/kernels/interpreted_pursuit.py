"""Laws of the pursuit's Triton kernels under Triton's interpreter; test_pursuit_triton.py runs this file in a process
of its own."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from ris_fast.config.schema import Task
from ris_fast.kernels.cov_nmse.op import cov_nmse
from ris_fast.kernels.pursuit import op, solve, triton_kernels
from ris_fast.kernels.pursuit.samples import SAMPLES, scenes
from ris_fast.kernels.pursuit.search import Geometry, Pursuit, normal_equations
from ris_fast.kernels.pursuit.triton_search import TILE
from ris_fast.kernels.pursuit.triton_solve import sweep
from ris_fast.models.features import Features
from tests.kernels.test_pursuit_kernel import closeness, drawn, no_factors

NAMED = {sample.name: sample for sample in SAMPLES}
# (batch, N_H, N_V, M, L, K): antennas and snapshots below, at and beyond a tile; one and many atoms; a single row
SIZES = [(2, 3, 1, 2, 3, 1), (1, 13, 11, 5, 33, 4), (1, 5, 5, 16, 16, 5), (1, 17, 1, 40, 8, 2)]


@pytest.fixture
def large_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes time by operations, not by their size."""
    monkeypatch.setattr(triton_kernels, "ROWS", 64)


def first(args: tuple, scenes: int) -> tuple:
    y, h, codes, snr_db, *rest = args
    return y[:scenes], h[:scenes], codes[:scenes] if codes.dim() == 4 else codes, snr_db[:scenes], *rest


@pytest.mark.parametrize("name", ["small", "small-own-codes", "odd", "spherical", "strided", "one-of-each"])
def test_pursuit_triton_is_as_exact_as_eager(name: str) -> None:
    args = first(NAMED[name].make("cpu", torch.float32), 2 if name in ("small", "strided") else 1)
    assert closeness(op._triton(*args), args) < 2


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_pursuit_triton_is_exact_at_any_size(sizes: tuple[int, ...], large_strips: None) -> None:
    args = scenes(*sizes, sector=0.3 if sizes[1] > 16 else 0.8, seed=1)
    assert closeness(op._triton(*args), args) < 2


def test_pursuit_triton_searches_alike_by_factors_and_by_the_dictionary(large_strips: None) -> None:
    """More than a tile of positions along u, and along v."""
    y, h, codes, snr_db, constants, *rest = scenes(1, 14, 25, 5, 9, 2, sector=1.0)
    assert min(constants[9].shape[2], constants[10].shape[2]) > TILE
    found = [
        op._triton(y, h, codes, snr_db, [*constants[:9], *factors], *rest)
        for factors in (constants[9:], no_factors(constants))
    ]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_pursuit_triton_takes_an_empty_batch() -> None:
    args = NAMED["empty-batch"].make("cpu", torch.float32)
    assert [each.shape for each in op._triton(*args)] == [each.shape for each in op._plain(*args)]


def test_pursuit_triton_ignores_the_unit(large_strips: None) -> None:
    y, h, *rest = first(NAMED["small"].make("cpu", torch.float32), 1)
    plain = op._triton(y, h, *rest)
    for one, other in zip(op._triton(1e-30 * y, 3e17 * h, *rest), plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")  # numpy's word on NaN
def test_pursuit_triton_keeps_nan_within_its_scene_and_zeros_finite(large_strips: None) -> None:
    y, h, *rest = scenes(5, 12, 12, 3, 4, 2)  # two positions along w, equal scores where all are 0
    whole = op._triton(*first((y, h, *rest), 1))
    y, h = y.clone(), h.clone()
    y[1, 2], h[2, 1, 3], y[3], h[4] = float("nan"), float("inf"), 0.0, 0.0
    found = op._triton(y, h, *rest)
    for a, b in zip(found, whole, strict=True):
        torch.testing.assert_close(a[0], b[0], rtol=1e-4, atol=1e-5)
        assert not a[1].isfinite().all() and not a[2].isfinite().all() and a[3:].isfinite().all()
    assert not found[1][3:].any()
    wanted = op._plain(y, h, *rest)  # of equal scores the first counts
    torch.testing.assert_close(found[0][3:], wanted[0][3:], rtol=1e-4, atol=1e-5)


@triton.jit
def sweep_one(a_ptr, log_det_ptr, n, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    at = a_ptr + i[:, None] * SIZE + i[None, :]
    a, log_det = sweep(tl.load(at), n, SIZE)
    tl.store(at, a)
    tl.store(log_det_ptr, log_det)


@pytest.mark.parametrize("ridge", [1e-2, 0.0])
def test_sweep_in_triton_raises_pivots_as_the_definition_does(ridge: float) -> None:
    """Two equal unknowns: without a ridge the pivot of the second is 0, and is raised."""
    n, size = 5, 8
    matrix, side = torch.diag(torch.tensor([4.0, 4.0, 2.0, 4.0, 8.0])), torch.tensor([1.0, 2.0, 3.0, 2.001, 5.0])
    matrix[1, 3] = matrix[3, 1] = 4.0
    matrix[0, 2] = matrix[2, 0] = 1.0
    sides = torch.cat((side[:, None], torch.eye(n)), 1)[..., None]
    wanted, volume = solve.spd_solve_log_det(matrix[..., None], sides, torch.full((n, 1), ridge))
    tile, log_det = torch.zeros(size, size), torch.empty(1)
    tile[:n, :n], tile[:n, n], tile[n, :n] = matrix + ridge * torch.eye(n), side, side
    sweep_one[(1,)](tile, log_det, n, SIZE=size)
    torch.testing.assert_close(tile[:n, n], wanted[:, 0, 0], rtol=1e-5, atol=0)
    torch.testing.assert_close(-tile[:n, :n], wanted[:, 1:, 0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(log_det, volume, rtol=1e-6, atol=1e-6)


def test_pursuit_triton_retries_the_doubtful_scenes_alone(large_strips: None) -> None:
    """Four sources in each scene and two atoms: doubtful, but for the scene whose SNR is said to be low."""
    y, h, codes, snr_db, constants, wavenumber, _ = scenes(3, 6, 6, 16, 8, 4, seed=3)
    snr_db[1], stages = -10.0, 2
    pursuit, normal = Pursuit(Geometry(*constants), wavenumber, stages), normal_equations(y, h, codes, snr_db)
    none = y.new_zeros(3, 0, 3)
    top = pursuit.polished(normal, *pursuit.extended(normal, none, none, normal.moment, stages))
    assert pursuit.doubtful(normal, top).tolist() == [True, False, True]
    args = (y, h, codes, snr_db, constants, wavenumber, stages)
    assert closeness(op._triton(*args), args) < 2


def test_pursuit_triton_clamps_the_snr_as_the_definition_does(large_strips: None) -> None:
    y, h, codes, snr_db, *rest = first(NAMED["small"].make("cpu", torch.float32), 1)
    for value in (-90.0, 70.0):
        args = (y, h, codes, torch.full_like(snr_db, value), *rest)
        for one, other in zip(op._triton(*args), op._plain(*args), strict=True):
            torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-3)


def test_pursuit_triton_solves_the_task_as_well_as_plain_torch(large_strips: None) -> None:
    model, found, args = drawn(Task(), torch.arange(2), "test")
    ours, plain = (
        float(cov_nmse(model.sources(Features(*run(*args))), target_factor=found.factor))
        for run in (op._triton, op._plain)
    )
    assert ours == pytest.approx(plain, rel=0.01)
