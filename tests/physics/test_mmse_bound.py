"""The MMSE bound goes through its table; that of scenes is the mean over them."""

from __future__ import annotations

import pytest

from ris_fast.physics.mmse_bound import FEW, MMSE_BOUND_NMSE, MMSE_BOUND_SNR_DB, mmse_bound, mmse_bound_nmse


@pytest.mark.parametrize("sources", sorted(MMSE_BOUND_NMSE))
def test_mmse_bound_goes_through_its_table(sources: int) -> None:
    assert [mmse_bound_nmse(sources, snr) for snr in MMSE_BOUND_SNR_DB] == pytest.approx(list(MMSE_BOUND_NMSE[sources]))


def test_mmse_bound_falls_with_the_snr() -> None:
    grid = [-5.0 + 0.25 * i for i in range(101)]
    for sources in range(1, 6):
        values = [mmse_bound_nmse(sources, snr) for snr in grid]
        assert all(later < earlier for earlier, later in zip(values, values[1:]))
    mean = sum(mmse_bound_nmse(k, snr) for k in range(1, 6) for snr in grid) / (5 * len(grid))
    assert 0.013 < mean < 0.024


def test_mmse_bound_refuses_six_sources() -> None:
    with pytest.raises(ValueError, match="1 to 5"):
        mmse_bound_nmse(6, 0.0)


def test_mmse_bound_of_scenes_is_their_mean_and_needs_many() -> None:
    half = FEW // 2
    low, high = mmse_bound_nmse(1, 15.0), mmse_bound_nmse(5, -5.0)
    assert mmse_bound([1] * half + [5] * half, [15.0] * half + [-5.0] * half) == pytest.approx((low + high) / 2)
    assert mmse_bound([1] * (FEW - 1), [0.0] * (FEW - 1)) is None
    with pytest.raises(ValueError):
        mmse_bound([1] * FEW, [0.0])
