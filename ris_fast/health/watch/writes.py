"""Whether a model writes into its inputs where they lie, and is given what it left there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ris_fast.health.watch.samples import few_numbers
from ris_fast.health.watch.tensors import is_plain, tensors_of

PLACES, FOUND, PASSES = 64, 64, 32  # that are kept; after as many passes without a write, no more are looked at

Place = tuple[int, tuple[int, ...], torch.dtype]


class InputWrites:
    """Version counters of the first input on both sides of a pass; numbers only where they tell of a write."""

    def __init__(self) -> None:
        self.left: dict[Place, Tensor] = {}  # a few numbers, as the model left them
        self.found: list[tuple[Tensor, Tensor]] = []  # a place comes again: as it was left; and is written to again
        self.passes = 0
        self.input: Tensor | None = None
        self.version = 0
        self.before: Tensor | None = None

    @property
    def listens(self) -> bool:
        """Whether a pass is looked at: the first ones, and all where one has been written to."""
        return self.passes < PASSES or bool(self.left)

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a pass."""
        self.before = None
        given = args[0] if args and _can_be_looked_at(args[0]) else _first(args, kwargs)
        self.input = given
        if given is None:
            return
        self.version, self.passes = given._version, self.passes + 1
        if self.left and _place(given) in self.left and len(self.found) < FOUND:
            self.before = few_numbers([given.detach()]).clone()

    def finish(self) -> None:
        """After it."""
        given, self.input = self.input, None
        if given is None or given._version == self.version:
            return
        key, now = _place(given), few_numbers([given.detach()]).clone()
        if self.before is not None and key in self.left:
            was = self.left[key]
            self.found.append(((self.before == was).all(), (self.before != now).any()))
        if key in self.left or len(self.left) < PLACES:
            self.left[key] = now

    def record(self) -> list[tuple[bool, bool]]:
        """Reads the device."""
        return [(bool(same), bool(again)) for same, again in self.found]


def _can_be_looked_at(value: Any) -> bool:
    if not isinstance(value, Tensor) or not is_plain(value):
        return False
    return value.is_floating_point() and value.numel() > 0 and not value.is_inference()


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    return next(filter(_can_be_looked_at, tensors_of((args, kwargs))), None)


def _place(tensor: Tensor) -> Place:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.dtype
