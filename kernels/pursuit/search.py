"""Newtonized orthogonal matching pursuit: finds the sources of a scene through the sensing operator, unrolled.

Each stage adds the dictionary atom that best explains the residual of G^H y, fits all amplitudes by ridge least
squares, then takes one joint Gauss-Newton step on the amplitudes and positions of all atoms so far, on the true cost
|y - G A s|^2. Shapes are static. No gradient passes through it; a network reads its outcome.
Source: Mamandipoor, Ramasamy, Madhow, "Newtonized orthogonal matching pursuit: frequency estimation over the
continuum", IEEE Transactions on Signal Processing 64 (2016) 5066-5081; here with a step on all atoms jointly.

Legend: B batch, L snapshots, M base-station antennas, N RIS elements, K atoms, T = 4 tangents of an atom, G grid
points. Complex arrays are planar here, (..., 2C) = [real C | imaginary C]: one real matrix product then does a complex
one.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..scale import rescaled
from .solve import spd_solve

TANGENTS = 4  # a, and its normalised derivatives along u, v and w = 1/range

NOTHING = 1e-18  # mean squares of rescaled numbers are far above it, unless all of them are zero


class Normal(NamedTuple):
    """The normal equations of one batch, in units where y has mean power 1 and G^H G has mean diagonal 1."""

    gram: Tensor  # (B, N, 2N)  [Re P | -Im P], P = G^H G
    moment: Tensor  # (B, N, 2)   b = G^H y, planar
    noise: Tensor  # (B,)        sigma^2
    signal: Tensor  # (B,)        expected |x|^2
    energy: Tensor  # (B,)        |y|^2


class Atoms(NamedTuple):
    """What the pursuit found, atoms in the order of their discovery; D are the tangents before the last step."""

    position: Tensor  # (B, K, 3)       u, v, w = 1/range
    amplitude: Tensor  # (B, 2, K)       s, real and imaginary parts
    gram: Tensor  # (B, 2, K, T, K, T)  D^H P D, real and imaginary parts
    residual_correlation: Tensor  # (B, 2, K, T)    D^H (b - P x), x the linearised fit
    gains: Tensor  # (B, K)          fall of the cost |y - G x|^2 at each stage
    stage_positions: Tensor  # (B, E, 3)       positions after each earlier stage, E = K (K - 1) / 2
    stage_amplitudes: Tensor  # (B, 2, E)       their amplitudes then


class Geometry(NamedTuple):
    """The constants of a task: the array in radians of phase, the box of positions and the grid of the first guess."""

    x: Tensor  # (N,)       k x
    y: Tensor  # (N,)       k y
    curvature: Tensor  # (N,)       k (x^2 + y^2) / 2
    scale: Tensor  # (3,)       spread of psi over the aperture by u, v, w
    low: Tensor  # (3,)       least u, v, w
    high: Tensor  # (3,)       largest u, v, w
    trust: Tensor  # (3,)       step that a Gauss-Newton step is damped to, times scale
    grid: Tensor  # (G, 3)     positions
    dictionary: Tensor  # (2N, 2G)   residual (N, 2), flattened, to the two parts of a^H r; (2N, 0): not made yet
    along_x: (
        Tensor  # (W, X, U, 2)   factors of the Fresnel steering vectors of the grid, G = U V W, N = X Y, by w: a = x y
    )
    along_y: Tensor  # (W, Y, V, 2)   (0, 0, 0, 2) both: the array is no rectangle


def normal_equations(snapshots: Tensor, channel: Tensor, codes: Tensor, snr_db: Tensor) -> Normal:
    """P = sum_l diag(c_l)^H H^H H diag(c_l) = (H^H H) o (C^H C) and b = sum_l conj(c_l) o (H^H y_l), normalised.

    Args: snapshots (B, L, M, 2), channel (B, M, N, 2), codes (L, N, 2) or (B, L, N, 2), snr_db (B,), all of one dtype.
    Numerics: snapshots and channel of any finite scale give the same; those of zeros give b = 0, and P = 0 for the
        channel.
    Cost: 8 M N^2 FLOPs a scene; P is 8 N^2 bytes.
    """
    batch, length, antennas, _ = snapshots.shape
    elements = channel.shape[2]
    snapshots, channel = rescaled(snapshots), rescaled(channel)
    column = (channel.square().sum(-1).sum((1, 2)) * (length / elements)).clamp_min(NOTHING)
    level = snapshots.square().sum(-1).mean((1, 2)).clamp_min(NOTHING)
    planes = channel.permute(0, 3, 1, 2)
    stacked = planes.reshape(batch, 2 * antennas, elements)
    turned = torch.stack((planes[:, 1], -planes[:, 0]), dim=1).reshape(batch, 2 * antennas, elements)
    adjoint = (stacked / column[:, None, None]).transpose(1, 2)
    sets = codes if codes.dim() == 4 else codes[None]
    overlap = _adjoint_matmul(sets, sets)
    gram = _times(adjoint @ stacked, adjoint @ turned, overlap[..., 0], overlap[..., 1])
    back = _adjoint_matmul(channel, snapshots.transpose(1, 2))
    moment = _conj_multiply(codes.transpose(-3, -2), back).sum(2) * (column * level).rsqrt()[:, None, None]
    snr = 10.0 ** (snr_db / 10.0)
    size = float(length * antennas)
    return Normal(gram, moment, 1.0 / (1.0 + snr), size * snr / (1.0 + snr), torch.full_like(snr, size))


def _times(real: Tensor, imag: Tensor, other_real: Tensor, other_imag: Tensor) -> Tensor:
    """[Re | -Im] of an elementwise complex product, written in place: at 8 N^2 bytes a scene every copy is felt."""
    size = real.shape[-1]
    out = real.new_empty(*real.shape[:-1], 2 * size)
    out[..., :size] = real
    out[..., :size].mul_(other_real).addcmul_(imag, other_imag, value=-1)
    out[..., size:] = real
    out[..., size:].mul_(-other_imag).addcmul_(imag, other_real, value=-1)
    return out


def _adjoint_matmul(a_BNM: Tensor, b_BNP: Tensor) -> Tensor:
    """a^H b for pairs (B, N, M, 2) and (B, N, P, 2), without a transposed copy of `a`: (B, M, P, 2)."""
    (batch, inner, rows, _), columns = a_BNM.shape, b_BNP.shape[-2]
    both = a_BNM.reshape(batch, inner, 2 * rows).transpose(-1, -2) @ b_BNP.reshape(b_BNP.shape[0], inner, 2 * columns)
    both = both.reshape(batch, rows, 2, columns, 2)
    return torch.stack((both[:, :, 0, :, 0] + both[:, :, 1, :, 1], both[:, :, 0, :, 1] - both[:, :, 1, :, 0]), dim=-1)


def _conj_multiply(a: Tensor, b: Tensor) -> Tensor:
    """conj(a) b elementwise for pairs (..., 2), broadcast."""
    a_re, a_im, b_re, b_im = a[..., 0], a[..., 1], b[..., 0], b[..., 1]
    return torch.stack((a_re * b_re + a_im * b_im, a_re * b_im - a_im * b_re), dim=-1)


def turn(planar: Tensor) -> Tensor:
    """[re | im] -> [im | -re]: -j times a planar array."""
    real, imag = planar.chunk(2, dim=-1)
    return torch.cat((imag, -real), dim=-1)


def with_dictionary(geometry: Geometry, wavenumber: float) -> Geometry:
    """The same constants and their dictionary, for whoever searches by it more than once.

    Cost: 16 N G bytes, G about N^2 / 31 for the ranges of RIS-12x12: 1.5 MB there, 0.6 GB at 32 x 32.
    """
    return geometry._replace(dictionary=Pursuit(geometry, wavenumber, 0).dictionary)


class Pursuit:
    """`stages` atoms found one after the other, each stage ending in a joint Gauss-Newton step.

    Args: geometry: constants of the task; wavenumber: rad/m where the wavefront is spherical, 0 where it is Fresnel.
    """

    def __init__(self, geometry: Geometry, wavenumber: float, stages: int) -> None:
        self.x, self.y, self.curvature, self.scale, self.low, self.high, self.trust, self.grid = geometry[:8]
        self.dictionary = geometry.dictionary
        self.wavenumber, self.stages = wavenumber, stages
        if not self.dictionary.shape[1]:
            self.dictionary = self.correlator()

    def correlator(self) -> Tensor:
        """The dictionary as one real matrix (2N, 2G)."""
        real, imag = self.steer(self.grid[None])[0].chunk(2, dim=1)
        return torch.stack((torch.cat((real, -imag), 1), torch.cat((imag, real), 1)), dim=1).flatten(0, 1)

    def phase_slopes(self, position: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """psi and its derivatives by u, v and w at (B, K, 3) positions, each broadcast to (B, N, K)."""
        u, v, w = position.transpose(1, 2)[:, :, None].unbind(1)
        x, y, bend = self.x[:, None], self.y[:, None], self.curvature[:, None]
        line = u * x + v * y
        if not self.wavenumber:
            zero = torch.zeros_like(line)
            return line - bend * w, x + zero, y + zero, zero - bend
        k = self.wavenumber
        q = (1.0 + 2.0 / k * w * (w * bend - line)).clamp_min(1e-12).sqrt()
        psi = 2.0 * (line - w * bend) / (1.0 + q)
        slope_q = (2.0 * w * bend - line) / (k * q)
        return psi, x / q, y / q, -(2.0 * bend + psi * slope_q) / (1.0 + q)

    def tangents(self, position: Tensor) -> Tensor:
        """Unit-norm a and j (psi' - mean psi') a / scale for u, v, w: (B, K, 3) -> (B, N, 2KT) planar."""
        psi, *slopes = self.phase_slopes(position)
        norm = 1.0 / math.sqrt(self.x.numel())
        cosine, sine = psi.cos() * norm, psi.sin() * norm
        weights = [(slope - slope.mean(1, keepdim=True)) / scale for slope, scale in zip(slopes, self.scale)]
        real = torch.stack([cosine, *(-weight * sine for weight in weights)], dim=-1)
        imag = torch.stack([sine, *(weight * cosine for weight in weights)], dim=-1)
        return torch.stack((real, imag), dim=2).flatten(2)

    def steer(self, position: Tensor) -> Tensor:
        """Unit-norm atoms alone: (B, K, 3) -> (B, N, 2K) planar."""
        psi = self.phase_slopes(position)[0]
        return torch.cat((psi.cos(), psi.sin()), dim=2) / math.sqrt(self.x.numel())

    def __call__(self, normal: Normal) -> Atoms:
        """Runs all stages: static shapes, no host synchronisation, no gradient."""
        position = normal.moment.new_zeros(normal.moment.shape[0], 0, 3)
        residual, explained, gains = normal.moment, torch.zeros_like(normal.noise), []
        positions, amplitudes_then = [position], [normal.moment.new_zeros(position.shape[0], 2, 0)]
        for _ in range(self.stages):
            position = torch.cat((position, self.strongest(residual)[:, None]), dim=1)
            image, gram, moment = self.project(normal, position)
            move, fit = self.step(gram, moment, normal)
            position = torch.clamp(position + move / self.scale, self.low, self.high)
            residual = normal.moment - combine(image, fit)
            residual_correlation = moment - apply_gram(gram, fit)
            reached = (fit * (moment + residual_correlation)).sum((1, 2, 3))
            gains.append(reached - explained)
            explained = reached
            positions.append(position)
            amplitudes_then.append(fit[..., 0])
        return Atoms(
            position,
            fit[..., 0],
            gram,
            residual_correlation,
            torch.stack(gains, dim=1),
            torch.cat(positions[:-1], dim=1),
            torch.cat(amplitudes_then[:-1], dim=2),
        )

    def strongest(self, residual: Tensor) -> Tensor:
        """The grid position with the largest |a^H r|: (B, N, 2) -> (B, 3)."""
        real, imag = (residual.flatten(1) @ self.dictionary).chunk(2, dim=1)
        return self.grid[(real.square() + imag.square()).argmax(1)]

    def project(self, normal: Normal, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Image P D of the tangents D (planar), D^H P D (B, 2, K, T, K, T) and D^H b (B, 2, K, T)."""
        tangents = self.tangents(position)
        image = normal.gram @ torch.cat((tangents, turn(tangents)), dim=1)
        batch, atoms, size = position.shape[0], position.shape[1], position.shape[1] * TANGENTS
        both = tangents.transpose(1, 2) @ torch.cat((image, normal.moment), dim=2)
        left, right = both[:, :size], both[:, size:]
        real = left[..., :size] + right[..., size : 2 * size]
        imag = left[..., size : 2 * size] - right[..., :size]
        moment = torch.stack((left[..., -2] + right[..., -1], left[..., -1] - right[..., -2]), dim=1)
        gram = torch.stack((real, imag), dim=1).reshape(batch, 2, atoms, TANGENTS, atoms, TANGENTS)
        return image, gram, moment.reshape(batch, 2, atoms, TANGENTS)

    def step(self, gram: Tensor, moment: Tensor, normal: Normal) -> tuple[Tensor, Tensor]:
        """One joint Gauss-Newton step: the scaled move (B, K, 3), and the fit in the tangent space (B, 2, K, T)."""
        s = amplitudes(gram, moment, normal)
        change = newton(gram, moment, s, self.trust, normal)
        move = torch.clamp(change[..., 2:], -2 * self.trust, 2 * self.trust)
        first = s + change[..., :2].transpose(1, 2)
        return move, torch.cat((first[..., None], s[..., None] * move[:, None]), dim=3)


def combine(planar: Tensor, coefficient: Tensor) -> Tensor:
    """Complex product of a planar (B, N, 2KT) with (B, 2, K, T): (B, N, 2)."""
    real, imag = coefficient.flatten(2).unbind(1)
    return planar @ torch.stack((torch.cat((real, -imag), 1), torch.cat((imag, real), 1)), dim=2)


def apply_gram(gram: Tensor, s: Tensor) -> Tensor:
    """gram (B, 2, K, T, K, T') times s (B, 2, K, T'): (B, 2, K, T)."""
    flat = gram.flatten(4).flatten(2, 3)
    real, imag = s.flatten(2)[:, :, None].unbind(1)
    out = torch.stack(
        ((flat[:, 0] * real - flat[:, 1] * imag).sum(-1), (flat[:, 0] * imag + flat[:, 1] * real).sum(-1)), dim=1
    )
    return out.reshape(gram.shape[:4])


def amplitudes(gram: Tensor, moment: Tensor, normal: Normal) -> Tensor:
    """Ridge least squares over the amplitudes alone: (B, 2, K)."""
    batch, _, atoms, _ = moment.shape
    real, imag = gram[:, :, :, 0, :, 0].permute(1, 2, 3, 0).unbind(0)
    matrix = torch.cat((torch.cat((real, -imag), 1), torch.cat((imag, real), 1)), 0)
    ridge = (normal.noise / normal.signal).expand(2 * atoms, batch)
    solved = spd_solve(matrix, moment[..., 0].flatten(1).T, ridge)
    return solved.reshape(2, atoms, batch).permute(2, 0, 1)


def newton(gram: Tensor, moment: Tensor, s: Tensor, trust: Tensor, normal: Normal) -> Tensor:
    """The joint real system in (re s, im s, u, v, w) of every atom, damped by the grid's cell: (B, K, 5)."""
    batch, _, atoms = s.shape
    correlation = moment - apply_gram(gram[..., :1], s[..., None])
    unit = torch.eye(2, device=s.device, dtype=s.dtype)[:, None].expand(batch, 2, atoms, 2)
    turn_re, turn_im = torch.cat((unit, s[..., None].expand(batch, 2, atoms, 3)), dim=3).unbind(1)  # (B, K, 5)
    correlation_re, correlation_im = _twice_first(correlation).unbind(1)
    rhs = correlation_re * turn_re + correlation_im * turn_im
    real, imag = _twice_first(_twice_first(gram).transpose(3, 5)).transpose(3, 5).unbind(1)
    right_re = real * turn_re[:, None, None] - imag * turn_im[:, None, None]
    right_im = real * turn_im[:, None, None] + imag * turn_re[:, None, None]
    full = right_re * turn_re[:, :, :, None, None] + right_im * turn_im[:, :, :, None, None]
    size = 5 * atoms
    ridge = torch.cat(
        ((normal.noise / normal.signal)[:, None].expand(batch, 2), normal.noise[:, None] / trust.square()), dim=1
    ).T.repeat(atoms, 1)
    matrix = full.reshape(batch, size, size).permute(1, 2, 0).contiguous()
    return spd_solve(matrix, rhs.reshape(batch, size).T, ridge).T.reshape(batch, atoms, 5)


def _twice_first(x: Tensor) -> Tensor:
    """Repeats the first entry of the last axis: an atom has a real and an imaginary amplitude, a move has neither."""
    return torch.cat((x[..., :1], x), dim=-1)
