"""What the gradient that arrives at an output gives away of the loss behind it.

Legend: B scenes, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ris_fast.health.watch.graph import MOVING, chain_of
from ris_fast.health.watch.tensors import is_plain

SPREAD = 0.01  # of probabilities, from which on a softmax of them tells itself from them
ROWS = 4


def fingerprint_of(output: Tensor) -> Callable[[Tensor], tuple[str, Tensor] | None]:
    """For the gradient at this output: which mistake it would be, and () numbers that are near zero if it is.

    A cross-entropy of probabilities, a binary one of probabilities, or a mean square against every target.
    """
    last = next((name for name, *_ in chain_of(output.grad_fn, set()) if name not in MOVING), "")
    kept: Any = output.detach() if is_plain(output) and output.dtype == torch.float32 else None

    def of(grad: Tensor) -> tuple[str, Tensor] | None:
        if kept is None or grad.shape != kept.shape or not is_plain(grad):
            return None
        if last == "Softmax" and kept.ndim == 2 and kept.shape[0] >= ROWS and kept.shape[1] > 2:
            return "softmax", softmax_residual(kept, grad)
        if last == "Sigmoid" and kept.numel() >= ROWS:
            return "sigmoid", sigmoid_residual(kept, grad)
        if kept.ndim == 2 and kept.shape[1] == 1 and kept.shape[0] >= 2 * ROWS:
            return "broadcast", affine_residual(kept[:, 0], grad[:, 0])
        return None

    return of


def softmax_residual(output_BC: Tensor, grad_BC: Tensor) -> Tensor:
    """(1,), how far a gradient is from scale * (softmax(output) - one_hot), of the rows that are not uniform."""
    chosen = grad_BC.argmin(1, keepdim=True)
    soft = output_BC.softmax(1)
    others, given = soft.scatter(1, chosen, 0.0), grad_BC.scatter(1, chosen, 0.0)
    scale = given.sum(1) / others.sum(1)
    wrong = (given - scale[:, None] * others).abs().amax(1)
    wrong = torch.maximum(wrong, (grad_BC.gather(1, chosen)[:, 0] + scale * others.sum(1)).abs())
    uneven = output_BC.amax(1) - output_BC.amin(1) > SPREAD
    wrong = torch.where(scale > 0, wrong / scale, torch.inf)
    enough = (uneven & (scale > 0)).sum() >= ROWS
    return torch.where(enough, torch.where(uneven, wrong, 0.0).max(), torch.inf)[None]


def sigmoid_residual(output: Tensor, grad: Tensor) -> Tensor:
    """(1,), how far a gradient is from scale * (sigmoid(output) - label), with both labels and uneven outputs."""
    soft = output.sigmoid()
    scale = grad / (soft - (grad < 0).to(soft.dtype))
    enough = (grad < 0).any() & (grad > 0).any() & (output.max() - output.min() > SPREAD)
    return torch.where(enough, (scale.max() - scale.min()) / scale.mean(), torch.inf)[None]


def affine_residual(output_B: Tensor, grad_B: Tensor) -> Tensor:
    """(3,), how far a gradient is from slope * (output - target) with one target for all, that target, and the outputs'
    mean."""
    made, given = output_B - output_B.mean(), grad_B - grad_B.mean()
    slope = (made * given).sum() / made.square().sum()
    spread = made.square().mean().sqrt()
    wrong = (given - slope * made).abs().max() / (slope * spread)
    target = output_B.mean() - grad_B.mean() / slope
    return torch.stack([torch.where(slope > 0, wrong, torch.inf), target, output_B.mean()])
