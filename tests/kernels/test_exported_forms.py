"""What kernels compute otherwise in an exported graph is what they compute elsewhere."""

from __future__ import annotations

import pytest
import torch

from ris_fast.kernels.pursuit.reference import pursuit_features
from ris_fast.kernels.pursuit.samples import SAMPLES
from ris_fast.kernels.pursuit.solve import spd_solve_log_det
from ris_fast.kernels.scale import power_of_two


@pytest.fixture
def exporting(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    return monkeypatch


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_power_of_two_by_logarithm_is_that_by_bits(dtype: torch.dtype, exporting: pytest.MonkeyPatch) -> None:
    exponents = torch.arange(-126, 127, dtype=dtype)
    peaks = torch.cat([torch.tensor([0.0], dtype=dtype), exponents.exp2(), 1.5 * exponents.exp2()])[:, None]
    found = power_of_two(peaks)
    exporting.undo()
    torch.testing.assert_close(found, power_of_two(peaks), rtol=0, atol=0)


@pytest.mark.parametrize("sides", [None, 3])
def test_spd_solve_by_lapack_is_the_elimination(sides: int | None, exporting: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(7, 5, 5, generator=generator, dtype=torch.float64)
    matrix, ridge = (half @ half.mT).permute(1, 2, 0), torch.rand(5, 7, generator=generator, dtype=torch.float64)
    rhs = torch.randn(*(5, 7) if sides is None else (5, sides, 7), generator=generator, dtype=torch.float64)
    found = spd_solve_log_det(matrix, rhs, ridge)
    exporting.undo()
    for ours, theirs in zip(found, spd_solve_log_det(matrix, rhs, ridge), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_pursuit_in_an_exported_graph_is_the_definition(exporting: pytest.MonkeyPatch) -> None:
    given = next(sample for sample in SAMPLES if sample.small).make("cpu", torch.float64)
    found = pursuit_features(*given)
    exporting.undo()
    for ours, theirs in zip(found, pursuit_features(*given), strict=True):
        torch.testing.assert_close(ours, theirs)
