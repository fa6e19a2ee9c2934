"""Preflight of what the loss says of the truth and of known errors, and of the labels that it compares with.

Legend: B batch, N RIS elements, Q factor columns, K sources (padded).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as fn

from ris_fast.data.geometry import Reach
from ris_fast.health.finding import Finding
from ris_fast.health.preflight.distributions import UNITS, WIDE
from ris_fast.health.preflight.misjudged import reason, which_scene
from ris_fast.health.preflight.probe import PreflightContext
from ris_fast.models.prediction import Prediction
from ris_fast.physics.real_complex import conj, expi, multiply
from ris_fast.physics.scenes import Scenes
from ris_fast.training.loss_terms import ANGLE_DELTA, active_sources
from ris_fast.training.validation import scene_nmse

ZERO = 1e-3  # of the truth's loss, where the zero predictor's is 1
LEANS = 0.1  # a turn by less is that of a number, such as a mean over the batch, and not of a comparison
OTHERS = 1e-3  # relative change of a direction that rounding does not make
SHIFT_RAD, SHIFT_LOG = 0.02, 0.05
NOISY = 0.1  # of the size of the true factors
COVARIANCE = ("cov", "cov_pred")
LOOKED_AT = 256  # scenes of files
FEW_BEYOND = 0.03  # share of the sources, that errors of their labels alone take past a limit
A_TENTH = 0.1  # of a unit: a larger one may explain by chance how far sources go
LOCATED = {"angle": "azimuth", "range": "range_m", "chamfer": "azimuth"}


def oracle(scenes: Scenes, like: Prediction) -> Prediction:
    """The answer that is right: the target's factor in as many columns as the network's, and the sources' positions."""
    columns = like.factor.shape[2]
    factor = fn.pad(scenes.factor, (0, 0, 0, max(0, columns - scenes.factor.shape[2])))
    active = active_sources(scenes.count, scenes.power.shape[1])

    def set_of(values: Tensor | None, wanted: Tensor | None) -> Tensor | None:
        """Positions of the sources; a slot without one repeats the first."""
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


@torch.no_grad()
def term_values(context: PreflightContext, prediction: Prediction, scenes: Scenes) -> dict[str, float]:
    """Every enabled term of the loss, before its weight."""
    return {name: float(value) for name, value in context.loss(prediction, scenes)[1].items()}


def truth(context: PreflightContext) -> Iterator[Finding]:
    """The true factors and positions score zero in every term that compares with the truth."""
    scenes = context.scenes
    if scenes.factor is None:
        return
    guess = context.guess
    right = oracle(scenes, guess)
    scores = term_values(context, right, scenes)
    wrong = next((name for name in COVARIANCE if name in scores and not scores[name] < ZERO), None)
    if wrong and context.config.loss.beta == 0.0:
        if math.isfinite(scores[wrong]) or math.isfinite(term_values(context, guess, scenes)[wrong]):
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
    if not wrong and context.config.loss.beta == 0.0:
        named = next((name for name in COVARIANCE if name in scores), "")
        if named and scenes.batch > 2 and (same := which_scene(context, named, right)) is not None:
            yield same
            return
        yield from _deaf(context, right)
    if guess.count_logits is not None and "count" in scores:
        yield from _counted(context, right, scores["count"])


def _deaf(context: PreflightContext, right: Prediction) -> Iterator[Finding]:
    """Answers that are wrong by the definition do not score as the truth does."""
    scenes = context.scenes
    first, plain = term_values(context, context.guess, scenes), float(scene_nmse(context.guess, scenes).mean())
    for cause, what, why, factor in (
        (
            "conjugation_error",
            "the complex conjugates of the true factors",
            "imaginary parts, or their signs, do not enter the loss",
            conj(right.factor),
        ),
        (
            "conjugation_error",
            "true factors whose elements are turned by phases of their own",
            "the loss compares sizes and no phases",
            turned(right.factor),
        ),
        (
            "clamped_loss",
            f"true factors with noise of {NOISY:.0%} of their size",
            "the loss is flat around the truth: errors below a threshold are free",
            _noisy(right.factor),
        ),
    ):
        given = right._replace(factor=factor)
        error = float(scene_nmse(given, scenes).mean())
        scores = term_values(context, given, scenes)
        for name in COVARIANCE:
            deaf = name in scores and first[name] < ZERO < plain  # to all answers, which has another name
            if name in scores and not deaf and error > 10 * ZERO and abs(scores[name]) < 0.1 * min(ZERO, error):
                yield Finding(
                    cause,
                    f"{what}, whose NMSE is {error:.3g} by its definition, score {scores[name]:.1e} in {name}, as the"
                    " truth"
                    f" does: {why}.",
                )
                return


def turned(factor: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(43)
    phases = 2 * math.pi * torch.rand(factor.shape[:2], generator=generator)
    return multiply(factor, expi(phases).to(factor)[:, :, None])


def _noisy(factor: Tensor) -> Tensor:
    noise = torch.randn(factor.shape, generator=torch.Generator().manual_seed(44)).to(factor)
    size = factor.flatten(1).square().mean(1).sqrt().view(-1, 1, 1, 1)
    return factor + NOISY * size * noise


def _counted(context: PreflightContext, right: Prediction, score: float) -> Iterator[Finding]:
    """Sure and right logits have no entropy to speak of, and surer ones less of it."""
    if not score > ZERO:
        return
    scenes, logits = context.scenes, right.count_logits
    surer = term_values(context, right._replace(count_logits=20.0 * logits), scenes)["count"]
    twice = math.log1p((logits.shape[1] - 1) / math.e)
    if abs(surer - score) < ZERO * score:
        yield Finding(
            "softmax_twice",
            f"logits that are sure of the true count have an entropy of {score:.4g}, and logits 20 times larger the"
            " same"
            f" ({twice:.4g} is what a softmax before the cross-entropy leaves of {logits.shape[1]} classes): they are"
            " squashed before the loss squashes them itself.",
            certain=abs(score - twice) < 0.01 * twice,
        )
        return
    for step in (1, -1):
        other = term_values(context, right._replace(count_logits=logits.roll(step, 1)), scenes)["count"]
        if other < ZERO:
            yield Finding(
                "parts_unrelated",
                f"logits that are sure of the true count have an entropy of {score:.3g}, and those of one source"
                f" {'more' if step == 1 else 'less'} {other:.1e}: the loss counts from another number than the scenes.",
            )
            return


def _misjudged(context: PreflightContext, term: str, right: Prediction, guess: Prediction, score: float) -> Finding:
    """Why the truth does not score zero."""
    scenes = context.scenes
    if others := asks_others(context, term, guess):
        return Finding("shapes_broadcast", others)
    turned = term_values(context, right._replace(factor=conj(right.factor)), scenes)[term]
    random = term_values(context, guess, scenes)[term]
    if abs(turned) < ZERO:
        return Finding(
            "conjugation_error",
            f"the true factors score {score:.3g} in {term} and their complex conjugates "
            f"{turned:.1e}: one side has the other sign of the exponent.",
        )
    if (found := reason(context, term, right, guess, score)) is not None:
        return found
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


def asks_others(context: PreflightContext, term: str, guess: Prediction) -> str:
    """How many answers are told by a term where the targets of other scenes lie, by the direction of its gradient.

    A loss that is divided by a sum over its batch changes in size with the other scenes, and not in direction.
    """
    scenes = context.scenes
    half = scenes.batch // 2
    if half < 2:
        return ""
    numbers = torch.arange(scenes.batch)
    others = torch.where(numbers % 2 == 0, numbers, 1)
    slopes = []
    for asked in (scenes, scenes[others.to(scenes.snapshots.device)]):
        factor = guess.factor.detach().clone().requires_grad_()
        value = context.loss(guess._replace(factor=factor), asked)[1][term]
        found = torch.autograd.grad(value, factor, allow_unused=True)[0] if value.requires_grad else None
        if found is None or not bool(found.isfinite().all()):
            return ""
        slopes.append(found[: 2 * half : 2].flatten(1).double())
    along = (slopes[0] * slopes[1]).sum(1) / slopes[0].square().sum(1).clamp_min(1e-300)
    gap = (slopes[1] - along[:, None] * slopes[0]).norm(dim=1) / slopes[1].norm(dim=1).clamp_min(1e-300)
    many = int((gap > OTHERS).sum())
    if not many > half // 2 or float(gap.median()) < LEANS:
        return ""
    return (
        f"the gradient of {term} at the answers to {many} of {half} scenes turns by {float(gap.median()):.2g} when the"
        " targets of the other scenes of the batch are replaced: answers are compared with the targets of all"
        " scenes, as shapes (B, 1, ...) and (B, ...) that are broadcast do, or with another scene's."
    )


def _shifted(context: PreflightContext, right: Prediction, scenes: Scenes) -> Iterator[Finding]:
    """A known error in angle or range has the loss that the definition says, in radians and log-metres."""
    if right.azimuth is None:
        return
    moved = right._replace(azimuth=right.azimuth + SHIFT_RAD)
    scores = term_values(context, moved, scenes)
    expected = {"angle": ANGLE_DELTA * (SHIFT_RAD - ANGLE_DELTA / 2), "chamfer": 2 * SHIFT_RAD**2}
    for name, value in expected.items():
        if scores.get(name) and math.isfinite(scores[name]) and not 0.3 * value < scores[name] < 3.0 * value:
            yield Finding(
                "wrong_units",
                f"azimuths that are wrong by {SHIFT_RAD} rad have a {name} loss of "
                f"{scores[name]:.3g}; {value:.3g} is right.",
            )
            return
    if right.range_m is not None and "range" in scores:
        value = SHIFT_LOG**2 / 2
        found = term_values(context, right._replace(range_m=right.range_m * math.exp(SHIFT_LOG)), scenes)["range"]
        if math.isfinite(found) and not 0.3 * value < found < 3.0 * value:
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
        if (found := _files_beyond(context, stored, allowed)) is not None:
            yield found
            return
        allowed = served
    if scenes.azimuth is not None:
        seen = Reach()
        seen.include(scenes.azimuth, scenes.elevation, scenes.range_m, scenes.range_m > 0)
        yield from _beyond(seen, allowed, "the task says" if reach is None else "the files say")


def _files_beyond(context: PreflightContext, stored: Reach, allowed: Reach) -> Finding | None:
    """The first quantity that goes further in the files than the task says: in another unit, or because the task says
    too little. A unit moves all of the sources by its factor; what no unit explains is a setting that fits loosely."""
    for name, limit_name, unit in (
        ("azimuth", "azimuth_deg", "rad"),
        ("elevation", "elevation_deg", "rad"),
        ("range_m", "range_max_m", "m"),
    ):
        high, limit = getattr(stored, name), getattr(allowed, name)
        if not high > 1.01 * limit + 1e-6:
            continue
        seen = f"the files' {name.removesuffix('_m')}s go up to {high:.4g}; the task says {limit:.4g} {unit}"
        for other, factor in UNITS[name == "range_m"].items():
            if factor < 1 and WIDE * limit <= factor * high <= 1.01 * limit:
                return Finding("wrong_units", f"{seen}, which they keep to in {other}.", certain=factor < A_TENTH)
        share = _share_beyond(context, name, 1.01 * limit)
        fits = high if name == "range_m" else math.degrees(high)
        digits = 10.0 ** (1 - math.floor(math.log10(fits)))
        setting = f"task.{limit_name}={math.ceil(fits * digits) / digits:g}"
        return Finding(
            "task_differs",
            f"{seen}. {share:.1%} of the sources of training scenes lie beyond it, and no other unit explains that.",
            advice=f"Give --set {setting}. A label that is measured has an error, which may take a few past the limit.",
            certain=share > FEW_BEYOND,
        )
    return None


def _share_beyond(context: PreflightContext, name: str, limit: float) -> float:
    """Of the sources of scenes from all over the training files, how many lie beyond a limit."""
    source = context.trainer.source
    size = source.size("train")
    rows = torch.linspace(0, size - 1, min(LOOKED_AT, size)).long().to(source.index_device)
    scenes = source.batch("train", rows)
    values, active = getattr(scenes, name), scenes.range_m
    if values is None or active is None or not bool((active > 0).any()):
        return 1.0
    return float((values[active > 0].abs() > limit).float().mean())


def _beyond(seen: Reach, allowed: Reach, says: str) -> Iterator[Finding]:
    """The first quantity that goes further than allowed."""
    for name, unit in (("azimuth", "rad"), ("elevation", "rad"), ("range_m", "m")):
        high, limit = getattr(seen, name), getattr(allowed, name)
        if high > 1.01 * limit + 1e-6:
            yield Finding("wrong_units", f"{name.removesuffix('_m')}s go up to {high:.4g}; {says} {limit:.4g} {unit}.")
            return


CHECKS = {
    "the truth scores zero": truth,
    "labels are in radians and metres": labels,
}
