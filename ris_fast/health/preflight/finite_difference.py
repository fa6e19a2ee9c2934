"""A derivative beside finite differences of the function, with the step and the side that suit it best."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import product

AGREES = 0.05  # relative; at which no smaller step is tried

Along = tuple[
    float, Callable[[float], float], float
]  # the derivative by backward, the function of a step, its rounding
Gap = tuple[float, float]  # how far derivative and difference are apart, and the size of the larger


def pooled(gaps: Iterable[Gap]) -> float:
    """The relative error of several together; 0 where all are below the rounding."""
    apart, sizes = zip(*gaps, (0.0, 0.0))
    return math.hypot(*apart) / math.hypot(*sizes) if any(sizes) else 0.0


def gap_of(lines: Iterable[Along], steps: tuple[float, ...]) -> Gap:
    """How far derivatives and their differences are apart, and how large they are, each with the step that suits it.

    Lines are made one by one, each costs a pass or more: no further one once two or more agree together.
    """
    apart, size = 0.0, 0.0
    for number, line in enumerate(lines, 1):
        further, larger = line_gap(line, steps)
        apart, size = math.hypot(apart, further), math.hypot(size, larger)
        if number > 1 and apart <= AGREES * size:
            break
    return apart, size


def line_gap(line: Along, steps: tuple[float, ...]) -> Gap:
    """The gap along one line, with the step and the side at which it is smallest."""
    derivative, _, noise = line
    best = (math.inf, 1.0)
    for step, sides in product(steps, (1, 2)):  # most agree on the first side, and a second costs a pass again
        difference = _difference(line, step, sides)
        size = max(abs(difference), abs(derivative))
        best = min(
            best,
            (max(0.0, abs(difference - derivative) - noise / step), size),
            key=lambda each: each[0] / (each[1] or 1.0),
        )
        if best[0] <= AGREES * best[1]:
            break
    return best


def _difference(line: Along, step: float, sides: int) -> float:
    """Ahead; or of both sides the nearest: central, or on the one side of a kink on which the derivative was taken."""
    derivative, function, _ = line
    ahead, here = function(step), function(0.0)
    differences = [(ahead - here) / step]
    if sides == 2:
        behind = function(-step)
        differences += [(ahead - behind) / (2 * step), (here - behind) / step]
    return min(differences, key=lambda each: abs(each - derivative))
