"""Blind maximum likelihood: a search from many starts, slow and thorough, for a network to be compared with.

Legend: B batch, N RIS elements, K sources (padded), S sets of symbols, G grid points.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ris_fast.config.schema import Task
from ris_fast.kernels.pursuit.search import Pursuit
from ris_fast.localize.candidates import pursuit_sources
from ris_fast.localize.descent import choose, descend
from ris_fast.localize.likelihood import Estimate, estimate, joined
from ris_fast.localize.measurement import Measurement, Point, measurements
from ris_fast.localize.order import description, pruned, without_weakest
from ris_fast.models.pursuit import geometry_of

STEPS = 3
FAR_OFF = 1e6  # nats for each source too many or too few, where the number is given


@torch.no_grad()
def maximum_likelihood(
    task: Task,
    snapshots: Tensor,
    channel: Tensor,
    codes: Tensor,
    snr_db: Tensor,
    *,
    count: str | Tensor = "mdl",
    rounds: int = 1,
) -> Estimate:
    """The sources that maximise the likelihood, searched for from many starts.

    Model: a pursuit and `refine` give the first answer. Then, for each source in turn, the place on the grid that would
        explain most of the measurement in its stead is added as one more source, all are refined, the one least needed
        is removed, and what has the smaller description length is kept; `rounds` times over.
    Args, Returns: as `refine`; count: "mdl", "aic" or (B,) sources.
    Cost: about 10 ms of one core a scene of RIS-12x12, 3 ms for each round more.
    """
    largest = task.max_sources
    start = pursuit_sources(task, snapshots, channel, codes, snr_db)
    search, parts = _search(task, snapshots), []
    for rows, measurement in measurements(task, snapshots, channel, codes, snr_db):
        wanted = count[rows] if isinstance(count, Tensor) else count
        point = descend(measurement, measurement.start(start.take(rows)), STEPS)
        point, length = pruned(measurement, point, wanted, largest)
        for source in [*range(largest)] * rounds:
            point, length = _another(measurement, search, point, length, source, wanted)
        parts.append(estimate(measurement, point, (-length).softmax(1)))
    return joined(parts)


def _another(
    measurement: Measurement, search: Pursuit, point: Point, length: Tensor, source: int, count: str | Tensor
) -> tuple[Point, Tensor]:
    """The better of a point and one where a new place was tried for one source; likewise the lengths (B, K + 1)."""
    place = _strongest(search, measurement.left_over(_silenced(point, source)))
    position, active = torch.cat((point.position, place[:, None]), dim=1), pad(point.active, (0, 1), value=True)
    more = descend(measurement, measurement.at(position, active), STEPS - 1)
    everyone, largest = torch.ones_like(active[:, 0]), point.active.shape[1]
    same = descend(measurement, without_weakest(measurement, more, everyone, largest), 1)
    fewer = descend(measurement, without_weakest(measurement, same, everyone, largest), 1)
    room = more.active.sum(1) <= largest
    more = without_weakest(measurement, more, ~everyone, largest)
    for trial, valid in ((same, everyone), (fewer, everyone), (more, room)):
        here = torch.where(valid, description(measurement, trial, count), torch.inf)
        length = length.scatter_reduce(1, trial.active.sum(1, keepdim=True), here[:, None], "amin")
        better = valid & (_score(measurement, trial, count) < _score(measurement, point, count))
        point = choose(better, trial, point)
    return point, length


def _silenced(point: Point, source: int) -> Point:
    """The point with the symbols of one source at zero."""
    others = torch.arange(point.amplitude.shape[2], device=point.amplitude.device) != source
    return point._replace(amplitude=point.amplitude * others)


def _strongest(search: Pursuit, left: Tensor) -> Tensor:
    """The place on the grid that explains most of (B, S, N, 2): (B, 3)."""
    real, imag = (left.flatten(2) @ search.dictionary).chunk(2, dim=2)
    return search.grid[(real.square() + imag.square()).sum(1).argmax(1)]


def _score(measurement: Measurement, point: Point, count: str | Tensor) -> Tensor:
    """What is least at the answer: (B,)."""
    if isinstance(count, str):
        return description(measurement, point, count)
    return point.cost / measurement.noise + FAR_OFF * (point.active.sum(1) - count).abs()


def _search(task: Task, like: Tensor) -> Pursuit:
    """The array, the box and the dictionary of a task."""
    geometry, wavenumber = geometry_of(task)
    return Pursuit(type(geometry)(*(each.to(like) for each in geometry)), wavenumber, 0)
