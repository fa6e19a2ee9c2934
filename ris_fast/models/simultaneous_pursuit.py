"""Pursuit features of scenes whose symbols change from snapshot to snapshot: positions are common, amplitudes are not.

Model: y_l = G_l A s_l + n, G_l = H diag(c_l), s_l free. A stage adds the grid position with the largest
sum_l |a^H G_l^H r_l|^2 and takes one Gauss-Newton step on all positions so far, with every snapshot's amplitudes
eliminated (variable projection). Of an atom the power p = mean_l |s_l|^2 remains, which is what the covariance holds.

Source: simultaneous orthogonal matching pursuit (Tropp, Gilbert and Strauss 2006) with the refinement of Newtonized OMP
(Mamandipoor, Ramasamy and Madhow 2016), here for several measurement vectors.

Legend: B batch, L snapshots, M base-station antennas, N RIS elements, K atoms, T = 4 tangents of an atom, E earlier
stages' atoms, F features. Complex arrays are planar here, (..., 2C) = [real C | imaginary C].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ris_fast.config.schema import Task
from ris_fast.kernels.pursuit.reference import TINY, WORKING_SNR_DB
from ris_fast.kernels.pursuit.search import TANGENTS, Pursuit
from ris_fast.kernels.pursuit.solve import spd_solve
from ris_fast.kernels.scale import rescaled
from ris_fast.models.features import Features, PursuitFeatures, SceneFeatures
from ris_fast.physics.channel import backproject
from ris_fast.physics.real_complex import multiply

CHUNK_BYTES = 2**26  # of the sensing operators of the scenes worked on at once


class Fit(NamedTuple):
    """Least squares of every snapshot at one set of positions."""

    images: Tensor  # (B, L, 2M, KT)   G_l times the tangents, real parts of the rows above the imaginary ones
    steer: Tensor  # (B, L, 2M, 2K)   the real matrix that takes [re s, im s] to the snapshot
    gram: Tensor  # (B, L, 2K, 2K)   of `steer`
    amplitude: Tensor  # (B, L, 2, K)     s
    residual: Tensor  # (B, L, 2M)       y - G A s


class SimultaneousFeatures(SceneFeatures):
    """Snapshots, channel and codes -> `Features`, for symbols that are drawn anew in each snapshot.

    Args: task: the array and the ranges of the scenes; stages: atoms to find.
    Cost: G is formed, 8 L M N bytes a scene, for a few scenes at a time; 16 L M N K (K + 1) FLOPs for the images.
    """

    def __init__(self, task: Task, stages: int) -> None:
        super().__init__(task, stages)
        self.width = stages * (3 + 1 + 1 + 3 + stages) + 4 * (stages * (stages - 1) // 2) + 2

    @torch.no_grad()
    def forward(self, snapshots: Tensor, channel: Tensor, codes: Tensor, snr_db: Tensor) -> Features:
        with torch.autocast(snapshots.device.type, enabled=False):
            codes = codes.expand(snapshots.shape[0], -1, -1, -1)
            size = max(1, CHUNK_BYTES // (channel[:1].nbytes * snapshots.shape[1]))
            parts = [
                self._chunk(*part) for part in zip(*(each.split(size) for each in (snapshots, channel, codes, snr_db)))
            ]
            return Features(*(torch.cat(each) for each in zip(*parts)))

    def _chunk(self, snapshots: Tensor, channel: Tensor, codes: Tensor, snr_db: Tensor) -> tuple[Tensor, Tensor]:
        return SimultaneousPursuit(self, snapshots, channel, codes, snr_db.clamp(*WORKING_SNR_DB)).features()


def features_for(task: Task, stages: int) -> PursuitFeatures | SimultaneousFeatures:
    """The pursuit that fits the symbols of a task."""
    return (PursuitFeatures if task.symbols == "static" else SimultaneousFeatures)(task, stages)


class SimultaneousPursuit:
    """The pursuit of one batch: units where y has mean power 1 and sum_l G_l^H G_l mean diagonal 1."""

    def __init__(
        self, constants: SimultaneousFeatures, snapshots: Tensor, channel: Tensor, codes: Tensor, snr_db: Tensor
    ) -> None:
        batch, self.length, self.antennas, _ = snapshots.shape
        self.search = Pursuit(constants.geometry(), constants.wavenumber, constants.atoms)
        self.atoms, self.snr_db = constants.atoms, snr_db
        snapshots, channel = rescaled(snapshots), rescaled(channel)
        level = snapshots.square().sum(-1).mean((1, 2)).clamp_min(TINY).rsqrt()[:, None, None, None]
        column = channel.square().sum((1, 2, 3)).mul(self.length / channel.shape[2]).clamp_min(TINY).rsqrt()
        self.channel, self.codes = channel * column[:, None, None, None], codes
        self.y = torch.cat((snapshots * level).unbind(-1), -1)  # (B, L, 2M)
        operator = multiply(self.channel[:, None], codes[:, :, None])  # (B, L, M, N, 2)
        self.operator = torch.cat(operator.flatten(1, 2).unbind(-1), -1)  # (B, LM, 2N)
        self.noise, self.energy = 1.0 / (1.0 + 10.0 ** (snr_db / 10.0)), float(self.length * self.antennas)
        self.signal = self.energy * (1.0 - self.noise)  # expected |s_l|^2 of a source, at most

    def features(self) -> tuple[Tensor, Tensor]:
        """Inputs (B, F) and basis (B, N, 2R) planar, as `PursuitFeatures` lays them out."""
        position, earlier, residual = self.y.new_zeros(self.y.shape[0], 0, 3), [], self.y
        unexplained = [torch.full_like(self.noise, self.energy)]  # energy, before each stage and after the last
        images = self._images(position)
        for _ in range(self.atoms):
            new = self._strongest(residual)[:, None]
            images, position = torch.cat((images, self._images(new)), dim=-1), torch.cat((position, new), dim=1)
            position, information = self._refined(position, self._fit(images))
            images = self._images(position)
            fit = self._fit(images)
            residual = fit.residual
            unexplained.append(residual.square().sum((1, 2)))
            earlier.append((position, self._power(fit)))
        gains = torch.stack([before - after for before, after in zip(unexplained, unexplained[1:])], dim=1)
        return self._inputs(earlier, gains, information, fit), self._basis(earlier)

    def _strongest(self, residual: Tensor) -> Tensor:
        """The grid position that explains most of the residual: (B, L, 2M) -> (B, 3)."""
        back = backproject(self.channel, self.codes, torch.stack(residual.chunk(2, -1), -1))
        real, imag = (back.flatten(2) @ self.search.dictionary).chunk(2, dim=-1)
        return self.search.grid[(real.square() + imag.square()).sum(1).argmax(1)]

    def _images(self, position: Tensor) -> Tensor:
        """G_l times the tangents at the positions (B, K, 3): (B, L, 2M, KT)."""
        real, imag = self.search.tangents(position).chunk(2, dim=2)
        both = self.operator @ torch.cat(
            (torch.cat((real, imag), 2), torch.cat((-imag, real), 2)), dim=1
        )  # (B, LM, 2KT)
        return torch.cat(both.unflatten(1, (self.length, self.antennas)).chunk(2, dim=-1), dim=2)

    def _fit(self, images: Tensor) -> Fit:
        steer = _real_columns(images[..., ::TANGENTS])
        gram = steer.transpose(-1, -2) @ steer
        moment = (steer.transpose(-1, -2) @ self.y[..., None])[..., 0]
        amplitude = spd_solve(*_last(gram, moment), self._ridge(moment.shape[-1])).T.unflatten(0, moment.shape[:2])
        residual = self.y - (steer @ amplitude[..., None])[..., 0]
        return Fit(images, steer, gram, amplitude.unflatten(-1, (2, -1)), residual)

    def _power(self, fit: Fit) -> Tensor:
        """Mean over the snapshots of |s|^2, less what noise adds to it: (B, K)."""
        size = fit.gram.shape[-1]
        unit = torch.eye(size, device=fit.gram.device, dtype=fit.gram.dtype).expand_as(fit.gram)
        inverse = (
            spd_solve(*_last(fit.gram, unit), self._ridge(size))
            .diagonal(dim1=0, dim2=1)
            .unflatten(0, fit.gram.shape[:2])
        )
        added = 0.5 * self.noise[:, None, None] * inverse
        return (fit.amplitude.square() - added.unflatten(-1, (2, -1))).sum(2).mean(1).clamp_min(TINY)

    def _ridge(self, unknowns: int) -> Tensor:
        """(n, BL): the noise beside what is expected of |s|^2."""
        return (self.noise / self.signal).repeat_interleave(self.length).expand(unknowns, -1)

    def _refined(self, position: Tensor, fit: Fit) -> tuple[Tensor, Tensor]:
        """One Gauss-Newton step on the positions, amplitudes eliminated: the new ones, and the information on each,
        (B, K, 3)."""
        batch, atoms = position.shape[:2]
        columns = torch.cat((fit.steer, self._jacobian(fit)), dim=-1)  # (B, L, 2M, 5K)
        gram, right = _last(
            columns.transpose(-1, -2) @ columns, (columns.transpose(-1, -2) @ fit.residual[..., None])[..., 0]
        )
        ridge = self._ridge(2 * atoms)
        right = torch.cat((right[: 2 * atoms] - ridge * fit.amplitude.flatten(2).flatten(0, 1).T, right[2 * atoms :]))
        gram, right = (each.unflatten(-1, (batch, self.length)).sum(-1) for each in _eliminated(gram, right, ridge))
        trust = self.search.trust
        step = spd_solve(gram, right, (self.noise[:, None] / trust.square()).repeat(1, atoms).T).T.unflatten(
            1, (atoms, 3)
        )
        move = torch.clamp(step, -2 * trust, 2 * trust) / self.search.scale
        information = gram.diagonal(dim1=0, dim2=1).unflatten(1, (atoms, 3)) / self.noise[:, None, None]
        return torch.clamp(position + move, self.search.low, self.search.high), information

    def _jacobian(self, fit: Fit) -> Tensor:
        """Derivatives of the snapshots by u, v and w of every atom: (B, L, 2M, 3K)."""
        real, imag = fit.images.unflatten(-1, (-1, TANGENTS))[..., 1:].chunk(2, dim=2)  # (B, L, M, K, 3)
        s_re, s_im = (each[:, :, None, :, None] for each in fit.amplitude.unbind(2))
        return torch.cat((real * s_re - imag * s_im, real * s_im + imag * s_re), dim=2).flatten(3)

    def _inputs(self, earlier: list[tuple[Tensor, Tensor]], gains: Tensor, information: Tensor, fit: Fit) -> Tensor:
        """(B, F): per atom its position, share of power, evidence, information and couplings; the estimates of earlier
        stages; the scene."""
        position, power = earlier[-1]
        middle, half = (self.search.high + self.search.low) / 2, (self.search.high - self.search.low) / 2
        total = power.sum(1, keepdim=True)
        before = [
            ((then - position[:, : then.shape[1]]) * self.search.scale, (weight / total).clamp_min(1e-6).log() / 4)
            for then, weight in earlier[:-1]
        ]
        coupling = fit.gram.sum(1)[:, : self.atoms].unflatten(-1, (2, -1)).square().sum(2).sqrt()  # |sum_l b_i^H b_j|
        misfit = (fit.residual.square().sum((1, 2)).clamp_min(TINY) / (self.energy * self.noise)).log().clamp(-4, 4)
        parts = [
            (position - middle) / half.clamp_min(TINY),
            *(shift.clamp(-3, 3) for shift, _ in before),
            (power / total).clamp_min(1e-6).log() / 4,
            *(weight for _, weight in before),
            (gains.clamp_min(0) / self.noise[:, None]).log1p() / 4 - 1,
            information.clamp_min(0).log1p() / 4 - 1,
            coupling,
            self.snr_db / 10 - 1,
            misfit,
        ]
        return torch.cat([part.flatten(1) if part.dim() > 1 else part[:, None] for part in parts], dim=1)

    def _basis(self, earlier: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Tangents at the final positions times sqrt(p); then, by atom, how each earlier stage's estimate differs."""
        position, power = earlier[-1]
        total, answerable = power.sum(1, keepdim=True), self.y.square().sum((1, 2))[:, None] > 0

        def level(p: Tensor) -> Tensor:
            return torch.where(answerable, p / total, p * 0).sqrt()[:, None]

        real, imag = (
            each * level(power).repeat_interleave(TANGENTS, 2) for each in self.search.tangents(position).chunk(2, 2)
        )
        then = [
            [
                each * level(p) - now[..., : p.shape[1] * TANGENTS : TANGENTS]
                for each, now in zip(self.search.steer(where).chunk(2, 2), (real, imag))
            ]
            for where, p in earlier[:-1]
        ]
        return torch.cat((real, *(each[0] for each in then), imag, *(each[1] for each in then)), dim=2)


def _real_columns(columns: Tensor) -> Tensor:
    """Complex columns [Re; Im] (..., 2M, K) -> the real matrix of [s_re, s_im] -> [Re; Im]: (..., 2M, 2K)."""
    real, imag = columns.chunk(2, dim=-2)
    return torch.cat((columns, torch.cat((-imag, real), dim=-2)), dim=-1)


def _last(*each: Tensor) -> tuple[Tensor, ...]:
    """Scenes and snapshots (B, L, ...) to one last axis, where `spd_solve` has its systems: (..., BL)."""
    return tuple(one.flatten(0, 1).movedim(0, -1) for one in each)


def _eliminated(matrix: Tensor, right: Tensor, ridge: Tensor) -> tuple[Tensor, Tensor]:
    """The Schur complement of the unknowns that have a ridge: (n, n, B), (n, B), (m, B) -> (n - m, n - m, B), (n - m,
    B)."""
    rest = torch.cat((matrix, right[:, None]), dim=1)
    for k, each in enumerate(ridge):
        pivot = torch.maximum(rest[0, 0] + each, 1e-6 * (matrix[k, k] + each))
        rest = rest[1:, 1:] - rest[1:, :1] * (rest[0, 1:] / pivot)
    return rest[:, :-1], rest[:, -1]
