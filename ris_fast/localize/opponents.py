"""Classical estimators, each run on the same scenes as a network: the field by linear estimates, sources by search.

An estimate of the field on the surface is a factor x (one column, or one for each snapshot) whose covariance x x^H also
holds the cross terms between sources; `locate` finds positions in it. The searches return sources themselves.

Legend: B batch, L snapshots, M base-station antennas, N RIS elements, K sources (padded), S sets of symbols (1 or L),
R = L M / S measurements of a set.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ris_fast.config.schema import Task
from ris_fast.kernels.field.op import aperture_field
from ris_fast.localize.blind import maximum_likelihood
from ris_fast.localize.candidates import pursuit_sources
from ris_fast.localize.likelihood import refine
from ris_fast.localize.sources import Sources
from ris_fast.models.beams import FieldPrior
from ris_fast.physics.array import RISArray, cosine_steering
from ris_fast.physics.real_complex import to_complex, to_pairs
from ris_fast.physics.scenes import Scenes

LOT = 64  # scenes whose Gram matrices are inverted at once
LEAST_EIGENVALUE = 1e-9  # of a Gram matrix, as a share of its mean: float64 resolves it
LMMSE_STEPS = 30  # of conjugate gradients


class Answer(NamedTuple):
    """What an estimator says of a batch of scenes."""

    factor: Tensor  # (B, N, C, 2)  of the covariance, F F^H
    sources: Sources | None  # where it finds them itself; else `locate(factor, ...)` does


@torch.no_grad()
def least_squares(task: Task, scenes: Scenes) -> Answer:
    """The field G^+ y, a column for each set of symbols.

    Cost: the inverse of a matrix min(N, R) square, float64: 1 ms of one core a scene of RIS-12x12.
    """
    sets = 1 if task.symbols == "static" else scenes.snapshots.shape[1]
    parts = []
    for rows in torch.arange(scenes.batch, device=scenes.snapshots.device).split(LOT):
        some = scenes[rows]
        channel, codes, snapshots = (to_complex(each.double()) for each in (some.channel, some.codes, some.snapshots))
        operator = channel[:, None] * codes.expand(len(rows), -1, -1)[:, :, None]  # (B, L, M, N)
        operator, y = (
            operator.reshape(len(rows), sets, -1, operator.shape[3]),
            snapshots.reshape(len(rows), sets, -1, 1),
        )
        if operator.shape[2] >= operator.shape[3]:
            field = _solve(operator.mH @ operator, operator.mH @ y)
        else:
            field = operator.mH @ _solve(operator @ operator.mH, y)
        parts.append(to_pairs(field[..., 0].transpose(1, 2)).to(scenes.snapshots.dtype))
    return Answer(torch.cat(parts) if parts else scenes.snapshots.new_empty(0, task.elements, sets, 2), None)


def _solve(gram: Tensor, right: Tensor) -> Tensor:
    """gram^-1 right, with a ridge that only a singular matrix feels."""
    level = torch.diagonal(gram, dim1=-2, dim2=-1).real.mean(-1).clamp_min(torch.finfo(torch.float64).tiny)
    unit = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    factor, _ = torch.linalg.cholesky_ex(gram + (LEAST_EIGENVALUE * level)[..., None, None] * unit)
    return torch.cholesky_solve(right, factor)


@torch.no_grad()
def lmmse(task: Task, scenes: Scenes) -> Answer:
    """The field by linear minimum mean square error, with the mean covariance of the task's scenes as prior."""
    static, root = task.symbols == "static", FieldPrior(task).to(scenes.snapshots.device).root
    return Answer(
        aperture_field(
            scenes.channel, scenes.codes, scenes.snapshots, scenes.snr_db, static=static, root=root, steps=LMMSE_STEPS
        ),
        None,
    )


def omp(task: Task, scenes: Scenes) -> Answer:
    """Orthogonal matching pursuit on a grid, refined by likelihood, the number of sources by MDL."""
    given = scenes.snapshots, scenes.channel, scenes.codes, scenes.snr_db
    sources = refine(task, *given, pursuit_sources(task, *given), count="mdl").sources
    return Answer(factor_of(task, sources), sources)


def blind_likelihood(task: Task, scenes: Scenes) -> Answer:
    """Blind maximum likelihood, `maximum_likelihood`, the number of sources by MDL."""
    sources = maximum_likelihood(task, scenes.snapshots, scenes.channel, scenes.codes, scenes.snr_db).sources
    return Answer(factor_of(task, sources), sources)


OPPONENTS: dict[str, Callable[[Task, Scenes], Answer]] = {
    "least_squares": least_squares,
    "lmmse": lmmse,
    "omp": omp,
    "blind_likelihood": blind_likelihood,
}


def opponent(name: str, task: Task, scenes: Scenes) -> Answer:
    """What one of `OPPONENTS` says of the scenes.

    Raises: ValueError for a name that is none of them, or scenes without the channel.
    """
    if name not in OPPONENTS:
        raise ValueError(f"opponent: there is no '{name}', expected one of {', '.join(OPPONENTS)}.")
    if scenes.channel is None:
        raise ValueError(f"opponent: {name} needs the channel H, which these scenes do not carry. Use data with it.")
    return OPPONENTS[name](task, scenes)


def factor_of(task: Task, sources: Sources) -> Tensor:
    """The covariance that sources make, as its factor (B, N, K, 2): columns sqrt(p_k) a_k, zero beyond the count."""
    range_m = torch.where(sources.active, sources.range_m, 1.0)
    u, v, _ = sources.cosines().unbind(-1)
    columns = cosine_steering(RISArray.of(task), u, v, range_m) * sources.power.sqrt()[..., None, None]
    return columns.transpose(1, 2).contiguous()
