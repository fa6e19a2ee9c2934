"""Steps of optimizers that `watch` was not given, on tensors that it watches.

A hook that torch calls at every optimizer's step tells of them. Within a compiled step it does nothing.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch.optim import Optimizer

KEPT = 32


@dataclass
class Rival:
    """An optimizer that steps. `shared`: ids of its tensors that are watched; `first`, `last`: its steps, counted in
    those of all; `given`: whether `watch` was given it; `nested`: it steps within a step of one that was given, or
    around."""

    kind: str
    shared: frozenset[int]
    given: bool
    nested: bool
    first: int
    last: int
    steps: int = 0


class Rivals:
    """All optimizers that have made a step since the watch began."""

    def __init__(self, given: Sequence[Optimizer], watched: Callable[[], set[int]]) -> None:
        """`watched()`: ids of the tensors of interest now."""
        self.given, self.watched = [weakref.ref(each) for each in given], watched
        self.known: dict[int, tuple[weakref.ref[Optimizer], Rival]] = {}
        self.rivals: list[Rival] = []
        self.clock = 0
        self.inside: Optimizer | None = None  # the one whose step runs

    def stepped(self, optimizer: Optimizer) -> None:
        """After a step of any optimizer."""
        self.clock += 1
        known = self.known.get(id(optimizer))
        if known is None or known[0]() is not optimizer:
            known = self.known[id(optimizer)] = weakref.ref(optimizer), self._begin(optimizer)
            self.known = {key: each for key, each in self.known.items() if each[0]() is not None}
        rival = known[1]
        rival.steps, rival.last = rival.steps + 1, self.clock

    def _begin(self, optimizer: Optimizer) -> Rival:
        tensors = {id(p) for group in optimizer.param_groups for p in group["params"]}
        given = any(each() is optimizer for each in self.given)
        rival = Rival(
            type(optimizer).__name__,
            frozenset(tensors & self.watched()),
            given,
            self.inside not in (None, optimizer) or self._wraps(optimizer),
            self.clock,
            self.clock,
        )
        if rival.shared and not given:
            self.rivals = [*self.rivals[: KEPT // 2], *self.rivals[KEPT // 2 :][-KEPT // 2 :], rival]
        return rival

    def span(self, optimizer: Optimizer) -> tuple[int, int] | None:
        """Its first and last step."""
        known = self.known.get(id(optimizer))
        return (known[1].first, known[1].last) if known and known[0]() is optimizer else None

    def _wraps(self, optimizer: Optimizer) -> bool:
        """Whether it is made of an optimizer that was given."""
        given = [each() for each in self.given]
        inner = [each for each in vars(optimizer).values() if isinstance(each, Optimizer)]
        return any(
            one is other or one.param_groups is other.param_groups
            for one in (optimizer, *inner)
            for other in given
            if other is not None and other is not optimizer
        )

    def steps_on(self, optimizer: Optimizer, tensors: Sequence[int]) -> int:
        """Steps that others have made on any of these tensors."""
        return sum(
            rival.steps
            for ref, rival in self.known.values()
            if ref() is not optimizer and not rival.shared.isdisjoint(tensors)
        )


def held_by_optimizers() -> set[int]:
    """Ids of what any optimizer of the process holds, those that have not stepped yet too."""
    found = [each for each in gc.get_objects() if issubclass(type(each), Optimizer) and hasattr(each, "param_groups")]
    return {id(p) for optimizer in found for group in optimizer.param_groups for p in group["params"]}
