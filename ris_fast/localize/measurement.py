"""The measurement as a function of the positions of its sources: least squares of the symbols, slopes, information.

Model: y = G A(position) s + n, n white of power sigma^2, s free. Where the symbols are static there is one s for all
snapshots; else one for each, and only the positions are common. At given positions the best s follows by least squares,
so that the cost is a function of the positions alone (variable projection).

Source: Golub and Pereyra, "The differentiation of pseudo-inverses and nonlinear least squares problems whose variables
separate", SIAM Journal on Numerical Analysis 10 (1973) 413-432, in Kaufman's form of the slopes.

Legend: B batch, L snapshots, M base-station antennas, N RIS elements, K sources (padded), S sets of symbols (1 or L),
R = L M / S measurements of a set, T = 4 tangents of a source. Planar: (..., 2C) = [real C | imaginary C], the others
are complex or pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ris_fast.config.schema import Task
from ris_fast.kernels.pursuit.search import NOTHING, TANGENTS, Pursuit
from ris_fast.kernels.pursuit.solve import spd_solve
from ris_fast.kernels.scale import power_of_two
from ris_fast.localize.sources import Deviations, Sources
from ris_fast.models.pursuit import geometry_of
from ris_fast.physics.real_complex import to_complex

CHUNK_BYTES = 2**26  # of the sensing operators of the scenes worked on at once
TINY = 1e-12
RIDGE = 0.1  # of noise over signal: as much as float32 needs to hold two equal sources apart, and too little to bias


class Point(NamedTuple):
    """The measurement at one set of positions; rows of `active` False hold no source. Complex arrays are complex."""

    position: Tensor  # (B, K, 3)       u, v, w = 1/range
    active: Tensor  # (B, K)          bool
    gram: Tensor  # (B, S, KT, KT)  of the images of the tangents
    moment: Tensor  # (B, S, KT)      images^H y
    amplitude: Tensor  # (B, S, K)       s
    cost: Tensor  # (B,)            |y - G A s|^2
    objective: Tensor  # (B,)            the same with the ridge on s: what the steps bring down
    slope: Tensor  # (B, 3K)         -1/2 its derivative by the scaled positions
    information: Tensor  # (B, 3K, 3K)     Re of the Gram matrix of the slopes of y, symbols eliminated
    inverse: Tensor  # (B, S, K, K)    of the Gram matrix of the steered sources, with its ridge
    coupling: Tensor  # (B, S, K, 3K)   -ds / d(scaled position)

    @property
    def steer(self) -> Tensor:
        """(B, S, K, K): the Gram matrix of the steered sources alone."""
        return self.gram[..., ::TANGENTS, ::TANGENTS]


class Measurement:
    """Scenes in units where y has mean power 1 and sum_l G_l^H G_l mean diagonal 1.

    Args: task: array and ranges; snapshots (B, L, M, 2), channel (B, M, N, 2), codes ([B,] L, N, 2), snr_db (B,), of
        one dtype and device.
    Cost: the sensing operator is formed, 8 L M N bytes a scene.
    """

    def __init__(self, task: Task, snapshots: Tensor, channel: Tensor, codes: Tensor, snr_db: Tensor) -> None:
        batch, length, antennas, _ = snapshots.shape
        self.sets = 1 if task.symbols == "static" else length
        self.search = search_of(task, snapshots)
        units = power_of_two(snapshots), power_of_two(channel)
        snapshots, channel = snapshots * units[0], channel * units[1]
        level = snapshots.square().sum(-1).mean((1, 2)).clamp_min(NOTHING)
        column = channel.square().sum((1, 2, 3)).mul(length / channel.shape[2]).clamp_min(NOTHING)
        scaled = channel * column.rsqrt()[:, None, None, None]
        y = snapshots * level.rsqrt()[:, None, None, None]
        self.y = y.flatten(1, 2).unflatten(1, (self.sets, length * antennas // self.sets))  # (B, S, R, 2)
        operator = to_complex(scaled)[:, None] * to_complex(codes).expand(batch, -1, -1)[:, :, None]
        self.operator = torch.view_as_real(operator).flatten(3).flatten(1, 2)  # (B, LM, 2N), pairs
        self.energy = self.y.square().sum((1, 2, 3))  # |y|^2, the cost without any source
        self.noise = 1.0 / (1.0 + 10.0 ** (snr_db / 10.0))
        self.size = length * antennas
        self.ridge = RIDGE * self.noise / (self.size * (1.0 - self.noise)).clamp_min(NOTHING)
        ratio = units[1] / units[0]
        self.cost_unit = level / units[0].flatten().square()
        self.power_unit = level / column * ratio.flatten().square()  # of |s|^2, in the units of the scenes

    def start(self, sources: Sources) -> Point:
        """The point at the positions of sources, brought into the box of the task."""
        return self.at(self.inside(sources.cosines()), sources.active)

    def at(self, position: Tensor, active: Tensor) -> Point:
        """Least squares of the symbols at positions (B, K, 3), and how the measurement leans on them."""
        images = self._images(position, active)
        gram, moment = _complex_product(images, images), _complex_product(images, self.y)[..., 0]
        fit = self._fit(position, active, gram, moment)
        residual = self.y - images @ _coefficient(fit.amplitude)
        cost = residual.square().sum((1, 2, 3))
        return fit._replace(
            cost=cost,
            objective=cost + self.ridge * _energy(fit.amplitude),
            slope=_slope(_complex_product(images, residual)[..., 0], fit.amplitude),
        )

    def among(self, point: Point, rows: Tensor, active: Tensor) -> Point:
        """The point with sources `rows` (B, J) alone, without another look at the measurement.

        Numerics: the cost is a difference from |y|^2, good to 1e-7 of that in float32.
        """
        columns = (rows[..., None] * TANGENTS + torch.arange(TANGENTS, device=rows.device)).flatten(1)
        there = active.repeat_interleave(TANGENTS, dim=1)[:, None]
        index = columns[:, None].expand(-1, self.sets, -1)
        moment = point.moment.gather(2, index) * there
        gram = point.gram.gather(2, index[..., None].expand(-1, -1, -1, point.gram.shape[3]))
        gram = gram.gather(3, index[:, :, None].expand(-1, -1, index.shape[2], -1))
        position = point.position.gather(1, rows[..., None].expand(-1, -1, 3))
        return self._fit(position, active, gram * (there[..., None] & there[:, :, None]), moment)

    def _fit(self, position: Tensor, active: Tensor, gram: Tensor, moment: Tensor) -> Point:
        batch, sources = active.shape
        inverse = self._inverse(gram[..., ::TANGENTS, ::TANGENTS])
        amplitude = (inverse @ moment[..., ::TANGENTS, None])[..., 0]
        by_source = gram.unflatten(3, (sources, TANGENTS)).unflatten(2, (sources, TANGENTS))
        cross = (by_source[:, :, :, 0, :, 1:] * amplitude[:, :, None, :, None]).flatten(3)  # (B, S, K, 3K)
        scaled = amplitude[:, :, :, None, None, None].conj() * amplitude[:, :, None, None, :, None]
        own = (by_source[:, :, :, 1:, :, 1:] * scaled).reshape(batch, self.sets, 3 * sources, 3 * sources)
        coupling = inverse @ cross
        information = (own - cross.mH @ coupling).real.sum(1)
        explained = (amplitude.conj() * moment[..., ::TANGENTS]).real.sum((1, 2))
        objective = self.energy - explained
        cost = objective - self.ridge * _energy(amplitude)
        residual = moment - (gram[..., ::TANGENTS] @ amplitude[..., None])[..., 0]
        slope = _slope(residual, amplitude)
        return Point(position, active, gram, moment, amplitude, cost, objective, slope, information, inverse, coupling)

    def left_over(self, point: Point) -> Tensor:
        """G_s^H r_s of r = y - G A s, (B, S, N, 2): a search is for the largest sum_s |a^H G_s^H r_s|^2."""
        real, imag = self.search.steer(point.position).chunk(2, dim=2)
        field = torch.complex(real, imag)[:, None] @ point.amplitude[..., None]  # (B, S, N, 1)
        real, imag = field.real[..., 0], field.imag[..., 0]
        planes = torch.stack((real, imag, -imag, real), dim=3).unflatten(3, (2, 2)).flatten(2, 3)
        operator = self.operator.unflatten(1, self.y.shape[1:3])  # (B, S, R, 2N)
        back = (operator.mT @ (self.y - operator @ planes)).unflatten(2, (-1, 2))  # (B, S, N, 2, 2)
        return torch.stack((back[..., 0, 0] + back[..., 1, 1], back[..., 0, 1] - back[..., 1, 0]), dim=-1)

    def inside(self, position: Tensor) -> Tensor:
        """Positions brought into the box of the task."""
        return torch.clamp(position, self.search.low, self.search.high)

    def step(self, point: Point) -> Tensor:
        """The Gauss-Newton step (B, K, 3), damped to about a cell of the pursuit's grid and at most two of them."""
        trust, sources = self.search.trust, point.position.shape[1]
        ridge = (self.noise[:, None] / trust.square()).repeat(1, sources).T
        solved = spd_solve(point.information.permute(1, 2, 0).contiguous(), point.slope.T, ridge)
        return torch.clamp(solved.T.unflatten(1, (sources, 3)), -2 * trust, 2 * trust) / self.search.scale

    def power(self, point: Point) -> Tensor:
        """Mean over the sets of |s|^2 less what noise adds to it, in the units of the scenes: (B, K)."""
        return torch.where(point.active, self.mean_square(point) * self.power_unit[:, None], 0.0)

    def mean_square(self, point: Point) -> Tensor:
        """The same in units of the measurement, and next to nothing where there is no source."""
        added = self.noise[:, None] * torch.diagonal(point.inverse.real, dim1=-2, dim2=-1).mean(1)
        squares = torch.view_as_real(point.amplitude).square().sum(3).mean(1)
        return torch.where(point.active, squares - added, 0.0).clamp_min(NOTHING)

    def deviations(self, point: Point) -> Deviations:
        """Standard deviations by the inverse of the Fisher information, 2 / sigma^2 times `information` and so on."""
        covariance = self._covariance(point)
        geometry = position_deviations(point.position, covariance, self.search.scale)
        power = self._power_variance(point, covariance).clamp_min(0).sqrt() * self.power_unit[:, None]
        return Deviations(*(torch.where(point.active, each, 0.0) for each in (*geometry, power)))

    def _covariance(self, point: Point) -> Tensor:
        """Of the scaled positions: (B, 3K, 3K)."""
        size = point.slope.shape[1]
        unit = torch.eye(size, device=point.slope.device, dtype=point.slope.dtype)
        ridge = torch.where(point.active, 0.0, 1.0).repeat_interleave(3, dim=1).T
        inverse = spd_solve(
            point.information.permute(1, 2, 0).contiguous(), unit[..., None].expand(-1, -1, ridge.shape[1]), ridge
        )
        return inverse.permute(2, 0, 1) * (self.noise / 2)[:, None, None]

    def _power_variance(self, point: Point, covariance: Tensor) -> Tensor:
        """Of mean |s|^2, (B, K): what noise does at fixed positions, and what the errors of the positions do."""
        s = point.amplitude
        spread = torch.diagonal(point.inverse.real, dim1=-2, dim2=-1)
        squares = torch.view_as_real(s).square().sum(3)
        fixed = 2.0 * self.noise[:, None] / self.sets**2 * (squares * spread).sum(1)
        moved = 2.0 * (s[..., None].conj() * point.coupling).real.mean(1)  # (B, K, 3K)
        return fixed + ((moved @ covariance) * moved).sum(2)

    def _images(self, position: Tensor, active: Tensor) -> Tensor:
        """G_l times the tangents, zero where there is no source: (B, S, R, 2KT), planar."""
        columns = active.repeat_interleave(TANGENTS, dim=1).repeat(1, 2)[:, None].to(self.y.dtype)
        real, imag = (self.search.tangents(position) * columns).chunk(2, dim=2)
        planes = torch.stack((real, imag, -imag, real), dim=2)
        planes = planes.unflatten(2, (2, 2)).flatten(3).flatten(1, 2)  # (B, 2N, 2KT), rows in pairs like the operator
        return (self.operator @ planes).unflatten(1, self.y.shape[1:3])

    def _inverse(self, gram: Tensor) -> Tensor:
        """(gram + ridge)^-1, Hermitian: (B, S, K, K)."""
        batch, sets, size, _ = gram.shape
        real, imag = (each.flatten(0, 1).permute(1, 2, 0) for each in (gram.real, gram.imag))
        matrix = torch.cat((torch.cat((real, -imag), 1), torch.cat((imag, real), 1)))
        unit = torch.eye(2 * size, size, device=gram.device, dtype=real.dtype)[..., None].expand(-1, -1, batch * sets)
        solved = spd_solve(matrix, unit, self.ridge.repeat_interleave(sets).expand(2 * size, -1))
        real, imag = solved.permute(2, 0, 1).unflatten(0, (batch, sets)).chunk(2, dim=2)
        return torch.complex(real, imag)


def measurements(
    task: Task, snapshots: Tensor, channel: Tensor, codes: Tensor, snr_db: Tensor
) -> Iterator[tuple[slice, Measurement]]:
    """The scenes of a batch, as many at once as their sensing operators have room for."""
    size = max(1, CHUNK_BYTES // max(1, channel[:1].nbytes * snapshots.shape[1]))
    for first in range(0, max(1, len(snapshots)), size):
        rows = slice(first, first + size)
        own = codes[rows] if codes.dim() == 4 else codes
        yield rows, Measurement(task, snapshots[rows], channel[rows], own, snr_db[rows])


def position_deviations(position: Tensor, covariance: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Deviations of azimuth, elevation (rad) and range (m), (B, K) each.

    Model: dv = cos(el) d el, du = cos(az) cos(el) d az - sin(az) sin(el) d el, dw = -w^2 dr.
    Args: position (B, K, 3) of u, v, w; covariance (B, 3K, 3K) of the same times scale (3,).
    """
    blocks = covariance.unflatten(2, (-1, 3)).unflatten(1, (-1, 3))
    covariance = torch.diagonal(blocks, dim1=1, dim2=3).permute(0, 3, 1, 2) / (scale[:, None] * scale)
    u, v, w = position.unbind(-1)
    cosine = (1.0 - v.square()).clamp_min(TINY).sqrt()
    depth = (1.0 - u.square() - v.square()).clamp_min(TINY).sqrt()  # cos(az) cos(el)
    by_v = u * v / (cosine.square() * depth)
    uu, uv, vv, ww = (covariance[..., i, j] for i, j in ((0, 0), (0, 1), (1, 1), (2, 2)))
    azimuth = uu / depth.square() + 2.0 * uv * by_v / depth + vv * by_v.square()
    variances = (azimuth, vv / cosine.square(), ww / w.clamp_min(TINY).pow(4))
    return tuple(each.clamp_min(0).sqrt() for each in variances)


def search_of(task: Task, like: Tensor) -> Pursuit:
    """The array and the box of positions of a task, without the dictionary of a search: nothing is searched here."""
    geometry, wavenumber = geometry_of(task)
    geometry = geometry._replace(dictionary=geometry.dictionary.new_empty(0, 1))
    return Pursuit(type(geometry)(*(each.to(like) for each in geometry)), wavenumber, 0)


def _complex_product(a: Tensor, b: Tensor) -> Tensor:
    """a^H b of planar (B, S, R, 2A) and (B, S, R, 2C), complex: (B, S, A, C)."""
    upper, lower = (a.mT @ b).chunk(2, dim=2)
    (rr, ri), (ir, ii) = upper.chunk(2, dim=3), lower.chunk(2, dim=3)
    return torch.complex(rr + ii, ri - ir)


def _coefficient(amplitude: Tensor) -> Tensor:
    """Symbols (B, S, K) as the real matrix (B, S, 2KT, 2) that takes planar images of tangents to G A s, a pair."""
    real, imag = (pad(each[..., None], (0, TANGENTS - 1)).flatten(2) for each in (amplitude.real, amplitude.imag))
    return torch.stack((torch.cat((real, -imag), 2), torch.cat((imag, real), 2)), dim=3)


def _slope(correlation: Tensor, amplitude: Tensor) -> Tensor:
    """Re conj(s) d^H r of every scaled u, v and w: (B, S, KT), (B, S, K) -> (B, 3K)."""
    along = correlation.unflatten(2, (-1, TANGENTS))[..., 1:]
    return (amplitude[..., None].conj() * along).real.sum(1).flatten(1)


def _energy(amplitude: Tensor) -> Tensor:
    """|s|^2 of all sources: (B, S, K) -> (B,)."""
    return torch.view_as_real(amplitude).square().sum((1, 2, 3))
