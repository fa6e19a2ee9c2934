"""Preflight of each tensor's gradient on its way: by autograd, behind backward, and in the optimizer's hands."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ris_fast.health.finding import Finding
from ris_fast.health.preflight.measures import all_finite, listed
from ris_fast.health.preflight.probe import PreflightContext
from ris_fast.health.preflight.step_probe import StepTrace

OTHER, RIGHT = 0.2, 0.02  # of a ratio away from 1: another scale, and none
EXACT = 1e-4  # relative, between the sorted numbers of two gradients
LONGER, ELSEWHERE = 1.2, 0.5  # times the gradient; cosine, below which most of it is something else
FEWEST, APART = 3, 1.5  # tensors of one norm; between the largest and the smallest of their factors
PURE = 0.02  # share of a gradient that is no multiple of the other one


def one_by_one(
    context: PreflightContext, taken: StepTrace, parts: Sequence[Sequence[Tensor | None]], shares: Sequence[float]
) -> Iterator[Finding]:
    """Tensors whose gradient is multiplied on its way while that of most others is left as it is.

    Args: parts: each micro-batch's gradient by autograd, of the trainable tensors; shares: of the step's scenes.
    """
    live = [(name, number) for number, (name, p) in enumerate(context.parameters.items()) if p.requires_grad]
    raw = [taken.raw[number] for _, number in live]
    given = [taken.given[number] for _, number in live] if taken.given else raw
    if not all(map(all_finite, (raw, given, *parts))):
        return
    wanted = [_sum([part[row] for part in parts], shares, taken.scale) for row in range(len(live))] if parts else raw
    names = [name for name, _ in live]
    for where, before, after in (
        ("backward leaves", wanted, raw),
        ("the optimizer is given", raw, given),
    ):
        scaled = _scaled(names, before, after)
        if scaled:
            worst = max(scaled, key=lambda name: abs(scaled[name] - 1))
            yield Finding(
                "gradient_scale_differs",
                f"{where} {len(scaled)} of {len(names)} tensors another multiple of their gradient than the rest:"
                f" {listed(list(scaled))}, {scaled[worst]:.3g} of it in {worst}. Where a gradient is scaled on purpose,"
                " that is meant.",
                certain=False,
            )
            return
        if seen := _rearranged(names, before, after):
            yield Finding("wrong_backward", f"{where} {seen}")
            return
        if gone := _cleared(names, before, after):
            yield Finding(
                "zeroed_gradients",
                f"{where} a gradient of exactly zero in {len(gone)} of {len(names)} tensors, which have one by"
                f" autograd: {listed(gone)}. Something clears it on its way. Where they are held on purpose, name them"
                " in health.frozen and give them no gradient.",
                certain=False,
            )
            return
        if seen := _replaced(before, after):
            yield Finding("wrong_backward", f"{where} {seen}", certain=False)
            return


def clipped_apart(names: Sequence[str], taken: StepTrace) -> dict[str, float]:
    """Tensors whose gradient is on its way brought to one norm for all of them, each by a factor of its own: name ->
    factor; empty where that is not so."""
    factors, norms = {}, []
    for name, old, new in zip(names, taken.raw, taken.given):
        if old is None or new is None or not bool(old.any()) or not bool(new.any()):
            continue
        before, after = old.double().norm(), new.double().norm()
        factor = float(after / before)
        if factor < 1 - RIGHT and float((new.double() - factor * old.double()).norm()) < PURE * float(after):
            factors[name], norms = factor, [*norms, float(after)]
    one_norm = len(norms) >= FEWEST and max(norms) < (1 + PURE) * min(norms)
    return factors if one_norm and max(factors.values()) > APART * min(factors.values()) else {}


def _cleared(names: Sequence[str], before: Sequence[Tensor | None], after: Sequence[Tensor | None]) -> list[str]:
    """Tensors whose gradient is exactly zero behind a place that leaves that of the others as it is."""
    pairs = [(name, a, b) for name, a, b in zip(names, before, after) if a is not None and b is not None and a.any()]
    gone = [name for name, _, new in pairs if not bool(new.any())]
    kept = all(float((b - a).norm()) <= RIGHT * float(a.norm()) for name, a, b in pairs if name not in gone)
    return gone if kept and len(gone) < len(pairs) else []


def _replaced(before: Sequence[Tensor | None], after: Sequence[Tensor | None]) -> str:
    """A gradient that points elsewhere than the one it was, and is no shorter: something was added to it."""
    pairs = [(a, b) for a, b in zip(before, after) if a is not None and b is not None]
    if not pairs:
        return ""
    old, new = (torch.cat([pair[side].double().flatten() for pair in pairs]) for side in (0, 1))
    sizes = float(old.norm()), float(new.norm())
    if not min(sizes) > 0 or not sizes[1] > LONGER * sizes[0]:
        return ""
    along = float(old @ new) / (sizes[0] * sizes[1])
    if not abs(along) < ELSEWHERE:
        return ""
    return (
        f"a gradient of norm {sizes[1]:.3g} where it was {sizes[0]:.3g}, at a cosine of {along:.2f} to it: what was"
        " added"
        " on the way, as noise or a decay, outweighs it. Which of the two: whether it is the same for the same scenes."
    )


def _rearranged(names: Sequence[str], before: Sequence[Tensor | None], after: Sequence[Tensor | None]) -> str:
    """Gradients whose numbers are those that they were, in other places or with other signs; '' where none are.

    A clip, a projection or a compression makes other numbers; one factor for all tensors is none of it.
    """
    pairs = [(name, a, b) for name, a, b in zip(names, before, after) if a is not None and b is not None]
    if not pairs:
        return ""
    old, new = (torch.cat([pair[side].double().flatten() for pair in pairs]) for side in (1, 2))
    size = float(old.norm())
    if not size > 0 or not float(new.norm()) > 0:
        return ""
    factor = float(new.norm()) / size
    apart = float((new - factor * old).norm()) / float(new.norm())
    ranked = float((new.abs().sort()[0] - factor * old.abs().sort()[0]).norm()) / float(new.norm())
    if not apart > OTHER or not ranked < EXACT:
        return ""
    turned = [
        name
        for name, a, b in pairs
        if float((b.double() - factor * a.double()).norm()) > OTHER * factor * float(a.norm())
    ]
    along = float(old @ new) / (size * float(new.norm()))
    return (
        f"the numbers of the gradient in other places or with other signs, in {len(turned)} of {len(names)} tensors:"
        f" {listed(turned)}. The cosine of the two is {along:.2f}."
    )


def _sum(parts: Sequence[Tensor | None], shares: Sequence[float], scale: float) -> Tensor | None:
    found = [share * scale * part.double() for part, share in zip(parts, shares) if part is not None]
    return torch.stack(found).sum(0) if found else None


def _scaled(names: Sequence[str], before: Sequence[Tensor | None], after: Sequence[Tensor | None]) -> dict[str, float]:
    """Tensors with another ratio than 1, where it is one number for all entries and most tensors have 1."""
    ratios = {}
    for name, old, new in zip(names, before, after):
        if old is None or new is None or not bool(old.any()):
            continue
        old, new = old.double().flatten(), new.double().flatten()
        value = float(new @ old / (old @ old))
        if float((new - value * old).norm()) <= PURE * float(new.norm()):
            ratios[name] = value
    right = sum(abs(value - 1) < RIGHT for value in ratios.values())
    return (
        {name: value for name, value in ratios.items() if abs(value - 1) > OTHER and value}
        if (2 * right > len(names))
        else {}
    )
