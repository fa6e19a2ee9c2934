"""What a validation NMSE is worth: the baselines in words, the milestones and the MMSE bound of the standard task."""

from __future__ import annotations

import math
from collections.abc import Mapping

MEANINGS = {
    "zero": "predicts nothing",
    "identity": "power from everywhere alike",
    "mean": "the mean training covariance, about the best answer that ignores the input",
    "pursuit": "matching pursuit through the known channel, refined jointly; no network",
    "matched_filter": "the back-projections that the network is shown, shrunk towards the mean; no network",
    "least_squares": "the field by least squares through the known channel, shrunk towards the mean; no network",
    "lmmse": "the linear MMSE field that the network is shown, shrunk towards the mean; no network",
}

MILESTONES = {
    0.52: "rank-1 LMMSE",
    0.35: "several sources are seen",
    0.187: "the original's hope",
    0.10: "good enough to localise",
    0.04: "near blind maximum likelihood",
}

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


def figure(value: float) -> str:
    """A score with three decimals, and below a tenth with three significant digits: 0.806, 0.0203."""
    return f"{value:#.3g}" if abs(value) < 0.1 else f"{value:.3f}"


def baseline_lines(baselines: Mapping[str, float]) -> list[str]:
    """One line a baseline, its figure beside what it means."""
    wide = max([8, *map(len, baselines)])
    return [
        f"  {name.replace('_', ' '):<{wide}} {figure(value):>6}  {MEANINGS.get(name, '')}".rstrip()
        for name, value in baselines.items()
    ]


def milestone_line() -> str:
    return "  then: " + ", ".join(f"{value:g} {meaning}" for value, meaning in MILESTONES.items())


def judge(nmse: float | None, baselines: Mapping[str, float], *, milestones: bool = True) -> str:
    """A figure beside the constant answer, in words, and the last milestone that it has passed; None where nothing was
    measured."""
    mean = baselines.get("mean", 1.0)
    if nmse is None:
        return f"not measured (baseline {mean:.3f})"
    if not math.isfinite(nmse):
        return f"not a number (baseline {mean:.3f})"
    if nmse >= mean:
        return f"{figure(nmse)}, no better than the constant answer ({mean:.3f})"
    passed = [meaning for value, meaning in MILESTONES.items() if milestones and nmse <= value]
    return f"{figure(nmse)}, below the constant answer ({mean:.3f})" + (f"; passed: {passed[-1]}" if passed else "")
