"""Preflight of the scale of a gradient: a part whose gradient is a constant multiple of the derivative of the loss.

A wrong derivative differs from direction to direction; a scaled one has the same ratio to differences along all of
them, and such a ratio has error bars: the rounding of the differences.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence

import torch

from ris_fast.health.finding import Finding
from ris_fast.health.preflight.finite_difference import Along
from ris_fast.health.preflight.measures import listed
from ris_fast.health.preflight.probe import PreflightContext
from ris_fast.health.preflight.projected import lines, projection

STEP = 1e-3  # relative to the size of the weights; both sides, so that curvature leaves a millionth
SPREAD = 0.05  # relative, of the ratios of several directions that are called one
OTHER = 0.3  # |log ratio| from which a scale is another
LEAST = 1e-4  # below which a gradient is none, which has names of its own
SECONDS = 0.5  # for the modules one by one
SURE = 5.0  # times the rounding, that a difference is


def of_parts(context: PreflightContext, names: Sequence[str]) -> Finding | None:
    """A finding where the gradients of these children of the network are their derivatives times one number each."""
    ratios = {name: ratio(along) for name, along in _lines(context, names)}
    if not all(ratios.get(name) is not None and _other(ratios[name]) for name in names):
        return None
    children = {name.partition(".")[0] for name in context.trainable}
    return _finding(ratios, whole=len(ratios) == len(children))


def of_loss(ratios: dict[str, float | None]) -> Finding | None:
    """The same of the loss's gradient at each output of the network, against the loss that is printed."""
    if not ratios or not all(value is not None and _other(value) for value in ratios.values()):
        return None
    worst = max(ratios, key=lambda name: abs(math.log(abs(ratios[name]))))
    return Finding(
        "gradient_scale_differs",
        f"the gradient of the loss with respect to {listed(list(ratios))} is one multiple of its derivative along"
        f" several directions, {ratios[worst]:.3g} of it: what is differentiated is not the loss that is printed.",
        certain=False,
    )


def single_parts(context: PreflightContext) -> Iterator[Finding]:
    """Module by module as long as time allows: one whose gradient is small hides among others of its part."""
    began, found = time.perf_counter(), {}
    owners = list(dict.fromkeys(name.rpartition(".")[0] for name in context.trainable))
    for name, along in _lines(context, owners, exact=True):
        value = ratio(along)
        if value is not None and _other(value):
            found[name] = value
        if time.perf_counter() - began > SECONDS:
            break
    if found:
        yield _finding(found, whole=False)


def _finding(ratios: dict[str, float], *, whole: bool) -> Finding:
    worst = max(ratios, key=lambda name: abs(math.log(abs(ratios[name]))))
    others = "of all parts of the network" if whole else f"of {listed(list(ratios))}"
    rest = "" if whole else ", and that of other parts is the derivative itself"
    return Finding(
        "gradient_scale_differs",
        f"along several directions the gradient {others} is one multiple of the derivative of the loss,"
        f" {ratios[worst]:.3g} of it in '{worst}'{rest}. Where a gradient is scaled on purpose, that is meant.",
        certain=False,
    )


def _other(value: float) -> bool:
    return abs(value) > LEAST and (value < 0 or abs(math.log(value)) > OTHER)


def _lines(
    context: PreflightContext, names: Sequence[str], *, exact: bool = False
) -> Iterator[tuple[str, Iterable[Along]]]:
    """Name of each part and lines along its weights. Args: exact: weights of the module itself, not of its children."""
    found = projection(context)
    if found is None:
        return
    projected, gradients = found
    live, generator = context.trainable, torch.Generator().manual_seed(37)
    for name in names:
        own = [
            each for each in gradients if (each.rpartition(".")[0] == name if exact else each.partition(".")[0] == name)
        ]
        if own:
            yield (
                name,
                lines(projected, [live[each] for each in own], [gradients[each] for each in own], generator),
            )


def ratio(lines: Iterable[Along], step: float = STEP) -> float | None:
    """The gradient over the difference, where it is the same along all directions that tell; None where it is not."""
    values = []
    for slope, function, noise in lines:
        difference = (function(step) - function(-step)) / (2 * step)
        if abs(difference) > SURE * noise / step:
            values.append((slope / difference, noise / step / abs(difference)))
        if len(values) == 1 and not _other(values[0][0]):
            return None  # as it should be
    if len(values) < 2:
        return None
    middle = sum(value for value, _ in values) / len(values)
    if any(abs(value - middle) > (SPREAD + 2 * error) * abs(middle) for value, error in values):
        return None
    return middle
