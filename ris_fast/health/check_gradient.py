"""Preflight of the gradient: it exists, is finite, is not zero, and is the derivative of the loss that is printed.

Legend: B batch, N RIS elements, Q factor columns.
"""

from __future__ import annotations

import math
from functools import cache
from itertools import product
from typing import Callable, Iterator

import torch
from torch import Tensor

from ris_fast.health.autograd import ZERO_DERIVATIVE, Exits, Graph, graph_of
from ris_fast.health.check_loss import COVARIANCE
from ris_fast.health.check_parameters import listed
from ris_fast.health.check_terms import doubled
from ris_fast.health.finding import Finding
from ris_fast.health.subject import Subject
from ris_fast.models.prediction import Prediction
from ris_fast.physics.scenes import Scenes

NOISE, NOISE_WIDE = 2e-6, 1e-12    # of a loss of order one in float32, and in float64
STEPS = (1e-2, 1e-3)
DISAGREES = 0.2            # relative error of a directional derivative; a right one is below 0.03
UNDERFLOW = 2.0**20


def connected(subject: Subject) -> Iterator[Finding]:
    """The loss requires a gradient, has a history, and depends on the factors through autograd."""
    exits = Exits()
    with exits:
        total, terms, prediction = subject.run()
    if not any(subject.loss.weights.get(name, 0) > 0 for name in COVARIANCE):
        return
    if total.requires_grad and total.grad_fn is None:
        yield Finding("loss_rebuilt", f"the loss is a leaf with no history: it was made anew from a number"
                      f"{_via(exits.rebuilt)}.")
    elif not prediction.factor.requires_grad:
        if any(parameter.requires_grad for parameter in subject.parameters.values()):
            yield Finding("detached_backbone", "the factors that the network returns require no gradient: it runs under "
                          f"no_grad or detaches its answer{_via(exits.detached)}.")
    elif not total.requires_grad or _cut(total, prediction.factor):
        loose = [name for name in COVARIANCE if name in terms and not terms[name].requires_grad]
        cause = "loss_rebuilt" if exits.rebuilt and not exits.detached else "detached_loss"
        yield Finding(cause, f"no gradient flows from the loss to the factors ({listed(loose) or 'the total'} has no "
                      f"history){_via(exits.rebuilt if cause == 'loss_rebuilt' else exits.detached)}.")


def _via(places: list[str]) -> str:
    return f", by {places[0]}" if places else ""


def _cut(total: Tensor, factor: Tensor) -> bool:
    return torch.autograd.grad(total, factor, retain_graph=True, allow_unused=True)[0] is None


# ---- each tensor -----------------------------------------------------------------------------------------------------


def every_tensor(subject: Subject) -> Iterator[Finding]:
    """Every trainable tensor gets a gradient that is there, finite and not zero; else the reason."""
    live = {name: parameter for name, parameter in subject.parameters.items() if parameter.requires_grad}
    with subject.full_precision():
        total, terms, _ = subject.run()
        if not total.requires_grad or total.grad_fn is None or not live or not bool(total.isfinite()):
            return
        graph = graph_of(total)
        gradients = dict(zip(live, torch.autograd.grad(total, list(live.values()), retain_graph=True, allow_unused=True)))
        bad = [name for name, gradient in gradients.items() if gradient is not None and not bool(gradient.isfinite().all())]
        if bad:
            yield Finding("nonfinite_gradients", f"the loss is {float(total.detach()):.4g} and the gradients of {len(bad)} of "
                          f"{len(live)} tensors are not finite, first {bad[0]}{_source(subject, total, terms)}.")
            return
        silent = [name for name, gradient in gradients.items() if gradient is None or not bool(gradient.any())]
        yield from _silent(subject, silent, gradients, graph)


def _source(subject: Subject, total: Tensor, terms: dict[str, Tensor]) -> str:
    """Which term the non-finite gradient comes from; one outside of the table shows as a difference of sums."""
    live = [parameter for parameter in subject.parameters.values() if parameter.requires_grad]
    for name, value in terms.items():
        parts = torch.autograd.grad(value, live, retain_graph=True, allow_unused=True) if value.requires_grad else ()
        if any(part is not None and not bool(part.isfinite().all()) for part in parts):
            return f"; they come from the term {name}"
    rest = float(total.detach() - sum(subject.loss.weights.get(name, 0) * value.detach() for name, value in terms.items()))
    return f"; no named term has them: they come from something outside the table of terms, worth {rest:.3g}"


def _silent(subject: Subject, names: list[str], gradients: dict[str, Tensor | None], graph: Graph) -> Iterator[Finding]:
    """Tensors without gradient: unused, cut off, or stopped by an operator that has no derivative."""
    unused, cut, stopped, lost, flat = [], [], [], [], []
    for name in names:
        parameter, reached = subject.parameters[name], id(subject.parameters[name]) in graph.leaves
        if not _matters(subject, parameter):
            if reached and gradients[name] is not None:
                flat.append(name)
            if not reached or gradients[name] is None:
                unused.append(name)
            continue
        (lost if reached and gradients[name] is None else stopped if reached else cut).append(name)
    if lost:
        yield Finding("wrong_backward", f"{listed(lost)}: the loss depends on it and autograd reaches it, but an operator's "
                      f"backward returns nothing for it{_hand(graph)}.")
    if stopped:
        yield _stopped(subject, stopped, graph)
    if cut:
        rounded = graph.named(*ZERO_DERIVATIVE)
        yield Finding("detached_backbone", f"{len(cut)} of {len(gradients)} tensors change the loss and receive no gradient: "
                      f"{listed(cut)}{_via(rounded)}.")
    if flat and len(flat) == len(gradients):
        yield _flat(subject, len(flat))
    if unused:
        share = sum(subject.parameters[name].numel() for name in unused) / sum(p.numel() for p in subject.parameters.values())
        yield Finding("unused_head", f"{len(unused)} tensors ({share:.0%} of the weights) reach no term of the loss: "
                      f"{listed(unused)}.")


def _flat(subject: Subject, tensors: int) -> Finding:
    """Why no tensor changes the loss: the loss is flat at the factors, or the network behind them is."""
    total, _, prediction = subject.run()
    factor = torch.autograd.grad(total, prediction.factor, allow_unused=True)[0]
    seen = f"the loss is {float(total.detach()):.4g}, and the gradients of all {tensors} trainable tensors are exactly zero"
    if factor is not None and bool(factor.any()):
        return Finding("zeroed_gradients", f"{seen}; at the factors there is one of norm {float(factor.norm()):.2g}.")
    return Finding("clamped_loss", f"{seen}, as it is at the factors: there the loss is flat.")


def _hand(graph: Graph) -> str:
    return f" (written by hand: {', '.join(graph.written_by_hand)})" if graph.written_by_hand else ""


def _stopped(subject: Subject, names: list[str], graph: Graph) -> Finding:
    """Tensors that the loss depends on and autograd reaches, with a gradient of exactly zero."""
    what = f"{len(names)} tensors change the loss and have a gradient of exactly zero: {listed(names)}"
    live = [subject.parameters[name] for name in names]
    larger = torch.autograd.grad(subject.run()[0] * UNDERFLOW, live, allow_unused=True)
    if any(part is not None and bool(part.any()) for part in larger):
        return Finding("gradient_underflow", f"{what}; with a loss a million times larger it is not.")
    if graph.written_by_hand:
        return Finding("wrong_backward", f"{what}; backward runs through {', '.join(graph.written_by_hand)}.")
    if graph.named(*ZERO_DERIVATIVE):
        return Finding("non_differentiable", f"{what}; the path has {listed(graph.named(*ZERO_DERIVATIVE))}.")
    return Finding("zeroed_gradients", f"{what}; every operator on the path has a derivative, so something clears it on the way.")


@torch.no_grad()
def _matters(subject: Subject, parameter: Tensor) -> bool:
    """Whether the loss changes with this tensor, by more than rounding."""
    before = subject.value()
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(parameter.shape, generator=generator).to(parameter.device, parameter.dtype)
    size = float(parameter.detach().square().mean().sqrt()) or 0.1
    return any(abs(_after(subject, parameter, noise, step * size) - before) > NOISE * max(1.0, abs(before))
               for step in (0.1, 1.0))


def _after(subject: Subject, parameter: Tensor, direction: Tensor, step: float) -> float:
    with subject.moved([parameter], [direction], step):
        return subject.value()


# ---- is it the derivative? ------------------------------------------------------------------------------------------


def right_derivative(subject: Subject) -> Iterator[Finding]:
    """Finite differences of the loss along random directions of each part agree with the gradient."""
    with subject.full_precision():
        wrong = [name for name, error in loss_inputs(subject).items() if error > DISAGREES]
        if wrong:
            yield Finding("wrong_backward", f"the loss has another derivative with respect to {listed(wrong)} than its "
                          f"backward says.")
            return
        errors = {name: error for name, error in parts(subject).items() if error > DISAGREES}
        if not errors:
            return
        exits = Exits()
        with exits:
            graph = graph_of(subject.run()[0])
        worst = max(errors, key=errors.__getitem__)
        seen = (f"the gradient of {len(errors)} parts of the network is not the derivative of the loss, most in '{worst}' "
                f"(relative error {errors[worst]:.2g})")
    if graph.written_by_hand or not (graph.named(*ZERO_DERIVATIVE) or exits.detached):
        yield Finding("wrong_backward", f"{seen}{_hand(graph)}.")
    elif graph.named(*ZERO_DERIVATIVE):
        yield Finding("non_differentiable", f"{seen}; the path has {listed(graph.named(*ZERO_DERIVATIVE))}.")
    else:
        yield Finding("detached_backbone", f"{seen}{_via(exits.detached)}.")


def loss_inputs(subject: Subject) -> dict[str, float]:
    """Relative error of the loss's derivative along a random direction of each output of the network, in float64.

    The loss is asked with gradients on, as in training: one that differs without them is another mistake.
    """
    with torch.no_grad():
        guess = subject.run()[2]
    guess = Prediction(*(None if value is None else value.detach().double() for value in guess))
    scenes = doubled(subject.scenes)
    errors = {}
    for name, value in guess._asdict().items():
        if value is None:
            continue
        leaf = value.clone().requires_grad_()
        total = subject.loss(guess._replace(**{name: leaf}), scenes)[0]
        if not total.requires_grad:
            continue
        gradient = torch.autograd.grad(total, leaf, allow_unused=True)[0]
        if gradient is not None and bool(gradient.any()):
            errors[name] = _loss_error(subject, guess, scenes, name, gradient)
    return errors


def _loss_error(subject: Subject, guess: Prediction, scenes: Scenes, name: str, gradient: Tensor) -> float:
    generator, value = torch.Generator().manual_seed(11), getattr(guess, name)
    pairs = []
    for _ in range(3):
        direction = torch.randn(value.shape, generator=generator).to(value) * value.square().mean().sqrt()

        def loss(step: float, direction: Tensor = direction) -> float:
            return float(subject.loss(guess._replace(**{name: (value + step * direction).requires_grad_()}), scenes)[0].detach())
        pairs.append((float((gradient * direction).sum()), loss, abs(loss(0.0))))
    return _relative_error(pairs, (*STEPS, 1e-5, 1e-7), NOISE_WIDE)


def parts(subject: Subject) -> dict[str, float]:
    """Relative error of the derivative along random directions of each child of the network."""
    live = {name: parameter for name, parameter in subject.parameters.items() if parameter.requires_grad}
    total, _, _ = subject.run()
    if not live or not total.requires_grad or not bool(total.isfinite()):
        return {}
    gradients = dict(zip(live, torch.autograd.grad(total, list(live.values()), allow_unused=True)))
    generator = torch.Generator().manual_seed(7)
    errors = {}
    for part in dict.fromkeys(name.partition(".")[0] for name in live):
        names = [name for name in live if name.partition(".")[0] == part and gradients[name] is not None]
        if names:
            errors[part] = _part_error(subject, [live[name] for name in names], [gradients[name] for name in names], generator,
                                       float(total.detach()))
    return errors


def _part_error(subject: Subject, tensors: list[Tensor], gradients: list[Tensor], generator: torch.Generator,
                value: float) -> float:
    pairs, sizes = [], [float(tensor.detach().square().mean().sqrt()) for tensor in tensors]
    first = min([0.02, *filter(None, sizes)])          # of a tensor that starts at zero
    for _ in range(2):
        directions = [torch.randn(tensor.shape, generator=generator).to(tensor) * (size or first) for tensor, size in zip(tensors, sizes)]

        def loss(step: float, directions: list[Tensor] = directions) -> float:
            if not step:
                return value                       # of the same weights and random numbers
            with subject.moved(tensors, directions, step):
                return subject.value()
        pairs.append((float(sum((g * d).sum() for g, d in zip(gradients, directions))), loss, abs(value)))
    return _relative_error(pairs)


def _relative_error(pairs: list, steps: tuple[float, ...] = STEPS, noise: float = NOISE) -> float:
    """Of derivatives against central differences, the better of several steps; 0 where all are below the rounding."""
    best, pairs = math.inf, [(derivative, cache(loss), value) for derivative, loss, value in pairs]
    for step, sides in product(steps, (1, 2)):      # a second side costs a forward pass again, and most agree on the first
        gaps, sizes = 0.0, 0.0
        for derivative, loss, value in pairs:
            difference = _difference(derivative, loss, step, sides)
            gaps += max(0.0, abs(difference - derivative) - noise * max(value, 1e-3) / step) ** 2
            sizes += max(abs(difference), abs(derivative)) ** 2
        best = min(best, math.sqrt(gaps / sizes) if sizes > 0 else 0.0)
        if best < 0.05:
            break
    return best


def _difference(derivative: float, loss: Callable[[float], float], step: float, sides: int) -> float:
    """Ahead, or of both sides the nearest: central, or on the one side of a kink (an assignment of sources, a Huber) on
    which the derivative was taken."""
    ahead, here = loss(step), loss(0.0)
    differences = [(ahead - here) / step]
    if sides == 2:
        differences += [(ahead - loss(-step)) / (2 * step), (here - loss(-step)) / step]
    return min(differences, key=lambda each: abs(each - derivative))


CHECKS = {"the loss depends on the factors": connected, "every tensor gets a gradient": every_tensor,
          "the gradient is the derivative": right_derivative}
