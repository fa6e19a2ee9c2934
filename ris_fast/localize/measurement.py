"""The measurement as a function of the positions of its sources: least squares of the symbols, slopes, information.

Model: y = G A(position) s + n, n white of power sigma^2, s free. Where the symbols are static there is one s for all
snapshots; else one for each, and only the positions are common. At given positions the best s follows by least squares,
so that the cost is a function of the positions alone (variable projection).

Source: Golub and Pereyra, "The differentiation of pseudo-inverses and nonlinear least squares problems whose variables
separate", SIAM Journal on Numerical Analysis 10 (1973) 413-432, in Kaufman's form of the slopes.

Legend: B batch, L snapshots, M base-station antennas, N RIS elements, K sources (padded), S sets of symbols (1 or L),
R = L M / S measurements of a set, T = 4 tangents of a source. Planar: (..., 2C) = [real C | imaginary C].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ris_fast.config.schema import Task
from ris_fast.kernels.pursuit.search import NOTHING, TANGENTS, Pursuit
from ris_fast.kernels.pursuit.solve import spd_solve
from ris_fast.kernels.scale import power_of_two
from ris_fast.localize.sources import Deviations
from ris_fast.models.pursuit import geometry_of
from ris_fast.physics.real_complex import multiply

TINY = 1e-12
RIDGE = 0.1  # of noise over signal: as much as float32 needs to hold two equal sources apart, and too little to bias


class Point(NamedTuple):
    """The measurement at one set of positions; rows of `active` False hold no source."""

    position: Tensor  # (B, K, 3)     u, v, w = 1/range
    active: Tensor  # (B, K)        bool
    amplitude: Tensor  # (B, S, 2K)    s, real parts first
    cost: Tensor  # (B,)          |y - G A s|^2
    objective: Tensor  # (B,)          the same with the ridge on s: what the steps bring down
    slope: Tensor  # (B, 3K)       -1/2 its derivative by the scaled positions
    information: Tensor  # (B, 3K, 3K)   Re of the Gram matrix of the slopes of y, symbols eliminated
    inverse: Tensor  # (B, S, 2K, 2K)  of the Gram matrix of the steered sources, with its ridge
    coupling: Tensor  # (B, S, 2K, 3K)  -ds / d(scaled position)


class Measurement:
    """Scenes in units where y has mean power 1 and sum_l G_l^H G_l mean diagonal 1.

    Args: task: array and ranges; snapshots (B, L, M, 2), channel (B, M, N, 2), codes ([B,] L, N, 2), snr_db (B,), of
        one dtype and device.
    Cost: the sensing operator is formed, 8 L M N bytes a scene.
    """

    def __init__(self, task: Task, snapshots: Tensor, channel: Tensor, codes: Tensor, snr_db: Tensor) -> None:
        batch, length, antennas, _ = snapshots.shape
        self.sets = 1 if task.symbols == "static" else length
        self.search = _search(task, snapshots)
        units = power_of_two(snapshots), power_of_two(channel)
        snapshots, channel = snapshots * units[0], channel * units[1]
        level = snapshots.square().sum(-1).mean((1, 2)).clamp_min(NOTHING)
        column = channel.square().sum((1, 2, 3)).mul(length / channel.shape[2]).clamp_min(NOTHING)
        scaled = channel * column.rsqrt()[:, None, None, None]
        y = snapshots * level.rsqrt()[:, None, None, None]
        self.y = torch.cat(y.reshape(batch, self.sets, -1, 2).unbind(-1), dim=-1)  # (B, S, 2R)
        operator = multiply(scaled[:, None], codes.expand(batch, -1, -1, -1)[:, :, None])
        self.operator = torch.cat(operator.flatten(1, 2).unbind(-1), dim=-1)  # (B, LM, 2N)
        self.noise = 1.0 / (1.0 + 10.0 ** (snr_db / 10.0))
        self.size = length * antennas
        self.ridge = RIDGE * self.noise / (self.size * (1.0 - self.noise)).clamp_min(NOTHING)
        ratio = units[1] / units[0]
        self.cost_unit = level / units[0].flatten().square()
        self.power_unit = level / column * ratio.flatten().square()  # of |s|^2, in the units of the scenes

    def at(self, position: Tensor, active: Tensor) -> Point:
        """Least squares of the symbols at positions (B, K, 3), and how the measurement leans on them."""
        images = self._images(position, active)
        steer = _real_columns(images[..., ::TANGENTS])
        gram, moment = steer.mT @ steer, (steer.mT @ self.y[..., None])[..., 0]
        inverse = self._inverse(gram)
        amplitude = (inverse @ moment[..., None])[..., 0]
        residual = self.y - (steer @ amplitude[..., None])[..., 0]
        cost = residual.square().sum((1, 2))
        jacobian = _slopes(images, amplitude)
        cross = steer.mT @ jacobian
        coupling = inverse @ cross
        information = (jacobian.mT @ jacobian - cross.mT @ coupling).sum(1)
        slope = (jacobian.mT @ residual[..., None])[..., 0].sum(1)
        objective = cost + self.ridge * amplitude.square().sum((1, 2))
        return Point(position, active, amplitude, cost, objective, slope, information, inverse, coupling)

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
        spread = torch.diagonal(point.inverse, dim1=-2, dim2=-1)
        real, imag = (point.amplitude.square() - 0.5 * self.noise[:, None, None] * spread).chunk(2, dim=-1)
        power = (real + imag).mean(1).clamp_min(NOTHING) * self.power_unit[:, None]
        return torch.where(point.active, power, 0.0)

    def deviations(self, point: Point) -> Deviations:
        """Standard deviations by the inverse of the Fisher information, 2 / sigma^2 times `information` and so on."""
        covariance = self._covariance(point)
        sources = point.position.shape[1]
        blocks = covariance.unflatten(2, (sources, 3)).unflatten(1, (sources, 3))
        cosines = torch.diagonal(blocks, dim1=1, dim2=3).permute(0, 3, 1, 2) / (
            self.search.scale[:, None] * self.search.scale
        )
        angles = angle_deviations(point.position, cosines)
        power = self._power_variance(point, covariance).clamp_min(0).sqrt() * self.power_unit[:, None]
        return Deviations(*(torch.where(point.active, each, 0.0) for each in (*angles, power)))

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
        s, sources = point.amplitude, point.position.shape[1]
        slope = 2.0 / self.sets * torch.diag_embed(torch.stack(s.chunk(2, dim=-1)))  # d power / d s: (2, B, S, K, K)
        slope = torch.cat(tuple(slope), dim=-1)  # (B, S, K, 2K)
        fixed = (self.noise / 2)[:, None] * ((slope @ point.inverse) * slope).sum((1, 3))
        moved = (slope @ point.coupling).sum(1)  # (B, K, 3K)
        return fixed + ((moved @ covariance) * moved).sum(2)

    def energy(self) -> Tensor:
        """|y|^2, the cost without any source: (B,)."""
        return self.y.square().sum((1, 2))

    def _images(self, position: Tensor, active: Tensor) -> Tensor:
        """G_l times the tangents, zero where there is no source: (B, S, 2R, KT), real parts of the rows first."""
        real, imag = (self.search.tangents(position) * self._columns(active)).chunk(2, dim=2)
        planes = torch.cat((torch.cat((real, imag), 2), torch.cat((-imag, real), 2)), dim=1)  # (B, 2N, 2KT)
        both = (self.operator @ planes).unflatten(1, (self.sets, -1))
        return torch.cat(both.chunk(2, dim=-1), dim=2)

    def _columns(self, active: Tensor) -> Tensor:
        return active.repeat_interleave(TANGENTS, dim=1).repeat(1, 2)[:, None].to(self.y.dtype)

    def _inverse(self, gram: Tensor) -> Tensor:
        """(gram + ridge)^-1: (B, S, n, n)."""
        batch, sets, size, _ = gram.shape
        unit = torch.eye(size, device=gram.device, dtype=gram.dtype)[..., None].expand(-1, -1, batch * sets)
        ridge = self.ridge.repeat_interleave(sets).expand(size, -1)
        solved = spd_solve(gram.flatten(0, 1).permute(1, 2, 0).contiguous(), unit, ridge)
        return solved.permute(2, 0, 1).unflatten(0, (batch, sets))


def angle_deviations(position: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Deviations of azimuth, elevation (rad) and range (m), (B, K) each, from positions (B, K, 3) of u, v, w and their
    covariance (B, K, 3, 3): dv = cos(el) d el, du = cos(az) cos(el) d az - sin(az) sin(el) d el, dw = -w^2 dr."""
    u, v, w = position.unbind(-1)
    cosine = (1.0 - v.square()).clamp_min(TINY).sqrt()
    depth = (1.0 - u.square() - v.square()).clamp_min(TINY).sqrt()  # cos(az) cos(el)
    by_v = u * v / (cosine.square() * depth)
    uu, uv, vv, ww = (covariance[..., i, j] for i, j in ((0, 0), (0, 1), (1, 1), (2, 2)))
    azimuth = uu / depth.square() + 2.0 * uv * by_v / depth + vv * by_v.square()
    variances = (azimuth, vv / cosine.square(), ww / w.clamp_min(TINY).pow(4))
    return tuple(each.clamp_min(0).sqrt() for each in variances)


def _search(task: Task, like: Tensor) -> Pursuit:
    """The array and the box of positions of a task, without the dictionary of a search: nothing is searched here."""
    geometry, wavenumber = geometry_of(task)
    geometry = geometry._replace(dictionary=geometry.dictionary.new_empty(0, 1))
    return Pursuit(type(geometry)(*(each.to(like) for each in geometry)), wavenumber, 0)


def _real_columns(columns: Tensor) -> Tensor:
    """Complex columns [Re; Im] (..., 2R, K) -> the real matrix of [s_re, s_im] -> [Re; Im]: (..., 2R, 2K)."""
    real, imag = columns.chunk(2, dim=-2)
    return torch.cat((columns, torch.cat((-imag, real), dim=-2)), dim=-1)


def _slopes(images: Tensor, amplitude: Tensor) -> Tensor:
    """Derivatives of the measurement by the scaled u, v and w of every source: (B, S, 2R, 3K)."""
    real, imag = images.unflatten(-1, (-1, TANGENTS))[..., 1:].chunk(2, dim=2)  # (B, S, R, K, 3)
    s_re, s_im = amplitude[:, :, None, :, None].chunk(2, dim=3)
    return torch.cat((real * s_re - imag * s_im, real * s_im + imag * s_re), dim=2).flatten(3)
