"""Why a covariance term of the loss does not score the truth as it should: by what changes the score.

Legend: B batch, N RIS elements, Q factor columns.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from ris_fast.health.finding import Finding
from ris_fast.health.preflight.autograd import ZERO_DERIVATIVE, graph_of
from ris_fast.health.preflight.measures import listed
from ris_fast.health.preflight.probe import PreflightContext
from ris_fast.models.prediction import Prediction
from ris_fast.physics.real_complex import expi, multiply
from ris_fast.physics.scenes import Scenes

SCALES = tuple(10.0 ** (step / 2) for step in range(-8, 9))  # of a factor of trace N
LITTLE, SAME = 0.05, 1e-6  # of the score of an untrained network; relative: rounding of a mean


def reason(context: PreflightContext, term: str, right: Prediction, guess: Prediction, score: float) -> Finding | None:
    """What is wrong with a term that does not score the truth as zero, where a specific mistake explains it."""
    random = value_of(context, term, guess)
    if not math.isfinite(score):
        return _not_finite(context, term, score, random)
    seen = f"the true factors score {score:.4g} in {term} instead of 0 (an untrained network: {random:.3g})"
    if (stepped := _without_slope(context, term, guess)) is not None:
        return Finding(stepped[0], f"{seen}; {stepped[1]}.")
    noise = torch.randn(right.factor.shape, generator=torch.Generator().manual_seed(47)).to(right.factor)
    near = [
        value_of(context, term, right._replace(factor=right.factor + size * noise * _rms(right.factor)))
        for size in (0.003, 0.03)
    ]
    if all(abs(value - score) < SAME * abs(score) for value in near) and abs(random - score) > LITTLE * abs(score):
        return Finding(
            "clamped_loss",
            f"{seen}, and factors near the truth exactly the same: the loss is held at that value, and errors"
            " below it are free.",
        )
    unit = right.factor / _sizes(right.factor) * math.sqrt(right.factor.shape[1])
    best = min(SCALES, key=lambda scale: _or_infinite(value_of(context, term, right._replace(factor=scale * unit))))
    scaled = value_of(context, term, right._replace(factor=best * unit))
    if scaled < LITTLE * min(score, random):
        return Finding(
            "target_scale_differs",
            f"{seen}, and {scaled:.2g} at {best:.3g} times the scale of trace N: the term compares sizes, and"
            " prediction and target do not have the same.",
        )
    turned = multiply(unit, expi(torch.full(unit.shape[:3], 0.7).to(unit)))
    before, after = (value_of(context, term, right._replace(factor=each)) for each in (unit, turned))
    if abs(after - before) > 1e-3 * max(abs(after), abs(before)):
        return Finding(
            "conjugation_error",
            f"{seen}, and its score changes from {before:.4g} to {after:.4g} when all factors are turned by one"
            " phase, which leaves R = F F^H as it is: a transpose stands where the conjugate transpose belongs.",
        )
    return None


def which_scene(context: PreflightContext, term: str, right: Prediction) -> Finding | None:
    """A term for which the truth of another scene is as good as a scene's own."""
    scenes = context.scenes
    other = value_of(context, term, right._replace(factor=right.factor.roll(1, 0)))
    random, own = value_of(context, term, context.guess), value_of(context, term, right)
    if not abs(other - own) < 1e-4 * max(abs(random), abs(own)) or not random - own > LITTLE * abs(random):
        return None
    one = Prediction(*(None if value is None else value[:1] for value in right))
    alone = value_of(context, term, one, scenes[:1])
    swapped = value_of(context, term, one._replace(factor=right.factor[1:2]), scenes[:1])
    seen = (
        f"true factors score {own:.2g} in {term}, and so do those of other scenes (an untrained network: {random:.3g})"
    )
    if abs(swapped - alone) > LITTLE * random:
        return Finding(
            "scenes_mixed",
            f"{seen}, and for one scene by itself {swapped:.3g}: a mean over the scenes is taken before"
            " answers are compared.",
        )
    return Finding(
        "dead_loss_term",
        f"{seen}, for one scene by itself too: what it compares, as a diagonal or a trace, is the same in all scenes.",
    )


@torch.no_grad()
def value_of(context: PreflightContext, term: str, prediction: Prediction, scenes: Scenes | None = None) -> float:
    return float(context.loss(prediction, context.scenes if scenes is None else scenes)[1][term])


def uses_targets(context: PreflightContext, term: str, prediction: Prediction) -> bool:
    """Whether the term changes with the targets at all: with some that no scene has."""
    scenes = context.scenes
    ramp = torch.linspace(0.1, 1.0, scenes.factor.shape[1]).to(scenes.factor)[:, None, None]
    return value_of(context, term, prediction, replace(scenes, factor=ramp * scenes.factor)) != value_of(
        context, term, prediction
    )


def _not_finite(context: PreflightContext, term: str, score: float, random: float) -> Finding | None:
    """A term that is no number for the right answer alone is one that training comes to."""
    if not math.isfinite(random):
        return None  # for every answer, of which others say more
    return Finding(
        "nonfinite_gradients",
        f"the true factors score {score} in {term}, and an untrained network {random:.3g}: the better the answer,"
        " the nearer to a division by zero or a logarithm of zero.",
    )


def _without_slope(context: PreflightContext, term: str, guess: Prediction) -> tuple[str, str] | None:
    """A term that changes with the answer and has no gradient there: cause, and in words."""
    factor = guess.factor.detach().float().clone().requires_grad_()
    value = context.loss(guess._replace(factor=factor), context.scenes)[1][term]
    if not value.requires_grad:
        return None
    slope = torch.autograd.grad(value, factor, allow_unused=True, retain_graph=True)[0]
    if slope is None or bool(slope.any()) or not bool(value.isfinite()):
        return None
    steps = graph_of(value).named(*ZERO_DERIVATIVE)
    moved = value_of(context, term, guess._replace(factor=factor.detach().roll(1, 0)))
    if moved == float(value.detach()):
        return None
    if steps:
        return (
            "non_differentiable",
            f"it changes with the answer and its gradient is exactly zero: the path has {listed(steps)}",
        )
    return "clamped_loss", "its gradient at an untrained network's answer is exactly zero: there it is flat"


def _sizes(factor: Tensor) -> Tensor:
    return factor.flatten(1).norm(dim=1).clamp_min(1e-30).view(-1, 1, 1, 1)


def _rms(factor: Tensor) -> Tensor:
    return _sizes(factor) / math.sqrt(factor[0].numel())


def _or_infinite(value: float) -> float:
    return value if math.isfinite(value) else math.inf
