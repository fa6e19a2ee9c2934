"""Moments: step counts, moments and averages in the buckets, and the entries of `optimizer.state` that show them."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ris_fast.kernels.fused_step.layout import State
from ris_fast.training.optim.arguments import check_saved
from ris_fast.training.optim.placement import Placement
from ris_fast.training.optim.views import identical

_OURS = ("step", "exp_avg", "exp_avg_sq", "ema", "counters")  # in an entry of `state`; the rest is the user's

StateEntries = MutableMapping[Any, dict[str, Any]]  # `optimizer.state`: parameter -> entry


class Moments:
    """Every entry of `optimizer.state` is made of views into the buckets, so that torch and savers read what is there.

    active: whether tensor i had a gradient in the last step; empty before the first step and after loading.
    averaging: True once the average has left its starting value; only then is it worth saving.
    """

    def __init__(self, placement: Placement, averaging: bool = False) -> None:
        self.placement, self.averaging = placement, averaging
        self.active: list[bool] = []
        self._shown: list[Any] = []

    def load(self, state: StateEntries, loaded: Mapping[Any, Any]) -> None:
        """Copies the loaded entries into the buckets and shows them; a tensor without moments starts from zero. Raises
        ValueError on moments that are missing or of another shape, before anything is copied."""
        tensors = self.placement
        for name, p in zip(tensors.names, tensors.params, strict=True):
            if loaded.get(p):
                check_saved(name, p, loaded[p])
        for i, p in enumerate(tensors.params):
            saved, entry = loaded.get(p), self._entry(i)
            for key, view in entry.items():
                view.copy_(torch.as_tensor(saved[key])) if saved else view.zero_()
            if not saved:
                state.pop(p, None)
                continue
            if self.averaging and "ema" in saved:
                tensors.averages[i].copy_(saved["ema"])
            state[p] = {key: value for key, value in saved.items() if key not in _OURS} | entry
        self.active = []
        self.note_earlier_steps()
        self.show(state)

    def note_earlier_steps(self) -> None:
        """Step counts from elsewhere may be ahead of the applied steps; the difference stays what it is now."""
        buckets = self.placement.buckets
        first = buckets[0]
        most = torch.stack([bucket.steps.max().to(first.device, torch.float64) for bucket in buckets]).max()
        ahead = (most - first.state[State.APPLIED]).clamp(min=0)
        for bucket in buckets:
            bucket.state[State.EARLIER].copy_(ahead)

    def _entry(self, i: int) -> dict[str, Tensor]:
        bucket, slot = self.placement.places[i]
        return dict(step=bucket.steps[slot], exp_avg=bucket.moments1[slot], exp_avg_sq=bucket.moments2[slot])

    def show(self, state: StateEntries) -> None:
        """Puts averages and, with the first tensor that has moments, the counters into `state`, where savers look."""
        params = self.placement.params
        holders = [i for i, p in enumerate(params) if state.get(p)]
        for i in holders:
            entry = state[params[i]]
            for key in ("ema", "counters"):
                entry.pop(key, None)
            entry.update({"ema": self.placement.averages[i]} if self.averaging else {})
            entry.update({"counters": self.placement.buckets[0].state} if i == holders[0] else {})
        self._shown = _values(state)

    def unchanged(self, state: StateEntries) -> bool:
        """Whether `state` holds what was shown there last."""
        return identical(_values(state), self._shown)

    def set_active(self, state: StateEntries, active: Sequence[bool]) -> None:
        """Makes `state` and the work tables of the kernels agree on which tensors have a gradient."""
        if active == self.active:
            return
        params = self.placement.params
        new = [i for i, there in enumerate(active) if there and not state.get(params[i])]
        for i in new:
            state[params[i]].update(self._entry(i))
        if new:
            self.show(state)
        self.active = list(active)
        for bucket, members in zip(self.placement.buckets, self.placement.members, strict=True):
            bucket.set_active([active[i] for i in members])

    def start_average(self, state: StateEntries) -> None:
        """The average begins as the weights are now; without effect where there is none or it has begun."""
        buckets = self.placement.buckets
        if buckets[0].ema is None or self.averaging:
            return
        for bucket in buckets:
            bucket.ema.copy_(bucket.param)
        self.averaging = True
        self.show(state)


def _values(state: Mapping[Any, Any]) -> list[Any]:
    try:
        return list(chain.from_iterable(map(dict.values, state.values())))
    except TypeError:  # a user's entry that belongs to no tensor may be anything
        return [value for entry in state.values() if isinstance(entry, dict) for value in entry.values()]
