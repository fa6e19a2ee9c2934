"""Preflight of the gradient: it exists, is finite, is not zero, and is the derivative of the loss that is printed.

Legend: B batch, N RIS elements, Q factor columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from re import sub

import torch
from torch import Tensor, nn

from ris_fast.health.finding import Finding
from ris_fast.health.preflight.autograd import ZERO_DERIVATIVE, Exits, Graph, by_hand, flattened_at, graph_of, via
from ris_fast.health.preflight.derivative import right_derivative
from ris_fast.health.preflight.derivatives import derivatives
from ris_fast.health.preflight.measures import all_finite, listed, rms
from ris_fast.health.preflight.persistent import persistent
from ris_fast.health.preflight.probe import SMALL, PreflightContext, layer_calls
from ris_fast.health.preflight.projected import NOISE
from ris_fast.health.preflight.staircase import JUMPS, at_an_end, in_jumps
from ris_fast.health.preflight.terms import direction_of, moved
from ris_fast.health.preflight.truth import COVARIANCE, term_values
from ris_fast.physics.scenes import Scenes

BOUNDED = ("Clamp", "Hardtanh", "Hardsigmoid", "Hardswish")
UNDERFLOW = 2.0**20
NO_WEIGHT = 1e-3  # of the weights, that a vector or two of a layer are
LEFTOVER = 0.01  # of the weights, which does not keep a network from learning
OTHERS = 8  # draws of random numbers, each with other scenes


def connected(context: PreflightContext) -> Iterator[Finding]:
    """The loss requires a gradient, has a history, and depends on the factors through autograd."""
    exits = Exits()
    with exits:
        total, terms, prediction = context.run()
    if not any(context.loss.weights.get(name, 0) > 0 for name in COVARIANCE):
        return
    if total.requires_grad and total.grad_fn is None:
        yield Finding(
            "loss_rebuilt", f"the loss is a leaf with no history: it was made anew from a number{via(exits.rebuilt)}."
        )
    elif not prediction.factor.requires_grad:
        if context.trainable:
            yield _without_history(context, exits)
    elif not total.requires_grad or _cut(context, total, terms, prediction.factor):
        loose = [name for name in COVARIANCE if name in terms and not terms[name].requires_grad]
        cause = "loss_rebuilt" if exits.rebuilt and not exits.detached else "detached_loss"
        yield Finding(
            cause,
            f"no gradient flows from the loss to the factors ({listed(loose) or 'the total'} has no "
            f"history){via(exits.rebuilt if cause == 'loss_rebuilt' else exits.detached)}.",
        )
    elif loose := [name for name in _without_slope(context, terms) if name != "count"]:
        yield Finding(
            "detached_loss",
            f"the terms {listed(loose)} change with the answers and no gradient flows from them: they are printed, and"
            f" nothing is learned from them{via(exits.detached or exits.rebuilt)}.",
            certain=False,
        )


def _without_slope(context: PreflightContext, terms: dict[str, Tensor]) -> list[str]:
    """Terms without a history that other answers have another value of."""
    names = [name for name, value in terms.items() if not value.requires_grad and context.loss.weights.get(name, 0) > 0]
    if not names or not any(value.requires_grad for value in terms.values()):
        return []  # where all are numbers, they are printed, and the total has the history
    others = moved(context.guess, direction_of(context.guess, 19), 0.3)
    now, then = (term_values(context, guess, context.scenes) for guess in (context.guess, others))
    return [name for name in names if now[name] != then[name]]


def _without_history(context: PreflightContext, exits: Exits) -> Finding:
    """The factors know no gradient: which layer is the last whose answer does, or that none is."""
    known: dict[str, bool] = {}

    def keep(name: str, module: nn.Module, inputs: tuple, output: object) -> None:
        if isinstance(output, Tensor):
            known[name] = output.requires_grad

    with layer_calls(context.model, keep):
        context.run()
    last = [name for name, requires in known.items() if requires][-1:]
    after = [name for name in known if not known[name]][:1]
    seen = "the factors that the network returns require no gradient"
    if in_jumps(context, list(context.trainable.values()), factor=True):
        return Finding("non_differentiable", f"{seen}; with all weights, {JUMPS}.")
    if known and not last:
        return Finding(
            "detached_backbone",
            f"{seen}, and neither does the answer of any of its {len(known)} layers, of which the first is {after[0]}:"
            f" the whole forward runs under no_grad or inference_mode{via(exits.detached)}.",
            advice="Remove torch.no_grad() or torch.inference_mode() from around the network's forward, as a decorator"
            " or a `with`, and any torch.set_grad_enabled(False) before it.",
        )
    where = f"; the last layer whose answer requires one is {last[0]}" if last else ""
    then = f", and {after[0]} is without" if last and after else ""
    return Finding(
        "detached_backbone", f"{seen}{where}{then}: it is detached, or made under no_grad{via(exits.detached)}."
    )


def _cut(context: PreflightContext, total: Tensor, terms: dict[str, Tensor], factor: Tensor) -> bool:
    """Whether no covariance term depends on the factors. The total may all the same, through heads that read them;
    it alone can tell where the terms are numbers without a history."""

    def leads(value: Tensor) -> bool:
        found = derivatives(value, [factor], retain_graph=True) if value.requires_grad else ()
        return any(each is not None for each in found)

    weighted = [terms[name] for name in COVARIANCE if context.loss.weights.get(name, 0) > 0 and name in terms]
    told = weighted and any(value.requires_grad for value in terms.values())
    return not leads(total) or bool(told and not any(map(leads, weighted)))


# ---- each tensor -----------------------------------------------------------------------------------------------------


def every_tensor(context: PreflightContext) -> Iterator[Finding]:
    """Every trainable tensor gets a gradient that is there, finite and not zero; else the reason."""
    live = context.trainable
    with context.full_precision():
        total, terms, _ = context.run()
        if not total.requires_grad or total.grad_fn is None or not live or not bool(total.isfinite()):
            return
        graph = graph_of(total)
        gradients = dict(zip(live, derivatives(total, list(live.values()), retain_graph=True)))
        bad = [
            name for name, gradient in gradients.items() if gradient is not None and not bool(gradient.isfinite().all())
        ]
        if bad:
            yield Finding(
                "nonfinite_gradients",
                f"the loss is {float(total.detach()):.4g} and the gradients of {len(bad)} of "
                f"{len(live)} tensors are not finite, first {bad[0]}{_source(context, total, terms)}.",
            )
            return
        silent = [name for name, gradient in gradients.items() if gradient is None or not bool(gradient.any())]
        silent = _always_silent(context, silent)
        yield from _silent(context, silent, gradients, graph)


def _always_silent(context: PreflightContext, names: list[str]) -> list[str]:
    """Of some tensors, those that other random numbers and other scenes give no gradient either: a layer may be left
    out by chance, or be for some scenes only."""
    for number, scenes in enumerate(_batches(context), 1):
        if not names:
            break
        total = context.run(scenes, seed=number)[0]
        parts = derivatives(total, [context.parameters[name] for name in names]) if total.requires_grad else ()
        names = [name for name, part in zip(names, parts) if part is None or not bool(part.any())] if parts else names
    return names


def _batches(context: PreflightContext) -> list[Scenes]:
    """A few small batches of different scenes, again from the first where there are too few."""
    batches = [scenes[:SMALL] for group in context.groups for scenes in group]
    return [batches[number % len(batches)] for number in range(1, OTHERS + 1)]


def _source(context: PreflightContext, total: Tensor, terms: dict[str, Tensor]) -> str:
    """Which term the non-finite gradient comes from; one outside of the table shows as a difference of sums."""
    live = [parameter for parameter in context.parameters.values() if parameter.requires_grad]
    for name, value in terms.items():
        parts = derivatives(value, live, retain_graph=True) if value.requires_grad else ()
        if not all_finite(parts):
            return f"; they come from the term {name}"
    rest = float(
        total.detach() - sum(context.loss.weights.get(name, 0) * value.detach() for name, value in terms.items())
    )
    return f"; no named term has them: they come from something outside the table of terms, whose value is {rest:.3g}"


def _silent(
    context: PreflightContext, names: list[str], gradients: dict[str, Tensor | None], graph: Graph
) -> Iterator[Finding]:
    """Tensors without gradient: unused, cut off, or stopped by an operator that has no derivative."""
    unused, cut, stopped, lost, flat = [], [], [], [], []
    for name in names:
        parameter, reached = context.parameters[name], id(context.parameters[name]) in graph.leaves
        if not _matters(context, parameter):
            if reached and gradients[name] is not None:
                flat.append(name)
            if not reached or gradients[name] is None:
                unused.append(name)
            continue
        (lost if reached and gradients[name] is None else stopped if reached else cut).append(name)
    if lost:
        yield Finding(
            "wrong_backward",
            f"{listed(lost)}: the loss depends on it and autograd reaches it, but an operator's "
            f"backward returns nothing for it{by_hand(graph)}.",
        )
    if stopped:
        yield _stopped(context, stopped, graph)
    if cut and in_jumps(context, [context.parameters[name] for name in cut]):
        yield Finding(
            "non_differentiable",
            f"{len(cut)} of {len(gradients)} tensors change the loss and receive no gradient: {listed(cut)}; {JUMPS}.",
        )
    elif cut:
        rounded = graph.named(*ZERO_DERIVATIVE)
        yield Finding(
            "detached_backbone",
            f"{len(cut)} of {len(gradients)} tensors change the loss and receive no gradient: "
            f"{listed(cut)}{via(rounded)}.",
        )
    if flat and len(flat) == len(gradients):
        yield _flat(context, len(flat))
    elif matrices := _in_no_output(context, [name for name in flat if context.parameters[name].dim() > 1]):
        yield Finding(
            "vanishing_gradient",
            f"{len(flat)} of {len(gradients)} tensors have a gradient of exactly zero and do not change the loss, with"
            f" other scenes and other weights too: {listed(matrices)}. What they compute is multiplied by zero, or a"
            " unit, a mask or a normalisation over a single number behind them is off for every scene.",
            advice="Print what the branch that they are in answers, and what that is multiplied by: a gate, a mask, a"
            " dropout of everything.",
            certain=False,
        )
    called = _rows_of_calls(context) if unused else {}
    if unused := [name for name in unused if not _waits_for_scenes(name.rpartition(".")[0], called)]:
        share = sum(context.parameters[name].numel() for name in unused) / sum(
            p.numel() for p in context.parameters.values()
        )
        if share < NO_WEIGHT and all(_beside_a_live_weight(context, name, unused) for name in unused):
            context.note = f"{listed(unused)}: what a derivative or a difference leaves out, and too few to matter"
            return
        made = [name for name in unused if name.rpartition(".")[0] in called]
        answers = [each for each in context.run()[2] if each is not None and each.requires_grad]
        leaves = set().union(*(graph_of(each).leaves for each in answers))
        answering = any(id(context.parameters[name]) in leaves for name in made)
        yield Finding(
            "unused_head",
            f"{len(unused)} tensors ({share:.0%} of the weights) reach no term of the loss: {listed(unused)}."
            f"{'' if made else ' No forward pass calls what they belong to.'}",
            certain=answering or share > LEFTOVER and bool(made),  # a run learns beside what nothing calls
        )


def _beside_a_live_weight(context: PreflightContext, name: str, unused: list[str]) -> bool:
    """Whether a tensor is a vector of a layer whose matrix is learned, as the last constant of an energy that the
    network answers with the derivative of."""
    layer = name.rpartition(".")[0]
    siblings = [each for each in context.trainable if each.rpartition(".")[0] == layer and each not in unused]
    return context.parameters[name].dim() < 2 and any(context.parameters[each].dim() > 1 for each in siblings)


def _rows_of_calls(context: PreflightContext) -> dict[str, list[float]]:
    """Of every module with parameters that a few passes call: the rows that it is given in each, as a share of the
    batch; nothing for a pass that does not call it."""
    found: dict[str, list[float]] = {}
    for seed, scenes in enumerate(_batches(context)):

        def keep(name: str, module: nn.Module, inputs: tuple, output: object, batch: int = scenes.batch) -> None:
            first = next((each for each in inputs if isinstance(each, Tensor) and each.dim()), None)
            found.setdefault(name, []).append(1.0 if first is None else len(first) / batch)

        with layer_calls(context.model, keep):
            context.predict(scenes, seed)
    return found


def _waits_for_scenes(module: str, called: dict[str, list[float]]) -> bool:
    """Whether no pass calls a module, and some give only a part of their scenes to one that differs in a number of its
    name: an expert to which no scene was routed."""
    kind = sub(r"\d+", "#", module)
    like = [rows for name, rows in called.items() if sub(r"\d+", "#", name) == kind]
    return module not in called and any(min(rows) < 1 or len(rows) < OTHERS for rows in like)


def _in_no_output(context: PreflightContext, names: list[str]) -> list[str]:
    """Of some tensors those that no output has a derivative by: an output may be one that the loss says nothing of, as
    the count where there is one source in every scene."""
    outputs = [value for value in context.run()[2] if value is not None and value.requires_grad]
    generator = torch.Generator().manual_seed(79)
    sides = [torch.randn(value.shape, generator=generator).to(value) for value in outputs]
    parts = derivatives(outputs, [context.parameters[name] for name in names], sides) if names and outputs else ()
    return [name for name, part in zip(names, parts) if part is None or not bool(part.any())]


def _flat(context: PreflightContext, tensors: int) -> Finding:
    """Why no tensor changes the loss: the loss is flat at the factors, or the network behind them is."""
    total, _, prediction = context.run()
    factor = derivatives(total, [prediction.factor])[0]
    seen = (
        f"the loss is {float(total.detach()):.4g}, and the gradients of all {tensors} trainable tensors are exactly"
        " zero"
    )
    if factor is not None and bool(factor.any()):
        return Finding("zeroed_gradients", f"{seen}; at the factors there is one of norm {float(factor.norm()):.2g}.")
    return _flat_at_factors(f"{seen}, as it is at the factors", prediction.factor)


def _flat_at_factors(what: str, factor: Tensor) -> Finding:
    """The loss has no slope at the factors, which it bounds, or which are zero."""
    if not bool(factor.any()):
        return Finding(
            "zeroed_gradients", f"{what}: all factors F are zero, and F F^H has no slope there. Start from others."
        )
    return Finding("clamped_loss", f"{what}: there the loss is flat.")


def _stopped(context: PreflightContext, names: list[str], graph: Graph) -> Finding:
    """Tensors that the loss depends on and autograd reaches, with a gradient of exactly zero."""
    what = f"{len(names)} tensors change the loss and have a gradient of exactly zero: {listed(names)}"
    live = [context.parameters[name] for name in names]
    larger = derivatives(context.run()[0] * UNDERFLOW, live)
    if any(part is not None and bool(part.any()) for part in larger):
        return Finding("gradient_underflow", f"{what}; with a loss a million times larger it is not.")
    total, _, prediction = context.run()
    factor = derivatives(total, [prediction.factor])[0]
    if factor is not None and not bool(factor.any()):
        return _flat_at_factors(f"{what}; it is zero at the factors already", prediction.factor)
    if graph.written_by_hand:
        return Finding("wrong_backward", f"{what}; backward runs through {', '.join(graph.written_by_hand)}.")
    if graph.named(*ZERO_DERIVATIVE):
        return Finding("non_differentiable", f"{what}; the path has {listed(graph.named(*ZERO_DERIVATIVE))}.")
    bounds = graph_of(context.run()[2].factor).named(*BOUNDED)
    if bounds:
        return Finding(
            "saturated_output",
            f"{what}; between them and the output the path has {listed(bounds)}, which has no derivative beyond its"
            " bounds:"
            " all that arrives there lies beyond.",
            advice="Print what is clamped, before and after. Widen the bounds, or bring the signal between them.",
        )
    exits = Exits()
    with exits:
        total = context.run()[0]
    if flat := flattened_at(total):
        by_weights = at_an_end(context, live)
        return Finding(
            "bad_initialisation" if by_weights else "saturated_output",
            f"{what}; a gradient arrives at {listed(list(dict.fromkeys(flat)))} on the path and leaves as zero: all"
            " that is given there lies where it is flat"
            f"{', which it does not with all weights drawn anew' * by_weights}.",
            advice="Print what the softmax, sigmoid or tanh is given. Bring it to numbers of order one, by a"
            " normalisation before it or a larger temperature.",
            certain=False,
        )
    if exits.detached:
        return Finding(
            "detached_backbone",
            f"{what}; a value leaves the graph{via(exits.detached)} and what is left of the path"
            " is multiplied by zero, or something clears the gradient on it.",
            certain=False,
        )
    if at_an_end(context, live):
        return Finding(
            "bad_initialisation",
            f"{what}; with all weights drawn anew at a usual size it is not: as they are they drive a unit on the path"
            " to its end, where it is flat.",
            certain=False,
        )
    return Finding(
        "zeroed_gradients", f"{what}; every operator on the path has a derivative, so something clears it on the way."
    )


@torch.no_grad()
def _matters(context: PreflightContext, parameter: Tensor) -> bool:
    """Whether the loss changes with this tensor, by more than rounding."""
    before = context.value()
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(parameter.shape, generator=generator).to(parameter.device, parameter.dtype)
    size = rms(parameter) or 0.1
    return any(
        abs(_after(context, parameter, noise, step * size) - before) > NOISE * max(1.0, abs(before))
        for step in (0.1, 1.0)
    )


def _after(context: PreflightContext, parameter: Tensor, direction: Tensor, step: float) -> float:
    with context.moved([parameter], [direction], step):
        return context.value()


CHECKS = {
    "the loss depends on the factors": connected,
    "every tensor gets a gradient": persistent(
        every_tensor, "zeroed_gradients", "clamped_loss", "unused_head", "vanishing_gradient"
    ),
    "the gradient is the derivative": right_derivative,
}
