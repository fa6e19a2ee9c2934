"""What can be known of every step without reading a tensor: who has a gradient, who is frozen, rates, other settings.

Version counters tell whether a tensor was written to, within the step and between two.

Legend: T tensors of one optimizer's groups.
"""

from __future__ import annotations

from dataclasses import replace
from operator import is_
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ris_fast.health.watch.histories import PlainSteps, RateHistory, SettingHistory, TensorHistory


class EveryStep:
    """Facts about each step of an optimizer, added up."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.steps = 0
        self.ids: list[int] = []
        self.present: list[bool] = []
        self.free: list[bool] = []
        self.since = 0  # the step from which on the three lists are what they are
        self.tensors: dict[int, TensorHistory] = {}
        self.values: list[Any] = []  # of all settings of all groups
        self.settings: dict[tuple[int, str], SettingHistory] = {}
        self.rates: dict[int, RateHistory] = {}
        self.versions: list[int] = []
        self.outside: list[int] = []  # steps before which a tensor was written to
        self.outside_count, self.written, self.last_ids = 0, False, self.ids
        self.unwritten = 0  # steps that wrote to no tensor, although one had a gradient
        self.memberships = 0  # changes of the list of tensors
        self.state_size, self.state_lost, self.state_is_lost = 0, 0, False

    def before(self, tensors: list[Tensor], closure: bool) -> None:
        """Before a step; with a closure gradients come within it."""
        self._note_settings()
        size = len(self.optimizer.state)
        self.state_is_lost = size == 0 and self.state_size > 0
        self.state_lost += self.state_is_lost
        ids, versions = list(map(id, tensors)), [p._version for p in tensors]
        if ids != self.ids:
            self.flush()
            self.memberships += bool(self.ids)
            self.ids, self.present, self.free = ids, [], []
        self.written = self.versions != versions and ids == self.last_ids and self.steps > 0
        self.last_ids = ids
        if self.written:
            self.outside_count += 1
            self.outside = [*self.outside[:16], *self.outside[16:][-15:], self.steps]
        self.versions = versions
        if not closure:
            self._note_pattern(tensors)

    def after(self, tensors: list[Tensor], closure: bool) -> None:
        """After a step."""
        if closure:
            self._note_pattern(tensors)
        versions = [p._version for p in tensors]
        self.unwritten += versions == self.versions and any(self.present)
        self.versions, self.state_size = versions, len(self.optimizer.state)
        self.steps += 1

    def _note_pattern(self, tensors: list[Tensor]) -> None:
        present, free = [p.grad is not None for p in tensors], [p.requires_grad for p in tensors]
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
            outside=self.outside_count,
            outside_steps=tuple(self.outside),
            unwritten=self.unwritten,
            memberships=self.memberships,
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
        groups = self.optimizer.param_groups
        values = [value for group in groups for name, value in group.items() if name != "params"]
        if len(values) == len(self.values) and all(map(is_, values, self.values)):
            return
        self.values = values
        for number, group in enumerate(groups):
            for name, value in group.items():
                if name == "lr" and not isinstance(value, Tensor):
                    self.rates.setdefault(number, RateHistory()).note(self.steps, float(value))
                elif name not in ("params", "lr", "initial_lr") and not isinstance(value, Tensor):
                    self._note(number, name, value)

    def _note(self, number: int, name: str, value: Any) -> None:
        record = self.settings.get((number, name))
        if record is None:
            self.settings[number, name] = SettingHistory(number, name, value, value)
        elif record.now is not value and record.now != value:
            record.change(self.steps, value)
