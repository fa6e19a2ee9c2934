"""Positions by likelihood: Gauss-Newton on the measurement from given starts, posterior ranges, number of sources.

Model: y = G A(position) s + n, n circular white of power sigma^2; -log p(y) = |y - G A s|^2 / sigma^2 + constant, with
sigma^2 from the SNR.

Legend: B batch, L snapshots, M base-station antennas, N RIS elements, K sources (padded).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from ris_fast.config.schema import Task
from ris_fast.localize.descent import descend
from ris_fast.localize.measurement import Measurement, Point, measurements
from ris_fast.localize.order import CRITERIA, pruned
from ris_fast.localize.range_posterior import range_posterior
from ris_fast.localize.sources import Deviations, Sources


class Estimate(NamedTuple):
    """Sources of a batch of scenes by likelihood."""

    sources: Sources
    deviations: Deviations  # by the Fisher information at the estimate; of ranges, those of the posterior
    cost: Tensor  # (B,)       |y - G A s|^2 at maximum likelihood, in the units of the snapshots
    count_probability: (
        Tensor  # (B, K + 1)  of 0, 1, .. K sources; by description length; all on the count where none is chosen
    )


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
    steps: int = 3,
    range_prior: bool = True,
) -> Estimate:
    """Maximum-likelihood sources from starts near them, with ranges as posterior medians.

    Model: `steps` joint Gauss-Newton steps on all positions with the symbols eliminated; a step that would raise the
        cost is not taken, and the next one is a quarter of it. Positions stay in the box of the task. Where a number
        of sources is to be found, or fewer are wanted than `start` holds, the source whose absence costs least is
        removed, and so on down to one; the number k to keep, at most the task's, is then known, and takes another step.
        It has the least -log p(y) + 2 k log(2 L M) (count = "mdl") or + 4 k (count = "aic"): 4 parameters a source,
        its position and its power, each worth half the logarithm of the number of real measurements, or one. p(y) is
        that of symbols drawn from circular Gaussians with the powers found: symbols of their own for every snapshot
        are then no parameters, and where there is one symbol a source it makes no difference. count = "evidence" is
        the probability of k itself, with sources as the task draws them: see `evidence`.
    Args: snapshots (B, L, M, 2), channel (B, M, N, 2), codes ([B,] L, N, 2), snr_db (B,); start: candidates, one column
        each; count: None keeps all of them, "mdl", "aic" and "evidence" choose, a tensor (B,) says how many;
        range_prior: whether ranges are medians of their posterior, see `range_posterior`, with its deviations; else
        both are those of the likelihood. The two differ where a source is weak or far.
    Returns: `Estimate`, as wide as `start`, or as the task's largest number of sources where one is chosen;
        `count_probability` is proportional to exp(-description length), or is that of the evidence; it compares this
        one chain of candidates, is overconfident, and no probability of being right. Powers are mean_l |s_l|^2 less
        what noise adds to it, in the unit of `Scenes.power`.
    Raises: ValueError for an unknown criterion.
    Numerics: in the dtype of the snapshots. Symbols have a ridge of 0.1 sigma^2 / signal, which leaves two equal
        sources a finite answer.
    Source: Schwarz, "Estimating the dimension of a model", Annals of Statistics 6 (1978) 461-464; Wax and Kailath,
        "Detection of signals by information theoretic criteria", IEEE Trans. ASSP 33 (1985) 387-392.
    """
    if isinstance(count, str) and count not in CRITERIA:
        raise ValueError(f"refine: count is {count!r}, expected one of {', '.join(CRITERIA)}, a tensor (B,) or None.")
    parts = []
    for rows, measurement in measurements(task, snapshots, channel, codes, snr_db):
        wanted = count[rows] if isinstance(count, Tensor) else count
        largest = min(start.power.shape[1], task.max_sources)
        parts.append(_refined(measurement, start.take(rows), wanted, largest, steps, range_prior))
    return joined(parts)


def _refined(
    measurement: Measurement,
    start: Sources,
    count: str | Tensor | None,
    largest: int,
    steps: int,
    range_prior: bool,
) -> Estimate:
    point = descend(measurement, measurement.start(start), steps)
    if count is None:
        found = point.active.sum(1)
        probability = one_hot(found, point.active.shape[1] + 1).to(point.cost.dtype)
    else:
        point, length = pruned(measurement, point, count, largest)
        probability = (-length).softmax(1)
    return estimate(measurement, point, probability, range_prior)


def estimate(measurement: Measurement, point: Point, probability: Tensor, range_prior: bool = False) -> Estimate:
    """Sorted by power and in the units of the scenes."""
    covariance = measurement.covariance(point)
    power, deviations = measurement.power(point), measurement.deviations(point, covariance)
    position = point.position
    if range_prior:
        ranges, spread = _posterior_ranges(measurement, point, covariance)
        position = torch.cat((position[..., :2], 1.0 / ranges[..., None]), dim=2)
        deviations = deviations._replace(range_m=torch.where(point.active, spread, 0.0))
    key = torch.where(point.active, power, -1.0)
    order = key.argsort(dim=1, descending=True, stable=True)
    position = position.gather(1, order[..., None].expand(-1, -1, 3))
    sources = Sources.of_cosines(position, power.gather(1, order), point.active.sum(1))
    deviations = Deviations(*(each.gather(1, order) for each in deviations))
    return Estimate(sources, deviations, point.cost * measurement.cost_unit, probability)


def _posterior_ranges(measurement: Measurement, point: Point, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Medians and deviations of ranges, (B, K) each, everything else in the likelihood at its best."""
    task, scale = measurement.task, measurement.search.scale[2]
    deviation = torch.diagonal(covariance, dim1=1, dim2=2)[:, 2::3].clamp_min(0).sqrt() / scale
    inverse = measurement.newton(point, covariance)[..., 2]
    return range_posterior(inverse, deviation, task.range_min_m, task.range_max_m)


def joined(parts: Sequence[Any]) -> Any:
    """Lots of scenes as one: tensors, or records of them."""
    if isinstance(parts[0], Tensor):
        return torch.cat(list(parts))
    return type(parts[0])(*(joined(each) for each in zip(*parts)))
