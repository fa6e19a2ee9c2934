"""What a validation NMSE is worth: the baselines in words, the milestones of the standard task, the MMSE bound."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ris_fast.physics.baseline_names import CONSTANT_BASELINES

MEANINGS = {
    "zero": "predicts nothing",
    "identity": "power from everywhere alike",
    "mean": "the mean training covariance, about the best answer that ignores the input",
    "pursuit": "matching pursuit through the known channel; no network",
    "matched_filter": "the back-projections that the network is shown, shrunk towards the mean; no network",
    "least_squares": "the field by least squares through the known channel, shrunk towards the mean; no network",
    "lmmse": "the linear MMSE field that the network is shown, shrunk towards the mean; no network",
    "omp": "orthogonal matching pursuit, refined by likelihood; no network",
    "blind_likelihood": "blind maximum likelihood from many starts; no network",
}

BOUND = "about what the best possible estimator scores on these scenes, estimated by Monte Carlo"

MILESTONES = {
    0.52: "rank-1 LMMSE",
    0.35: "several sources are seen",
    0.187: "the original's hope",
    0.10: "good enough to localise",
    0.04: "near blind maximum likelihood",
}


LABELS = {"lmmse": "LMMSE", "omp": "OMP"}


def label(name: str) -> str:
    """The name of an estimator as a person writes it; the name of a run as it is."""
    return LABELS.get(name, name.replace("_", " ") if name in MEANINGS else name)


def figure(value: float) -> str:
    """A score with three decimals, and below a tenth with three significant digits: 0.806, 0.0203."""
    return f"{value:#.3g}" if abs(value) < 0.1 else f"{value:.3f}"


def baseline_lines(baselines: Mapping[str, float], mmse_bound: float | None = None) -> list[str]:
    """One line a baseline, its figure beside what it means; the MMSE bound behind them where it is known."""
    wide = max([8, *map(len, baselines)])
    rows = [(name.replace("_", " "), value, MEANINGS.get(name, "")) for name, value in baselines.items()]
    if mmse_bound is not None:
        rows.append(("MMSE bound", mmse_bound, BOUND))
        wide = max(wide, len("MMSE bound"))
    return [f"  {name:<{wide}} {figure(value):>6}  {meaning}".rstrip() for name, value, meaning in rows]


def milestone_line() -> str:
    return "  then: " + ", ".join(f"{value:g} {meaning}" for value, meaning in MILESTONES.items())


def judge(
    nmse: float | None,
    baselines: Mapping[str, float],
    *,
    mmse_bound: float | None = None,
    milestones: bool = True,
) -> str:
    """A figure beside the constant answer, in words: which estimators without a network it does not beat, the last
    milestone that it has passed, and how far it is from the MMSE bound of the scenes, where that is known."""
    mean = baselines.get("mean", 1.0)
    if nmse is None:
        return f"not measured (baseline {mean:.3f})"
    if not math.isfinite(nmse):
        return f"not a number (baseline {mean:.3f})"
    if nmse >= mean:
        return f"{figure(nmse)}, no better than the constant answer ({mean:.3f})"
    better = [(name, value) for name, value in baselines.items() if name not in CONSTANT_BASELINES and value <= nmse]
    passed = [meaning for value, meaning in MILESTONES.items() if milestones and nmse <= value]
    bound = f"{nmse / mmse_bound:.3g} times the MMSE bound of these scenes ({figure(mmse_bound)})" if mmse_bound else ""
    return "; ".join(
        filter(
            None,
            [
                f"{figure(nmse)}, below the constant answer ({mean:.3f})",
                ", ".join(f"not below the {name.replace('_', ' ')} ({figure(value)})" for name, value in better),
                passed and f"passed: {passed[-1]}",
                bound,
            ],
        )
    )
