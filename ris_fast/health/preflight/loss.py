"""Preflight of the loss: what it says of the truth, of a known error and of guesses, through the trainer's own objects.

Legend: B batch, N RIS elements, Q factor columns, K sources (padded).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.nn import functional as fn

from ris_fast.data.geometry import Reach
from ris_fast.health.finding import Finding
from ris_fast.health.preflight.probe import PreflightContext
from ris_fast.models.prediction import Prediction
from ris_fast.physics.real_complex import conj
from ris_fast.physics.scenes import Scenes
from ris_fast.training.loss import TRUTH_TERMS

ZERO = 1e-3  # of the truth's loss, where the zero predictor's is 1
SHIFT_RAD, SHIFT_LOG = 0.02, 0.05
COVARIANCE = ("cov", "cov_pred")
LOCATED = {"angle": "azimuth", "range": "range_m", "chamfer": "azimuth"}
DOMINATES = 0.95
# on FEW scenes: four times as many halve the gradient of the truth at most, and this share stays below the other
FAR_FROM_IT = 0.8
FEW = 4
AGAINST = -0.5  # cosine of two gradients; what is added to a total turns it by less


def weights(context: PreflightContext) -> Iterator[Finding]:
    """Some term above zero tells the factors what the truth is, and the main one is among them."""
    given: Mapping[str, float] = context.loss.weights
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
    guess = context.guess
    leaves = Prediction(
        *(None if value is None else value.detach().float().clone().requires_grad_() for value in guess)
    )
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


# ---- the oracle ----------------------------------------------------------------------------------------------------


def oracle(scenes: Scenes, like: Prediction) -> Prediction:
    """The answer that is right: the target's factor in as many columns as the network's, and the sources' places."""
    columns = like.factor.shape[2]
    factor = fn.pad(scenes.factor, (0, 0, 0, max(0, columns - scenes.factor.shape[2])))
    active = torch.arange(scenes.power.shape[1], device=scenes.count.device) < scenes.count[:, None]

    def set_of(values: Tensor | None, wanted: Tensor | None) -> Tensor | None:
        """Places of the sources; a slot without one repeats the first."""
        return None if wanted is None or values is None else torch.where(active, values, values[:, :1]).clone()

    logits = None
    if like.count_logits is not None:
        logits = 50.0 * fn.one_hot(scenes.count - 1, like.count_logits.shape[1]).to(factor.dtype)
    return Prediction(
        factor.clone(),
        set_of(scenes.azimuth, like.azimuth),
        set_of(scenes.elevation, like.elevation),
        set_of(scenes.range_m, like.range_m),
        logits,
    )


def _terms(context: PreflightContext, prediction: Prediction, scenes: Scenes) -> dict[str, float]:
    with torch.no_grad():
        return {name: float(value) for name, value in context.loss(prediction, scenes)[1].items()}


def truth(context: PreflightContext) -> Iterator[Finding]:
    """The true factors and places score zero in every term that compares with the truth."""
    scenes = context.scenes
    if scenes.factor is None:
        return
    guess = context.guess
    right = oracle(scenes, guess)
    scores = _terms(context, right, scenes)
    wrong = next((name for name in COVARIANCE if name in scores and not scores[name] < ZERO), None)
    if wrong and context.config.loss.beta == 0.0:
        yield _misjudged(context, wrong, right, guess, scores[wrong])
    for name in LOCATED:
        if name in scores and scores[name] > ZERO:
            yield Finding(
                "wrong_units",
                f"the true {LOCATED[name]} has a {name} loss of {scores[name]:.3g} instead of 0: "
                "prediction and label are not in the same units or frame.",
            )
            return
    yield from _shifted(context, right, scenes)


def _misjudged(context: PreflightContext, term: str, right: Prediction, guess: Prediction, score: float) -> Finding:
    """Why the truth does not score zero."""
    scenes = context.scenes
    turned = _terms(context, right._replace(factor=conj(right.factor)), scenes)[term]
    random = _terms(context, guess, scenes)[term]
    if abs(turned) < ZERO:
        return Finding(
            "conjugation_error",
            f"the true factors score {score:.3g} in {term} and their complex conjugates "
            f"{turned:.1e}: one side has the other sign of the exponent.",
        )
    if score > random:
        return Finding(
            "loss_sign",
            f"{term} is {score:.3g} for the truth and {random:.3g} for an untrained network: "
            "it grows as the answer gets better.",
        )
    return Finding(
        "target_scale_differs",
        f"the true factors score {score:.4g} in {term} instead of 0 (an untrained "
        f"network: {random:.3g}): prediction and target are not treated alike.",
    )


def _shifted(context: PreflightContext, right: Prediction, scenes: Scenes) -> Iterator[Finding]:
    """A known error in angle or range has the loss that the definition says, in radians and log-metres."""
    if right.azimuth is None:
        return
    moved = right._replace(azimuth=right.azimuth + SHIFT_RAD)
    scores, delta = _terms(context, moved, scenes), math.radians(0.25)
    expected = {"angle": delta * (SHIFT_RAD - delta / 2), "chamfer": 2 * SHIFT_RAD**2}
    for name, value in expected.items():
        if scores.get(name) and not 0.3 * value < scores[name] < 3.0 * value:
            yield Finding(
                "wrong_units",
                f"azimuths that are wrong by {SHIFT_RAD} rad have a {name} loss of "
                f"{scores[name]:.3g}; {value:.3g} is right.",
            )
            return
    if right.range_m is not None and "range" in scores:
        value = SHIFT_LOG**2 / 2
        found = _terms(context, right._replace(range_m=right.range_m * math.exp(SHIFT_LOG)), scenes)["range"]
        if not 0.3 * value < found < 3.0 * value:
            yield Finding(
                "wrong_units", f"ranges that are 5 % too long have a range loss of {found:.3g}; {value:.3g} is right."
            )


def labels(context: PreflightContext) -> Iterator[Finding]:
    """Angles and ranges lie where the task says.

    A reader may re-express the positions of files from another origin, which moves them past the task's limits: what
    the files have is held to the task, and the scenes to what the reader served.
    """
    task, scenes = context.config.task, context.scenes
    allowed = Reach(math.radians(task.azimuth_deg), math.radians(task.elevation_deg), task.range_max_m)
    reach = getattr(context.trainer.source, "reach", None)
    if reach is not None:
        stored, served = reach
        yield from _beyond("the files' ", stored, allowed, "the task says")
        allowed = served
    if scenes.azimuth is not None:
        seen = Reach()
        seen.include(scenes.azimuth, scenes.elevation, scenes.range_m, scenes.range_m > 0)
        yield from _beyond("", seen, allowed, "the task says" if reach is None else "the files say")


def _beyond(whose: str, seen: Reach, allowed: Reach, says: str) -> Iterator[Finding]:
    """The first quantity that goes further than allowed."""
    for name, unit in (("azimuth", "rad"), ("elevation", "rad"), ("range_m", "m")):
        high, limit = getattr(seen, name), getattr(allowed, name)
        if high > 1.01 * limit + 1e-6:
            yield Finding(
                "wrong_units", f"{whose}{name.removesuffix('_m')}s go up to {high:.4g}; {says} {limit:.4g} {unit}."
            )
            return


# ---- terms ---------------------------------------------------------------------------------------------------------


def dead_terms(context: PreflightContext) -> Iterator[Finding]:
    """Every enabled term changes with the prediction, and none is flat where training starts."""
    scenes = context.scenes
    guess = context.guess
    others = [guess, _jolted(guess, 0.5), _jolted(guess, 0.1)]
    if scenes.factor is not None:
        others.append(oracle(scenes, guess))
    table = [_terms(context, each, scenes) for each in others]
    alone = ("cross", "count") if context.config.task.max_sources == 1 else ()
    for name in table[0].keys() - set(alone):
        values = [row[name] for row in table]
        if len(set(values)) == 1:
            yield Finding("dead_loss_term", f"{name} is {values[0]:g} for every prediction that was tried.")
        elif name in COVARIANCE and len(set(values[:3])) == 1:
            yield Finding(
                "clamped_loss",
                f"{name} is {values[0]:g} for an untrained network and for others near it, and "
                f"{values[-1]:.3g} for the truth: it is flat where training starts.",
            )


def _jolted(prediction: Prediction, size: float) -> Prediction:
    """A prediction with noise of this share of its own size in every output."""
    generator = torch.Generator().manual_seed(5)

    def noisy(value: Tensor | None) -> Tensor | None:
        if value is None:
            return None
        noise = torch.randn(value.shape, generator=generator).to(value.device, value.dtype)
        return (
            (value + size * value.abs().mean() * noise).abs()
            if (value > 0).all()
            else value + size * value.abs().mean() * noise
        )

    return Prediction(*(noisy(value) for value in prediction))


def shares(context: PreflightContext, scenes: Scenes) -> dict[str, float]:
    """Name of each term -> norm of its weighted gradient over the trainable parameters."""
    live = [parameter for parameter in context.parameters.values() if parameter.requires_grad]
    _, terms, _ = context.run(scenes)
    sizes = {}
    for name, value in terms.items():
        if not value.requires_grad:
            sizes[name] = 0.0
            continue
        parts = torch.autograd.grad(
            value * context.loss.weights.get(name, 0.0), live, retain_graph=True, allow_unused=True
        )
        sizes[name] = float(
            torch.stack([part.norm() for part in parts if part is not None] or [torch.zeros(())]).norm()
        )
    return sizes


def balance(context: PreflightContext) -> Iterator[Finding]:
    """No auxiliary term supplies nearly all of the gradient."""
    sizes = shares(context, context.scenes[:FEW])
    if max(sizes.values(), default=0.0) > FAR_FROM_IT * sum(sizes.values()):
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
            certain=context.loss.weights[name] > truth,
        )


CHECKS = {
    "the weights of the loss": weights,
    "the total is made of its terms": total,
    "the truth scores zero": truth,
    "labels are in radians and metres": labels,
    "every term of the loss is alive": dead_terms,
    "no auxiliary term dominates": balance,
}
