"""Ranks side by side: those with the same tensors, and the steps that all of them looked at.

Legend: R ranks, S numbers, a few of every tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from ris_fast.health.watch.rank_records import RankOptimizer, RankRecord, RanksRecord, RankStep

NEAR, FAR = 5e-3, 5e-2  # share of a gradient by which it is not another one's multiple: rounding in 16 bits; other data
FEW_NUMBERS = 4  # of fewer, any two are nearly multiples
ALL = "all tensors"
LOCAL_STEPS = {"PostLocalSGDOptimizer"}


@dataclass(frozen=True)
class RankedStep:
    """One step of all ranks that are compared, of tensors that all of them looked at; see `RankStep`. Rows are ranks:
    (R, S).

    Args: optimizer: its place among those that are watched.
    """

    optimizer: int
    step: int
    parts: dict[str, slice]
    arrived: Tensor
    at_step: Tensor
    weights: Tensor
    rates: list[list[float]]
    held_back: bool


@dataclass(frozen=True)
class Group:
    """Ranks, and the steps that all of them looked at.

    Args: hashes: of the tensors that all of them have, by name, of each rank; managed, within, given: see `Wrapper`;
        loose: why unlike weights or gradients may be meant.
    """

    ranks: list[RankRecord]
    steps: list[RankedStep]
    hashes: dict[str, tuple[int, ...]]
    managed: set[str]
    within: set[str]
    given: bool
    loose: str

    def named(self, places: Sequence[int]) -> str:
        numbers = [str(self.ranks[place].rank) for place in places]
        return f"rank{'s' * (len(numbers) > 1)} {', '.join(numbers[:8])}"

    def first_steps(self) -> list[RankedStep]:
        """Of each optimizer."""
        return [
            step for last, step in zip([None, *self.steps], self.steps) if not last or last.optimizer < step.optimizer
        ]

    def copied(self) -> set[str]:
        """Tensors that began with the same weights on all ranks, other than zeros or ones: copies of one network."""
        parts = [(name, step.weights[:, part]) for step in self.first_steps() for name, part in step.parts.items()]
        drawn = [(name, rows) for name, rows in parts if bool((rows[0] != rows[0, 0]).any())]
        alike = {name for name, rows in drawn if all_alike(rows)}
        return {name for name, rows in parts if all_alike(rows)} if alike and len(alike) == len(drawn) else alike


def group_ranks(ranks: RanksRecord) -> Group:
    mine = ranks.mine
    inside = mine.wrapper.ranks if mine.wrapper else range(ranks.size)
    same = [each for each in ranks.ranks if each.rank in inside and len(each.optimizers) == len(mine.optimizers)]
    wrappers = [each.wrapper for each in same if each.wrapper]
    by_optimizer = enumerate(zip(*(each.optimizers for each in same)))
    steps = [step for number, of_one in by_optimizer for step in _common_steps(number, of_one)]
    return Group(
        ranks=same,
        steps=steps,
        hashes=_common_hashes(same),
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


def _common_hashes(ranks: list[RankRecord]) -> dict[str, tuple[int, ...]]:
    by_rank = [dict(zip(zip(each.names, each.shapes), each.hashes)) for each in ranks]
    common = [key for key in by_rank[0] if all(key in each for each in by_rank)]
    return {key[0]: tuple(each[key] for each in by_rank) for key in common}


def _common_steps(number: int, optimizers: Sequence[RankOptimizer]) -> Iterator[RankedStep]:
    """Steps that all ranks looked at; tensors that all ranks have."""
    by_rank = [{record.step: record for record in each.records} for each in optimizers]
    for step in sorted(set.intersection(*map(set, by_rank))):
        records = [each[step] for each in by_rank]
        sizes = [dict(zip(each.names, each.sizes)) for each in records]
        names = [name for name, size in sizes[0].items() if all(each.get(name) == size for each in sizes)]
        ends = torch.tensor([sizes[0][name] for name in names]).cumsum(0).tolist()
        if names:
            yield RankedStep(
                optimizer=number,
                step=step,
                parts={name: slice(end - sizes[0][name], end) for name, end in zip(names, ends)},
                arrived=torch.stack([_numbers_of(each, names, each.arrived) for each in records]),
                at_step=torch.stack([_numbers_of(each, names, each.at_step) for each in records]),
                weights=torch.stack([_numbers_of(each, names, each.weights) for each in records]),
                rates=[[float(rate) for rate in each.rates] for each in records],
                held_back=any(each.held_back for each in records),
            )


def _numbers_of(record: RankStep, names: list[str], numbers: Tensor) -> Tensor:
    """(S,) of these tensors."""
    parts = dict(zip(record.names, numbers.split(record.sizes)))
    return torch.cat([parts[name] for name in names])


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
