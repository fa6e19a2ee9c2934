"""Findings that hold for the weights as they start are held to weights beside them.

What enters a network through a factor that starts at zero, a gate, a last layer or a residual's scale, has no part in
the answer at the start, and the first step opens it. What is a mistake is one for the weights beside these too, where
only those have moved that receive a gradient: a start that no step leaves stays one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch

from ris_fast.health.finding import Finding
from ris_fast.health.preflight.derivatives import derivatives
from ris_fast.health.preflight.measures import rms
from ris_fast.health.preflight.probe import PreflightContext

NUDGE, FROM_ZERO, ROUNDS = 0.05, 0.05, 2  # of a tensor's size; where it is zero; steps


@contextmanager
def nudged(context: PreflightContext) -> Iterator[None]:
    """Inside, the tensors that a first step moves, and those that a second one moves then, have moved a little."""
    live, generator, moved = context.trainable, torch.Generator().manual_seed(41), set[str]()
    with ExitStack() as stack:
        for _ in range(ROUNDS):
            total = context.run()[0]
            parts = derivatives(total, list(live.values())) if total.requires_grad and live else []
            reached = [name for name, part in zip(live, parts) if part is not None and bool(part.any())]
            weights = [live[name] for name in reached if name not in moved]
            moved |= set(reached)
            directions = [
                (NUDGE * rms(weight) or FROM_ZERO) * torch.randn(weight.shape, generator=generator).to(weight)
                for weight in weights
            ]
            stack.enter_context(context.moved(weights, directions, 1.0))
        yield


def persistent(
    check: Callable[[PreflightContext], Iterator[Finding]], *causes: str
) -> Callable[[PreflightContext], Iterator[Finding]]:
    """The check, whose findings of these causes, names of one kind, are left out where moved weights have none."""

    def held(context: PreflightContext) -> Iterator[Finding]:
        found = list(check(context))
        if any(finding.cause in causes for finding in found):
            with nudged(context):
                still = any(finding.cause in causes for finding in check(context))
            found = [finding for finding in found if still or finding.cause not in causes]
        yield from found

    return held
