"""What is added up over all steps of an optimizer, as plain data."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

LOW = 1.01e-3  # of it: next to nothing moves
STILL = 1e-6  # of the largest rate that a group had: below it nothing moves that moved before


@dataclass
class TensorHistory:
    """A tensor over the steps of its optimizer.

    Args: steps: that found it in a group; with_grad, free: those that found it with a gradient, with requires_grad;
        last_free: the last of them, -1 for none; turns: changes between free and frozen.
    """

    steps: int = 0
    with_grad: int = 0
    free: int = 0
    last_free: int = -1
    turns: int = 0
    was_free: bool | None = None

    def add(self, first: int, count: int, present: bool, free: bool) -> None:
        """`count` steps from `first` on."""
        self.steps += count
        self.with_grad += count * present
        self.free += count * free
        self.last_free = first + count - 1 if free else self.last_free
        self.turns += self.was_free is not None and self.was_free != free
        self.was_free = free


@dataclass
class RateHistory:
    """The learning rate of a group.

    Args: still, negative: steps at a rate of next to nothing of the largest before, and below zero;
        still_since, negative_since: where the last step is one of those, the first of the steps in a row; low_since: of
        those below a thousandth of the largest; changed_at: the first step at the last rate; falls: of the changes.
    """

    first: float = math.nan
    last: float = math.nan
    largest: float = 0.0
    since: int = 0
    changes: int = -1
    falls: int = 0
    still: int = 0
    negative: int = 0
    still_since: int | None = None
    negative_since: int | None = None
    low_since: int | None = None
    changed_at: int = 0

    def note(self, step: int, rate: float) -> None:
        """From `step` on it is `rate`."""
        if rate == self.last:
            return
        self._close(step)
        self.first = rate if self.changes < 0 else self.first
        self.changed_at, self.falls = step, self.falls + (rate < self.last)
        self.last, self.largest, self.changes = rate, max(self.largest, rate), self.changes + 1
        still, negative = 0 <= rate <= STILL * self.largest, rate < 0
        self.still_since = (step if self.still_since is None else self.still_since) if still else None
        self.low_since = (step if self.low_since is None else self.low_since) if rate <= LOW * self.largest else None
        self.negative_since = (step if self.negative_since is None else self.negative_since) if negative else None

    def _close(self, step: int) -> None:
        self.still += (step - self.since) * (self.still_since is not None)
        self.negative += (step - self.since) * (self.negative_since is not None)
        self.since = step

    def closed(self, steps: int) -> RateHistory:
        """A copy that counts all `steps`."""
        copy = replace(self)
        copy._close(steps)
        return copy


@dataclass
class SettingHistory:
    """One setting of a group other than its rate: its first value, the one now, how often it changed and when last."""

    group: int
    name: str
    first: Any
    now: Any
    changes: int = 0
    at: int = 0

    def change(self, step: int, value: Any) -> None:
        self.now, self.changes, self.at = value, self.changes + 1, step


@dataclass(frozen=True)
class PlainSteps:
    """What is known of every step.

    Args: tensors: histories by id of the tensor; rates: by group, where they are numbers; outside: steps before which
        a tensor had been written to; state_lost: how often its state was gone.
    """

    tensors: dict[int, TensorHistory] = field(default_factory=dict)
    rates: dict[int, RateHistory] = field(default_factory=dict)
    settings: list[SettingHistory] = field(default_factory=list)
    outside: int = 0
    state_lost: int = 0


@dataclass(frozen=True)
class Passes:
    """Backward passes that reached one tensor, counted between two steps.

    Args: intervals: how often a step came after so many passes, of which so many found the gradient before them gone,
        and whether all came from one line, with the weights at rest; replaced: steps that found another gradient than
        the last pass left; since: passes since the last step.
    """

    intervals: dict[tuple[int, int, bool], int] = field(default_factory=dict)
    replaced: int = 0
    since: int = 0


@dataclass(frozen=True)
class GradientNumbers:
    """A few numbers of all gradients at the last look: how many, of which zero, and of which others below the smallest
    normal number of float16 and on its grid; and how many tensors, no biases, have some and none that are not."""

    sampled: int = 0
    zero: int = 0
    narrow: int = 0
    narrow_matrices: int = 0


@dataclass(frozen=True)
class NumbersRecord:
    """A few numbers of a tensor now, beside those before the first step.

    Args: sampled: how many; changed: those that are others now; live: those that had a gradient other than zero in a
        step that was looked at; held: those of them that are not changed; short: finite ones whose last 13 bits of 32
        are zero, as those of 16-bit formats are; distinct: different ones; size: their mean magnitude.
    """

    sampled: int
    changed: int
    live: int
    held: int
    short: int
    distinct: int
    size: float
