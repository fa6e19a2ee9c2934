"""Preflight of what the loss prefers: the truth to other answers, where no term has a definition that it can be held
to, as one of the user's own, a blend, a loading or a shrinkage has none.

Legend: B batch, N RIS elements, Q factor columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ris_fast.health.finding import Finding
from ris_fast.health.preflight.own_terms import outweighs, reads_factors
from ris_fast.health.preflight.probe import PreflightContext
from ris_fast.health.preflight.truth import COVARIANCE, oracle, turned
from ris_fast.models.prediction import Prediction
from ris_fast.physics.real_complex import conj, multiply
from ris_fast.physics.scenes import Scenes
from ris_fast.training.loss import CovarianceLoss
from ris_fast.training.validation import scene_nmse

SCALES = tuple(10.0 ** (step / 2) for step in range(-8, 9))  # of a factor of trace N; a term may have its own
DIFFERENT = 0.3  # NMSE between the truths of two scenes, on average, above which a loss should tell them apart
DEAF = 1e-3  # of the larger score: what rounding makes of equal ones
SWALLOWED = 0.02  # of the difference that the plain NMSE makes between right and wrong answers
DOWN, STRIDE = 24, 0.1  # steps down a gradient, of the size of the factors each
FAR_BELOW, LOW = 0.5, 0.3  # of the score of an untrained network


def own_term(context: PreflightContext) -> Iterator[Finding]:
    """A term of the user's own that is to teach the factors prefers a scene's truth to the truth of another scene."""
    name, scenes = getattr(context.loss, "own_name", ""), context.scenes
    if not name or context.loss.weights.get(name, 0.0) <= 0 or scenes.factor is None or scenes.batch < 4:
        return
    beside = any(context.loss.weights.get(each, 0.0) > 0 for each in COVARIANCE)  # terms that do know what is right
    if beside and not outweighs(context, name, context.guess):
        return
    right = oracle(scenes, context.guess)
    apart = float(scene_nmse(right._replace(factor=right.factor.roll(1, 0)), scenes).mean())
    if not apart > DIFFERENT:
        return
    scores = _scores(context, name, right, scenes)
    if not all(map(math.isfinite, (scores.own, scores.other, scores.random))):
        return
    seen = (
        f"the best that the true factors score in {name}, at any scale, is {scores.own:.4g}; the true factors of other"
        f" scenes {scores.other:.4g}, an untrained network {scores.random:.4g}"
    )
    if (judged := _prefers(context, name, right, scenes, scores)) is None and not beside:
        judged = _knows_no_phases(scores)
    if judged is not None:
        if not beside or scores.own > LOW * scores.random:  # it may say what the others do not
            yield Finding(judged[0], f"{seen}{judged[1]}.", certain=False)
    elif reads_factors(context, name, right):
        lower = _below(context, name, right, scenes)
        if lower < scores.own - FAR_BELOW * max(scores.random - scores.own, DEAF * scores.size):
            yield Finding(
                "target_scale_differs",
                f"{seen}; down its own gradient from the true factors {name} reaches {lower:.4g}: its lowest value is"
                " not at the truth. The two likeliest reasons: one side has another form, as probabilities where"
                " logarithms are meant, decibels or a square; and a reward for what is only a part of the target.",
                advice="Print the term for the truth itself, and for the truth a little sharper, smaller and larger: it"
                " should be lowest for the truth. kl_div takes logarithms first, and cross_entropy no softmax.",
                certain=False,
            )


class Scores(NamedTuple):
    """What a term says of the true factors, of those of other scenes (the least and the most), of an untrained network,
    of the conjugates, and of the true factors with each element turned by a phase of its own."""

    own: float
    other: float
    most: float
    random: float
    conjugate: float
    turned: float

    @property
    def size(self) -> float:
        return max(abs(self.own), abs(self.other), abs(self.random), 1e-30)


def _scores(context: PreflightContext, name: str, right: Prediction, scenes: Scenes) -> Scores:
    def scored(factor: Tensor) -> float:
        return _scored(context, name, right, factor, scenes)

    own, others = scored(right.factor), [scored(right.factor.roll(step, 0)) for step in (1, -1)]
    random = scored(context.guess.factor.float())
    return Scores(own, min(others), max(others), random, scored(conj(right.factor)), scored(turned(right.factor)))


def _prefers(
    context: PreflightContext, name: str, right: Prediction, scenes: Scenes, scores: Scores
) -> tuple[str, str] | None:
    """The cause, and why, where a term prefers something else to the truth or does not know it from that."""
    own, other, most, random, conjugate, _ = scores
    little = DEAF * scores.size
    if _lowest(conjugate, (own, other, random), random):
        return "conjugation_error", (
            f", and their complex conjugates {conjugate:.4g}: one side is conjugated, or transposed, and the other is"
            " not"
        )
    if _lowest(other, (own, most, random), random):
        return "shuffled_labels", ": an answer is compared with another scene's target, as after a roll or a sort"
    if own > LOW * random and _knows_phases(context, name, right, scenes):
        return "conjugation_error", (
            "; and it changes when a factor is turned by one phase, which leaves F F^H as it is: a transpose stands"
            " where the conjugate transpose belongs"
        )
    if max(abs(other - own), abs(random - own)) < little:
        return "dead_loss_term", ": it does not tell right from wrong"
    if own > random + little and abs(other - own) < little:
        return "target_scale_differs", (
            ": whose target it is does not matter, and the truth is not best: beside one side the other is nothing"
        )
    if own > max(random, other) + little:
        return "loss_sign", ": it is largest for the right answer, as a similarity that is minimised"
    if not abs(other - own) < little:
        return None
    if _of_the_batch(context, name, right, scenes, scores.size):
        return "scenes_mixed", (
            ": it does not matter which scene an answer is for, and of a scene by itself it does: a mean over the"
            " scenes is taken before answers are compared"
        )
    return "dead_loss_term", (
        ": what it compares, as a diagonal or a trace, is the same in all scenes, so it does not tell one scene's truth"
        " from another's"
    )


def _knows_no_phases(scores: Scores) -> tuple[str, str] | None:
    if min(abs(scores.conjugate - scores.own), abs(scores.turned - scores.own)) >= DEAF * scores.size:
        return None
    return "conjugation_error", (
        f", their conjugates {scores.conjugate:.4g} and the same with elements turned by phases of their own"
        f" {scores.turned:.4g}: it compares sizes, or real parts, and no phases"
    )


def _lowest(value: float, others: tuple[float, ...], random: float) -> bool:
    """Whether it is below all the others by most of what an untrained network is above it."""
    return min(others) - value > FAR_BELOW * max(random - value, 1e-30)


@torch.no_grad()
def _knows_phases(context: PreflightContext, name: str, right: Prediction, scenes: Scenes) -> bool:
    """Whether the term changes when the factor of a scene is multiplied by i^(1/2)."""
    half = math.sqrt(0.5)
    size = right.factor.flatten(1).norm(dim=1).clamp_min(1e-30).view(-1, 1, 1, 1)
    unit = right.factor / size * math.sqrt(right.factor.shape[1])
    turned = multiply(unit, torch.tensor((half, half)).to(unit).expand_as(unit))
    score, other = (float(context.loss(right._replace(factor=factor), scenes)[1][name]) for factor in (unit, turned))
    return abs(score - other) > 10 * DEAF * max(abs(score), abs(other))


@torch.no_grad()
def _scored(context: PreflightContext, name: str, like: Prediction, factor: Tensor, scenes: Scenes) -> float:
    """The lowest that the term says of these factors, at any scale that serves all scenes."""
    size = factor.flatten(1).norm(dim=1).clamp_min(1e-30).view(-1, 1, 1, 1)
    unit = factor / size * math.sqrt(factor.shape[1])
    values = [
        float(context.loss(like._replace(factor=given), scenes)[1][name])
        for given in (factor, *(scale * unit for scale in SCALES))
    ]
    return min((value for value in values if math.isfinite(value)), default=math.nan)


def _below(context: PreflightContext, name: str, right: Prediction, scenes: Scenes) -> float:
    """The lowest value of the term on the way down its gradient from the true factors."""
    size = right.factor.flatten(1).square().mean(1).sqrt().view(-1, 1, 1, 1).clamp_min(1e-30)
    factor, lowest = right.factor.detach().clone(), math.inf
    for _ in range(DOWN):
        leaf = factor.clone().requires_grad_()
        torch.manual_seed(0)
        value = context.loss(right._replace(factor=leaf), scenes)[1][name]
        if not value.requires_grad or not bool(value.isfinite()):
            break
        lowest = min(lowest, float(value.detach()))
        (slope,) = torch.autograd.grad(value, leaf, allow_unused=True)
        if slope is None or not bool(slope.isfinite().all()):
            break
        each = slope.flatten(1).square().mean(1).sqrt().view(-1, 1, 1, 1).clamp_min(1e-30)
        factor = factor - STRIDE * size * slope / each
    return lowest


def _of_the_batch(context: PreflightContext, name: str, right: Prediction, scenes: Scenes, size: float) -> bool:
    """Whether single scenes do matter to the term: then it is the mean over them that loses which is which."""
    one = scenes[:1]
    alone = Prediction(*(None if value is None else value[:1] for value in right))
    score = _scored(context, name, alone, alone.factor, one)
    other = _scored(context, name, alone, right.factor[1:2], one)
    return abs(other - score) > DEAF * size


def settings(context: PreflightContext) -> Iterator[Finding]:
    """Blend, loading and shrinkage leave the covariance's term something to tell right from wrong by."""
    given, scenes = context.config.loss, context.scenes
    if (
        scenes.factor is None
        or context.loss.weights.get("cov", 0.0) <= 0
        or not (given.beta or given.loading or given.shrink)
    ):
        return
    if type(context.loss) is not CovarianceLoss:
        return
    right = oracle(scenes, context.guess)
    wrong = [context.guess, right._replace(factor=right.factor.roll(1, 0))]
    plain = min(float(scene_nmse(each, scenes).mean()) for each in wrong)
    if not plain > DIFFERENT:
        return
    found = _told(context, context.loss, right, wrong, scenes)
    if found > SWALLOWED * plain:
        return
    tried = {
        name: _told(
            context, CovarianceLoss(replace(given, own="", **{name: 0.0}), context.config.task), right, wrong, scenes
        )
        for name in ("loading", "shrink", "beta")
        if getattr(given, name) > 0
    }
    name = max(tried, key=tried.__getitem__)
    yield Finding(
        {"loading": "epsilon_swallows_signal", "shrink": "dead_loss_term", "beta": "dead_loss_term"}[name],
        f"loss.cov tells the truth from wrong answers by {found:.2g}, where the plain NMSE of the best of these is"
        f" {plain:.2g}; with loss.{name} = 0 instead of {getattr(given, name):g} by {tried[name]:.2g}: what is added to"
        " both sides is so large that the prediction hardly matters.",
        advice=f"Give --set loss.{name}=0, or a tenth of the smallest part of the covariance that should count.",
        certain=found < DEAF * plain,
    )


@torch.no_grad()
def _told(
    context: PreflightContext, loss: CovarianceLoss, right: Prediction, wrong: list[Prediction], scenes: Scenes
) -> float:
    """By how much the covariance's term is larger for the best of the wrong answers than for the right one."""
    loss = loss.to(scenes.snapshots.device)
    score, *others = (
        float(loss.nmse(each.factor.float(), scenes, blend=loss.settings.beta > 0).mean()) for each in (right, *wrong)
    )
    return min(others) - score


CHECKS = {
    "a loss of one's own prefers the truth": own_term,
    "blend, loading and shrinkage leave the truth the best answer": settings,
}
