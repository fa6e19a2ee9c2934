"""The word that ends a run, in a sentence: which of the lines that a learner must pass it did not pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ris_fast.physics.baseline_names import CONSTANT_BASELINES
from ris_fast.training.summary import LEARNED

STANDS_STILL = "stalled_above_inputs"  # a cause of the watch
FEW_STEPS = 200  # a network that learns shows it within as many


def stalled_because(summary: Mapping[str, Any]) -> str:
    """`0.0266, below every constant answer (0.79) but not better than pursuit, ...`: why a run is called stalled.

    `summary` is that of the run: best_val_nmse, baselines, initial_val_nmse; each may be missing.
    """
    best, baselines, start = (
        summary.get("best_val_nmse"),
        summary.get("baselines") or {},
        summary.get("initial_val_nmse"),
    )
    if best is None:
        return "not measured: no epoch was validated with a finite figure"
    constants = [baselines[name] for name in CONSTANT_BASELINES if name in baselines]
    lowest = min(constants, default=1.0)
    if best >= lowest:
        steps = summary.get("optimizer_steps")
        few = f"; {steps} steps are few, train longer" if isinstance(steps, int) and steps < FEW_STEPS else ""
        return (
            f"{best:.3g} is no better than the constant answer ({lowest:.3g}): the network has learned nothing of the"
            f" scenes{few}"
        )
    feeding = {
        name: value for name, value in baselines.items() if name not in CONSTANT_BASELINES and best >= LEARNED * value
    }
    if feeding:
        name, value = min(feeding.items(), key=lambda item: item[1])
        beside = "not better" if best >= value else "not clearly better"
        return (
            f"{best:.3g} is below every constant answer ({lowest:.3g}) but {beside} than {name.replace('_', ' ')},"
            f" {value:.3g}, which the network's inputs give without it: "
            + ("it stands still there" if STANDS_STILL in (summary.get("findings") or ()) else "train longer")
        )
    if isinstance(start, (int, float)) and start < lowest:
        return (
            f"{best:.3g} is not clearly below what the network scored before its first step ({start:.3g}): train longer"
        )
    return f"{best:.3g} is not clearly below the constant answer ({lowest:.3g}): train longer"


def lost_again(summary: Mapping[str, Any]) -> list[str]:
    """A line for a run that ends far above its best, which its verdict does not show; none for others."""
    ends = [
        value
        for key in ("val_nmse_raw", "val_nmse_ema")
        if isinstance(value := summary.get(key), (int, float)) and value == value
    ]
    if "collapsed" not in (summary.get("findings") or ()) or not ends:
        return []
    return [
        f"but it was lost again: the last validation NMSE is {min(ends):.3g}; the best checkpoint has the weights from"
        " before"
    ]


def explanation_lines(summary: Mapping[str, Any], *, every: bool = False) -> list[str]:
    """What a stalled run was looked at for, what is likely first: each explanation with the measurement that speaks for
    it or against it, or why there is none; findings, which are shown by themselves, left out.

    `every`: a line for each; else seven lines at most. Empty where nothing was looked at.
    """
    entries = summary.get("explanations")
    if summary.get("verdict") != "stalled" or not isinstance(entries, Sequence):
        return []
    entries = [each for each in entries if not each.get("found")]
    if every:
        return [_explained(each) for each in entries]
    by_status = {status: [each for each in entries if each["status"] == status] for status in _MOST}
    lines = [_explained(each) for status, most in _MOST.items() for each in by_status[status][:most]]
    left = {status: len(by_status[status]) - most for status, most in _MOST.items() if len(by_status[status]) > most}
    if out := [each for each in entries if each["status"] == RULED_OUT]:
        said = [f"{each['reason']} ({each['by']})" for each in out[:_SHOWN]]
        left |= {RULED_OUT: len(out) - _SHOWN} if len(out) > _SHOWN else {}
        lines.append(f"  ruled out: {'; '.join(said)}")
    if left:
        lines.append("  and " + ", ".join(f"{count} more {status}" for status, count in left.items()))
    return lines


def _explained(each: Mapping[str, Any]) -> str:
    todo = f". try: {each['next']}" if each.get("next") else ""
    return f"  {each['status']}: {each['reason']}: {each['by']}{todo}"


RULED_OUT = "ruled out"
_MOST, _SHOWN = {"likely": 3, "not looked at": 2}, 5
