"""Steps of all optimizers of the process, given or not: one hook of torch for every watch.

It stays. Torch walks its list of such hooks at every step, and one that is taken away meanwhile, as by the garbage
collector, would be an error in the loop.
"""

from __future__ import annotations

import weakref
from typing import Any, Protocol

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from ris_fast.health.watch.guard import guarded


class StepListener(Protocol):
    def stepped(self, optimizer: Optimizer) -> None:
        """After a step of any optimizer."""


_LISTENERS: list[weakref.ref[StepListener]] = []
_HOOKS: list[Any] = []  # one, once somebody listens


def listen(listener: StepListener) -> None:
    """It hears of every step until it is gone, or `stop_listening`; within a compiled step of none."""
    if not _HOOKS:
        _HOOKS.append(register_optimizer_step_post_hook(_stepped))
    _LISTENERS.append(weakref.ref(listener, _LISTENERS.remove))


def stop_listening(listener: StepListener) -> None:
    _LISTENERS[:] = [each for each in _LISTENERS if each() is not listener]


def _stepped(optimizer: Optimizer, *_: Any) -> None:
    if not torch.compiler.is_compiling():
        for each in tuple(_LISTENERS):
            if (listener := each()) is not None:
                guarded(listener.stepped, optimizer)
