"""Preflight of constants in denominators: the epsilon of each normalisation beside what it is added to."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ris_fast.health.finding import Finding
from ris_fast.health.preflight.measures import listed, relative_change, rms
from ris_fast.health.preflight.probe import PreflightContext, layer_calls

NAMES = ("eps", "epsilon", "variance_epsilon")  # attributes of a module; torch's and others' layers
SMALLER = 1e-6  # of the epsilon, with which a layer is asked again
SWALLOWED, DROWNED = 1.0, 9.0  # relative change: an epsilon three times the variance, and a hundred times
LOUDER, AUDIBLE, FAINT = 2.0**26, 0.05, 1e-2  # times; rms of a signal of order one; of it, that is next to nothing
LARGE = 1e-2  # no epsilon that only keeps a division finite is as large


def epsilons(context: PreflightContext) -> Iterator[Finding]:
    """No layer answers otherwise by much with an epsilon that is next to nothing, to what it is given in training."""
    found: dict[str, tuple[float, float, float, float]] = {}
    calls: dict[str, tuple[tuple, Tensor]] = {}

    def keep(name: str, module: nn.Module, inputs: tuple, output: Any) -> None:
        if isinstance(output, Tensor) and inputs and isinstance(inputs[0], Tensor):
            given = tuple(each.detach().clone() if isinstance(each, Tensor) else each for each in inputs)
            calls.setdefault(name, (given, output.detach()))

    with_one = {name: module for name, module in context.model.named_modules() if _epsilon(module)}
    if not with_one:
        return
    handles = [module.register_forward_hook(partial(keep, name)) for name, module in with_one.items()]
    try:
        context.model.train()
        context.run()
    finally:
        for handle in handles:
            handle.remove()
    for name, (inputs, output) in calls.items():
        attribute, value = _epsilon(with_one[name])
        change = _change(with_one[name], attribute, value, inputs, output)
        if change > SWALLOWED:
            found[name] = (change, value, rms(inputs[0]), rms(output))
    if found:
        worst = max(found, key=lambda name: found[name][0])
        change, value, size, answer = found[worst]
        yield Finding(
            "epsilon_swallows_signal",
            f"{listed(list(found))}: the epsilon of {worst} is {value:.2g}, its input has rms {size:.2g} (mean square"
            f" {size**2:.2g}) and its answer rms {answer:.2g}, which an epsilon of {value * SMALLER:.1g} changes by"
            f" {change:.2g} of itself.",
            advice=f"Make {worst}.{_epsilon(with_one[worst])[0]} a small share of the variance that it meets, such as"
            " 1e-5, or bring its input to numbers of order one.",
            certain=value >= LARGE and change > DROWNED,
        )


def _epsilon(module: nn.Module) -> tuple[str, float] | None:
    """Name and value of the module's epsilon, where it has one above zero."""
    for name in NAMES:
        value = getattr(module, name, None)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0:
            return name, float(value)
    return None


@torch.no_grad()
def _change(module: nn.Module, attribute: str, value: float, inputs: tuple, output: Tensor) -> float:
    """How much of itself the module's answer changes by with a smaller epsilon; 0 where that says nothing."""
    kept = getattr(module, attribute)
    setattr(module, attribute, value * SMALLER)
    try:
        again = module.forward(*inputs)
    finally:
        setattr(module, attribute, kept)
    if not isinstance(again, Tensor) or again.shape != output.shape or not bool(output.any()):
        return 0.0
    change = relative_change(output.float(), again.float())
    return change if change < float("inf") else 0.0


def between_layers(context: PreflightContext) -> Iterator[Finding]:
    """No signal of order one is next to nothing at the following layer and of order one when it is much louder.

    What a network computes between its layers has no attribute to look at: it is asked with a louder signal.
    """
    order: list[tuple[str, float, float]] = []

    def keep(name: str, module: nn.Module, inputs: tuple, output: Any) -> None:
        if isinstance(output, Tensor) and inputs and isinstance(inputs[0], Tensor):
            order.append((name, rms(inputs[0]), rms(output)))

    context.model.train()
    with layer_calls(context.model, keep), torch.no_grad():
        context.run()
    for (before, _, sent), (after, received, _) in zip(order, order[1:]):
        if sent > AUDIBLE and 0 < received < FAINT * sent:
            louder = _received(context, before, after)
            # What a layer between them normalises is as loud as before.
            if AUDIBLE < louder < 1 / AUDIBLE and 10 * received < louder < LOUDER * received / 100:
                yield Finding(
                    "epsilon_swallows_signal",
                    f"{before} answers with rms {sent:.2g}, of which {received:.2g} reach {after}; of an answer"
                    f" {LOUDER:g} times larger {louder:.2g} do. What lies between divides by a size with a constant"
                    " added that is larger than the signal.",
                    certain=False,
                )
                return


@torch.no_grad()
def _received(context: PreflightContext, before: str, after: str) -> float:
    """Rms of what a layer is given when the answer of another one is much louder."""
    modules, found = dict(context.model.named_modules()), []
    handles = [
        modules[before].register_forward_hook(lambda module, inputs, output: LOUDER * output),
        modules[after].register_forward_pre_hook(lambda module, inputs: found.append(rms(inputs[0]))),
    ]
    try:
        context.run()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else 0.0


CHECKS = {
    "no constant swallows a signal between layers": between_layers,
    "no epsilon is larger than the signal beside it": epsilons,
}
