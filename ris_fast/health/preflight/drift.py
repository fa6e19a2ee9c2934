"""Preflight of a network that changes by being called: what becomes of its answers as passes in training go on.

A buffer, a counter or a generator that each pass moves may fade one part of a network into another, or sharpen it. What
is right at the first pass is held to what it is many passes later, with the weights as they are.
Legend: B batch.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ris_fast.health.finding import Finding
from ris_fast.health.preflight.derivatives import derivatives
from ris_fast.health.preflight.measures import SAME, listed, relative_change, total_norm
from ris_fast.health.preflight.probe import PreflightContext

PASSES, FEW = 64, 4  # scenes of a pass
LEFT = 0.01  # of how much answers differ between scenes, or of the gradient
CLOSE = 0.1  # of what other random numbers change
AT_AN_END = 0.9  # share of the entries


def changes_by_itself(context: PreflightContext) -> Iterator[Finding]:
    """Many passes later answers still differ between scenes, and tensors still have a gradient."""
    scenes = context.scenes[:FEW]
    if scenes.batch < 2 or not context.trainable:
        return
    context.model.train()
    before = {name: value.detach().clone() for name, value in context.model.named_buffers()}
    first, second = _pass(context), _pass(context)
    drawn = _pass(context, seed=1)
    if first is None or relative_change(first[0], second[0]) <= SAME + CLOSE * relative_change(first[0], drawn[0]):
        return
    for _ in range(PASSES):
        torch.manual_seed(0)
        context.step.predict(scenes)
    last = _pass(context)
    if last is None:
        return
    moved = [
        f"{name} from {_short(before[name])} to {_short(value)}"
        for name, value in context.model.named_buffers()
        if name in before and before[name].shape == value.shape and not torch.equal(before[name], value)
    ]
    seen = (
        f"the network changes by being called in training: {listed(moved) or 'something that is no buffer, as a counter'};"
        f" {PASSES} passes later"
    )
    spreads, slopes = (_apart(first[0]), _apart(last[0])), (first[1], last[1])
    advice = (
        "Look at the direction of the schedule inside the network, what it counts (passes, steps or epochs), and where it"
        " ends."
    )
    if spreads[1] <= LEFT * spreads[0]:
        yield Finding(
            "ignored_input",
            f"{seen}, with the same weights, its answers to different scenes differ by {spreads[1]:.1e} of themselves, where"
            f" they differed by {spreads[0]:.1e}: it fades out what depends on the input.",
            advice=advice,
            certain=False,
        )
    elif _at_ends(last[0]) > AT_AN_END > _at_ends(first[0]):
        yield Finding(
            "saturated_output",
            f"{seen}, with the same weights, {_at_ends(last[0]):.0%} of its output's entries are at the ends of a range"
            f" ({_at_ends(first[0]):.0%} at first).",
            advice=advice,
            certain=False,
        )
    elif slopes[1] <= LEFT * slopes[0]:
        yield Finding(
            "vanishing_gradient",
            f"{seen}, with the same weights, the gradient of the loss has norm {slopes[1]:.2g}, and had {slopes[0]:.2g}.",
            advice=advice,
            certain=False,
        )


def _pass(context: PreflightContext, seed: int = 0) -> tuple[Tensor, float] | None:
    """The factor and the norm of the gradient of a training pass, with the buffers as they are."""
    scenes, live = context.scenes[:FEW], list(context.trainable.values())
    torch.manual_seed(seed)
    prediction = context.step.predict(scenes)
    total = context.loss(prediction, scenes)[0]
    if not total.requires_grad or not bool(prediction.factor.isfinite().all()):
        return None
    return prediction.factor.detach().float().clone(), total_norm(derivatives(total, live))


def _apart(factor: Tensor) -> float:
    """How much answers differ between scenes, relative to their size."""
    return float((factor - factor.mean(0)).norm() / factor.norm().clamp_min(1e-30))


def _at_ends(factor: Tensor) -> float:
    low, high = torch.aminmax(factor)
    reach = (high - low).clamp_min(1e-30)
    return float((((high - factor) < 1e-3 * reach) | ((factor - low) < 1e-3 * reach)).float().mean())


def _short(value: Tensor) -> str:
    return f"{float(value):.3g}" if value.numel() == 1 else f"norm {float(value.float().norm()):.3g}"


CHECKS = {"many passes leave the network as it is": changes_by_itself}
