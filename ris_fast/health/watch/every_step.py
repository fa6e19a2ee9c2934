"""What can be known of every step without reading a tensor: who has a gradient, who is frozen, rates, other settings.

Version counters tell whether a tensor was written to, within the step and between two.

Legend: T tensors of one optimizer's groups.
"""

from __future__ import annotations

from dataclasses import replace
from operator import attrgetter, is_
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ris_fast.health.watch.histories import PlainSteps, RateHistory, SettingHistory, TensorHistory
from ris_fast.health.watch.samples import held_tensors

VERSION, FREE = attrgetter("_version"), attrgetter("requires_grad")


class EveryStep:
    """Facts about each step of an optimizer, added up."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.steps = 0
        self.held: list[Tensor] = []  # (T,) at the last step
        self.ids: list[int] = []
        self.present: list[bool] = []
        self.free: list[bool] = []
        self.since = 0  # the step from which on the lists are what they are
        self.tensors: dict[int, TensorHistory] = {}
        self.groups: list[dict[str, Any]] = []  # copies, with all settings
        self.settings: dict[tuple[int, str], SettingHistory] = {}
        self.rates: dict[int, RateHistory] = {}
        self.versions: list[int] = []
        self.outside, self.written = 0, False  # steps before which a tensor was written to
        self.state_size, self.state_lost, self.state_is_lost = 0, 0, False

    def before(self, closure: bool) -> None:
        """Before a step; with a closure gradients come within it."""
        optimizer = self.optimizer
        groups = optimizer.param_groups
        for group, last in zip(groups, self.groups):
            if len(group) != len(last) or not all(map(is_, group.values(), last.values())):
                self._note_settings()
                break
        else:
            if len(groups) != len(self.groups):
                self._note_settings()
        self.state_is_lost = self.state_size > 0 and not optimizer.state
        self.state_lost += self.state_is_lost
        tensors = groups[0]["params"] if len(groups) == 1 else held_tensors(optimizer)
        versions = list(map(VERSION, tensors))
        if len(tensors) == len(self.held) and all(map(is_, tensors, self.held)):
            self.written = versions != self.versions and self.steps > 0
            if self.written:
                self.outside += 1
        else:
            self.flush()
            self.held, self.ids = list(tensors), list(map(id, tensors))
            self.present, self.free, self.written = [], [], False
        if not closure:
            self._note_pattern(tensors)

    def after(self, closure: bool) -> None:
        """After a step."""
        groups = self.optimizer.param_groups
        tensors = groups[0]["params"] if len(groups) == 1 else held_tensors(self.optimizer)
        if closure:
            self._note_pattern(tensors)
        self.versions, self.state_size = list(map(VERSION, tensors)), len(self.optimizer.state)
        self.steps += 1

    def _note_pattern(self, tensors: list[Tensor]) -> None:
        present, free = [p.grad is not None for p in tensors], list(map(FREE, tensors))
        if present != self.present or free != self.free:
            self.flush()
            self.present, self.free = present, free

    def record(self) -> PlainSteps:
        """All of it, as copies; tensors by id."""
        self.flush()
        return PlainSteps(
            tensors={key: replace(each) for key, each in self.tensors.items()},
            rates={number: each.closed(self.steps) for number, each in self.rates.items()},
            settings=[replace(each) for each in self.settings.values()],
            outside=self.outside,
            state_lost=self.state_lost,
        )

    def flush(self) -> None:
        """Adds the steps since the last change to each tensor's own count."""
        count = self.steps - self.since
        if count:
            for key, present, free in zip(self.ids, self.present, self.free):
                self.tensors.setdefault(key, TensorHistory()).add(self.since, count, present, free)
        self.since = self.steps

    def _note_settings(self) -> None:
        """Those that are not the objects that they were."""
        before, self.groups = self.groups, [dict(group) for group in self.optimizer.param_groups]
        for number, group in enumerate(self.groups):
            last = before[number] if number < len(before) else {}
            for name, value in group.items():
                if name in ("params", "initial_lr") or isinstance(value, Tensor) or last.get(name, last) is value:
                    continue
                if name == "lr":
                    self.rates.setdefault(number, RateHistory()).note(self.steps, float(value))
                else:
                    self._note(number, name, value)

    def _note(self, number: int, name: str, value: Any) -> None:
        record = self.settings.get((number, name))
        if record is None:
            self.settings[number, name] = SettingHistory(number, name, value, value)
        elif record.now is not value and record.now != value:
            record.change(self.steps, value)
