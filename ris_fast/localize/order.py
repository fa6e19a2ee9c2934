"""The number of sources of a scene by description length, from more candidates than it can have.

Legend: B batch, L snapshots, M base-station antennas, K sources (padded).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad

from ris_fast.localize.descent import descend
from ris_fast.localize.evidence import evidence, gaussian_symbols
from ris_fast.localize.measurement import Measurement, Point

CRITERIA = ("mdl", "aic", "evidence")
PARAMETERS = 4  # of a source: three of its position, and its power


def pruned(measurement: Measurement, point: Point, count: str | Tensor, largest: int) -> tuple[Point, Tensor]:
    """Removes sources one by one and keeps the number asked for: the point there, and the description length of each
    number (B, largest + 1), by MDL where the number is given."""
    batch = len(point.active)
    length = point.cost.new_full((batch, largest + 1), torch.inf)
    length[:, 0] = measurement.energy / measurement.noise
    position = point.position.new_zeros(batch, largest, 3)  # of the best so far: none
    active = torch.zeros_like(position[..., 0], dtype=torch.bool)
    best = _rank(length[:, 0], active.sum(1), count)
    for fewer in fewer_and_fewer(measurement, point, largest):
        k, here = fewer.active.sum(1), description(measurement, fewer, count)
        length.scatter_reduce_(1, k[:, None], here[:, None], "amin")
        rank = _rank(here, k, count)
        better, best = rank < best, torch.minimum(rank, best)
        rest = (0, largest - fewer.active.shape[1])
        position = torch.where(better[:, None, None], pad(fewer.position, (0, 0, *rest)), position)
        active = torch.where(better[:, None], pad(fewer.active, rest), active)
    return descend(measurement, measurement.at(measurement.inside(position), active), 1), length


def fewer_and_fewer(measurement: Measurement, point: Point, largest: int) -> Iterator[Point]:
    """Points with at most `largest` sources, with one fewer, and so on down to one, at positions that stay as they are.

    The cost of each is what it would be after a step from there: found without another look at the measurement.
    """
    for slots in range(point.active.shape[1], 0, -1):
        if slots < point.active.shape[1]:
            point = without_weakest(measurement, point, point.active.sum(1) > slots, slots)
        if slots <= largest:
            yield point._replace(cost=(point.cost - measurement.fall(point)).clamp_min(0))


def _rank(length: Tensor, k: Tensor, count: str | Tensor) -> Tensor:
    """What is smallest at the number of sources to keep: (B,)."""
    return (k - count).abs().to(length.dtype) if isinstance(count, Tensor) else length


def description(measurement: Measurement, point: Point, count: str | Tensor) -> Tensor:
    """Description length of a scene's sources in nats, (B,), up to a constant of the scene; MDL if the number is given.

    Model: -log p(y) of symbols drawn with the powers found, plus what the parameters cost; or the negative logarithm of
        the evidence.
    """
    if isinstance(count, str) and count == "evidence":
        return evidence(measurement, point)
    found = gaussian_symbols(measurement, point, measurement.mean_square(point))
    return found + point.active.sum(1) * penalty(measurement, count)


def penalty(measurement: Measurement, count: str | Tensor) -> float:
    """Description length of the parameters of one more source."""
    return PARAMETERS * (1.0 if isinstance(count, str) and count == "aic" else 0.5 * math.log(2 * measurement.size))


def without_weakest(measurement: Measurement, point: Point, scenes: Tensor, slots: int) -> Point:
    """In these scenes (B,) the source is removed whose absence raises the objective least; `slots` columns remain."""
    spread = torch.diagonal(point.inverse.real, dim1=-2, dim2=-1)
    squares = torch.view_as_real(point.amplitude).square().sum(3)
    loss = torch.where(point.active, (squares / spread).sum(1), torch.inf)
    weakest = one_hot(loss.argmin(1), loss.shape[1]).bool()
    active = point.active & ~(weakest & scenes[:, None])
    order = active.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :slots]
    return measurement.among(point, order, active.gather(1, order))
