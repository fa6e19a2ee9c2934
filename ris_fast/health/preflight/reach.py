"""Preflight of what the output can reach: over scenes and over weights drawn at random, beside what the targets have.

A factor has a freedom of its own, F U with U unitary, so most is asked of R = F F^H. What no weights change is no
matter of training: an entry that is never negative, an imaginary part that is never there, an element that stays zero.
Legend: B batch, N RIS elements, Q factor columns, K sources (padded), S samples, scenes times weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ris_fast.health.finding import Finding
from ris_fast.health.preflight.measures import rms
from ris_fast.health.preflight.probe import SMALL, PreflightContext
from ris_fast.health.preflight.scenes import all_scenes
from ris_fast.models.modes import eval_mode
from ris_fast.models.prediction import Prediction
from ris_fast.physics.real_complex import to_complex
from ris_fast.physics.scenes import Scenes

SCALES = (1.0, 1.0, 1.0, 1.0, 3.0, 10.0)  # of the weights as they are, in size
FEWEST, TARGETS = 32, 64  # samples; scenes whose targets are looked at
NONE = 1e-6  # relative: rounding of a product of real numbers
BOTH = 0.1  # share of the targets that an entry is positive in, and negative
MOST = 0.5  # share of the entries that are held
OUT_OF_REACH, AT_THE_END = 0.1, 1e-2  # share of the targets; of their span, within which an answer is at its end
FIXED, APART = 1e-3, 0.3  # relative spread of a share that is fixed; relative difference of the targets' from it
NEAR, FOLDED = 0.05, 0.02  # of the span of the targets, from zero; share of the answers there
TURN = 2.02 * math.pi  # rad: an angle that is bounded by a whole turn is not beyond it
PILED = 0.1  # share of the answers of large weights that are there


class Reach(NamedTuple):
    """Of all samples: factors (S, N, Q, 2), and the outputs with places in them, (S, K) each, by name; of these also
    those of the largest weights, where what is bounded sits at its ends, and how far each of these two reaches."""

    factor: Tensor
    places: dict[str, Tensor]
    extremes: dict[str, Tensor]
    ends: dict[str, list[float]]
    counts: Tensor | None  # logits of the count, (S, K)


def output_reach(context: PreflightContext) -> Iterator[Finding]:
    """With any weights, the covariance takes the signs and elements that the targets have, and places theirs."""
    scenes = all_scenes(context)[:TARGETS]
    found = _reached(context)
    if found is not None and found.counts is not None and (seen := _squashed(found.counts)):
        yield Finding("softmax_twice", seen)
    if found is None or found.factor.shape[0] < FEWEST or scenes.batch < 2 or not bool(found.factor.any()):
        return
    if seen := _beyond_a_turn(found):
        yield Finding(
            "wrong_units",
            seen,
            advice="Leave a conversion to degrees out of the network: angles are in radians, answers and labels.",
            certain=False,
        )
        return
    wanted = _target(scenes)
    if seen := _covariance(found.factor, wanted):
        yield Finding("limited_output", seen)
    elif seen := _fixed_powers(found.factor.square().sum((2, 3)), torch.diagonal(wanted.real, dim1=1, dim2=2)):
        yield Finding("limited_output", seen, certain=False)
    elif seen := _places(found, scenes):
        yield Finding("limited_output", seen, certain=False)


@torch.no_grad()
def _reached(context: PreflightContext) -> Reach | None:
    """Outputs for the small batch with weights drawn anew, those that are finite."""
    weights = list(context.trainable.values())
    if not weights:
        return None
    generator, outputs = torch.Generator().manual_seed(31), []
    scenes = context.scenes[:SMALL]
    for scale in SCALES:
        directions = [
            scale * (rms(weight) or 0.05) * torch.randn(weight.shape, generator=generator).to(weight) - weight
            for weight in weights
        ]
        with context.moved(weights, directions, 1.0), context.full_precision(), eval_mode(context.model):
            torch.manual_seed(0)
            outputs.append(context.step.predict(scenes).apply(lambda value: value.float().clone()))
    finite = [_finite_rows(each) for each in outputs]
    outputs = [each.apply(lambda value, rows=rows: value[rows]) for each, rows in zip(outputs, finite)]
    if torch.equal(outputs[0].factor, outputs[1].factor):
        return None  # which other weights do not change
    names = [name for name in ("azimuth", "elevation", "range_m") if getattr(outputs[0], name) is not None]
    places = {name: [getattr(each, name) for each in outputs] for name in names}
    return Reach(
        torch.cat([each.factor for each in outputs]),
        {name: torch.cat(values) for name, values in places.items()},
        {name: torch.cat(values[-2:]) for name, values in places.items()},
        {name: [_end(each) for each in values[-2:]] for name, values in places.items()},
        None if outputs[0].count_logits is None else torch.cat([each.count_logits for each in outputs]),
    )


def _end(values: Tensor) -> float:
    return float(values.abs().max()) if len(values) else math.inf


def _squashed(logits: Tensor) -> str:
    """What says that logits are no logits; empty where they may be. Args: (S, K), with weights drawn at random."""
    if len(logits) < FEWEST or logits.shape[1] < 2 or float(logits.min()) < 0.0 or float(logits.max()) > 1.0:
        return ""
    if float(logits.std()) < AT_THE_END:
        return ""
    sums = logits.sum(1)
    kind = "a softmax" if float((sums - 1.0).abs().max()) < 1e-4 else "a sigmoid"
    return (
        f"in {len(logits)} answers with weights drawn at random the logits of the count lie between"
        f" {float(logits.min()):.3g}"
        f" and {float(logits.max()):.3g}{', and sum to 1' if kind == 'a softmax' else ''}: {kind} is taken of them"
        " before the"
        " cross-entropy, which takes one itself."
    )


def _finite_rows(prediction: Prediction) -> Tensor:
    rows = [value.flatten(1).isfinite().all(1) for value in prediction if value is not None]
    return torch.stack(rows).all(0)


def _target(scenes: Scenes) -> Tensor:
    """R of the scenes, complex (B, N, N)."""
    if scenes.factor is None:
        return to_complex(scenes.covariance)
    factor = to_complex(scenes.factor)
    return factor @ factor.mH


def _covariance(factor: Tensor, wanted: Tensor) -> str:
    """What R cannot be, whatever the weights; empty where it can be all that the targets are."""
    many = f"in {len(factor)} answers, to {SMALL} scenes with weights drawn at random,"
    size = factor.flatten(1).norm(dim=1)
    factor = to_complex(factor / size.clamp_min(1e-30).view(-1, 1, 1, 1))[size > 0]
    if len(factor) < FEWEST:
        return ""
    made = factor @ factor.mH
    power, needed = torch.diagonal(made.real, dim1=1, dim2=2), torch.diagonal(wanted.real, dim1=1, dim2=2)
    dead = (power == 0).all(0) & (needed > 0).any(0)
    if bool(dead.any()):
        first = ", ".join(map(str, dead.nonzero()[:3, 0].tolist()))
        return f"{many} {int(dead.sum())} of {len(dead)} elements are exactly zero, first {first}; in the targets not."
    if rms(made.imag) < NONE * rms(made.abs()) and rms(wanted.imag) > 1e-3 * rms(wanted.abs()):
        parts = [name for name, part in (("imaginary", factor.imag), ("real", factor.real)) if not bool(part.any())]
        where = f" (the {parts[0]} part of the factor is exactly zero)" if parts else ""
        return f"{many} the covariance is real{where}; those of the targets are complex."
    for name, part, target in (("real", made.real, wanted.real), ("imaginary", made.imag, wanted.imag)):
        if seen := _one_signed(part, target):
            return f"{many} the {name} part of the covariance {seen}"
    return _half_plane(factor, wanted, many)


def _fixed_powers(made: Tensor, wanted: Tensor) -> str:
    """Shares of the elements in the power that no weights change. Args: (S, N) and (B, N)."""
    share, target = (each / each.sum(1, keepdim=True).clamp_min(1e-30) for each in (made, wanted))
    fixed = share.mean(0)
    if bool((share.std(0) > FIXED * fixed).any()):
        return ""
    off = float(((target / fixed.clamp_min(1e-30) - 1).abs() > APART).float().mean())
    if not off > MOST:
        return ""
    return (
        f"in {len(made)} answers with weights drawn at random every element has a fixed share of the power, and"
        f" {off:.0%} of those in the targets are others."
    )


def _one_signed(made: Tensor, wanted: Tensor) -> str:
    """Entries that are never of one of the signs that the targets have. Args: (S, N, N) and (B, N, N), real."""
    both = ((wanted > 0).float().mean(0) > BOTH) & ((wanted < 0).float().mean(0) > BOTH)
    both &= torch.ones_like(both).triu(1)
    held = both & ((made >= 0).all(0) | (made <= 0).all(0))
    if not int(held.sum()) > MOST * int(both.sum()) > 0:
        return ""
    sign = "negative" if bool((made[:, held] >= 0).all()) else "of one of the two signs"
    return f"is never {sign} in {int(held.sum())} of {int(both.sum())} entries where the targets have both signs."


def _half_plane(factor: Tensor, wanted: Tensor, many: str) -> str:
    """Elements whose factors all lie in one half of the complex plane, in which no wave that turns further does.

    One row may: a factor's phase may be fixed at an element.
    """
    turning = ((wanted.real < 0).float().mean(0) > BOTH).any(1)
    for name, part in (("real", factor.real), ("imaginary", factor.imag)):
        for sign, held in (("negative", (part >= 0).all(2).all(0)), ("positive", (part <= 0).all(2).all(0))):
            rows = held & turning
            if int(rows.sum()) > max(1, MOST * int(turning.sum())):
                share = f"{int(rows.sum())} of {len(rows)} elements"
                return f"{many} the {name} part of the factor is never {sign}, in {share}."
    return ""


def _places(found: Reach, scenes: Scenes) -> str:
    """Outputs that stop at an end before many of the targets do; empty where none does."""
    active = scenes.power > 0 if scenes.power is not None else None
    for name, values in found.places.items():
        targets = getattr(scenes, name)
        if targets is None or active is None or not bool(active.any()):
            continue
        targets, ends = targets[active], torch.aminmax(values)
        span = float(targets.max() - targets.min())
        if seen := _folded(name, values, targets, span):
            return seen
        for end, beyond, what in (
            (ends.max, float((targets > ends.max + AT_THE_END * span).float().mean()), "above"),
            (ends.min, float((targets < ends.min - AT_THE_END * span).float().mean()), "below"),
        ):
            piled = float(((found.extremes[name] - end).abs() < AT_THE_END * span).float().mean())
            if beyond > OUT_OF_REACH and piled > PILED:
                return (
                    f"with weights drawn at random, {name} goes from {float(ends.min):.3g} to {float(ends.max):.3g} and"
                    f" sits at that end with large ones; {beyond:.0%} of the targets are {what} it, which go from"
                    f" {float(targets.min()):.3g} to {float(targets.max()):.3g}."
                )
    return ""


def _beyond_a_turn(found: Reach) -> str:
    """Angles that are held further away than a whole turn, at the same end by large weights and by larger ones: an
    answer that nothing holds grows on. Empty where none are."""
    for name in ("azimuth", "elevation"):
        if name not in found.places:
            continue
        near, end = found.ends[name]
        piled = float((found.extremes[name].abs() > (1 - AT_THE_END) * end).float().mean())
        if TURN < end < math.inf and abs(near - end) < AT_THE_END * end and piled > PILED:
            return (
                f"{name} sits at an end with large weights, at {end:.4g}, which is {end / (2 * math.pi):.3g} turns in"
                f" radians; in degrees it is {math.radians(end):.3g} rad."
            )
    return ""


def _folded(name: str, values: Tensor, targets: Tensor, span: float) -> str:
    """An output that comes as near zero as it likes and never past it, where targets lie on both sides."""
    for sign, side in ((1.0, "negative"), (-1.0, "positive")):
        off, missed = sign * values, float((sign * targets < 0).float().mean())
        near = float((off < NEAR * span).float().mean())
        if float(off.min()) >= 0.0 and missed > OUT_OF_REACH and near > FOLDED and float(off.max()) > NEAR * span:
            return (
                f"with weights drawn at random none of {values.numel()} values of {name} is {side}, and {near:.0%} of"
                f" them are nearly zero; {missed:.0%} of the targets are {side}. An arc cosine, a root or an absolute"
                " value has no sign."
            )
    return ""


CHECKS = {"the output can be what the targets are": output_reach}
