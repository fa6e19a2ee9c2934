"""Pursuit features of scenes whose symbols change from snapshot to snapshot: positions are common, amplitudes are not.

Model: y_l = G_l A s_l + n, G_l = H diag(c_l), s_l free. A stage adds the grid position with the largest
sum_l |a^H G_l^H r_l|^2 and takes one Gauss-Newton step on all positions so far, with every snapshot's amplitudes
eliminated (variable projection). Of an atom the power p = mean_l |s_l|^2 remains, which is what the covariance holds.

Source: simultaneous orthogonal matching pursuit (Tropp, Gilbert and Strauss 2006) with the refinement of Newtonized OMP
(Mamandipoor, Ramasamy and Madhow 2016), here for several measurement vectors.

Legend: B batch, L snapshots, M base-station antennas, N RIS elements, K atoms, T = 4 tangents of an atom, E earlier
stages' atoms, F features. Arrays are complex64 inside; at the edges complex ones are planar, (..., 2C) = [real C |
imaginary C], or pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ris_fast.config.schema import Task
from ris_fast.kernels.pursuit.parallel import parallel_map
from ris_fast.kernels.pursuit.reference import TINY, WORKING_SNR_DB
from ris_fast.kernels.pursuit.search import TANGENTS, Pursuit
from ris_fast.kernels.pursuit.solve import spd_solve
from ris_fast.kernels.scale import rescaled
from ris_fast.models.features import Features, PursuitFeatures, SceneFeatures
from ris_fast.physics.real_complex import to_complex

CHUNK_BYTES = 2**25  # of the sensing operators of the scenes that one thread of a CPU works on at once, at most
DEVICE_CHUNKS = 8  # as many at once on another device


class Fit(NamedTuple):
    """Least squares of every snapshot at one set of positions."""

    steer: Tensor  # (B, L, M, K)   G_l A
    gram: Tensor  # (B, L, K, K)   its Gram matrix S
    root: Tensor  # (B, L, K, K)   W = C^-1 of the Cholesky factor C C^H = S + ridge
    amplitude: Tensor  # (B, L, K)      s = W^H W (G_l A)^H y
    residual: Tensor  # (B, L, M)      y - G_l A s


class SimultaneousFeatures(SceneFeatures):
    """Snapshots, channel and codes -> `Features`, for symbols that are drawn anew in each snapshot.

    Args: task: the array and the ranges of the scenes; stages: atoms to find.
    Cost: G is formed, 8 L M N bytes a scene, for a few scenes at a time; 16 L M N K (K + 2) FLOPs for the images.
    """

    def __init__(self, task: Task, stages: int) -> None:
        super().__init__(task, stages)
        self.width = stages * (3 + 1 + 1 + 3 + stages) + 4 * (stages * (stages - 1) // 2) + 2

    @torch.no_grad()
    def forward(self, snapshots: Tensor, channel: Tensor, codes: Tensor, snr_db: Tensor) -> Features:
        with torch.autocast(snapshots.device.type, enabled=False):
            codes = codes.expand(snapshots.shape[0], -1, -1, -1)
            work, room = (parallel_map, 1) if snapshots.device.type == "cpu" else (_one_by_one, DEVICE_CHUNKS)
            most = room * CHUNK_BYTES // (8 * snapshots.shape[1:3].numel() * channel.shape[2])
            size = 2 ** max(0, most.bit_length() - 1)  # a power of two, which divides most batches evenly
            chunks = zip(*(each.split(size) for each in (snapshots, channel, codes, snr_db)))
            return Features(*(torch.cat(each) for each in zip(*work(self._chunk, chunks))))

    def reads_dictionary(self) -> bool:
        return not self.along_x.numel() or self.wavenumber > 0

    def _chunk(self, snapshots: Tensor, channel: Tensor, codes: Tensor, snr_db: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():  # which a thread has for itself
            return SimultaneousPursuit(self, snapshots, channel, codes, snr_db.clamp(*WORKING_SNR_DB)).features()


def _one_by_one(work: Callable[..., Any], chunks: Iterable[tuple[Any, ...]]) -> list[Any]:
    return [work(*chunk) for chunk in chunks]


def features_for(task: Task, atoms: int = 0) -> PursuitFeatures | SimultaneousFeatures:
    """The pursuit that fits the symbols of a task. atoms: 0 for K_max where they change from snapshot to snapshot, and
    one more where they are static, so that there is a choice."""
    if task.symbols == "static":
        return PursuitFeatures(task, atoms or task.max_sources + 1)
    return SimultaneousFeatures(task, atoms or task.max_sources)


class SimultaneousPursuit:
    """The pursuit of one batch: units where y has mean power 1 and sum_l G_l^H G_l mean diagonal 1."""

    def __init__(
        self, constants: SimultaneousFeatures, snapshots: Tensor, channel: Tensor, codes: Tensor, snr_db: Tensor
    ) -> None:
        self.length, self.antennas = snapshots.shape[1:3]
        geometry = constants.geometry()
        self.factors = None if constants.reads_dictionary() else (geometry.along_x, geometry.along_y)
        if self.factors is not None:
            geometry = geometry._replace(dictionary=snr_db.new_empty(0, 1))  # not made where nothing reads it
        self.search = Pursuit(geometry, constants.wavenumber, constants.atoms)
        self.atoms, self.snr_db = constants.atoms, snr_db
        snapshots, channel = rescaled(snapshots), rescaled(channel)
        level = snapshots.square().sum(-1).mean((1, 2)).clamp_min(TINY).rsqrt()[:, None, None, None]
        column = channel.square().sum((1, 2, 3)).mul(self.length / channel.shape[2]).clamp_min(TINY).rsqrt()
        self.channel, self.codes = to_complex(channel * column[:, None, None, None]), to_complex(codes)
        self.operator = (self.channel[:, None] * self.codes[:, :, None]).flatten(1, 2)  # (B, LM, N)  G
        self.y = to_complex(snapshots * level)  # (B, L, M)
        self.noise, self.energy = 1.0 / (1.0 + 10.0 ** (snr_db / 10.0)), float(self.length * self.antennas)
        self.ridge = self.noise / (self.energy * (1.0 - self.noise))  # noise beside the expected |s_l|^2, at most

    def features(self) -> tuple[Tensor, Tensor]:
        """Inputs (B, F) and basis (B, N, 2R) planar, as `PursuitFeatures` lays them out."""
        position, earlier, residual = self.snr_db.new_zeros(len(self.y), 0, 3), [], self.y
        unexplained = [torch.full_like(self.noise, self.energy)]  # energy, before each stage and after the last
        images = self._images(position)
        for stage in range(1, self.atoms + 1):
            new = self._strongest(residual)[:, None]
            images, position = torch.cat((images, self._images(new)), dim=-1), torch.cat((position, new), dim=1)
            position, information = self._refined(position, images, self._fit(images[..., 0, :]))
            images = self._images(position) if stage < self.atoms else self._images(position, 1)
            fit = self._fit(images[..., 0, :])
            residual = fit.residual
            unexplained.append(_power(residual).sum((1, 2)))
            earlier.append((position, self._powers(fit)))
        gains = torch.stack([before - after for before, after in zip(unexplained, unexplained[1:])], dim=1)
        return self._inputs(earlier, gains, information, fit), self._basis(earlier)

    def _strongest(self, residual: Tensor) -> Tensor:
        """The grid position that explains most of the residual: (B, L, M) -> (B, 3)."""
        back = torch.view_as_real(self.codes.conj() * (residual @ self.channel.conj()))  # (B, L, N, 2)
        explained = self._by_dictionary(back) if self.factors is None else self._by_factors(back, *self.factors)
        return self.search.grid[explained.argmax(1)]

    def _by_dictionary(self, back: Tensor) -> Tensor:
        """sum_l |a^H b_l|^2 of every grid position: (B, L, N, 2) -> (B, G)."""
        both = back.flatten(2) @ self.search.dictionary  # (B, L, 2G)
        return both.square_().unflatten(2, (2, -1)).sum((1, 2))

    def _by_factors(self, back: Tensor, along_x: Tensor, along_y: Tensor) -> Tensor:
        """N times the same, where sqrt(N) a(u, v, w) is an outer product of a vector along y and one along x."""
        (batch, length), (wide, columns), tall = back.shape[:2], along_x.shape[1:3], along_y.shape[1]
        rows, found = back.reshape(-1, 2 * wide), []
        for across, up in zip(_conjugate_product(along_x), _conjugate_product(along_y).mT):  # each w stays in the cache
            half = (rows @ across).view(batch * length, 2 * tall, columns)  # rows (y, re/im)
            both = torch.bmm(up.expand(batch * length, -1, -1), half)  # (BL, 2V, U)
            found.append(both.square_().view(batch, 2 * length, up.shape[0] // 2, columns).sum(1))
        return torch.stack(found, 3).transpose(1, 2).flatten(1)  # (B, UVW), the order of the grid

    def _images(self, position: Tensor, tangents: int = TANGENTS) -> Tensor:
        """G_l times the tangents at the positions (B, K, 3), the first of them `tangents`: (B, L, M, T, K)."""
        atoms = position.shape[1]
        real, imag = self.search.tangents(position).unflatten(2, (2, atoms, TANGENTS))[..., :tangents].unbind(2)
        columns = torch.complex(real, imag).transpose(2, 3).flatten(2)  # (B, N, TK)
        if atoms == 1:  # where reading G would take longer than its products
            coded = (self.codes.mT[..., None] * columns[:, :, None]).flatten(2)  # (B, N, LT)
            images = (self.channel @ coded).unflatten(2, (self.length, -1)).transpose(1, 2)
        else:
            images = self.operator @ columns
        return images.reshape(len(self.y), self.length, self.antennas, tangents, atoms)

    def _fit(self, steer: Tensor) -> Fit:
        adjoint = steer.mH
        gram = adjoint @ steer
        root = inverse_cholesky(gram, self.ridge)
        amplitude = root.mH @ (root @ (adjoint @ self.y[..., None]))
        return Fit(steer, gram, root, amplitude[..., 0], self.y - (steer @ amplitude)[..., 0])

    def _powers(self, fit: Fit) -> Tensor:
        """Mean over the snapshots of |s|^2, less what noise adds to it: (B, K)."""
        added = self.noise[:, None, None] * _power(fit.root).sum(2)  # of the diagonal of the inverse
        return (_power(fit.amplitude) - added).mean(1).clamp_min(TINY)

    def _refined(self, position: Tensor, images: Tensor, fit: Fit) -> tuple[Tensor, Tensor]:
        """One Gauss-Newton step on the positions, amplitudes eliminated: the new ones, and the information on each,
        (B, K, 3).

        Model: with the Jacobian J of the snapshots at fixed amplitudes the information is sum_l Re(J^H J - P^H P), P =
            W (G_l A)^H J, and the gradient sum_l Re J^H r, because the residual r is that of the ridge's own solution.
        """
        atoms = position.shape[1]
        jacobian = (images[..., 1:, :] * fit.amplitude[:, :, None, None]).flatten(3)  # (B, L, M, 3K)
        taken = fit.root @ (fit.steer.mH @ jacobian)  # (B, L, K, 3K)
        whole = jacobian.flatten(1, 2).mH @ torch.cat((jacobian, fit.residual[..., None]), -1).flatten(1, 2)
        taken = taken.flatten(1, 2)
        gram = whole[..., :-1].real - (taken.mH @ taken).real
        trust = self.search.trust
        ridge = (self.noise[:, None] / trust.square()).repeat_interleave(atoms, 1)
        step = spd_solve(gram.movedim(0, -1), whole[..., -1].real.T, ridge.T).T.unflatten(1, (3, atoms)).mT
        move = torch.clamp(step, -2 * trust, 2 * trust) / self.search.scale
        information = gram.diagonal(dim1=1, dim2=2).unflatten(1, (3, atoms)).mT / self.noise[:, None, None]
        return torch.clamp(position + move, self.search.low, self.search.high), information

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
        coupling = fit.gram.sum(1).abs()  # |sum_l b_i^H b_j|
        misfit = (_power(fit.residual).sum((1, 2)).clamp_min(TINY) / (self.energy * self.noise)).log().clamp(-4, 4)
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
        total, answerable = power.sum(1, keepdim=True), _power(self.y).sum((1, 2))[:, None] > 0

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


def _conjugate_product(f: Tensor) -> Tensor:
    """The real matrix (W, 2n, 2m) by which interleaved (re, im) rows times conj(f), (W, n, m, 2), are planar."""
    real, imag = f.unbind(-1)
    return torch.stack((torch.cat((real, -imag), -1), torch.cat((imag, real), -1)), 2).flatten(1, 2)


def _power(x: Tensor) -> Tensor:
    """|x|^2 elementwise."""
    return x.real.square() + x.imag.square()


def inverse_cholesky(gram: Tensor, ridge: Tensor) -> Tensor:
    """W = C^-1 of S + ridge = C C^H, lower triangular, so that W^H W is the inverse: (B, L, K, K).

    Args: gram: the Hermitian S of every snapshot, (B, L, K, K); ridge: of every scene, (B,).

    Numerics: elimination without pivoting over all systems at once; a pivot below 1e-6 of its diagonal entry is raised
        to that, as in `spd_solve`.
    """
    batch, length, size, _ = gram.shape
    unit = torch.eye(size, dtype=gram.dtype, device=gram.device)
    loaded = gram + ridge[:, None, None, None] * unit
    diagonal = loaded.diagonal(dim1=2, dim2=3).real.flatten(0, 1).T  # (K, BL)
    columns = loaded.flatten(0, 1).movedim(0, -1)
    rest, rows = torch.cat((columns, unit[..., None].expand(columns.shape)), 1), []
    for k in range(size):
        row = rest[0] * torch.maximum(rest[0, 0].real, 1e-6 * diagonal[k]).rsqrt()
        rows.append(row[-size:])
        if k + 1 < size:
            rest = rest[1:, 1:] - row[1 : size - k, None].conj() * row[1:]
    return torch.stack(rows).movedim(-1, 0).reshape(gram.shape)
