"""Findings that hold for the weights as they start are held to weights beside them.

What enters a network through a factor that starts at zero, a gate, a last layer or a residual's scale, has no part in
the answer at the start, and the first step opens it. What is a mistake is one for the weights beside these too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch

from ris_fast.health.finding import Finding
from ris_fast.health.preflight.measures import rms
from ris_fast.health.preflight.probe import PreflightContext

NUDGE, FROM_ZERO = 0.05, 0.05  # of a tensor's size; where it is zero


def nudged(context: PreflightContext) -> AbstractContextManager[None]:
    """Inside, every trainable tensor has moved a little in a random direction."""
    weights, generator = list(context.trainable.values()), torch.Generator().manual_seed(41)
    directions = [
        (NUDGE * rms(weight) or FROM_ZERO) * torch.randn(weight.shape, generator=generator).to(weight)
        for weight in weights
    ]
    return context.moved(weights, directions, 1.0)


def persistent(
    check: Callable[[PreflightContext], Iterator[Finding]], *causes: str
) -> Callable[[PreflightContext], Iterator[Finding]]:
    """The check, whose findings of these causes, names of one kind, are left out where with weights moved a little none is."""

    def held(context: PreflightContext) -> Iterator[Finding]:
        found = list(check(context))
        if any(finding.cause in causes for finding in found):
            with nudged(context):
                still = any(finding.cause in causes for finding in check(context))
            found = [finding for finding in found if still or finding.cause not in causes]
        yield from found

    return held
