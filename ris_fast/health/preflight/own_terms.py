"""Preflight of a loss term of the user's own: it falls towards the truth, and compares each answer with its own scene.

`preference` asks which of several complete answers such a term prefers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch

from ris_fast.health.finding import Finding
from ris_fast.health.preflight.autograd import graph_of
from ris_fast.health.preflight.probe import PreflightContext
from ris_fast.health.preflight.terms import leaf
from ris_fast.health.preflight.truth import COVARIANCE, OTHERS, ZERO, asks_others, oracle, term_values
from ris_fast.models.prediction import Prediction
from ris_fast.training.loss_terms import active_sources

GROWS = 1e-3  # relative, from one point of the way to the truth to the next
FITS = 1e-5  # of the value in the unit that is given; a square is far smaller at a 57th too
STEEP = 0.5  # of the slope at an untrained network's answers


def own_term(context: PreflightContext) -> Iterator[Finding]:
    """A term of the user's own falls towards the truth, and compares each answer with its own scene."""
    name, scenes = getattr(context.loss, "own_name", ""), context.scenes
    if not name or scenes.factor is None or not context.loss.weights.get(name, 0.0) > 0:
        return
    guess = context.guess
    if others := asks_others(context, name, guess):
        if where := _overflows(context, name, guess):
            yield Finding(
                "nonfinite_gradients",
                f"{where}, and its gradient with it. It compares the answers of a batch with each other's targets.",
                advice="Write exponentials of a comparison with logsumexp or cross_entropy, which subtract the largest"
                " first, or raise the temperature; one call of the term with the true factors as answers tells.",
                certain=False,
            )
        elif not _contrasts(context, name, guess) and not _tells_apart(context, name, guess):
            yield Finding("shapes_broadcast", others, certain=False)
        return
    if unit := _other_unit(context, name, guess):
        yield Finding(
            "wrong_units",
            f"at the true angles the term {name} is {unit[0]:.3g}, and at {unit[1]} times these {unit[2]:.3g}: labels"
            " and predictions are both in radians, and one side is converted to or from degrees.",
            certain=False,
        )
        return
    if _reads_padding(context, name, guess):
        yield Finding(
            "target_scale_differs",
            f"the term {name} changes with the places and powers of sources that its scenes do not have: it compares"
            " answers with the padding of the labels.",
            advice="Multiply by (scenes.power > 0), or by the first scenes.count slots, and divide by how many these"
            " are.",
            certain=False,
        )
        return
    if where := _slope_at_truth(context, name, guess):
        yield Finding(
            "loss_sign",
            f"at the true places the term {name} still has a slope in {where}, about as steep as at the answers of an"
            " untrained network: it is not lowest there, as where answers are matched with the farthest source, or"
            " with another scene's.",
            certain=False,
        )
        return
    if (places := _grows_to_places(context, name, guess)) is not None:
        yield Finding(
            "loss_sign",
            f"on the way from the places that an untrained network answers with to the true ones the term {name} takes"
            f" the values {places}: it grows as the answer gets better. A similarity is maximised: subtract it.",
            certain=False,
        )
        return
    right = oracle(scenes, guess)
    if not outweighs(context, name, guess) and not reads_factors(context, name, right):
        return  # what compares with no truth may hold the network back
    way = [term_values(context, _nearer(guess, right, share), scenes)[name] for share in (0.0, 0.5, 0.8, 1.0)]
    if all(math.isfinite(value) for value in way) and all(b > a + GROWS * abs(a) for a, b in zip(way, way[1:])):
        values = ", ".join(f"{value:.3g}" for value in way)
        if real := _falls_of_real_factors(context, name, guess):
            yield Finding(
                "conjugation_error",
                f"on the way from the answers of an untrained network to the truth the term {name} takes the values"
                f" {values}: it grows as the answer gets better. Of factors whose imaginary parts are all zero it takes"
                f" {real}: a transpose or a sign of the imaginary part is another on one side than on the other.",
                certain=False,
            )
            return
        yield Finding(
            "loss_sign",
            f"on the way from the answers of an untrained network to the truth the term {name} takes the values"
            f" {values}: it"
            " grows as the answer gets better. Where it holds the network back on purpose, that is meant.",
            certain=False,
        )


def _falls_of_real_factors(context: PreflightContext, name: str, guess: Prediction) -> str:
    """The values of a term on the way to the truth where no factor has an imaginary part, and a transpose is a
    conjugate one; '' where they do not fall to next to nothing."""
    real = torch.tensor([1.0, 0.0]).to(guess.factor)
    scenes, first = context.scenes, guess._replace(factor=guess.factor * real)
    scenes = replace(scenes, factor=scenes.factor * real)
    right = oracle(scenes, first)
    way = [term_values(context, _nearer(first, right, share), scenes)[name] for share in (0.0, 0.5, 0.8, 1.0)]
    falls = all(math.isfinite(value) for value in way) and all(b < a for a, b in zip(way, way[1:]))
    return ", ".join(f"{value:.3g}" for value in way) if falls and way[-1] < ZERO * way[0] else ""


def _nearer(guess: Prediction, right: Prediction, share: float) -> Prediction:
    """An answer on the way from an untrained network's, at the size of the true one, to the truth."""
    size = right.factor.flatten(1).norm(dim=1) / guess.factor.flatten(1).norm(dim=1).clamp_min(1e-30)
    return guess._replace(factor=(1 - share) * size.view(-1, 1, 1, 1) * guess.factor + share * right.factor)


def _overflows(context: PreflightContext, name: str, guess: Prediction) -> str:
    """Where on the way to the truth, and not only at its end, a term that is finite at first no longer is; '' where it
    is finite on all of it."""
    right = oracle(context.scenes, guess)
    for share in (0.0, 0.8, 0.9, 0.95):
        value = term_values(context, _nearer(guess, right, share), context.scenes)[name]
        if not math.isfinite(value):
            return (
                f"the term {name} is {value} for answers that are {share:.0%} of the way to the truth" if share else ""
            )
    return ""


def _contrasts(context: PreflightContext, name: str, guess: Prediction) -> bool:
    """Whether a softmax is part of the term, over the scenes that it compares, as in a contrastive one."""
    value = context.loss(guess.apply(leaf), context.scenes)[1][name]
    return bool(graph_of(value).named("LogSoftmax", "Softmax", "Logsumexp"))


def _tells_apart(context: PreflightContext, name: str, guess: Prediction) -> bool:
    """Whether a term asks which scene of the batch an answer belongs to, as a contrastive one does: true answers score
    better with their own scenes than with the others'.

    Shapes that are broadcast compare every answer with every target, in whatever order these are; an answer that is
    held to another scene's target scores best with that.
    """
    scenes, right = context.scenes, oracle(context.scenes, guess)
    own = term_values(context, right, scenes)[name]
    numbers = torch.arange(scenes.batch, device=scenes.snapshots.device)
    others = [term_values(context, right, scenes[numbers.roll(turn)])[name] for turn in range(1, scenes.batch)]
    lowest = min(others)
    return all(map(math.isfinite, (own, *others))) and lowest > own + OTHERS * max(abs(own), abs(lowest))


@torch.no_grad()
def _grows_to_places(context: PreflightContext, name: str, guess: Prediction) -> str | None:
    """The values of a term that reads the labels of places, on the way to them, where it grows on all of it."""
    scenes = context.scenes
    names = [each for each in ("azimuth", "elevation", "range_m") if getattr(guess, each) is not None]
    if not names or any(getattr(scenes, each) is None for each in names):
        return None
    rolled = replace(scenes, **{each: getattr(scenes, each).roll(1, 0) for each in names})
    torch.manual_seed(0)
    if term_values(context, guess, scenes)[name] == term_values(context, guess, rolled)[name]:
        return None
    right, way = oracle(scenes, guess), []
    for share in (0.0, 0.5, 0.8, 1.0):
        there = {each: (1 - share) * getattr(guess, each) + share * getattr(right, each) for each in names}
        torch.manual_seed(0)
        way.append(term_values(context, guess._replace(**there), scenes)[name])
    grows = all(math.isfinite(value) for value in way) and all(b > a + GROWS * abs(a) for a, b in zip(way, way[1:]))
    return ", ".join(f"{value:.3g}" for value in way) if grows else None


def _slope_at_truth(context: PreflightContext, name: str, guess: Prediction) -> str:
    """A place in which a term that reads its labels is as steep at the truth as elsewhere; '' where none is."""
    scenes, places = context.scenes, ("azimuth", "elevation", "range_m")
    if scenes.azimuth is None or guess.azimuth is None:
        return ""
    rolled = replace(scenes, **{each: getattr(scenes, each).roll(1, 0) for each in places})
    for place in places:
        sizes = []
        for answer, asked in ((guess, scenes), (oracle(scenes, guess), scenes), (guess, rolled)):
            value = getattr(answer, place).detach().float().clone().requires_grad_()
            term = context.loss(answer._replace(**{place: value}), asked)[1][name]
            slope = torch.autograd.grad(term, value, allow_unused=True)[0] if term.requires_grad else None
            if slope is None or not bool(slope.isfinite().all()) or not bool(slope.any()) and not sizes:
                break
            sizes.append(slope)
        if (
            len(sizes) == 3
            and not torch.equal(sizes[0], sizes[2])
            and float(sizes[1].norm()) > STEEP * float(sizes[0].norm())
        ):
            return place.removesuffix("_m")
    return ""


def _other_unit(context: PreflightContext, name: str, guess: Prediction) -> tuple[float, str, float] | None:
    """The value of a term at the true angles, and with what factor it is next to nothing there; None where it is with
    none. Of scenes whose slots all have a source, since padding is another matter."""
    scenes = context.scenes
    if guess.azimuth is None or guess.elevation is None or scenes.azimuth is None or scenes.power is None:
        return None
    full = scenes.count >= guess.azimuth.shape[1]
    if not bool(full.any()):
        return None
    scenes, right = scenes[full], oracle(scenes[full], guess.apply(lambda value: value[full]))
    value = term_values(context, right, scenes)[name]
    for times, factor in (("180 / pi", 180 / math.pi), ("pi / 180", math.pi / 180)):
        there = right._replace(azimuth=factor * right.azimuth, elevation=factor * right.elevation)
        other = term_values(context, there, scenes)[name]
        if 0 <= other < FITS * value:
            return value, times, other
    return None


def _reads_padding(context: PreflightContext, name: str, guess: Prediction) -> bool:
    """Whether the term changes with labels of sources that are not there."""
    scenes = context.scenes
    if scenes.azimuth is None or scenes.power is None or scenes.power.shape != scenes.azimuth.shape:
        return False
    there = active_sources(scenes.count, scenes.power.shape[1])
    if bool(there.all()):
        return False
    names = [each for each in ("azimuth", "elevation", "range_m") if getattr(scenes, each) is not None]
    other = {each: torch.where(there, getattr(scenes, each), getattr(scenes, each) + 0.37) for each in names}
    torch.manual_seed(0)
    first, again = (term_values(context, guess, scenes)[name] for _ in range(2))
    return first == again and term_values(context, guess, replace(scenes, **other))[name] != first


@torch.no_grad()
def reads_factors(context: PreflightContext, name: str, right: Prediction) -> bool:
    """Whether the term of the true answers is another one where the scenes have each other's true factors."""
    scenes, values = context.scenes, []
    for given in (scenes, scenes, replace(scenes, factor=scenes.factor.roll(1, 0))):
        torch.manual_seed(0)
        values.append(term_values(context, right, given)[name])
    return values[0] == values[1] != values[2]


def outweighs(context: PreflightContext, name: str, guess: Prediction) -> bool:
    """Whether a term's gradient at the factors is larger than that of what compares them with the truth."""
    factor = guess.factor.detach().clone().requires_grad_()
    values = context.loss(guess._replace(factor=factor), context.scenes)[1]
    slopes = {}
    for each in (name, *COVARIANCE):
        if each in values and values[each].requires_grad:
            (slope,) = torch.autograd.grad(values[each], factor, retain_graph=True, allow_unused=True)
            if slope is not None:
                slopes[each] = context.loss.weights[each] * slope.double()
    own, others = slopes.pop(name, None), sum(slopes.values(), torch.zeros_like(factor, dtype=torch.float64))
    if own is None:
        return False
    return float(own.norm()) > float(others.norm())


CHECKS = {"a term of one's own falls towards the truth": own_term}
