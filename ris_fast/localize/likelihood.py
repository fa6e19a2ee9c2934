"""Positions by maximum likelihood: Gauss-Newton on the measurement from given starts, and the number of sources.

Model: y = G A(position) s + n, n circular white of power sigma^2; -log p(y) = |y - G A s|^2 / sigma^2 + constant, with
sigma^2 from the SNR.

Legend: B batch, L snapshots, M base-station antennas, N RIS elements, K sources (padded).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad

from ris_fast.config.schema import Task
from ris_fast.localize.measurement import Measurement, Point
from ris_fast.localize.sources import Deviations, Sources

CHUNK_BYTES = 2**26  # of the sensing operators of the scenes worked on at once
PRUNING_STEPS, LAST_STEPS = 2, 1
CRITERIA = ("mdl", "aic")


class Estimate(NamedTuple):
    """Maximum-likelihood sources of a batch of scenes."""

    sources: Sources
    deviations: Deviations  # by the Fisher information at the estimate
    cost: Tensor  # (B,)       |y - G A s|^2, in the units of the snapshots
    count_probability: Tensor  # (B, K + 1)  of 0, 1, .. K sources; all on the count where it was given


@torch.no_grad()
def refine(
    task: Task,
    snapshots: Tensor,
    channel: Tensor,
    codes: Tensor,
    snr_db: Tensor,
    start: Sources,
    *,
    count: str | Tensor | None = None,
    steps: int = 4,
) -> Estimate:
    """Maximum-likelihood sources from starts near them.

    Model: `steps` joint Gauss-Newton steps on all positions with the symbols eliminated; a step that would raise the
        cost is not taken, and the next one is a quarter of it. Positions stay in the box of the task. Where a number
        of sources is to be found, or fewer are wanted than `start` holds, the source whose absence costs least is
        removed, the others are refined, and so on down to none. The number k of least description length is kept:

            cost_k / sigma^2 + k p log(n) / 2   (count = "mdl"),      cost_k / sigma^2 + k p   (count = "aic"),

        n = 2 L M real measurements, p = 5 parameters a source (3 + 2 L where symbols change from snapshot to snapshot).
    Args: snapshots (B, L, M, 2), channel (B, M, N, 2), codes ([B,] L, N, 2), snr_db (B,); start: candidates, one column
        each; count: None keeps all of them, "mdl" and "aic" choose, a tensor (B,) says how many.
    Returns: `Estimate`; `count_probability` is proportional to exp(-description length). Powers are mean_l |s_l|^2 less
        what noise adds to it, the unit of `Scenes.power`.
    Raises: ValueError for an unknown criterion.
    Numerics: in the dtype of the snapshots. Symbols have a ridge of 0.1 sigma^2 / signal, which leaves two equal
        sources a finite answer.
    Source: Schwarz, "Estimating the dimension of a model", Annals of Statistics 6 (1978) 461-464; Wax and Kailath,
        "Detection of signals by information theoretic criteria", IEEE Trans. ASSP 33 (1985) 387-392.
    """
    if isinstance(count, str) and count not in CRITERIA:
        raise ValueError(f"refine: count is {count!r}, expected one of {', '.join(CRITERIA)}, a tensor (B,) or None.")
    size = max(1, CHUNK_BYTES // max(1, channel[:1].nbytes * snapshots.shape[1]))
    parts = []
    for first in range(0, max(1, len(snapshots)), size):
        rows = slice(first, first + size)
        own = codes[rows] if codes.dim() == 4 else codes
        measurement = Measurement(task, snapshots[rows], channel[rows], own, snr_db[rows])
        wanted = count[rows] if isinstance(count, Tensor) else count
        parts.append(_refined(measurement, start.take(rows), wanted, steps))
    return Estimate(*(_joined(each) for each in zip(*parts)))


def _refined(measurement: Measurement, start: Sources, count: str | Tensor | None, steps: int) -> Estimate:
    point = descend(measurement, measurement.at(measurement.inside(start.cosines()), start.active), steps)
    if count is None:
        found = point.active.sum(1)
        probability = one_hot(found, point.active.shape[1] + 1).to(point.cost.dtype)
    else:
        point, probability = _pruned(measurement, point, count)
    return _estimate(measurement, point, probability)


def descend(measurement: Measurement, point: Point, steps: int) -> Point:
    """Gauss-Newton steps, each scene for itself: a step that does not lower the objective is refused, and the next one
    from the same place is a quarter of it."""
    length = torch.ones_like(point.cost)
    for _ in range(steps):
        move = length[:, None, None] * measurement.step(point)
        trial = measurement.at(measurement.inside(point.position + move), point.active)
        better = trial.objective < point.objective
        length = torch.where(better, 1.0, length / 4)
        point = _where(better, trial, point)
    return point


def _where(condition: Tensor, one: Point, other: Point) -> Point:
    pairs = zip(one, other)
    return Point(*(torch.where(condition.view(-1, *[1] * (a.dim() - 1)), a, b) for a, b in pairs))


def _pruned(measurement: Measurement, point: Point, count: str | Tensor) -> tuple[Point, Tensor]:
    """Removes sources one by one and keeps the number asked for: the point there, and the probability of each number
    (B, K + 1)."""
    batch, most = point.active.shape
    length = point.cost.new_full((batch, most + 1), torch.inf)  # description length of each number of sources
    length[:, 0] = measurement.energy / measurement.noise
    position, active = point.position, torch.zeros_like(point.active)  # of the best so far: none
    best = _rank(length[:, 0], torch.zeros_like(point.active[:, 0], dtype=torch.int64), count)
    for slots in range(most, 0, -1):
        if slots < most:
            point = _without_weakest(measurement, point, slots)
        k = point.active.sum(1)
        here = point.cost / measurement.noise + k * penalty(measurement, count)
        length.scatter_reduce_(1, k[:, None], here[:, None], "amin")
        rank = _rank(here, k, count)
        better, best = rank < best, torch.minimum(rank, best)
        rest = (0, most - slots)
        position = torch.where(better[:, None, None], pad(point.position, (0, 0, *rest)), position)
        active = torch.where(better[:, None], pad(point.active, rest), active)
    return descend(measurement, measurement.at(position, active), LAST_STEPS), (-length).softmax(1)


def _rank(length: Tensor, k: Tensor, count: str | Tensor) -> Tensor:
    """What is smallest at the number of sources to keep: (B,)."""
    return (k - count).abs().to(length.dtype) if isinstance(count, Tensor) else length


def penalty(measurement: Measurement, count: str | Tensor) -> float:
    """Description length of one more source, in nats; that of MDL where the number is given."""
    parameters = 3 + 2 * measurement.sets
    return float(parameters) if count == "aic" else 0.5 * parameters * math.log(2 * measurement.size)


def _without_weakest(measurement: Measurement, point: Point, slots: int) -> Point:
    """Of scenes with more than `slots` sources the one is removed whose absence raises the objective least."""
    spread = torch.diagonal(point.inverse.real, dim1=-2, dim2=-1)
    squares = torch.view_as_real(point.amplitude).square().sum(3)
    loss = torch.where(point.active, (squares / spread).sum(1), torch.inf)
    weakest = one_hot(loss.argmin(1), loss.shape[1]).bool()
    active = point.active & ~(weakest & (point.active.sum(1, keepdim=True) > slots))
    order = active.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :slots]
    return descend(measurement, measurement.among(point, order, active.gather(1, order)), PRUNING_STEPS)


def _estimate(measurement: Measurement, point: Point, probability: Tensor) -> Estimate:
    """Sorted by power and in the units of the scenes."""
    power, deviations = measurement.power(point), measurement.deviations(point)
    key = torch.where(point.active, power, -1.0)
    order = key.argsort(dim=1, descending=True, stable=True)
    position = point.position.gather(1, order[..., None].expand(-1, -1, 3))
    sources = Sources.of_cosines(position, power.gather(1, order), point.active.sum(1))
    deviations = Deviations(*(each.gather(1, order) for each in deviations))
    return Estimate(sources, deviations, point.cost * measurement.cost_unit, probability)


def _joined(parts: tuple[Any, ...]) -> Any:
    """Chunks of one field of an estimate, which may itself be a record."""
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)
    return type(parts[0])(*(torch.cat(each) for each in zip(*parts)))
