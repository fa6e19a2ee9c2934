"""What something other than the optimizer did to a tensor's numbers, told from a few of them.

Legend: N numbers of one tensor, each so many places after the one before.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ris_fast.health.watch.samples import stride_of

NEAR = (0.5, 2.0)  # factors that a constraint applies to weights that were within it a step ago


def kind_of_change(before: Tensor, after: Tensor, later: Tensor, gradient: Tensor, shape: tuple[int, ...]) -> str:
    """`before`, `after`: (N,) around a step; `later`: (N,) before the next one. Empty where nothing has changed."""
    changed = later != after
    if not changed.any():
        return ""
    before, after, later, gradient = (each.double() for each in (before, after, later, gradient))
    if not later.isfinite().all():
        return "nonfinite" if after.isfinite().all() else ""
    if torch.equal(later, before):
        return "undone"
    if float((later - after).norm()) <= 1e-5 * float(after.norm()):
        return "rounding"
    return (
        _by_value(after, later, changed)
        or _by_factor(after, later, shape)
        or _by_direction(before, after, later, gradient)
    )


def _by_value(after: Tensor, later: Tensor, changed: Tensor) -> str:
    """Clipped to bounds, masked, rounded, or made one number."""
    new, old = later[changed], after[changed]
    if _is_within_bounds(new, old, later):
        return "constant" if len(new) == len(later) > 1 and float(new.min()) == float(new.max()) else "clipped"
    if not new.any():
        return "zeroed" if len(new) == len(later) and len(later) > 1 else "masked"
    if _is_one(old.abs() - new.abs()) and bool((new.sign() * old.sign() >= 0).all()):
        return "shrunk"
    if any(torch.equal(later, later.to(dtype).double()) for dtype in (torch.bfloat16, torch.float16)):
        return "rounded"
    return "constant" if len(later) > 1 and float(later.min()) == float(later.max()) else ""


def _is_within_bounds(new: Tensor, old: Tensor, later: Tensor) -> bool:
    """Whether numbers that changed from `old` to `new` are the largest or the smallest of all now, and were beyond."""
    low, high = new.min(), new.max()
    at_high, at_low = (new == high) & (old > high), (new == low) & (old < low)
    within = (not at_high.any() or later.max() <= high) and (not at_low.any() or later.min() >= low)
    return bool((at_high | at_low).all()) and bool(within)


def is_clip(after: Tensor, later: Tensor) -> bool:
    """Whether what changed in (N,) numbers was brought back to one or two bounds, more than one number to one of
    them."""
    changed = later != after
    new = later[changed]
    return len(new) > len(new.unique()) and _is_within_bounds(new, after[changed], later)


def _is_one(amounts: Tensor) -> bool:
    """Whether all, but those that reach zero, are the same amount."""
    most = float(amounts.max())
    return most > 0 and float((amounts > 0.999 * most).double().mean()) > 0.5 and float(amounts.min()) >= 0


def _by_factor(after: Tensor, later: Tensor, shape: tuple[int, ...]) -> str:
    """Divided by norms of rows, of columns or of the whole: those stay near one, step by step."""
    used = after.abs() > 1e-12
    if bool((later[~used].abs() > 1e-12).any()) or not used.any():
        return ""
    factor, place = later[used] / after[used], (torch.arange(len(after)) * stride_of(shape))[used]
    near = bool((factor > NEAR[0]).all()) and bool((factor < NEAR[1]).all())
    sizes = shape or (1,)
    wide = max(1, math.prod(sizes) // sizes[0])
    for group in (place * 0, place // wide, place % sizes[-1]):
        if _same_within(factor, group):
            return "constrained" if near else "scaled"
    alone = len((place // wide).unique()) == len(place)  # too few numbers of a row to compare
    return "constrained" if alone and float(factor.min()) > 0.8 and float(factor.max()) < 1.25 else ""


def _same_within(factor: Tensor, group: Tensor) -> bool:
    """Whether numbers of one group have one factor; single numbers say nothing."""
    _, index, counts = group.unique(return_inverse=True, return_counts=True)
    mean = torch.zeros(len(counts), dtype=factor.dtype).index_add_(0, index, factor) / counts
    several = (counts > 1)[index]
    return bool(several.any()) and bool(((factor - mean[index]).abs() <= 1e-4 * mean[index].abs())[several].all())


def _by_direction(before: Tensor, after: Tensor, later: Tensor, gradient: Tensor) -> str:
    """Along the step or against the gradient again; else to anywhere."""
    moved = later - after
    for direction in (after - before, -gradient):
        if float(torch.nn.functional.cosine_similarity(moved, direction, dim=0)) > 0.99:
            return "again"
    return "other"
