"""Words for what a finding speaks of: tensors by their share of the weights, largest first, and steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

SHOWN = 3


def describe_tensors(sizes: Mapping[str, int], whole: int) -> str:
    """Count, share of the weights, and the largest: '64 tensors, 56 % of the weights; the largest: a 34 %, ...'.

    Args: sizes: numbers in each tensor, by its name; whole: numbers in all of the model's tensors.
    """
    total = max(whole, sum(sizes.values()), 1)
    largest = sorted(sizes, key=lambda name: -sizes[name])[:SHOWN]  # of equal ones the first
    if len(sizes) == 1:
        return f"{largest[0] or '?'}, {_percent(sizes[largest[0]], total)} of the weights"
    parts = ", ".join(f"{name or '?'} {_percent(sizes[name], total)}" for name in largest)
    before = "; the largest: " if len(sizes) > SHOWN else ": "
    whole_share = _percent(sum(sizes.values()), total)
    return f"{len(sizes)} tensors, {whole_share} of the weights{before}{parts}"


def share_of(sizes: Mapping[str, int], whole: int) -> float:
    """Of the weights, for `Finding.harm`."""
    return sum(sizes.values()) / max(whole, sum(sizes.values()), 1)


def describe_steps(steps: Sequence[int], looked_at: int) -> str:
    """At which of the steps that were looked at; counted from 1."""
    if len(steps) == looked_at:
        return f"at all {looked_at} steps that were looked at" if looked_at > 1 else f"at step {steps[0]}"
    some = ", ".join(map(str, steps[:SHOWN])) + (", ..." if len(steps) > SHOWN else "")
    return f"at {len(steps)} of the {looked_at} steps that were looked at: {some}"


def _percent(part: int, whole: int) -> str:
    percent = 100.0 * part / whole
    return f"{percent:.0f} %" if percent >= 1.0 or not part else f"{percent:.1g} %"
