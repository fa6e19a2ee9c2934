"""Preflight of the loss as a whole: its weights, its total, and whether each term is alive and none drowns the rest."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ris_fast.health.finding import Finding
from ris_fast.health.preflight.derivatives import derivatives
from ris_fast.health.preflight.measures import total_norm
from ris_fast.health.preflight.misjudged import uses_targets
from ris_fast.health.preflight.probe import PreflightContext
from ris_fast.health.preflight.terms import leaf, sizes_of
from ris_fast.health.preflight.truth import COVARIANCE, oracle, term_values
from ris_fast.models.prediction import Prediction
from ris_fast.physics.scenes import Scenes
from ris_fast.training.loss import TRUTH_TERMS

DOMINATES = 0.95  # share of the gradient's norm
FEW, SUSPECT = 4, 0.8  # scenes that are looked at first; the share there from which all are: four times as many scenes
# at most halve the gradient of the truth
FORGOTTEN = 0.003  # share of the gradient's norm that all terms of the covariance have
REMEMBERS = 1e-2  # sine of the angle by which a gradient turns
ASIDE = 0.5  # cosine below which most of a longer gradient is something else
AGAINST = -0.5  # cosine of two gradients; what is added to a total turns it by less


def weights(context: PreflightContext) -> Iterator[Finding]:
    """Some term above zero tells the factors what the truth is, and the main one is among them."""
    given: Mapping[str, float] = context.loss.weights
    if given.get(getattr(context.loss, "own_name", ""), 0.0) > 0:
        return  # a term of the user's own may be the main one
    if not any(given.get(name, 0.0) > 0 for name in TRUTH_TERMS):
        yield Finding(
            "zero_loss_weight", f"no term tells the factors what the truth is: the weights are {_shown(given)}."
        )
    elif given.get("cov", 0.0) <= 0:
        yield Finding("zero_loss_weight", f"loss.cov, the main term, has weight zero; what remains is {_shown(given)}.")


def _shown(given: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in given.items()) or "none"


def total(context: PreflightContext) -> Iterator[Finding]:
    """What is differentiated leads where the weighted sum of the terms leads, by its gradient at the network's
    outputs."""
    leaves = _jolted(context.guess.apply(Tensor.float), 0.1).apply(leaf)
    made, terms = context.loss(leaves, context.scenes)
    parts = [context.loss.weights.get(name, 0.0) * value for name, value in terms.items() if value.requires_grad]
    if not parts or made.grad_fn is None:
        return
    expected = sum(parts[1:], parts[0])
    wanted, found = (_slope(value, leaves) for value in (expected, made))
    along = float(wanted @ found / (wanted.norm() * found.norm()).clamp_min(1e-300))
    seen = f"the total is {float(made.detach()):.4g} and the weighted sum of its terms {float(expected.detach()):.4g}"
    if not bool(wanted.any()) or not bool((wanted + found).isfinite().all()):
        return
    if not bool(found.any()):
        yield Finding(
            "clamped_loss" if bool(made.detach()) else "zero_loss_weight",
            f"{seen}; the sum has a gradient at the factors and the total, which is differentiated, has none: it is"
            f" {'held at a bound' if bool(made.detach()) else 'multiplied by zero'}.",
        )
    elif abs(along) < ASIDE and float(found.norm()) > float(wanted.norm()):
        yield Finding(
            "dominating_term",
            f"{seen}; at the network's outputs the gradient of the total has a norm of {float(found.norm()):.3g} and"
            " that of"
            f" the sum {float(wanted.norm()):.3g}, and they point elsewhere (cosine {along:.2f}): what is added"
            " beside the"
            " terms outweighs them.",
            certain=False,
        )
    elif along < AGAINST:
        yield Finding(
            "loss_sign",
            f"{seen}; the total, which is minimised, falls where the sum grows (cosine of their gradients"
            f" {along:.2f}).",
        )


def _slope(value: Tensor, leaves: Prediction) -> Tensor:
    """The gradient at every output, in one row of float64."""
    live = [leaf for leaf in leaves if leaf is not None]
    parts = torch.autograd.grad(value, live, retain_graph=True, allow_unused=True)
    return torch.cat(
        [(torch.zeros_like(leaf) if part is None else part).flatten() for leaf, part in zip(live, parts)]
    ).double()


def dead_terms(context: PreflightContext) -> Iterator[Finding]:
    """Every enabled term changes with the prediction, and none is flat where training starts."""
    scenes = context.scenes
    guess = context.guess
    others = [guess, _jolted(guess, 0.5), _jolted(guess, 0.1)]
    if scenes.factor is not None:
        others.append(oracle(scenes, guess))
    table = [term_values(context, each, scenes) for each in others]
    alone = ("cross", "count") if context.config.task.max_sources == 1 else ()
    for name in table[0].keys() - set(alone):
        values = [row[name] for row in table]
        if not all(map(math.isfinite, values[:3])):
            continue  # which has names of its own
        if len(set(values)) == 1 and not (name == getattr(context.loss, "own_name", "") and _pulls(context, name)):
            yield Finding("dead_loss_term", f"{name} is {values[0]:g} for every prediction that was tried.")
        elif name in COVARIANCE and len(set(values[:3])) == 1:
            yield Finding(
                "clamped_loss",
                f"{name} is {values[0]:g} for an untrained network and for others near it, and "
                f"{values[-1]:.3g} for the truth: it is flat where training starts.",
            )


def _pulls(context: PreflightContext, name: str) -> bool:
    """Whether a term has a gradient: one that is divided by its own detached value is 1 for every answer."""
    leaves = context.guess.apply(leaf)
    value = context.loss(leaves, context.scenes)[1][name]
    return value.requires_grad and bool(_slope(value, leaves).any())


def _jolted(prediction: Prediction, size: float) -> Prediction:
    """A prediction with noise of this share of its own size in every output."""
    generator, levels = torch.Generator().manual_seed(5), sizes_of(prediction)

    def noisy(name: str, value: Tensor) -> Tensor:
        noise = torch.randn(value.shape, generator=generator).to(value.device, value.dtype)
        level = levels[name]
        changed = value + size * torch.where(level > 0, level, 1.0) * noise
        return changed.abs() if (value > 0).all() else changed

    return prediction._replace(**{name: noisy(name, getattr(prediction, name)) for name in levels})


def shares(context: PreflightContext, scenes: Scenes) -> dict[str, float]:
    """Name of each term -> norm of its weighted gradient over the trainable parameters."""
    live = [parameter for parameter in context.parameters.values() if parameter.requires_grad]
    _, terms, _ = context.run(scenes)
    sizes = {}
    for name, value in terms.items():
        if not value.requires_grad:
            sizes[name] = 0.0
            continue
        parts = derivatives(value * context.loss.weights.get(name, 0.0), live, retain_graph=True)
        sizes[name] = total_norm(parts)
    return sizes


def balance(context: PreflightContext) -> Iterator[Finding]:
    """No auxiliary term supplies nearly all of the gradient."""
    sizes = shares(context, context.scenes[:FEW])
    if max(sizes.values(), default=0.0) > SUSPECT * sum(sizes.values()):
        sizes = shares(context, context.scenes)
    total = sum(sizes.values())
    if not total > 0 or not math.isfinite(total) or not any(sizes.get(name) for name in COVARIANCE):
        return
    name, largest = max(sizes.items(), key=lambda item: item[1])
    if name not in TRUTH_TERMS and largest > DOMINATES * total:
        truth = sum(context.loss.weights.get(each, 0.0) for each in TRUTH_TERMS)
        yield Finding(
            "dominating_term",
            f"{name} (weight {context.loss.weights[name]:g}) supplies {largest / total:.1%} of "
            "the gradient at the start.",
            certain=context.loss.weights[name] > truth and name != getattr(context.loss, "own_name", ""),
        )
    elif (told := sum(sizes.get(each, 0.0) for each in COVARIANCE)) < FORGOTTEN * total:
        given = ", ".join(f"{each} {sizes[each] / total:.1%}" for each in sorted(sizes, key=sizes.__getitem__)[:-4:-1])
        yield Finding(
            "dominating_term",
            f"the covariance supplies {told / total:.2%} of the gradient at the start, with a weight of"
            f" {context.loss.weights.get('cov', 0.0):g}; most come from {given}.",
            certain=False,
        )


def keeps_nothing(context: PreflightContext) -> Iterator[Finding]:
    """The gradient of the loss for some scenes is the same once the loss has seen others: nothing of them stays in it.

    A loss may follow its own running size, which changes the length of the gradient and not where it points.
    """
    one, other = context.scenes, context.groups[-1][0][: context.scenes.batch]
    if other.batch != one.batch or torch.equal(other.snapshots, one.snapshots):
        return
    guess = _jolted(context.guess.apply(Tensor.float), 0.5)  # an answer of zeros has an NMSE of 1 for any target
    values = [term_values(context, guess, scenes) for scenes in (one, other)]
    known = [name for name in TRUTH_TERMS if name in values[0] and math.isfinite(values[0][name])]
    same = [name for name in known if values[0][name] == values[1][name] != 0.0]
    same = [name for name in same if one.factor is None or not uses_targets(context, name, guess)]
    if same and other.factor is not None and not torch.equal(one.factor, other.factor):
        yield Finding(
            "stale_cache",
            f"for the same answers {' and '.join(same)} has the same value, bit for bit, whichever of two sets of"
            f" {one.batch} scenes it is asked for: it compares with targets that it was given before.",
            advice="Compute everything that the loss compares from the scenes of its own call.",
        )
        return
    first, again = _gradient_of(context, guess, one), _gradient_of(context, guess, one)
    if first is None or again is None or _turn(first, again) > REMEMBERS:
        return  # it draws random numbers, or changes by itself
    _gradient_of(context, guess, other)
    later = _gradient_of(context, guess, one)
    if later is not None and _turn(first, later) > REMEMBERS:
        yield Finding(
            "stale_cache",
            f"asked twice for the same answers and scenes the loss has the same gradient, and another (turned by"
            f" {_turn(first, later):.2g}) once it has been asked for other scenes in between: it keeps targets, or"
            " what it"
            " makes of them, from the batch before.",
            advice="Compute everything that the loss compares from the scenes of its own call.",
        )


def _gradient_of(context: PreflightContext, guess: Prediction, scenes: Scenes) -> Tensor | None:
    """At every output, in one row; None where there is none."""
    torch.manual_seed(0)
    leaves = guess.apply(leaf)
    made = context.loss(leaves, scenes)[0]
    if made.grad_fn is None:
        return None
    slope = _slope(made, leaves)
    return slope if bool(slope.isfinite().all()) and bool(slope.any()) else None


def _turn(one: Tensor, other: Tensor) -> float:
    """The sine of the angle between two gradients."""
    along = float(one @ other / (one.norm() * other.norm()))
    return math.sqrt(max(0.0, 1.0 - along * along))


MEMORY = {"the loss keeps nothing of earlier scenes": keeps_nothing}  # a term of one's own remembers between its calls
CHECKS = {
    "the weights of the loss": weights,
    "the total is made of its terms": total,
    "every term of the loss is alive": dead_terms,
    **MEMORY,
    "no auxiliary term dominates": balance,
}
