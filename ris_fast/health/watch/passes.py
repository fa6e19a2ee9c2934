"""Counts the backward passes between two steps at one tensor, and those whose gradient was thrown away."""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ris_fast.health.watch.gradients import arrival_hook
from ris_fast.health.watch.histories import Passes

KINDS = 64  # of intervals that are told apart
TORCH = str(Path(torch.__file__).parent)


class PassCounter:
    """A hook on one tensor that stays in all steps; it reads no number."""

    def __init__(self) -> None:
        self.parameter: Tensor | None = None
        self.hook: Any = None
        self.last: weakref.ref[Tensor] | None = None
        self.version = 0  # of the weights, at the last pass
        self.passes, self.cleared, self.moved = 0, 0, False  # since the last step
        self.site, self.one_site = 0, True  # where the last pass was called, and whether all but the first were
        self.intervals: Counter[tuple[int, int, bool]] = Counter()
        self.replaced, self.heard = 0, False

    def follow(self, parameter: Tensor | None) -> None:
        """Counts at this tensor from now on."""
        if parameter is self.parameter:
            return
        self.close()
        self.__init__()  # type: ignore[misc]
        if parameter is not None:
            self.parameter, self.hook = parameter, parameter.register_post_accumulate_grad_hook(arrival_hook(self))

    def _arrive(self, parameter: Tensor, grad: Tensor) -> None:
        """Backward adds to the same tensor unless it was set to None or its graph is kept."""
        last = self.last
        if last is not None:
            site = _call_site()
            self.cleared += last() is not grad and not grad.requires_grad and grad.layout == torch.strided
            self.moved |= parameter._version != self.version
            self.one_site &= site == (self.site or site) != 0
            self.site = site
        self.heard = True
        self.passes, self.last, self.version = self.passes + 1, weakref.ref(grad), parameter._version

    def before(self) -> None:
        """Before a step after some passes: closes the interval."""
        if self.parameter is not None:
            key = self.passes, self.cleared, not self.moved and self.one_site
            if key in self.intervals or len(self.intervals) < KINDS:
                self.intervals[key] += 1
            grad = self.parameter.grad
            self.replaced += grad is not None and self.last is not None and self.last() is not grad
        self.restart()

    def restart(self) -> None:
        """After a step: what a closure did within it is not counted."""
        self.passes, self.cleared, self.moved, self.last = 0, 0, False, None
        self.site, self.one_site = 0, True

    def record(self) -> Passes:
        return Passes(dict(self.intervals), self.replaced, self.passes)

    def close(self) -> None:
        if self.hook is not None:
            self.hook.remove()
        self.hook = None


def _call_site() -> int:
    """Which lines outside torch have led here; 0 in the thread of another device's backward, which nobody called."""
    frame, lines = sys._getframe(2), []
    for _ in range(40):
        frame = frame.f_back
        if frame is None or len(lines) == 6:
            break
        if not frame.f_code.co_filename.startswith(TORCH):
            lines.append((frame.f_code, frame.f_lineno))
    return hash(tuple(lines)) if lines else 0
