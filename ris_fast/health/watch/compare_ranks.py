"""Ranks side by side: those with the same tensors, and the steps that all of them looked at.

Legend: R ranks, S numbers, a few of every tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from ris_fast.health.watch.records import RankOptimizer, RankRecord, RanksRecord

NEAR, FAR = 5e-3, 5e-2  # share of a gradient by which it is not another one's multiple: rounding in 16 bits; other data
FEW_NUMBERS = 4  # of fewer, any two are nearly multiples
ALL = "all tensors"
LOCAL_STEPS = {"PostLocalSGDOptimizer"}


@dataclass(frozen=True)
class RankedStep:
    """One step of all ranks that are compared; see `RankStep`. Rows are ranks: (R, S)."""

    step: int
    parts: dict[str, slice]
    arrived: Tensor
    at_step: Tensor
    weights: Tensor
    rates: list[list[float]]
    held_back: bool


@dataclass(frozen=True)
class Group:
    """Ranks with the same tensors, and the steps that all of them looked at."""

    ranks: list[RankRecord]
    steps: list[RankedStep]
    managed: set[str]
    within: set[str]
    given: bool
    loose: str  # why unlike weights or gradients may be meant

    def named(self, places: Sequence[int]) -> str:
        numbers = [str(self.ranks[place].rank) for place in places]
        return f"rank{'s' * (len(numbers) > 1)} {', '.join(numbers[:8])}"


def group_ranks(ranks: RanksRecord) -> Group:
    mine = ranks.mine
    inside = mine.wrapper.ranks if mine.wrapper else range(ranks.size)
    same = [
        each
        for each in ranks.ranks
        if each.rank in inside
        and (each.names, each.shapes, len(each.optimizers)) == (mine.names, mine.shapes, len(mine.optimizers))
    ]
    wrappers = [each.wrapper for each in same if each.wrapper]
    steps = [step for of_one in zip(*(each.optimizers for each in same)) for step in _common_steps(of_one)]
    return Group(
        ranks=same,
        steps=steps,
        managed={name for each in wrappers for name in each.managed},
        within={name for each in wrappers for name in each.within},
        given=any(each.given for each in wrappers),
        loose=_loose(same, steps),
    )


def _loose(ranks: list[RankRecord], steps: list[RankedStep]) -> str:
    optimizers = [each for rank in ranks for each in rank.optimizers]
    if any(rank.wrapper and rank.wrapper.own_reduction for rank in ranks):
        return "A communication hook of your own reduces."
    if any(each.kinds & LOCAL_STEPS for each in optimizers):
        return "A local optimizer averages weights now and then."
    if any(step.held_back for step in steps):
        return (
            "`no_sync` was on in the last backward of these steps, as local SGD has it: where no weights are averaged,"
            " it was left on."
        )
    return ""


def _common_steps(optimizers: Sequence[RankOptimizer]) -> Iterator[RankedStep]:
    """Steps that all ranks looked at, with the same tensors."""
    by_rank = [{record.step: record for record in each.records} for each in optimizers]
    for step in sorted(set.intersection(*map(set, by_rank))):
        records = [each[step] for each in by_rank]
        if all((each.names, each.sizes) == (records[0].names, records[0].sizes) for each in records):
            ends = torch.tensor(records[0].sizes).cumsum(0).tolist()
            yield RankedStep(
                step=step,
                parts={n: slice(end - size, end) for n, size, end in zip(records[0].names, records[0].sizes, ends)},
                arrived=torch.stack([each.arrived for each in records]),
                at_step=torch.stack([each.at_step for each in records]),
                weights=torch.stack([each.weights for each in records]),
                rates=[[float(rate) for rate in each.rates] for each in records],
                held_back=any(each.held_back for each in records),
            )


def multiple_of(base: Tensor, other: Tensor, slack: float = NEAR) -> float | None:
    """By what `base` has to be multiplied to be `other`; None where it is not its multiple, or one of them is zero."""
    if not base.any() or not other.any() or not bool((base.isfinite() & other.isfinite()).all()):
        return None
    factor = float(base @ other) / float(base @ base)
    return factor if factor > 0 and float((other - factor * base).norm()) <= slack * float(other.norm()) else None


def all_alike(rows: Tensor) -> bool:
    """Whether all ranks have the same numbers, bit for bit."""
    return bool((rows == rows[0]).all())


def all_apart(rows: Tensor) -> bool:
    """Whether no two ranks have multiples of the same gradient."""
    return all(row.any() for row in rows) and all(multiple_of(a, b, FAR) is None for a, b in combinations(rows, 2))


def judged_parts(step: RankedStep) -> dict[str, slice]:
    """Tensors with enough numbers to tell directions apart; if there is none, all together."""
    large = {name: part for name, part in step.parts.items() if part.stop - part.start >= FEW_NUMBERS}
    return large or {ALL: slice(0, step.at_step.shape[1])}
