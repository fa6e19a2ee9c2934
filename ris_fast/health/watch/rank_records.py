"""What `watch` knows of several ranks, as plain data.

Legend: S numbers, a few of every tensor.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor


@dataclass
class RankStep:
    """One optimizer step of one rank, of tensors whose gradient came from backward and is there at the step.

    Args: sizes: how many numbers are of each tensor; arrived, at_step, weights: (S,) those numbers, one tensor after
        the other, of gradients as backward left them on this rank and as the optimizer found them, and of the weights
        before the step; held_back: the model's DistributedDataParallel was told not to reduce (`no_sync`).
    """

    step: int
    names: list[str]
    sizes: list[int]
    arrived: Tensor
    at_step: Tensor
    weights: Tensor
    rates: list[float | Tensor]
    held_back: bool

    def on_host(self) -> RankStep:
        host = {name: getattr(self, name).cpu().double() for name in ("arrived", "at_step", "weights")}
        return replace(self, rates=[float(rate) for rate in self.rates], **host)


@dataclass(frozen=True)
class RankOptimizer:
    """One optimizer of one rank.

    Args: zero_steps, full_steps: of the last 1024, those in which backward left one small tensor a gradient of zeros
        only, and another one.
    """

    kinds: frozenset[str]
    steps: int
    records: list[RankStep]
    zero_steps: list[int]
    full_steps: list[int]


@dataclass(frozen=True)
class Wrapper:
    """A DistributedDataParallel.

    Args: given: it is what is watched, or part of it; managed: names of the tensors whose gradients it reduces;
        within: of those in the module that it wraps, but for those that it was told to leave alone; ranks: those it
        reduces over; own_reduction: a communication hook of the user reduces.
    """

    given: bool
    managed: list[str]
    within: list[str]
    ranks: list[int]
    own_reduction: bool


@dataclass(frozen=True)
class RankRecord:
    """One rank, at the report; of the tensors that it holds whole: names, shapes, whether they are trainable, and a
    hash of all their bits.

    Args: inputs: hashes of what the model was given in passes in training, by number of the pass.
    """

    rank: int
    device: str
    names: list[str]
    shapes: list[tuple[int, ...]]
    trainable: list[bool]
    hashes: list[int]
    optimizers: list[RankOptimizer]
    wrapper: Wrapper | None
    inputs: dict[int, str]

    @property
    def steps(self) -> int:
        return max(each.steps for each in self.optimizers)


@dataclass(frozen=True)
class RanksRecord:
    """Ranks that reported at the same step, this one among them.

    Args: size: how many there are; elsewhere: of ranks that reported at this time at another step, with other weights,
        which step.
    """

    mine: RankRecord
    ranks: list[RankRecord]
    size: int
    elsewhere: dict[int, int]
