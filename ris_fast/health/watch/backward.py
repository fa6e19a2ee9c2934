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

from ris_fast.health.watch.graph import CHAIN, GraphLeaves, chain_of, graph_of
from ris_fast.health.watch.loss import FIRST, WALKED, applied_twice, numbers_of
from ris_fast.health.watch.operations import over_scenes, reshaped_as_transposed
from ris_fast.health.watch.records import LossRecord
from ris_fast.health.watch.tensors import is_plain
from ris_fast.health.watch.terms import (
    compares_leaves,
    of_inputs_alone,
    sum_beside_mean,
    surrogate_sign,
    term_of_outputs,
    term_without_graph,
    weight_terms,
    zero_differences,
)

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
        node, ends = root.grad_fn, {each.grad_fn for each in outputs}
        chain = chain_of(node, ends)
        early = len(self.records) < FIRST
        now = LossRecord(
            step=steps,
            tensor=True,
            requires_grad=True,
            made_anew=node is None,
            chain=[name for name, _, _ in chain],
            chain_shapes=[shape for _, shape, _ in chain],
            direct=bool(chain) and chain[-1][2],
            behind=[name for each in ends for name, _, _ in chain_of(each, set())][:CHAIN] if early else [],
            outputs_require_grad=bool(outputs),
            outputs=numbers_of(outputs) if early else None,
            targets=None,
            value=root.detach().float().mean() if is_plain(root) else None,
            number=number,
        )
        if node is not None and len(self.records) < WALKED:
            leaves, users, _ = graph_of([node], ends)
            now.through, of_weights = (
                term_of_outputs(node, ends),
                weight_terms(node, ends, self.leaves.own_parameters()),
            )
            users_of_weights = graph_of(of_weights, ends)[1]
            now.of_weights, now.still = bool(of_weights), zero_differences(users_of_weights)
            now.of_inputs = of_inputs_alone(node, self.leaves.given)
            now.compares_weights = compares_leaves(users_of_weights)
            now.twice = next(filter(None, map(applied_twice, users)), ())
            rows = outputs[0].shape[0] if outputs and outputs[0].ndim else 0
            self.leaves.note_loss(leaves, rows, steps)
            now.over_scenes, now.transposed = over_scenes(users, rows, True), reshaped_as_transposed(users)
            now.surrogate = surrogate_sign(node)
            now.summed, now.ungraphed = sum_beside_mean(node, ends, rows), term_without_graph(node)
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
