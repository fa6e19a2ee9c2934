"""Cramer-Rao bounds of the sources of a scene, deterministic and stochastic, for static and per-snapshot symbols.

Model: y_s = G_s A(position) x_s + n, s = 1 .. S sets of symbols: one of all snapshots stacked where symbols are static,
else one for each snapshot; n circular white of power sigma^2 = mean |G A x|^2 / SNR. The unit of a position is scaled
to a radian of phase over the aperture before anything is inverted.

Legend: B batch, L snapshots, M base-station antennas, N RIS elements, K sources (padded), S sets of symbols,
R = L M / S measurements of a set, T = 4 tangents of a source.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ris_fast.config.schema import Task
from ris_fast.kernels.pursuit.search import TANGENTS
from ris_fast.localize.measurement import position_deviations, search_of
from ris_fast.localize.sources import Deviations, Sources
from ris_fast.physics.real_complex import to_complex
from ris_fast.physics.scenes import Scenes

SINGULAR = 1e-7  # pivot of a matrix with a unit diagonal: its square is what rounding leaves of float64
CHUNK_BYTES = 2**26  # of the sensing operators of the scenes worked on at once


class Truth(NamedTuple):
    """What a bound is made of, float64; columns of sources that are not there are zero."""

    sources: Sources
    images: Tensor  # (B, S, R, K, T)  G times a and its derivatives by the scaled u, v and w
    symbols: Tensor  # (B, S, K)
    noise: Tensor  # (B,)  sigma^2
    scale: Tensor  # (3,)  radians over the aperture by u, v, w


def deterministic_bound(task: Task, scenes: Scenes, symbols: Tensor | None = None) -> Deviations:
    """Least standard deviations of unbiased estimates where the symbols are unknown constants.

    Model: Fisher = 2/sigma^2 sum_s Re Z_s^H (I - B_s B_s^+) Z_s, B_s = G_s A, Z_s the derivatives of B_s x_s by the
        positions; that of the powers mean_s |x_s|^2 follows from the same Fisher matrix with the symbols in it.
    Args: scenes that carry channel and geometry; symbols: g x, complex (B, S, K) in the order of the scenes' sources,
        where they are known; otherwise least squares at the true positions, with the true powers.
    Returns: deviations in the order of `Sources.of_scenes`, float64; inf in a scene whose Fisher matrix is singular
        (two sources at one place), zeros where there is no source.
    Raises: ValueError where the scenes lack the channel or the geometry.
    Source: Stoica and Nehorai, "MUSIC, maximum likelihood, and Cramer-Rao bound", IEEE Trans. ASSP 37 (1989) 720-741.
    """
    return _by_chunk("deterministic_bound", _deterministic, task, scenes, symbols)


def stochastic_bound(task: Task, scenes: Scenes, symbols: Tensor | None = None) -> Deviations:
    """Least standard deviations of unbiased estimates where the symbols are circular Gaussian draws.

    Model: y_s ~ CN(0, R_s), R_s = B_s diag(p) B_s^H + sigma^2 I, Fisher_ij = sum_s tr(R_s^-1 dR_s/di R_s^-1 dR_s/dj)
        over positions, powers and sigma^2. R_s is inverted through the Gram matrix of B_s. Symbols set sigma^2 alone.
    Args, Returns, Raises: as `deterministic_bound`.
    Source: Stoica and Nehorai, "Performance study of conditional and unconditional direction-of-arrival estimation",
        IEEE Trans. ASSP 38 (1990) 1783-1795.
    """
    return _by_chunk("stochastic_bound", _stochastic, task, scenes, symbols)


@torch.no_grad()
def _by_chunk(
    owner: str, bound: Callable[[Truth], Deviations], task: Task, scenes: Scenes, symbols: Tensor | None
) -> Deviations:
    if scenes.channel is None or scenes.azimuth is None or scenes.power is None:
        lacks = "channel" if scenes.channel is None else "geometry of the sources"
        raise ValueError(f"{owner}: the scenes carry no {lacks}, which the bound is made of. Use data that has it.")
    size = max(1, CHUNK_BYTES // max(1, 2 * scenes.channel[:1].nbytes * scenes.snapshots.shape[1]))
    parts = []
    for first in range(0, max(1, scenes.batch), size):
        rows = slice(first, first + size)
        parts.append(bound(_truth(task, scenes[rows], None if symbols is None else symbols[rows])))
    return Deviations(*(torch.cat(each) for each in zip(*parts)))


def _truth(task: Task, scenes: Scenes, symbols: Tensor | None) -> Truth:
    sources = Sources.of_scenes(scenes)
    sources = Sources(*(each.double() for each in sources[:4]), sources.count)
    sets = 1 if task.symbols == "static" else scenes.snapshots.shape[1]
    channel, codes, snapshots = (to_complex(each.double()) for each in (scenes.channel, scenes.codes, scenes.snapshots))
    search = search_of(task, sources.power)
    position = torch.where(sources.active[..., None], sources.cosines(), search.high)
    real, imag = search.tangents(position).chunk(2, dim=2)
    tangents = torch.complex(real, imag) * sources.active.repeat_interleave(TANGENTS, dim=1)[:, None]
    operator = channel[:, None] * codes.expand(scenes.batch, -1, -1)[:, :, None]  # (B, L, M, N)
    images = (
        (operator.flatten(1, 2) @ tangents)
        .unflatten(1, (sets, snapshots.shape[1] * snapshots.shape[2] // sets))
        .unflatten(3, (-1, TANGENTS))
    )
    if symbols is None:
        symbols = _fitted_symbols(images[..., 0], snapshots.reshape(*images.shape[:3]), sources)
    else:
        order = scenes.power.argsort(dim=1, descending=True, stable=True)
        symbols = symbols.to(torch.complex128).gather(2, order[:, None].expand(-1, sets, -1))
    clean = (images[..., 0] @ symbols[..., None]).abs().square().mean((1, 2, 3))
    noise = clean * 10.0 ** (-scenes.snr_db.double() / 10.0)
    return Truth(sources, images, symbols, noise, search.scale)


def _fitted_symbols(steer: Tensor, y: Tensor, sources: Sources) -> Tensor:
    """Least squares at the true positions, (B, S, K), each source scaled to its true power."""
    fitted = _solve(_regular(steer.mH @ steer, sources.active), steer.mH @ y[..., None])[..., 0]
    power = fitted.abs().square().mean(1).clamp_min(torch.finfo(torch.float64).tiny)
    return fitted * (sources.power / power).sqrt()[:, None]


def _regular(gram: Tensor, active: Tensor) -> Tensor:
    """Ones on the diagonal where there is no source."""
    return gram + torch.diag_embed((~active).to(gram.dtype))[:, None]


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    """matrix^-1 right, Hermitian positive definite matrices scaled to a unit diagonal; NaN where one is singular."""
    scale = torch.diagonal(matrix, dim1=-2, dim2=-1).real.clamp_min(torch.finfo(torch.float64).tiny).rsqrt()
    factor, failed = torch.linalg.cholesky_ex(matrix * scale[..., None] * scale[..., None, :])
    least = torch.diagonal(factor, dim1=-2, dim2=-1).real.amin(-1)
    solved = scale[..., None] * torch.cholesky_solve(right * scale[..., None], factor)
    return torch.where(((failed > 0) | ~(least > SINGULAR))[..., None, None], torch.nan, solved)


def _deterministic(truth: Truth) -> Deviations:
    sources, images, symbols, noise, _ = truth
    steer = images[..., 0]
    slopes = (images[..., 1:] * symbols[:, :, None, :, None]).flatten(3)  # (B, S, R, 3K)
    gram = _regular(steer.mH @ steer, sources.active)
    coupling = _solve(gram, steer.mH @ slopes)
    apart = slopes - steer @ coupling
    fisher = 2.0 / noise[:, None, None] * (apart.mH @ apart).real.sum(1)
    covariance = _covariance(fisher, sources.active.repeat_interleave(3, dim=1))
    inverse = _solve(gram, torch.eye(steer.shape[-1], dtype=gram.dtype, device=gram.device).expand_as(gram))
    spread = torch.diagonal(inverse, dim1=-2, dim2=-1).real
    fixed = 2.0 * noise[:, None] * (symbols.abs().square() * spread).mean(1) / symbols.shape[1]
    moved = 2.0 * (symbols[..., None].conj() * coupling).real.mean(1)  # d power / d position
    return _deviations(truth, covariance, fixed + ((moved @ covariance) * moved).sum(2))


def _stochastic(truth: Truth) -> Deviations:
    sources, images, _, noise, _ = truth
    count = images.shape[3]
    fisher = gaussian_fisher(images * sources.power.sqrt()[:, None, None, :, None], noise)
    there = pad(sources.active.repeat_interleave(TANGENTS, dim=1), (0, 1), value=True)
    covariance = _covariance(fisher, there)[:, :-1, :-1].unflatten(2, (count, TANGENTS)).unflatten(1, (count, TANGENTS))
    variance = sources.power.square() * torch.diagonal(covariance[:, :, 0, :, 0], dim1=1, dim2=2)
    return _deviations(truth, covariance[:, :, 1:, :, 1:].flatten(3).flatten(1, 2), variance)


def gaussian_fisher(columns: Tensor, noise: Tensor) -> Tensor:
    """The Fisher matrix of the covariances R_s = sum_k b_sk b_sk^H + sigma^2 I of circular Gaussian measurements.

    Model: F_ij = sum_s tr(R_s^-1 dR_s/di R_s^-1 dR_s/dj), dR/di = d_i b^H + b d_i^H, with d a derivative of b for a
        position and b / 2 for the logarithm of a power.
    Args: columns (B, S, R, K, 1 + G) complex: b = sqrt(p) G a and its G derivatives; noise (B,): sigma^2.
    Returns: (B, K (1 + G) + 1, ...): log power and G positions of each source, then log sigma^2.
    """
    rows, count, each = columns.shape[2:]
    level = noise[:, None, None, None]
    steer, halves = columns[..., 0], columns.new_tensor([0.5] + [1.0] * (each - 1))
    slopes, repeated = (columns * halves).flatten(3), steer.repeat_interleave(each, dim=3)
    unit = torch.eye(count, dtype=steer.dtype, device=steer.device)
    inner = steer.mH @ steer + level * unit
    white_slopes, white = ((part - steer @ _solve(inner, steer.mH @ part)) / level for part in (slopes, repeated))
    crossed = repeated.mH @ white_slopes
    fisher = 2.0 * (crossed * crossed.mT + (repeated.mH @ white).mT * (slopes.mH @ white_slopes)).real.sum(1)
    with_noise = 2.0 * noise[:, None] * (white.conj() * white_slopes).real.sum((1, 2))
    of_inner = _solve(inner, unit.expand_as(inner)).abs().square().sum((2, 3))
    own = (rows - count + noise.square()[:, None] * of_inner).sum(1)
    last = torch.cat((with_noise, own[:, None]), dim=1)
    return torch.cat((torch.cat((fisher, with_noise[:, None]), dim=1), last[:, :, None]), dim=2)


def _covariance(fisher: Tensor, there: Tensor) -> Tensor:
    """The inverse of a Fisher matrix, ones on the diagonal for parameters that are not there; NaN where singular."""
    fisher = fisher + torch.diag_embed((~there).to(fisher.dtype))
    unit = torch.eye(fisher.shape[-1], dtype=fisher.dtype, device=fisher.device)
    return _solve(fisher, unit.expand_as(fisher))


def _deviations(truth: Truth, covariance: Tensor, power_variance: Tensor) -> Deviations:
    active = truth.sources.active
    position = torch.where(active[..., None], truth.sources.cosines(), 1.0)
    geometry = position_deviations(position, covariance, truth.scale)
    parts = (each.nan_to_num(nan=torch.inf) for each in (*geometry, power_variance.sqrt()))
    return Deviations(*(torch.where(active, each, 0.0) for each in parts))
