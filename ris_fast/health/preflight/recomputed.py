"""Preflight of what the backward pass computes again: it is what the forward pass had computed.

A block under a checkpoint runs a second time in backward. Its layers are followed by hooks: a second answer that is not
the first one was made with other random numbers, buffers, counters or modes. An operator that draws in its backward
shows as a gradient that depends on the random numbers at the time of backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ris_fast.health.finding import Finding
from ris_fast.health.preflight.derivatives import derivatives
from ris_fast.health.preflight.measures import CLOSE, all_finite, listed, relative_change, total_norm
from ris_fast.health.preflight.probe import PreflightContext

ROUNDING = 1e-4  # of the whole gradient: sums in another order


def recomputed(context: PreflightContext) -> Iterator[Finding]:
    """Layers that run again in backward answer as they did, and backward draws nothing that changes its gradient."""
    if (seen := difference(context)) is not None:
        yield Finding("recomputed_differently", seen)


def difference(context: PreflightContext) -> str | None:
    """What the backward pass differentiates instead of the forward pass that made the loss; None where nothing."""
    if "recomputed" not in context.known:
        context.known["recomputed"] = _difference(context)
    return context.known["recomputed"]


def _difference(context: PreflightContext) -> str | None:
    live = list(context.trainable.values())
    context.model.train()
    total, first, again = _followed(context, live, 1)
    if total is None:
        return None
    wrong = {
        name: min(relative_change(answer, other) for answer in first[name])
        for name, others in again.items()
        for other in others
        if name in first and all(answer.shape == other.shape for answer in first[name])
    }
    wrong = {name: change for name, change in wrong.items() if change > CLOSE}
    if wrong:
        name = next(iter(wrong))
        return (
            f"{len(again)} modules run again in the backward pass, and {len(wrong)} of them answer otherwise than they"
            f" did: {listed(list(wrong))}; '{name}' by {wrong[name]:.2g}. Other random numbers are drawn"
            " (preserve_rng_state=False), or a buffer, a counter or a mode has changed in between"
        )
    total = context.run(seed=0)[0]
    slopes = [_gradient(total, live, seed) for seed in (1, 2)]
    apart, size = _apart(*slopes), total_norm(slopes[0])
    if not apart > ROUNDING * size or not all(map(all_finite, slopes)):
        return None
    if apart > 10 * _apart(slopes[0], _gradient(total, live, 1)):
        return (
            f"of one forward pass, two backward passes that start from other random numbers give gradients that differ"
            f" by {apart / size:.2g}: backward draws random numbers anew"
        )
    return None


def _gradient(total: Tensor, live: list[Tensor], seed: int) -> list[Tensor | None]:
    """Of one and the same forward pass, with random numbers of its own in backward."""
    torch.manual_seed(1000 + seed)
    return derivatives(total, live, retain_graph=True)


def _apart(one: list[Tensor | None], other: list[Tensor | None]) -> float:
    return total_norm([a - b for a, b in zip(one, other) if a is not None and b is not None])


def _followed(
    context: PreflightContext, live: list[Tensor], seed: int
) -> tuple[Tensor | None, dict[str, list[Tensor]], dict[str, list[Tensor]]]:
    """The loss, and what each module answered in its forward pass and again in backward."""
    first: dict[str, list[Tensor]] = {}
    again: dict[str, list[Tensor]] = {}
    phase = [first]

    def keep(name: str, module: nn.Module, inputs: tuple, output: Any) -> None:
        if isinstance(output, Tensor):
            phase[0].setdefault(name, []).append(output.detach().float().clone())

    handles = [module.register_forward_hook(partial(keep, name)) for name, module in context.model.named_modules()]
    try:
        total = context.run(seed=seed)[0]
        if not total.requires_grad or not live:
            return None, first, again
        phase[0] = again
        torch.manual_seed(2000 + seed)
        derivatives(total, live)
    finally:
        for handle in handles:
            handle.remove()
    return total, first, again


CHECKS = {"backward computes again what forward had": recomputed}
