"""Preflight that the network can memorise a few scenes at all: the most telling check, and the last.

Where the run's own step does not reach the goal, copies of the weights are trained on the same scenes by plain Adam at
several rates. What a healthy network of any kind does at some rate tells a slow run from one that cannot learn. Time is
that of the processor, so that beside other work no less is tried.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import Tensor

from ris_fast.health.finding import Finding
from ris_fast.health.preflight.derivatives import derivatives
from ris_fast.health.preflight.measures import all_finite, total_norm
from ris_fast.health.preflight.probe import PreflightContext
from ris_fast.health.preflight.truth import COVARIANCE
from ris_fast.training.validation import scene_nmse

STEPS, GOAL = 60, 0.05
FEWEST, SECONDS = 6, 0.5  # steps at least, and after that time no more, if some was learned; else see TRIED, LONGEST
RATES = (1e-3, 1e-2, 1e-4)  # of plain Adam
TRIED, LONGEST = 25, 4.0  # steps at each rate at least, or nothing is said; seconds for all of them
ZERO = 1.0  # NMSE of an answer of zeros: what falls to that has learned nothing of its scenes
FALLS, FLAT = 0.05, 0.01  # share of the NMSE: that a network which can learn takes off, and that counts as none
NOISY = 0.3  # cosine of two gradients of the same scenes, below which chance makes most of them
HELD = 1.0  # of the gradient that comes through the answers, above which a term of the weights alone outweighs it
LEARNED, LEFT = 0.3, 0.7  # of a scene's own first NMSE, where scenes split


def overfit_batch(context: PreflightContext) -> Iterator[Finding]:
    """A few scenes again and again through the run's own step; where they are not learned, why not."""
    began, taken = time.thread_time(), 0
    context.step.telemetry.enabled = False  # undone with everything else
    first = [parameter.detach().clone() for parameter in context.trainable.values()]
    start_scenes = last_scenes = _scene_nmse(context)
    start = score = float(start_scenes.mean())
    for taken in range(1, STEPS + 1):
        torch.manual_seed(taken)
        context.model.train()
        context.step([context.scenes], STEPS)
        spent = time.thread_time() - began
        late = taken >= FEWEST and spent > SECONDS
        if taken % 10 == 0 or late:
            last_scenes = _scene_nmse(context)
            score = float(last_scenes.mean())
        learns = score < (1 - FALLS) * min(start, ZERO)
        if score < GOAL or (late and (learns or taken >= TRIED or spent > LONGEST)):
            break
    context.reached = score < GOAL
    context.note = f"NMSE of {context.scenes.batch} scenes {start:.3f} -> {score:.3f} in {taken} steps" + (
        ""
        if score < GOAL
        else f"; the goal of {GOAL:g} was not reached in {'the time for it' if taken < STEPS else f'{STEPS} steps'}"
    )
    if min(score, _score(context)) < (1 - FALLS) * min(start, ZERO) or not start > GOAL:
        return
    own = (
        f"the NMSE of {context.scenes.batch} scenes goes from {start:.3f} to {score:.3f} in {taken} of the run's steps"
    )
    gains = _plain_adam(context, first)
    if gains is None:
        return  # too slow to be tried
    few = taken < TRIED  # a slow machine or a large network: the run's own steps are too few to be compared with those
    yield from _reason(context, first, own, start, score, few, gains, (start_scenes, last_scenes))


def _reason(
    context: PreflightContext,
    first: list[Tensor],
    own: str,
    start: float,
    score: float,
    few: bool,
    gains: dict[float, float],
    scenes: tuple[Tensor, Tensor],
) -> Iterator[Finding]:
    """Nothing structural was found and the same scenes are not learned: by the step, by its rate, or by no step."""
    best = max(gains, key=gains.__getitem__)
    rates = [group.get("peak_lr", group["lr"]) for group in context.optimizer.param_groups]
    usual = max(rates)
    tried = ", ".join(f"{gain:.0%} at {rate:g}" for rate, gain in gains.items())
    if gains[best] >= FALLS:
        alike = [rate for rate in gains if usual / 3 <= rate <= 3 * usual]
        if score > 1.05 * start and best < usual / 3:
            yield Finding(
                "learning_rate_too_large",
                f"{own}; plain Adam takes off {tried}: the run's rate is {usual:g}.",
                certain=False,
            )
        elif not few and score > (1 - FLAT) * start and any(gains[rate] >= 2 * FALLS for rate in alike):
            yield Finding(
                "cannot_memorise",
                f"{own}; plain Adam on a copy takes off {tried} of the NMSE, and the run's rate is {usual:g}: the"
                " network can learn them, and the run's own step does not.",
                advice="Look between backward and the weights: what hooks, clipping, decay or the schedule make of the"
                " gradient. Compare the change of a weight in one step with minus the rate times the gradient's sign.",
                certain=False,
            )
        return
    if few:
        return  # it may take more steps than any of these were
    pull = _pull(context)
    if pull > HELD:
        yield Finding(
            "dominating_term",
            f"{own}, and plain Adam takes off {tried} of the NMSE. After these steps, what the loss asks of the weights"
            f" themselves has {pull:.3g} times the gradient that comes through the network's answers: it holds the"
            " weights, whatever the scenes.",
            advice="Look for a penalty on the weights or on their distance from earlier ones, in the loss or a term of"
            " your own, and train once without it.",
            certain=False,
        )
        return
    cosine = _agreement(context, first)
    if cosine < NOISY:
        yield Finding(
            "cannot_memorise",
            f"{own}, and plain Adam takes off {tried} of the NMSE. Two gradients of the same scenes have a cosine of"
            f" {cosine:.2f}: chance makes most of the gradient.",
            advice="Find what is random in training mode: dropout, noise that is added to inputs, targets or gradients."
            " Two calls with the same random numbers tell where it comes from.",
            certain=False,
        )
        return
    split = _split(*scenes)
    yield Finding(
        "cannot_memorise",
        f"{own}, and plain Adam on a copy takes off {tried} of the NMSE{split}. The two likeliest reasons: the output"
        " cannot be what the targets are, or the gradient does not lead there.",
        advice="Replace the network by one tensor of factors, the parameters themselves, and train it on these scenes:"
        " if that learns, the network is at fault, and the loss or the targets otherwise.",
        certain=False,
    )


def _split(before: Tensor, after: Tensor) -> str:
    """Scenes that are learned beside others that are not."""
    ratio = after / before.clamp_min(1e-30)
    learned, left = int((ratio < LEARNED).sum()), int((ratio > LEFT).sum())
    return f"; {learned} scenes are learned and {left} are not at all" if learned and left else ""


def _plain_adam(context: PreflightContext, first: list[Tensor]) -> dict[float, float] | None:
    """Rate -> share of the NMSE (of the loss, where it has no covariance) that plain Adam takes off, from the first
    weights; None where time does not allow."""
    by_nmse = any(context.loss.weights.get(name, 0.0) > 0 for name in COVARIANCE)
    live, began, gains = list(context.trainable.values()), time.thread_time(), {}
    if not live:
        return None
    for rate in RATES:
        _set(live, first)
        adam = torch.optim.Adam(live, rate, foreach=False)
        before = (
            min(ZERO, float(_scene_nmse(context).mean())) if by_nmse else float(context.run(seed=TRIED)[0].detach())
        )
        context.model.train()
        for number in range(TRIED):
            total = _total(context, number)
            if not total.requires_grad or time.thread_time() - began > LONGEST:
                return gains if max(gains.values(), default=0.0) >= FALLS else None
            for parameter, part in zip(live, derivatives(total, live)):
                parameter.grad = part
            adam.step()
        after = _score(context) if by_nmse else _loss(context)
        gains[rate] = max(0.0, 1 - after / max(before, 1e-30))
        if gains[rate] >= 2 * FALLS and rate != RATES[0]:
            break
    return gains


@torch.no_grad()
def _set(live: list[Tensor], values: list[Tensor]) -> None:
    for parameter, value in zip(live, values):
        parameter.copy_(value)


def _pull(context: PreflightContext) -> float:
    """Norm of the gradient that reaches the weights past the answers, of that which comes through them, at the weights
    as they are."""
    live, prediction = list(context.trainable.values()), context.step.predict(context.scenes)
    beside = context.loss(prediction.apply(Tensor.detach), context.scenes)[0]
    if not beside.requires_grad:
        return 0.0
    past = derivatives(beside, live)
    whole = derivatives(context.loss(prediction, context.scenes)[0], live)
    through = [a if b is None or a is None else a - b for a, b in zip(whole, past)]
    return total_norm(past) / max(total_norm(through), 1e-300)


def _agreement(context: PreflightContext, first: list[Tensor]) -> float:
    """Cosine of the gradients of the same scenes with two sets of random numbers, at the first weights."""
    live = list(context.trainable.values())
    _set(live, first)
    one, other = (derivatives(_total(context, seed), live) for seed in (1, 2))
    if not all_finite(one) or not all_finite(other):
        return 1.0
    product = sum(float((a.double() * b.double()).sum()) for a, b in zip(one, other) if a is not None and b is not None)
    return product / max(total_norm(one) * total_norm(other), 1e-300)


def _total(context: PreflightContext, seed: int) -> Tensor:
    """The loss of a training pass, whose running statistics go on from the one before."""
    torch.manual_seed(seed)
    return context.loss(context.step.predict(context.scenes), context.scenes)[0]


def _score(context: PreflightContext) -> float:
    """Mean NMSE in the better of the two modes: running statistics take longer than these few steps to follow."""
    context.model.train()
    with torch.no_grad():
        trained = float(scene_nmse(context.step.predict(context.scenes), context.scenes).mean())
    return min(trained, float(_scene_nmse(context).mean()))


def _loss(context: PreflightContext) -> float:
    return float(_total(context, TRIED).detach())


@torch.no_grad()
def _scene_nmse(context: PreflightContext) -> Tensor:
    context.model.eval()
    return scene_nmse(context.step.predict(context.scenes), context.scenes)


CHECKS = {"a few scenes can be memorised": overfit_batch}
