"""The MMSE bound goes through its table, and words match figures; tables line up."""

from __future__ import annotations

import math

import pytest

from ris_fast.report.baselines import MMSE_BOUND_NMSE, MMSE_BOUND_SNR_DB, judge, mmse_bound_nmse
from ris_fast.report.tables import text_table


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


@pytest.mark.parametrize(
    "nmse, words",
    [
        (1.9, "no better than"),
        (0.978, "no better than"),
        (0.9, "below"),
        (0.3, "several sources"),
        (math.nan, "not a number"),
        (None, "not measured"),
    ],
)
def test_judge_compares_with_the_constant_answer(nmse, words: str) -> None:
    assert words in judge(nmse, {"zero": 1.0, "mean": 0.978})


def test_text_table_aligns_numbers_to_the_right() -> None:
    table = text_table(["name", "NMSE", "scenes"], [["a", 0.123456, 1200], ["longer", None, 3]])
    assert table.splitlines() == [
        "name      NMSE  scenes",
        "------  ------  ------",
        "a       0.1235   1,200",
        "longer       -       3",
    ]
