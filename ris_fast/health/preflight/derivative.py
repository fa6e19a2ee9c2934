"""Preflight of the gradient's value: it is the derivative of the loss, looked at in two halves that meet at the
network's outputs.

The loss has kinks and jumps of its own (an assignment of sources, a minimum, a wrap), and a step in the weights moves
every output of every scene: some of them crosses one. So the loss is differentiated in the outputs alone, in float64,
with steps that are too small to cross anything; and the network under the loss's own gradient, held fixed, which is as
smooth as the network.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from ris_fast.health.finding import Finding
from ris_fast.health.functions import FunctionChecks
from ris_fast.health.preflight import recomputed, scales, scene_gradients
from ris_fast.health.preflight.autograd import ZERO_DERIVATIVE, Exits, Graph, StoppedValues, by_hand, graph_of, via
from ris_fast.health.preflight.finite_difference import Along, Gap, gap_of, pooled
from ris_fast.health.preflight.measures import listed, rms
from ris_fast.health.preflight.parameters import changed_by_a_pass
from ris_fast.health.preflight.probe import PreflightContext
from ris_fast.health.preflight.projected import (
    DIRECTIONS,
    LENGTHS,
    STEPS,
    lines,
    projection,
    random_directions,
    says_something,
)
from ris_fast.health.preflight.terms import ASIDE, direction_of, leaf, moved, sizes_of
from ris_fast.models.prediction import Prediction
from ris_fast.physics.scenes import Scenes

NOISE_WIDE = 1e-12  # of a loss of order one in float64
SMALL_STEPS = (1e-5, 1e-7, 1e-9)
UNFOLLOWED, NEXT_TO_NOTHING = 1e-5, 0.02  # relative: rounding of a copy beside its source; of what a gradient says
PLAIN = 10.0  # times the rounding, by which a gradient that is right would show
DISAGREES = 0.2  # relative error of a directional derivative; a right one is below 0.03


def right_derivative(context: PreflightContext) -> Iterator[Finding]:
    """Finite differences of the loss and of each part of the network agree with the gradient."""
    if changed_by_a_pass(context):
        return  # a difference between two places in the weights is none then
    with context.full_precision():
        wrong = [name for name, error in loss_inputs(context).items() if error > DISAGREES]
        if wrong:
            if (scaled := scales.of_loss(loss_scales(context, wrong))) is not None:
                yield scaled
                return
            with Exits() as exits:
                context.run()
            meant = f"{via(exits.detached)}; where a weight is detached on purpose, that is meant"
            yield Finding(
                "wrong_backward",
                f"the loss has another derivative with respect to {listed(wrong)} than its backward says"
                f"{meant if exits.detached else ''}.",
                certain=not exits.detached,
            )
            return
        gaps = parts(context)
        errors = {name: error for name, gap in gaps.items() if (error := pooled([gap])) > DISAGREES}
        if errors:  # outputs with a freedom of their own, such as the phases of singular vectors, may jump
            whole = parts(context, by_loss=True)
            errors = {name: error for name, error in errors.items() if pooled([whole[name]]) > DISAGREES}
        if not errors:
            yield from scales.single_parts(context)
            return
        with Exits() as exits:
            graph = graph_of(context.run()[0])
        held = parts(context, StoppedValues())
        stopped = all(pooled([held[name]]) <= DISAGREES for name in errors)
        if not (stopped and exits.straight_through) and (stale := unfollowed(context)):
            yield Finding(
                "stale_compiled_graph",
                f"{len(stale)} tensors receive a gradient, and the network's outputs stay as they are when these are"
                f" replaced by others of their size: {listed(stale)}. It computes with a copy of them that was made"
                " before,"
                " and backward is told otherwise.",
                advice="Make the copy in every forward, or again behind every step of the optimizer.",
                certain=not exits.detached,
            )
            return
        if recomputed.difference(context) is not None:
            return  # which has a check of its own
        if (scaled := scales.of_parts(context, list(errors))) is not None:
            yield scaled
            return
    worst = max(errors, key=errors.__getitem__)
    seen = (
        f"the gradient of {len(errors)} parts of the network is not the derivative of the loss, most in '{worst}' "
        f"(relative error {errors[worst]:.2g})"
    )
    if stopped:
        left_out = any(True for _ in scene_gradients.scenes_learned_from(context))  # a row may be what is stopped
        if exits.straight_through:
            context.note = f"gradients pass a rounding straight through{via(exits.detached)}"
        elif pooled(gaps.values()) > DISAGREES and not left_out:  # else it is a side path, stopped on purpose
            yield Finding(
                "detached_backbone",
                f"{seen}{via(exits.detached)}; where a gradient is stopped on purpose, that is meant.",
                certain=False,
            )
        return
    with context.full_precision():
        between = right_between_jumps(context, list(errors))
    if not graph.written_by_hand and (steps := graph.named(*ZERO_DERIVATIVE)):
        doubt = ". Between their jumps the gradient is right, as of an angle that is wrapped" if between else ""
        yield Finding("non_differentiable", f"{seen}; the path has {listed(steps)}{doubt}.", certain=not between)
    elif between:
        context.note = "outputs jump where the largest numbers or a threshold choose; between, the gradient is right"
    else:
        meant = substitutes(context, graph)
        of = f" Of {meant} a substitute derivative may be meant." if meant else ""
        yield Finding("wrong_backward", f"{seen}{by_hand(graph)}.{of}", certain=not meant)


def substitutes(context: PreflightContext, graph: Graph) -> str:
    """Names of the functions written by hand whose backward is none of their forward and meant, as of a spike; none
    where another is wrong."""
    checks = FunctionChecks()
    checks.begin(graph.functions_by_hand)
    context.run()
    checks.finish()
    wrong = [each for each in checks.found if each.wrong]
    return listed(sorted({each.name for each in wrong})) if wrong and all(each.substitute for each in wrong) else ""


def unfollowed(context: PreflightContext) -> list[str]:
    """Names of tensors with a gradient at the outputs that the outputs do not follow: not along the gradient, by a
    step that it says would show, nor when others are put in their place."""
    found = projection(context)
    if found is None:
        return []
    projected, gradients = found
    generator, stale = torch.Generator().manual_seed(47), []
    for name, gradient in gradients.items():
        weight = context.trainable[name]
        if weight.dim() > 1 and bool(gradient.any()):
            size = rms(weight) or 0.1
            others = torch.randn(weight.shape, generator=generator).to(weight) * size - weight
            if projected.change([weight], [others]) < UNFOLLOWED:
                ahead = gradient * (size * weight.numel() ** 0.5 / gradient.norm())
                slope, gone, noise = projected.line([weight], [gradient], [ahead])
                promised = slope * STEPS[0]
                if promised > PLAIN * noise and abs(gone(STEPS[0])) < NEXT_TO_NOTHING * promised:
                    stale.append(name)
    return stale


# ---- the loss
# ---------------------------------------------------------------------------------------------------------


def loss_inputs(context: PreflightContext) -> dict[str, float]:
    """Relative error of the loss's derivative at each output of the network: against differences in float64, and of
    float32, in which training asks, against float64. Aside of the outputs themselves, which may be equal: a tie is a
    kink.

    The loss is asked with gradients on, as in training: one that differs without them is another mistake.
    """
    guess = context.guess.apply(Tensor.double)
    guess, scenes = moved(guess, direction_of(guess, 19), ASIDE), context.scenes.double()
    narrow_slopes, errors = _slopes(context, guess.apply(Tensor.float), context.scenes), {}
    for name, gradient in _slopes(context, guess, scenes).items():
        narrow = narrow_slopes.get(name)
        rounded = math.inf if narrow is None else float((narrow.double() - gradient).norm() / gradient.norm())
        errors[name] = max(_loss_error(context, guess, scenes, name, gradient), rounded)
    return errors


def _slopes(context: PreflightContext, guess: Prediction, scenes: Scenes) -> dict[str, Tensor]:
    """The gradient at each output that has one."""
    leaves = {name: leaf(value) for name, value in guess._asdict().items() if value is not None}
    total = context.loss(Prediction(**leaves), scenes)[0]
    if not total.requires_grad or not bool(total.isfinite()):
        return {}
    gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return {
        name: gradient for name, gradient in zip(leaves, gradients) if gradient is not None and says_something(gradient)
    }


def loss_scales(context: PreflightContext, names: list[str]) -> dict[str, float | None]:
    """The gradient at some outputs over the difference quotient, where that is one number along all directions."""
    guess = context.guess.apply(Tensor.double)
    guess, scenes = moved(guess, direction_of(guess, 19), ASIDE), context.scenes.double()
    slopes = _slopes(context, guess, scenes)
    return {
        name: scales.ratio(_loss_lines(context, guess, scenes, name, slopes[name]), SMALL_STEPS[0])
        for name in names
        if name in slopes
    }


def _loss_error(context: PreflightContext, guess: Prediction, scenes: Scenes, name: str, gradient: Tensor) -> float:
    return pooled([gap_of(_loss_lines(context, guess, scenes, name, gradient), (*STEPS, *SMALL_STEPS))])


def _loss_lines(
    context: PreflightContext, guess: Prediction, scenes: Scenes, name: str, gradient: Tensor
) -> Iterator[Along]:
    """The loss along random directions of one output."""
    generator, value, size = torch.Generator().manual_seed(11), getattr(guess, name), sizes_of(guess)[name]
    for _ in range(DIRECTIONS):
        direction = torch.randn(value.shape, generator=generator).to(value) * size

        @cache
        def loss(step: float, direction: Tensor = direction) -> float:
            there = guess._replace(**{name: (value + step * direction).requires_grad_()})
            return float(context.loss(there, scenes)[0].detach())

        yield float((gradient * direction).sum()), loss, NOISE_WIDE * max(abs(loss(0.0)), 1e-3)


# ---- the network
# ------------------------------------------------------------------------------------------------------


def parts(context: PreflightContext, held: StoppedValues | None = None, *, by_loss: bool = False) -> dict[str, Gap]:
    """How far the derivative along random directions of each child of the network is off, and how large it is.

    Model: s(w) = sum_k <c_k, out_k(w)>, c_k the loss's gradient at output k for the weights as they are. There s has
        the loss's gradient. Args: held: what leaves the graph stays as it is while weights move; by_loss: of the loss
        itself, whose rounding is larger and is not allowed for: an agreement is one.
    """
    found = projection(context, held, by_loss=by_loss)
    if found is None:
        return {}
    projected, gradients, live = *found, context.trainable
    generator = torch.Generator().manual_seed(7)
    return {
        part: gap_of(
            lines(projected, [live[name] for name in names], [gradients[name] for name in names], generator), STEPS
        )
        for part, names in _members(gradients).items()
    }


def _members(gradients: dict[str, Tensor]) -> dict[str, list[str]]:
    """The tensors of each child of the network."""
    members: dict[str, list[str]] = {}
    for name in gradients:
        members.setdefault(name.partition(".")[0], []).append(name)
    return members


def right_between_jumps(context: PreflightContext, wrong: list[str]) -> bool:
    """Whether the gradient of these parts is the derivative wherever the outputs do not jump: those that a choice
    makes, by the largest k or a threshold, which no derivative sees."""
    found = projection(context)
    if found is None:
        return False
    projected, gradients, live = *found, context.trainable
    members, generator = _members(gradients), torch.Generator().manual_seed(29)
    gaps: dict[float, list[Gap]] = {length: [] for length in LENGTHS}
    for names in (members[part] for part in wrong):
        tensors = [live[name] for name in names]
        for directions in random_directions(tensors, generator):
            promised = float(sum((gradients[name] * way).sum() for name, way in zip(names, directions)))
            for length, found_there in gaps.items():
                slope = projected.between_jumps(tensors, directions, length)
                found_there.append((abs(slope - promised), max(abs(slope), abs(promised))))
    return min(map(pooled, gaps.values())) <= DISAGREES
