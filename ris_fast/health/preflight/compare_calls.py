"""What the step calls beside the network as written: their predictions and gradients, with these weights and others.

Legend: B batch, N RIS elements, Q factor columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from ris_fast.health.finding import Finding
from ris_fast.health.preflight.derivatives import derivatives
from ris_fast.health.preflight.measures import CLOSE, SAME, relative_change, rms, total_norm
from ris_fast.health.preflight.probe import SMALL, PreflightContext
from ris_fast.models.prediction import Prediction
from ris_fast.physics.scenes import Scenes

CALLS = 4  # on the same few scenes: one network, or several that take turns
NOISIER = 1.5  # times the spread of the network's own answers
ROUNDED = 0.05  # of any scene's answer: what bfloat16 or calibrated bytes leave, in an engine that only evaluates
COSTS = 0.01  # of the loss, that such an engine may
FARTHER = 0.6  # of the weights' size, where what was calibrated on other weights is off by more than rounding
DEPARTS = 10.0  # times what it is off by with the weights as they are
SLOPE, SLOPE_LOW = 1e-2, 0.2  # relative, of a gradient in float32 and in 16 bits
FAINT = 1e-4  # of the whole gradient: a tensor with less is measured by this


def compare(context: PreflightContext, scenes: Scenes, *, grad: bool) -> Finding | None:
    """Factors of the same few scenes, with the weights as they are and with others."""
    answers = [step_factor(context, scenes) for _ in range(CALLS)]
    spread = max(relative_change(answers[0], other) for other in answers)
    if spread > CLOSE:
        return _calls_differ(context, scenes, spread)
    written = model_factor(context, scenes)
    weights, directions = _elsewhere(context)
    with context.moved(weights, directions, 0.3):
        wanted = model_factor(context, scenes)  # calls may take turns between several copies
        moved = max((step_factor(context, scenes) for _ in range(2)), key=lambda each: relative_change(wanted, each))
        again = model_factor(context, scenes)
    how = "while training" if grad else "in validation"
    finding = _difference(context, how, answers[0], written, moved, wanted)
    if not grad and (finding is None or finding.cause == "compiled_differs"):
        now = relative_change(written, answers[0])
        departs = _departs(context, scenes, (weights, directions), now) if now > SAME else None
        finding = departs or _beyond_rounding(context, scenes, finding, answers[0], written)
    if finding is not None and relative_change(wanted, again) > CLOSE:
        return None  # the network keeps something from one call to the next, which has names of its own
    if (
        finding is not None
        and finding.cause == "stale_compiled_graph"
        and not grad
        and relative_change(answers[0], moved) < SAME
        and _follows(context, weights, directions)
    ):
        return Finding(
            "cached_validation",
            "in validation, the network's answers to scenes that it has seen are the same, bit for bit, after "
            "its weights were changed; those to other scenes are not.",
        )
    return finding


def compare_others(context: PreflightContext, scenes: Scenes) -> Finding | None:
    """Factors of other scenes than those before, as many: what the step calls is shown these, not those that it was
    shown first."""
    others = context.groups[-1][0][: scenes.batch]
    if others.batch != scenes.batch or torch.equal(others.snapshots, scenes.snapshots):
        return None
    first, answer, written = step_factor(context, scenes), step_factor(context, others), model_factor(context, others)
    if relative_change(written, answer) <= context.tolerance(CLOSE, 0.05):
        return None
    if relative_change(first, answer) < SAME:
        return Finding(
            "stale_cache",
            f"while training, what the step calls gives {others.batch} scenes the answers to {scenes.batch} others"
            " that it"
            " was shown before: something keeps inputs or answers from one call to the next, by their shape.",
            advice="Copy the inputs of every call into the static tensors that a captured graph reads, before it is"
            " replayed; or key what is kept by the scenes' numbers and their split.",
        )
    return _difference(
        context, "while training, on scenes that were not shown before,", answer, written, answer, written
    )


def compare_once(context: PreflightContext, scenes: Scenes) -> Finding | None:
    """Factors of many scenes, in evaluation mode with the weights as they are."""
    answer, written = step_factor(context, scenes), model_factor(context, scenes)
    finding = _difference(context, f"in batches of {scenes.batch}", answer, written, answer, written)
    return _beyond_rounding(context, scenes, finding, answer, written)


def _difference(
    context: PreflightContext, how: str, answer: Tensor, written: Tensor, moved: Tensor, wanted: Tensor
) -> Finding | None:
    """What the step calls and the network as written, on the same scenes with the weights as they are, and with
    others."""
    now, later = relative_change(written, answer), relative_change(wanted, moved)
    if later > max(CLOSE, 2 * now) and (
        relative_change(answer, moved) < SAME or later > 0.1 * relative_change(wanted, written)
    ):
        return _stale(how, later, now)
    if now > context.tolerance(CLOSE, 0.05):
        own = context.step.network is context.trainer.network and not context.by_torch
        return Finding(
            "compiled_differs",
            f"{how}, what the step calls answers otherwise than the network as written, "
            f"relative difference {now:.2g}{', though nothing is compiled' if own else ''}.",
            certain=not own,
        )
    return None


def _beyond_rounding(
    context: PreflightContext, scenes: Scenes, finding: Finding | None, answer: Tensor, written: Tensor
) -> Finding | None:
    """A difference of what only evaluates: certain where no usual precision explains it in any scene, and none where
    one does and the loss is next to the same."""
    if finding is None or any(relative_change(b, a) > ROUNDED for a, b in zip(answer, written)):
        return finding
    answers = (context.step.predict(scenes), _model_prediction(context, scenes))
    called, own = (float(context.loss(each, scenes)[0]) for each in answers)
    if abs(called - own) <= COSTS * abs(own):
        context.note = f"what evaluates is off by rounding: a loss of {called:.6g}, and {own:.6g} as written"
        return None
    return replace(
        finding,
        evidence=f"{finding.evidence} The loss of these scenes is {called:.4g} by it and {own:.4g} by the network. A"
        " low precision may explain it.",
        certain=False,
    )


def _departs(
    context: PreflightContext, scenes: Scenes, way: tuple[list[nn.Parameter], list[Tensor]], now: float
) -> Finding | None:
    """What is close to the network with these weights and not with others keeps something of these, as ranges of a
    calibration do."""
    with context.moved(*way, FARTHER):
        later = relative_change(model_factor(context, scenes), step_factor(context, scenes))
    if not later > max(ROUNDED, DEPARTS * now):
        return None
    return Finding(
        "stale_compiled_graph",
        f"in validation, what the step calls answers as the network as written but for {now:.2g} with its weights as"
        f" they are, and is off by {later:.2g} with others: it keeps something of these weights, as the ranges of a"
        " calibration are. Where it is made or calibrated anew before each validation, that is meant.",
        advice="Calibrate, quantise or export anew before each validation, from the weights as they then are.",
        certain=False,
    )


def _elsewhere(context: PreflightContext) -> tuple[list[nn.Parameter], list[Tensor]]:
    """All weights, and a random direction of the size of each."""
    weights = list(context.parameters.values())
    return weights, [torch.randn_like(weight) * (rms(weight) or 0.1) for weight in weights]


def _stale(how: str, later: float, now: float) -> Finding:
    return Finding(
        "stale_compiled_graph",
        f"{how}, what the step calls does not follow the network's weights: after they were changed its "
        f"answers are off by {later:.2g} (before: {now:.2g}).",
    )


def compare_random(context: PreflightContext, scenes: Scenes) -> Finding | None:
    """As `compare` for dropout, whose random numbers a compiler draws in another order: means over two calls differ no
    more than those of the network itself do."""

    def gaps() -> tuple[float, float]:
        first, called, second = (
            sum(_seeded(call, context, scenes, seed) for seed in seeds) / len(seeds)
            for call, seeds in ((model_factor, (1, 2)), (step_factor, (3, 4)), (model_factor, (5, 6)))
        )
        return relative_change(first, called), relative_change(first, second)

    now, usual = gaps()
    if now > CLOSE + NOISIER * usual:
        return Finding(
            "compiled_differs",
            "while training, what the step calls answers otherwise than the network as written: on the average "
            f"of two calls by {now:.2g}, the network itself by {usual:.2g}.",
        )
    with context.moved(*_elsewhere(context), 0.3):
        later, usual = gaps()
    return _stale("while training", later, now) if later > CLOSE + NOISIER * usual else None


def compare_compiled(context: PreflightContext, scenes: Scenes) -> Finding | None:
    """As `compare` for what torch compiled, and its backward pass too, on a whole batch: no pass more than it
    takes."""
    (answer, called), (written, slopes) = _gradients(context, scenes), _gradients(context, scenes, as_written=True)
    with context.moved(*_elsewhere(context), 0.3):
        moved, wanted = step_factor(context, scenes), model_factor(context, scenes)
    return _difference(context, "while training", answer, written, moved, wanted) or _compare_gradients(
        context, called, slopes
    )


def _compare_gradients(
    context: PreflightContext, called: dict[str, Tensor], wanted: dict[str, Tensor]
) -> Finding | None:
    """The compiled backward pass against that of the network as written."""
    if not wanted:
        return None
    total = total_norm(wanted.values())
    allowed = context.tolerance(SLOPE, SLOPE_LOW)
    off = {
        name: float((called[name] - slope).norm()) / max(float(slope.norm()), FAINT * total)
        for name, slope in wanted.items()
    }
    worst = max(off, key=lambda name: math.inf if math.isnan(off[name]) else off[name])
    if math.isfinite(total) and not off[worst] <= allowed:
        return Finding(
            "compiled_differs",
            f"while training, the gradient that what the step calls gives {worst} is not the one of the network "
            f"as written, relative difference {off[worst]:.2g}.",
        )
    return None


def _gradients(
    context: PreflightContext, scenes: Scenes, *, as_written: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """The factor; and name of each trainable tensor -> gradient of a random sum of the outputs, empty where autograd
    leads nowhere."""
    live = context.trainable
    prediction = _model_prediction(context, scenes) if as_written else context.step.predict(scenes)
    outputs = [value for value in prediction if value is not None and value.requires_grad]
    answer = prediction.factor.detach().float().clone()
    if not live or not outputs:
        return answer, {}
    generator = torch.Generator().manual_seed(29)
    sides = [torch.randn(value.shape, generator=generator).to(value) for value in outputs]
    slopes = derivatives(outputs, list(live.values()), sides)
    return answer, {name: torch.zeros_like(live[name]) if slope is None else slope for name, slope in zip(live, slopes)}


def _calls_differ(context: PreflightContext, scenes: Scenes, spread: float) -> Finding | None:
    """Calls on the same scenes differ: ranks, or copies in one process; None for a network that is random, writes
    into its scenes or keeps something of the scenes that it was shown before."""
    if (
        altered(context, scenes)
        or relative_change(model_factor(context, scenes), model_factor(context, scenes)) > CLOSE
    ):
        return None
    before = model_factor(context, scenes)
    model_factor(context, replace(scenes, snapshots=scenes.snapshots.roll(1, 0)))
    if relative_change(before, model_factor(context, scenes)) > CLOSE:
        return None
    ranks = (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        or context.config.training.accumulate > 1
    )
    return Finding(
        "ranks_diverged" if ranks else "stale_compiled_graph",
        f"calls of the step's network on the same scenes differ by {spread:.2g}: they do not use the same weights.",
    )


def _follows(context: PreflightContext, weights: list[nn.Parameter], directions: list[Tensor]) -> bool:
    """Whether scenes that were not asked for before are answered with the weights as they are."""
    with context.moved(weights, directions, 0.3):
        fresh = context.groups[1][0] if context.by_torch else context.groups[1][0][:SMALL]
        return relative_change(model_factor(context, fresh), step_factor(context, fresh)) < CLOSE


def altered(context: PreflightContext, scenes: Scenes) -> list[str]:
    """What of the scenes one call changes, in a copy of them."""
    names = [name for name in ("snapshots", "channel", "codes", "snr_db") if getattr(scenes, name) is not None]
    copy = replace(scenes, **{name: getattr(scenes, name).clone() for name in names})
    step_factor(context, copy)
    return [
        name
        for name in names
        if not torch.allclose(getattr(copy, name), getattr(scenes, name), 0.0, 0.0, equal_nan=True)
    ]


def noise(context: PreflightContext, scenes: Scenes, call: Callable[[PreflightContext, Scenes], Tensor]) -> float:
    """How much two answers to the same scenes differ in training."""
    context.model.train()
    return relative_change(*(_seeded(call, context, scenes, seed) for seed in (1, 2)))


def _seeded(
    call: Callable[[PreflightContext, Scenes], Tensor], context: PreflightContext, scenes: Scenes, seed: int
) -> Tensor:
    torch.manual_seed(seed)
    return call(context, scenes)


def step_factor(context: PreflightContext, scenes: Scenes) -> Tensor:
    """The factor by what the step calls."""
    torch.manual_seed(torch.initial_seed() % 2**31)
    return context.step.predict(scenes).factor.detach().float().clone()


def model_factor(context: PreflightContext, scenes: Scenes) -> Tensor:
    """The factor by the network as written."""
    return _model_prediction(context, scenes).factor.detach().float().clone()


def _model_prediction(context: PreflightContext, scenes: Scenes) -> Prediction:
    """What the network as written answers, in the run's precision."""
    with context.as_written():
        return type(context.step).predict(context.step, scenes)
