"""Preflight of the network: what comes out of it, and whether signals pass its layers.

Legend: B batch, L snapshots, M base-station antennas, N RIS elements, Q factor columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from ris_fast.health.finding import Finding
from ris_fast.health.preflight.autograd import graph_of
from ris_fast.health.preflight.derivatives import derivatives
from ris_fast.health.preflight.labels import element_orders
from ris_fast.health.preflight.measures import SAME, listed, relative_change, rms
from ris_fast.health.preflight.persistent import persistent
from ris_fast.health.preflight.probe import PreflightContext, layer_calls
from ris_fast.models.prediction import Prediction
from ris_fast.physics.array import RISArray
from ris_fast.physics.real_complex import adjoint_matmul, conj, to_complex
from ris_fast.training.validation import scene_nmse

GAIN = 20.0  # growth of a signal in one layer
AT_THE_ENDS = 0.9
# of the energy: columns that differ by more than rounding are independent, however alike at the start
DEPENDENT = 1e-12
FADED, CLEAR = 1e-3, 0.05  # shares of a signal that differ between scenes
DROWNED = 0.01  # of such a share, from the answer of a layer to what the next is given
NEARER, ASKED = 0.75, 0.8  # of the NMSE as it is; an NMSE that says something of the scenes
HARDLY_PART = 0.2  # of their size: gradients of units that start equal; those of healthy ones differ by half and more
NUDGE = 0.01  # by which tensors move that a gradient reaches


# ---- what comes out
# ----------------------------------------------------------------------------------------------------


def saturation(context: PreflightContext) -> Iterator[Finding]:
    """Factors are not all at the ends of a range, and have as many independent columns as scenes have sources."""
    answer = context.answer(context.scenes)
    if not bool(answer.isfinite().all()):
        return
    low, high = answer.amin(), answer.amax()
    reach = float((high - low).clamp_min(1e-30))
    share = float((((high - answer) < 1e-3 * reach) | ((answer - low) < 1e-3 * reach)).float().mean())
    if share > AT_THE_ENDS and reach > 1e-20:
        yield Finding(
            "saturated_output", f"{share:.0%} of the factor's entries are at {float(low):.3g} or {float(high):.3g}."
        )
        return
    gram = torch.linalg.eigvalsh(to_complex(adjoint_matmul(answer.double(), answer.double())))
    needed = min(int(context.scenes.count.max()), answer.shape[1])
    rank = int((gram > DEPENDENT * gram[:, -1:].clamp_min(1e-30)).sum(1).max())
    if rank < needed:
        yield Finding(
            "output_rank_too_low",
            f"factors have {rank} independent columns of {answer.shape[2]}; scenes have up to {needed} sources.",
        )


@torch.no_grad()
def layout(context: PreflightContext) -> Iterator[Finding]:
    """Answers are no nearer to the targets in another order of their elements or parts than as they are.

    It shows in a network that answers with something of its inputs from the start; one that does not is as far in all.
    """
    scenes, guess = context.scenes, context.guess
    if scenes.factor is None and scenes.covariance is None:
        return
    factor = guess.factor.float()
    size, elements, columns, _ = factor.shape
    others = {
        "conjugated": conj(factor),
        "read as columns of elements": factor.transpose(1, 2).reshape(size, elements, columns, 2),
        "with real and imaginary parts in planes": factor.reshape(size, 2, elements, columns).permute(0, 2, 3, 1),
        "with real and imaginary parts one behind the other": factor.reshape(size, elements, 2, columns).transpose(
            2, 3
        ),
    }
    array = RISArray.of(context.config.task)
    if array.elements == elements:
        others |= {f"with its elements {order}": factor[:, rows] for order, rows in element_orders(array)}
    score = float(scene_nmse(guess, scenes).mean())
    scores = {how: float(scene_nmse(Prediction(other.contiguous()), scenes).mean()) for how, other in others.items()}
    how = min(scores, key=scores.__getitem__)
    if scores[how] < NEARER * score and scores[how] < ASKED:
        yield Finding(
            "conjugation_error" if how == "conjugated" else "wrong_layout",
            f"the factors that the network answers with at the start have an NMSE of {score:.3g}, and {how}"
            f" {scores[how]:.3g}: the output is taken in another order than it is made.",
            certain=False,
        )


def layers(context: PreflightContext) -> Iterator[Finding]:
    """Signals neither explode nor stop on their way; units differ from each other."""
    signals: dict[str, tuple[float, float, bool]] = {}
    outputs: dict[str, Tensor] = {}
    told: list[tuple[str, float, float]] = []

    def keep(name: str, module: nn.Module, inputs: tuple, output: object) -> None:
        if isinstance(output, Tensor) and inputs and isinstance(inputs[0], Tensor):
            told.append((name, _told(context, inputs[0]), _told(context, output)))
            signals.setdefault(name, (rms(inputs[0]), rms(output), bool(inputs[0].detach().isfinite().all())))
            if output.requires_grad:
                outputs.setdefault(name, output)

    context.model.train()
    context.rewind()  # which makes a pass of its own when it is called first
    with layer_calls(context.model, keep):
        total = context.run()[0]
    for name, (_, after, finite) in signals.items():
        if finite and not after < float("inf"):
            yield Finding(
                "fp16_overflow" if _narrow(context) else "bad_initialisation",
                f"{name} answers with values that are not finite to inputs that are.",
            )
            return
    if not bool(total.isfinite()):
        yield from _broken_loss(
            context, float(total.detach()), [name for name, (_, _, finite) in signals.items() if not finite]
        )
        return
    exploding = list(_exploding(signals))
    if exploding or (exploding := list(_faded(told))):
        yield from exploding
    else:
        yield from _dead(context, total, outputs, signals)  # units that a loud signal drives to their ends
    yield from _equal_units(context)


def _narrow(context: PreflightContext) -> bool:
    """Numbers of 16 bits are about: by the run's setting, or in a tensor that the loss is made of."""
    if context.config.training.precision != "fp32":
        return True
    nodes = graph_of(context.run()[0]).operators
    return any(
        meta.dtype in (torch.float16, torch.bfloat16) for node in nodes for meta in getattr(node, "_input_metadata", ())
    )


def _broken_loss(context: PreflightContext, loss: float, layers: list[str]) -> Iterator[Finding]:
    """Why the loss is not finite, where no layer made it so; scenes that are not finite are reported elsewhere."""
    scenes = context.scenes
    if not all(
        bool(value.isfinite().all())
        for value in (scenes.snapshots, scenes.channel, scenes.factor, scenes.covariance)
        if value is not None
    ):
        return
    if layers:
        yield Finding(
            "input_scale",
            f"the input of {layers[0]} is not finite though the scenes are: what prepares it divides by zero or "
            "overflows.",
        )
    elif _narrow(context):
        yield Finding("fp16_overflow", f"the loss is {loss} although every layer is finite.")
    else:
        yield Finding("nonfinite_gradients", f"the loss is {loss} although every layer is finite, in float32.")


def _exploding(signals: dict[str, tuple[float, float, bool]]) -> Iterator[Finding]:
    grown = {name: after / before for name, (before, after, _) in signals.items() if before > 0}
    if not grown:
        return
    worst = max(grown, key=grown.__getitem__)
    if grown[worst] > GAIN and signals[worst][1] > GAIN:
        yield Finding(
            "bad_initialisation",
            f"{worst} turns a signal of rms {signals[worst][0]:.2g} into one of {signals[worst][1]:.2g}.",
        )


def _told(context: PreflightContext, value: Tensor) -> float:
    """How much of a signal differs between the scenes of a batch, as a share of it; not-a-number where it has no row
    for each."""
    batch = context.scenes.batch
    if batch < 2 or value.dim() < 2 or len(value) != batch or value.is_complex():
        return math.nan
    value = value.detach().float()
    return float((value - value.mean(0)).norm() / value.norm().clamp_min(1e-30))


def _faded(told: list[tuple[str, float, float]]) -> Iterator[Finding]:
    """What tells scenes apart at the first layers is not lost on the way to the last one.

    Args: told: of every call of a layer, in order: its name, and what share of its input and of its answer differs
        between scenes.
    """
    known = [each for each in told if math.isfinite(each[1]) and math.isfinite(each[2])]
    if not known or not 0 < known[-1][1] < FADED:
        return
    first = max(known, key=lambda each: each[1])
    drowned = next(
        (
            (before, after)
            for before, after in zip(known[known.index(first) :], known[known.index(first) + 1 :])
            if after[1] < DROWNED * before[2]
        ),
        None,
    )
    if first[1] > CLEAR and drowned is not None:
        before, after = drowned
        yield Finding(
            "input_scale",
            f"{before[2]:.1%} of what {before[0]} answers differs between scenes, and {after[1]:.1e} of what"
            f" {after[0]}, the next layer, is given: what is added in between, as an embedding of places or a bias, is"
            " the"
            " same for all scenes and so much larger that scenes are lost beside it.",
            advice="Print the two that are added. Bring both to order one: an embedding of places starts with a"
            " standard deviation of 0.02 to 1.",
            certain=False,
        )
    elif first[1] > CLEAR:
        steps = [f"{name} {after:.1e}" for name, _, after in known[known.index(first) :] if after > 0]
        shown = ", ".join(steps[:: max(1, len(steps) // 4)][:5])
        yield Finding(
            "vanishing_gradient",
            f"{first[1]:.0%} of what {first[0]} is given differs between scenes, and {known[-1][1]:.1e} of what the"
            f" last layer, {known[-1][0]}, is given: what tells scenes apart fades on the way ({shown}), and the"
            " gradient fades as much on its way back. Many layers with sigmoid or tanh and no way round them do that,"
            " or initial weights that are too small.",
            advice="Add what a block is given to what it answers (x + block(x)), normalise between layers, or take ReLU"
            " or GELU with initial weights for it.",
            certain=False,
        )


def _dead(context: PreflightContext, total: Tensor, outputs: dict[str, Tensor], signals: dict) -> Iterator[Finding]:
    """Layers whose output receives no gradient for any unit and scene, although it is there and autograd reaches it."""
    if not total.requires_grad or total.grad_fn is None or not outputs:
        return
    gradients = derivatives(total, list(outputs.values()), retain_graph=True)
    silent = [
        name
        for (name, value), gradient in zip(outputs.items(), gradients)
        if gradient is not None and not bool(gradient.any())
    ]
    zero = sum(p.dim() > 1 and not bool(p.any()) for p in context.trainable.values())
    stuck = _never_reached(context) if zero > 1 else []
    if len(stuck) > 1:
        yield Finding("zero_product_init", f"{listed(stuck)} start at zero, and each stops the gradient of the other.")
        return
    for name in reversed(silent):
        value = outputs[name].detach().float()
        if signals[name][1] > 0 and float(value.max()) < -3.0:
            yield Finding(
                "dead_units",
                f"all {value.shape[-1]} units of {name} lie between {float(value.min()):.3g} and "
                f"{float(value.max()):.3g}, where the activation behind it is flat.",
            )
            return


def _never_reached(context: PreflightContext) -> list[str]:
    """Matrices of zeros that no gradient reaches, not even after every tensor that one reaches has moved, and those it
    reaches then.

    One factor of a product may start at zero, as the last layer of a residual branch: it moves, and then the other one
    does.
    """
    live = context.trainable
    stuck = [name for name, p in live.items() if p.dim() > 1 and not bool(p.any())]
    generator, moved = torch.Generator().manual_seed(23), set[str]()
    with ExitStack() as stack:
        while len(stuck) > 1:
            total = context.run()[0]
            parts = dict(zip(live, derivatives(total, list(live.values()))))
            reached = {name for name, part in parts.items() if part is not None and bool(part.any())} - moved
            stuck = [name for name in stuck if name not in reached]
            if not reached:
                break
            tensors, moved = [live[name] for name in reached], moved | reached
            directions = [torch.randn(p.shape, generator=generator).to(p) for p in tensors]
            stack.enter_context(context.moved(tensors, directions, NUDGE))
    return stuck


def _equal_units(context: PreflightContext) -> Iterator[Finding]:
    """No weight matrix has equal rows that receive equal gradients, nor a layer units that hardly part.

    Rows that start equal and receive unlike gradients part at the first step: gains, windows and temperatures start so.
    """
    live = {name: p for name, p in context.trainable.items() if p.dim() > 1}
    layers = {
        f"{name}.weight".lstrip(".")
        for name, module in context.model.named_modules()
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd)
    }
    total = context.run()[0]
    parts = derivatives(total, list(live.values())) if live and total.requires_grad else ()
    pairs = [(name, weight.detach(), part) for (name, weight), part in zip(live.items(), parts) if part is not None]
    if twins := [name for name, weight, part in pairs if _stay_equal(weight, part)]:
        yield Finding(
            "symmetric_init",
            f"rows of {listed(twins)} start equal and receive equal gradients, so that they stay equal: as many as"
            " there are do the work of one.",
            advice="Draw them at random, as torch.nn.init.normal_(x, std=0.02) does.",
            certain=any(name in layers and bool(live[name].any()) for name in twins),
        )
    elif slow := [name for name, weight, part in pairs if name in layers and _parting(weight, part, 0) < HARDLY_PART]:
        yield Finding(
            "symmetric_init",
            f"all units of {listed(slow)} start with the same weights and receive gradients that differ by less than"
            f" {HARDLY_PART:.0%}: what tells units apart, as random biases, is small beside what they share, and they"
            " part slowly.",
            certain=False,
        )


def _stay_equal(weight: Tensor, slope: Tensor) -> bool:
    """Whether all slices along some axis are equal, and so are their gradients, which are not zero."""
    return any(_parting(weight, slope, axis) < SAME for axis in range(weight.dim()))


def _parting(weight: Tensor, slope: Tensor, axis: int) -> float:
    """How far the gradients of slices are from their mean, relative to them; infinite where the slices are not equal,
    or there is no gradient."""
    equal = weight.shape[axis] > 1 and bool((weight == weight.narrow(axis, 0, 1)).all())
    return relative_change(slope, slope.mean(axis, keepdim=True)) if equal and bool(slope.any()) else math.inf


CHECKS = {
    "answers are not at the ends of a range": persistent(saturation, "saturated_output", "output_rank_too_low"),
    "answers are laid out as the targets": layout,
    "signals pass every layer": persistent(layers, "dead_units"),
}
