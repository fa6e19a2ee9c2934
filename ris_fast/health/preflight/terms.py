"""Preflight of each term of the loss by itself: its gradient is its derivative, in float64 on the run's own scenes.

Legend: B batch, N RIS elements, Q factor columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import torch
from torch import Tensor

from ris_fast.health.finding import Finding
from ris_fast.health.preflight.autograd import StoppedValues
from ris_fast.health.preflight.measures import all_finite
from ris_fast.health.preflight.probe import PreflightContext
from ris_fast.models.prediction import Prediction
from ris_fast.physics.scenes import Scenes

# of each output's size; the best of them crosses no kink of a Huber loss, a minimum or an assignment, and no bend
STEPS = (1e-5, 1e-7, 1e-9)
ASIDE = 1e-2  # outputs rounded to 16 bits are often equal, and an assignment has its kinks just there
WRONG, MEANT = 1e-2, 0.2  # relative; a right derivative is below 1e-6; what a detached weight of scenes makes of it
ROUNDING = 1e-12  # of a term of order one in float64
FEW = 8
FROM_ZERO, SMALLEST = ("azimuth", "elevation", "count_logits"), 0.1  # rad, rad, nats


def each_term(context: PreflightContext) -> Iterator[Finding]:
    """Along a random direction of the network's outputs every enabled term changes as its gradient says; with what a
    term detaches as it is, as the weight of a scene by its own loss."""
    errors = {name: error for name, error in term_errors(context).items() if error > WRONG}
    if not errors:
        return
    held = all(error <= WRONG for error in term_errors(context, StoppedValues()).values())
    worst = max(errors, key=errors.__getitem__)
    if held and (
        errors[worst] <= MEANT or [*errors] == [getattr(context.loss, "own_name", "")] and _only_weighs(context, worst)
    ):
        context.note = f"of {', '.join(errors)} a part is detached, as a weight by the loss itself is"
        return
    meant = "; a part of it is detached, which is meant where that is the weight of a scene" if held else ""
    yield Finding(
        "wrong_backward",
        f"the gradient of {', '.join(errors)} is not the derivative of the term (relative error {errors[worst]:.2g} in"
        f" {worst}){meant}.",
        certain=not held,
    )


def _only_weighs(context: PreflightContext, name: str) -> bool:
    """Whether what a term detaches changes the size of its gradient at each scene's answer and not where it points, as
    the weight of a scene by its own loss or a division by a running mean do: where the gradient is zero, along
    directions at right angles to it in every scene, the term does not change either."""
    scenes, guess = context.scenes[:FEW].double(), context.guess.apply(lambda value: value[:FEW].double())
    guess = moved(guess, direction_of(guess, 19), ASIDE)
    leaves, noise = guess.apply(leaf), direction_of(guess, 17)
    live = {key: value for key, value in leaves._asdict().items() if value is not None}
    found = torch.autograd.grad(context.loss(leaves, scenes)[1][name], [*live.values()], allow_unused=True)
    slopes = [torch.zeros_like(one) if each is None else each for one, each in zip(live.values(), found)]
    slope, way = (
        torch.cat([each.flatten(1) for each in side], 1) for side in (slopes, [getattr(noise, k) for k in live])
    )
    along = (way * slope).sum(1, keepdim=True) / slope.square().sum(1, keepdim=True).clamp_min(1e-300)
    across = (way - along * slope).split([each[0].numel() for each in live.values()], 1)
    right = noise._replace(**{key: part.reshape(live[key].shape) for key, part in zip(live, across)})
    expected = float((slope * way).square().sum().sqrt())  # what a direction at random changes
    return min(_change(context, scenes, guess, right, name, step) for step in STEPS) < WRONG * expected


def _change(
    context: PreflightContext, scenes: Scenes, guess: Prediction, way: Prediction, name: str, step: float
) -> float:
    """Of a term along a direction, beyond rounding."""
    with torch.no_grad():
        ahead, behind = (float(context.loss(moved(guess, way, each), scenes)[1][name]) for each in (step, -step))
    return max(0.0, abs(ahead - behind) / (2 * step) - ROUNDING * max(abs(ahead), 1.0) / step)


def term_errors(context: PreflightContext, held: StoppedValues | None = None) -> dict[str, float]:
    """Name of each term that has a gradient -> relative error of its derivative along one random direction.

    Args: held: what leaves the graph stays as it is while the outputs move."""
    scenes = context.scenes[:FEW].double()
    with torch.no_grad():
        guess = context.run(context.scenes[:FEW])[2]
    guess = guess.apply(torch.Tensor.double)
    if not all_finite(guess):
        return {}
    guess = moved(guess, direction_of(guess, 19), ASIDE)
    leaves = guess.apply(leaf)
    direction = direction_of(guess, 17)
    with held or nullcontext():
        terms = context.loss(leaves, scenes)[1]
    slopes = {name: _slope(value, leaves, direction) for name, value in terms.items() if value.requires_grad}
    return {
        name: min(_error(context, scenes, guess, direction, name, slope, step, held) for step in STEPS)
        for name, slope in slopes.items()
    }


def leaf(value: Tensor) -> Tensor:
    """A copy that a gradient can be asked for."""
    return value.detach().clone().requires_grad_()


def sizes_of(guess: Prediction) -> dict[str, Tensor]:
    """The size of each output: its rms. Angles and logits, whose unit is fixed, may start at or near zero, all slots in
    one place: they count as a tenth at least, or no step of their own size would part them."""
    sizes = {name: value.square().mean().sqrt() for name, value in guess._asdict().items() if value is not None}
    return {name: size.clamp_min(SMALLEST) if name in FROM_ZERO else size for name, size in sizes.items()}


def direction_of(guess: Prediction, seed: int) -> Prediction:
    """Noise of the size of each output."""
    generator, sizes = torch.Generator().manual_seed(seed), sizes_of(guess)

    def noise(name: str, value: Tensor) -> Tensor:
        return sizes[name] * torch.randn(value.shape, generator=generator, dtype=value.dtype).to(value.device)

    return guess._replace(**{name: noise(name, getattr(guess, name)) for name in sizes})


def _slope(value: Tensor, leaves: Prediction, direction: Prediction) -> float:
    live = [(leaf, way) for leaf, way in zip(leaves, direction) if leaf is not None]
    parts = torch.autograd.grad(value, [leaf for leaf, _ in live], retain_graph=True, allow_unused=True)
    return sum(float((part * way).sum()) for part, (_, way) in zip(parts, live) if part is not None)


def _error(
    context: PreflightContext,
    scenes: Scenes,
    guess: Prediction,
    direction: Prediction,
    name: str,
    slope: float,
    step: float,
    held: StoppedValues | None,
) -> float:
    def value(way: float) -> float:
        with torch.set_grad_enabled(held is not None), held or nullcontext():  # only what has a history is stopped
            there = moved(guess, direction, way)
            return float(context.loss(there.apply(leaf) if held else there, scenes)[1][name].detach())

    ahead, behind = value(step), value(-step)
    difference, rounding = (ahead - behind) / (2 * step), ROUNDING * max(abs(ahead), 1.0) / step
    return max(0.0, abs(difference - slope) - rounding) / max(abs(difference), abs(slope), rounding)


def moved(guess: Prediction, direction: Prediction, step: float) -> Prediction:
    return Prediction(*(None if value is None else value + step * way for value, way in zip(guess, direction)))


CHECKS = {"the gradient of each term is its derivative": each_term}
