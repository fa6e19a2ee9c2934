"""What a learning rate that follows a schedule of the user's own does that no schedule is meant to do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

ABOVE = 0.05  # relative
VARIES, SAME = 0.1, 1e-6  # relative, of the rates within an epoch; between two epochs
THOUSANDTH, EARLY, ENDS = 1e-3, 0.1, 0.75  # of its highest rate, reached in this share of the run; zero before
SWINGS, SHORT = 4, 0.02  # turns of its way; share of the run between two of them
FEW, DROPS = 4, 2  # updates in which a rate falls, in so many steps at least
LOW = 0.05  # of its peak rate, that a group is given a fraction of


def out_of_plan(shares: Sequence[tuple[int, float]], epoch_steps: int, planned: int) -> str:
    """What is wrong with a rate, as the end of a sentence; empty where it may be meant.

    Args: shares: number of the update, and its rate as a share of the peak rate of its group, in order; epoch_steps,
        planned: updates of an epoch, and of the run.
    """
    if not shares:
        return ""
    highest, top = max((share, number) for number, share in shares)
    last, now = shares[-1]
    if highest > 1 + ABOVE and now == highest > shares[0][1]:  # and it rises still
        return f"is {highest:.3g} times its peak rate after {top} updates, and nothing bounds it there"
    if again := _starts_again(shares, epoch_steps):
        return again
    ways = [later - earlier for (_, earlier), (_, later) in pairwise(shares) if later != earlier]
    turns = sum(one * other < 0 for one, other in pairwise(ways))
    if turns >= SWINGS and last - shares[0][0] < turns * SHORT * planned:
        return f"rises and falls, and turns {turns} times in {last - shares[0][0]} updates"
    if highest < LOW and last - shares[0][0] >= FEW and now <= shares[-2][1]:
        return f"is {highest:.2g} of its peak rate at most in {len(shares)} updates, and does not rise"
    if not now < highest:
        return ""
    if now <= 0:
        return f"is zero after {last} updates" if last < ENDS * planned else ""
    if last - top < FEW or sum(way < 0 for way in ways) < DROPS:
        return ""  # it may be halved at some time
    pace = math.log(highest / now) / (last - top)
    reached = top + math.log(1 / THOUSANDTH) / pace
    if reached < EARLY * planned:
        return (
            f"has fallen from {highest:.3g} to {now:.3g} of its peak rate between updates {top} and {last}, and at this"
            f" pace is a thousandth of it after {reached:.0f}"
        )
    return ""


def _starts_again(shares: Sequence[tuple[int, float]], epoch_steps: int) -> str:
    """A rate that goes the same way in every epoch."""
    rows: dict[int, dict[int, float]] = {}
    for number, share in shares:
        rows.setdefault(number // epoch_steps, {})[number % epoch_steps] = share
    for one, other in pairwise(rows.values()):
        both = sorted(one.keys() & other.keys())
        varies = len(both) > 2 and max(one[k] for k in both) > (1 + VARIES) * min(one[k] for k in both)
        if varies and all(abs(one[k] - other[k]) <= SAME * one[k] for k in both):
            return f"goes the same way in every epoch, from {one[both[0]]:.3g} to {one[both[-1]]:.3g} of its peak rate"
    return ""
