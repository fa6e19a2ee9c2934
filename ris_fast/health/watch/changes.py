"""Weights that are not at the start of a step what the step before left: a few numbers of both sides.

After a step that was looked at they are compared at any rate. After others they are kept once a version counter has
told of such a change, and compared if it tells of another.

Legend: T tensors of one optimizer; S numbers, a few of each.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from ris_fast.health.watch.samples import ParameterSample, WeightSamples

FIRST, LAST = 4, 8  # changes that are kept
ARMED = 0.02  # share of a step that keeping may take
LONG_S = 0.01  # of a step beside which that is small
FREE = 1024  # steps after the first change that are kept whatever it takes


@dataclass
class OutsideChange:
    """Between two steps.

    Args: step: the one that left the weights; names, sizes: (T,) of the tensors; before, after: (S,) around that step;
        later: (S,) at the start of the next; gradient: (S,) at that step, empty where it was not looked at;
        explained: another optimizer stepped on the same tensors in between; state_reset: the optimizer's state was
        loaded or emptied there too; first: (S,) before the first step that was looked at; settled: (S,) after the next
        step, where that was kept; like: by name of a helper, (), whether it has these numbers.
    """

    step: int
    names: list[str]
    sizes: list[int]
    before: Tensor
    after: Tensor
    later: Tensor
    gradient: Tensor
    explained: bool
    state_reset: bool
    first: Tensor
    settled: Tensor | None = None
    like: dict[str, Tensor] = field(default_factory=dict)

    def on_host(self) -> OutsideChange:
        host: dict[str, Any] = {name: value.cpu() for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, like={name: flag.cpu() for name, flag in self.like.items()}, **host)


@dataclass
class Sides:
    """What a step found and left."""

    step: int
    before: Tensor
    after: Tensor
    gradient: Tensor


class OutsideWatch:
    """Compares what a step left with what the next one finds."""

    def __init__(self) -> None:
        self.waiting: Sides | None = None
        self.looked = False  # whether that was a look
        self.names: list[str] = []
        self.tensors: list[Tensor] = []  # of the last look
        self.samples: WeightSamples | None = None
        self.light: tuple[int, Tensor] | None = None
        self.light_s, self.lights = 0.0, 0  # what one light sample takes, and how many there were
        self.armed = 0  # changes that the version counters have told
        self.changes: list[OutsideChange] = []
        self.first = torch.zeros(0)

    def wait(self, sample: ParameterSample, tensors: list[Tensor]) -> None:
        """After a step that was looked at."""
        self.waiting = Sides(sample.step, sample.before, sample.after, sample.gradient)
        self._settle()
        self.first = self.first if sample.names == self.names else sample.before
        self.names, self.tensors, self.samples, self.looked = sample.names, tensors, sample.samples, True

    def begin_light(self, step: int, step_s: float) -> None:
        """Before a step that is not looked at."""
        cheap = self.lights < FREE or (step_s > LONG_S and 2 * self.light_s < ARMED * step_s)
        if self.armed and cheap and self.samples is not None and self.tensors:
            self.lights += 1
            began = perf_counter()
            self.light = step, self.samples.read(self.tensors)
            self.light_s = perf_counter() - began

    def finish_light(self) -> None:
        """After it, where numbers were kept."""
        (step, before), self.light, self.looked = self.light, None, False
        self.waiting = Sides(step, before, self.samples.read(self.tensors), before[:0])
        self._settle()

    def _settle(self) -> None:
        """What the step left that began with the last change."""
        if self.changes and self.changes[-1].step == self.waiting.step - 1:
            self.changes[-1].settled = self.waiting.after

    def wants_to_compare(self, written: bool) -> bool:
        """At the start of a step; `written`: a version counter has changed since the step before."""
        self.armed += written
        if self.waiting is not None and not self.looked and not written:
            self.waiting = None
        return self.waiting is not None

    def compare(self, step: int, explained: bool, state_reset: bool) -> OutsideChange | None:
        """At the start of `step`; keeps the change, if there is one or the device would have to be asked."""
        last, self.waiting = self.waiting, None
        if last.step != step - 1:
            return None
        later = self.samples.read(self.tensors)
        if not later.shape == last.after.shape == last.before.shape or len(self.names) != len(self.samples.sizes):
            return None
        if later.device.type == "cpu" and torch.equal(later, last.after):
            return None
        change = OutsideChange(
            step - 1,
            self.names,
            list(self.samples.sizes),
            last.before,
            last.after,
            later,
            last.gradient,
            explained,
            state_reset,
            self.first if self.first.shape == later.shape else later[:0],
        )
        self.changes = [*self.changes[:FIRST], *self.changes[FIRST:][-(LAST - 1) :], change]
        return change
