"""The loss of a backward pass that nobody told the watch of: its value and its graph near the root.

A hook on a gradient runs within the call of `backward`, whose frame has the tensor that it starts from. By then its
numbers are freed; operations and shapes are still there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward

from ris_fast.health.watch.graph import GraphLeaves
from ris_fast.health.watch.loss import FIRST, WALKED, record_of, walk
from ris_fast.health.watch.loss_records import LossRecord

KEPT = 256
FRAMES = 24


class BackwardLosses:
    """Notes the losses of steps that are looked at."""

    def __init__(
        self,
        leaves: GraphLeaves,
        step: Callable[[], tuple[int, int]],
        outputs: Callable[[], tuple[int, list[Tensor]]],
    ) -> None:
        """`step`: as of `LossHook`; `outputs`: number of the model's last pass, and what it gave."""
        self.leaves, self.step, self.outputs = leaves, step, outputs
        self.records: list[LossRecord] = []

    @torch.no_grad()
    def note(self) -> None:
        """Called from a hook within a backward pass."""
        if torch.compiler.is_compiling() or len(self.records) >= KEPT or (root := root_of_backward()) is None:
            return
        (steps, _), (number, outputs) = self.step(), self.outputs()
        outputs = [each for each in outputs if each.grad_fn is not None]
        now = record_of(root, outputs, [], steps, number, early=len(self.records) < FIRST)
        if root.grad_fn is not None and len(self.records) < WALKED:
            walk(now, root.grad_fn, outputs, self.leaves, told=False)
        self.records.append(now)
        if len(self.records) == WALKED:
            self.leaves.settle_losses()


def root_of_backward() -> Tensor | None:
    """The one tensor that the running backward pass starts from; on the thread that has called it, or on another."""
    code = _engine_run_backward.__code__
    frame: Any = sys._getframe(1)
    for _ in range(FRAMES):
        if frame is None or frame.f_code is code:
            break
        frame = frame.f_back
    else:
        frame = None
    if frame is None:  # a device's thread, which nobody called
        frame = next((each for each in sys._current_frames().values() if each.f_code is code), None)
    roots = frame.f_locals.get("t_outputs") if frame is not None else None
    found = roots[0] if isinstance(roots, (tuple, list)) and len(roots) == 1 else None
    return found if isinstance(found, Tensor) else None
