"""The MMSE bound of the standard task, RIS-12x12 with its default ranges: what the posterior mean is expected to score.

Free of torch, for readers of a run's figures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

FEW = 100  # scenes, below which a mean is no comparison with an expectation

# NMSE of the posterior mean on RIS-12x12 (static symbols, path loss), Monte Carlo with 40-250 scenes a cell: an
# estimate of the bound, not the bound.
MMSE_BOUND_SNR_DB = (-5.0, 5.0, 15.0)
MMSE_BOUND_NMSE = {
    1: (0.022, 0.004, 0.0004),
    2: (0.072, 0.007, 0.0006),
    3: (0.077, 0.010, 0.0016),
    5: (0.142, 0.021, 0.0016),
}


def mmse_bound_nmse(sources: int, snr_db: float) -> float:
    """The MMSE bound at one number of sources and one SNR in dB.

    Straight lines in log NMSE against dB through the table; the last one continues to 20 dB, and four sources are the
    geometric mean of three and five. Only for the standard task. Raises ValueError outside 1..5 sources.
    """
    if sources == 4:
        return math.sqrt(mmse_bound_nmse(3, snr_db) * mmse_bound_nmse(5, snr_db))
    if sources not in MMSE_BOUND_NMSE:
        raise ValueError(f"mmse_bound_nmse: the table has 1 to 5 sources, got {sources}.")
    low = 0 if snr_db < MMSE_BOUND_SNR_DB[1] else 1
    share = (snr_db - MMSE_BOUND_SNR_DB[low]) / (MMSE_BOUND_SNR_DB[low + 1] - MMSE_BOUND_SNR_DB[low])
    here, there = (math.log(each) for each in MMSE_BOUND_NMSE[sources][low : low + 2])
    return math.exp(here + share * (there - here))


def mmse_bound(sources: Sequence[int], snr_db: Sequence[float]) -> float | None:
    """The bound of these scenes, one number of sources and one SNR each; None for fewer than FEW, whose mean may be on
    either side of an expectation."""
    if len(sources) < FEW:
        return None
    return math.fsum(mmse_bound_nmse(k, snr) for k, snr in zip(sources, snr_db, strict=True)) / len(sources)
