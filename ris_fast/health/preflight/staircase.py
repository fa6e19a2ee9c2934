"""Where outputs follow weights in jumps alone, as through an argmax, a rounding or a comparison, and where a gradient
is zero only because weights have driven something to its end."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ris_fast.health.preflight.derivatives import derivatives
from ris_fast.health.preflight.measures import rms
from ris_fast.health.preflight.probe import PreflightContext

SMALL_STEPS, LARGE_STEP = (1e-3, 1e-2), 1.0  # of the size of each tensor
FEW = 0.2  # of the numbers that a large step changes, which jumps change in small ones
JUMPS = "the outputs follow them in jumps alone: a small move of them changes next to none of the numbers that a large"
JUMPS += " one does. An argmax, a rounding, a comparison or whole numbers are in the path, which have no derivative"


@torch.no_grad()
def in_jumps(context: PreflightContext, tensors: Sequence[Tensor], *, factor: bool = False) -> bool:
    """Whether hardly any number of the outputs moves with a small move of these tensors, and many do with a large
    one. Args: factor: of the factor alone."""
    generator = torch.Generator().manual_seed(53)
    directions = [
        torch.randn(each.shape, generator=generator).to(each.device, each.dtype) * (rms(each) or 0.1)
        for each in tensors
    ]
    with context.full_precision():
        here = _outputs(context, factor)
        shares = []
        for step in (*SMALL_STEPS, LARGE_STEP):
            with context.moved(tensors, directions, step):
                shares.append(float((_outputs(context, factor) != here).float().mean()))
    return shares[-1] > 0 and max(shares[:-1]) < FEW * shares[-1]


def _outputs(context: PreflightContext, factor: bool) -> Tensor:
    with torch.enable_grad():  # a network may behave differently without
        prediction = context.predict(context.scenes)
    if factor:
        return prediction.factor.detach().float().clone()
    return torch.cat([value.detach().float().flatten() for value in prediction if value is not None])


def at_an_end(context: PreflightContext, tensors: Sequence[Tensor]) -> bool:
    """Whether tensors that have a gradient of exactly zero have one once all weights are drawn anew at a usual size:
    then something was at its end, where it is flat, and nothing clears gradients."""
    live, generator = list(context.trainable.values()), torch.Generator().manual_seed(59)
    directions = []
    for weight in live:
        usual = (weight[0].numel() ** -0.5 if weight.dim() > 1 else rms(weight)) or 0.1
        directions.append(usual * torch.randn(weight.shape, generator=generator).to(weight) - weight.detach())
    with context.moved(live, directions, 1.0):
        total = context.run()[0]
        parts = derivatives(total, list(tensors)) if total.requires_grad else ()
    return any(part is not None and bool(part.any()) for part in parts)
