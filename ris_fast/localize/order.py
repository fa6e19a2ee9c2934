"""The number of sources of a scene by description length, from more candidates than it can have.

Legend: B batch, L snapshots, M base-station antennas, K sources (padded), S sets of symbols.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad

from ris_fast.kernels.pursuit.search import TANGENTS
from ris_fast.localize.descent import descend
from ris_fast.localize.measurement import Measurement, Point

CRITERIA = ("mdl", "aic")
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
    """Points with at most `largest` sources, with one fewer, and so on down to one, each refined from the last."""
    for slots in range(point.active.shape[1], 0, -1):
        if slots < point.active.shape[1]:
            point = descend(measurement, without_weakest(measurement, point, point.active.sum(1) > slots, slots), 1)
        if slots <= largest:
            yield point


def _rank(length: Tensor, k: Tensor, count: str | Tensor) -> Tensor:
    """What is smallest at the number of sources to keep: (B,)."""
    return (k - count).abs().to(length.dtype) if isinstance(count, Tensor) else length


def description(measurement: Measurement, point: Point, count: str | Tensor) -> Tensor:
    """Description length of a scene's sources in nats, (B,), up to a constant of the scene; MDL if the number is given.

    Model: -log p(y) where the symbols are circular Gaussian draws of the powers p found, y_s ~ CN(0, B_s diag(p) B_s^H
        + sigma^2 I), plus what the parameters cost. Everything in it is a matrix of sources by sources: with s' the
        mean of the symbols given y, y^H R^-1 y = |y - B s'|^2 / sigma^2 + s'^H diag(p)^-1 s'.
    """
    steer, s, noise = (each.to(torch.complex128) for each in (point.steer, point.amplitude, measurement.noise))
    root = measurement.mean_square(point).double().sqrt()[:, None]
    unit = torch.eye(root.shape[2], dtype=steer.dtype, device=steer.device)
    inner = root[..., None] * steer * root[..., None, :] + noise[:, None, None, None] * unit  # sigma^2 I + P' B^H B P'
    factor, _ = torch.linalg.cholesky_ex(inner)
    moment = root * point.moment[..., ::TANGENTS]
    drawn = torch.cholesky_solve(moment[..., None], factor)[..., 0]  # s' / sqrt(p)
    apart = s - root * drawn
    misfit = (apart.conj() * (2.0 * measurement.ridge[:, None, None] * s + (steer @ apart[..., None])[..., 0])).real
    spread = (
        2.0 * torch.diagonal(factor, dim1=-2, dim2=-1).real.log().sum((1, 2))
        - s.shape[1] * s.shape[2] * noise.real.log()
    )
    fit = (point.cost + misfit.sum((1, 2))) / measurement.noise + drawn.abs().square().sum((1, 2))
    return (fit + spread).to(point.cost.dtype) + point.active.sum(1) * penalty(measurement, count)


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
