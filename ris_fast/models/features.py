"""Input features that carry the sensing operator: what a weighted pursuit says of each atom, in plain numbers.

Every feature is free of units and of the arbitrary phase and scale of a scene, so that a network need learn neither.

Legend: B batch, L snapshots, M base-station antennas, N RIS elements, K atoms, T tangents of an atom, F features,
R = K T + K (K - 1) / 2 columns.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ris_fast.config import Task
from ris_fast.models.chunks import side_by_side
from ris_fast.models.pursuit import TANGENTS, Atoms, Geometry, Normal, Pursuit, geometry_of, normal_equations

TINY = 1e-12
CPU_CHUNK = 128        # scenes: 21 MB of normal equations


class Features(NamedTuple):
    """What the trainable part sees, and the columns that its factors are made of."""

    inputs: Tensor               # (B, F)      numbers of order one
    basis: Tensor                # (B, N, 2R)  planar; atom k: s_k times its T tangents; then what earlier stages add


class PursuitFeatures(nn.Module):
    """Snapshots, channel and codes -> `Features`. Holds no parameter; float32 whatever the autocast.

    Args: task: the array and the ranges of the scenes; stages: atoms to find.
    """

    def __init__(self, task: Task, stages: int) -> None:
        super().__init__()
        geometry, self.wavenumber = geometry_of(task)
        for name, value in geometry._asdict().items():
            self.register_buffer(name, value, persistent=False)
        self.atoms, self.width, self.rank = stages, _width(stages), _rank(stages)

    @torch.no_grad()
    def forward(self, snapshots: Tensor, channel: Tensor, codes: Tensor, snr_db: Tensor) -> Features:
        constants = [getattr(self, name) for name in Geometry._fields]
        return Features(*pursuit_features(snapshots, channel, codes, snr_db, constants, self.wavenumber, self.atoms))

    def sources(self, features: Features) -> Tensor:
        """The pursuit's own answer, without a network: columns s_k a_k, (B, N, K, 2)."""
        planes = features.basis.unflatten(2, (2, self.rank))[..., :self.atoms * TANGENTS:TANGENTS]
        return planes.transpose(2, 3).contiguous()


@torch.library.custom_op("ris_fast::pursuit_features", mutates_args=())
def pursuit_features(snapshots: Tensor, channel: Tensor, codes: Tensor, snr_db: Tensor, constants: list[Tensor],
                     wavenumber: float, stages: int) -> tuple[Tensor, Tensor]:
    """`Features` of a batch, as one operator: a thousand small operations that no compiler need look into.

    Numerics: float32; a CPU works on chunks of CPU_CHUNK scenes, whatever the threads, so that the bits do not depend on them.
    """
    pursuit = Pursuit(Geometry(*constants), wavenumber, stages)
    inputs = (snapshots.float(), channel.float(), snr_db.float())
    if snapshots.device.type != "cpu":
        return tuple(_features(pursuit, codes.float(), *inputs))
    parts = side_by_side(partial(_features, pursuit, codes.float()), zip(*(each.split(CPU_CHUNK) for each in inputs)))
    return torch.cat([part.inputs for part in parts]), torch.cat([part.basis for part in parts])


@pursuit_features.register_fake
def _(snapshots: Tensor, channel: Tensor, codes: Tensor, snr_db: Tensor, constants: list[Tensor],
      wavenumber: float, stages: int) -> tuple[Tensor, Tensor]:
    batch, _, elements, _ = channel.shape
    new = partial(torch.empty, device=snapshots.device, dtype=torch.float32)
    return new((batch, _width(stages))), new((batch, elements, 2 * _rank(stages)))


def _early(stages: int) -> int:
    """Atoms of all stages but the last, counted once a stage."""
    return stages * (stages - 1) // 2


def _rank(stages: int) -> int:
    """Columns of the basis with this many atoms."""
    return stages * TANGENTS + _early(stages)


def _width(stages: int) -> int:
    """Features of a scene with this many atoms."""
    return stages * (3 + 1 + 1 + 3 * TANGENTS + 2 * stages) + 4 * _early(stages) + 2


@torch.no_grad()
def _features(pursuit: Pursuit, codes: Tensor, snapshots: Tensor, channel: Tensor, snr_db: Tensor) -> Features:
    with torch.autocast(snapshots.device.type, enabled=False):
        normal = normal_equations(snapshots, channel, codes, snr_db)
        found = pursuit(normal)
        return Features(_inputs(pursuit, normal, found, snr_db), _basis(pursuit, found))


def _inputs(pursuit: Pursuit, normal: Normal, found: Atoms, snr_db: Tensor) -> Tensor:
    """(B, F): per atom its place, share of power, evidence, Fisher information, scores and couplings; the scene."""
    noise = normal.noise[:, None]
    s, power = found.amplitude, found.amplitude.square().sum(1).clamp_min(TINY)
    middle, half = (pursuit.high + pursuit.low) / 2, (pursuit.high - pursuit.low) / 2
    place = (found.place - middle) / half.clamp_min(TINY)
    share = (power / power.sum(1, keepdim=True)).clamp_min(1e-6).log() / 4
    evidence = (found.gains.clamp_min(0) / noise).log1p() / 4 - 1
    curvature = torch.diagonal(found.gram[:, 0].flatten(3).flatten(1, 2), dim1=1, dim2=2)
    information = (power[..., None] * curvature.unflatten(1, (-1, TANGENTS)) / noise[..., None]).clamp_min(TINY)
    scores = _conj_times(s[..., None], found.left) / (noise[:, None, :, None] * information[:, None].sqrt())
    phase = s / power.sqrt()[:, None]
    overlap = _conj_times(phase[..., None], _times(found.gram[:, :, :, 0, :, 0], phase[:, :, None]))
    left_over = (normal.energy - found.gains.sum(1)).clamp_min(TINY) / (normal.energy * normal.noise)
    shift = (found.early_place - _repeat_early(found.place, 1)) * pursuit.scale
    early_power = found.early_amplitude.square().sum(1) / power.sum(1, keepdim=True)
    parts = [place, shift.clamp(-3, 3), share, early_power.clamp_min(1e-6).log() / 4, evidence, information.log1p() / 4 - 1, scores.clamp(-4, 4) / 2, overlap,
             snr_db / 10 - 1, left_over.log().clamp(-4, 4)]
    return torch.cat([part.reshape(snr_db.shape[0], -1) for part in parts], dim=1)


def _basis(pursuit: Pursuit, found: Atoms) -> Tensor:
    """Tangents at the final places times amplitude; then, atom by atom, how each earlier stage's estimate differs.

    The amplitudes of a scene have norm one. The differences let a network go back to a smaller model order, whose
    estimates have not been spread over atoms that are noise.
    """
    level = found.amplitude.square().sum((1, 2), keepdim=True).clamp_min(TINY).sqrt()
    now, early = found.amplitude / level, found.early_amplitude / level
    real, imag = _planar_times(pursuit.tangents(found.place), now.repeat_interleave(TANGENTS, dim=2))
    early_real, early_imag = _planar_times(pursuit.steer(found.early_place), early)
    early_real = early_real - _repeat_early(real[..., ::TANGENTS], 2)
    early_imag = early_imag - _repeat_early(imag[..., ::TANGENTS], 2)
    return torch.cat((real, early_real, imag, early_imag), dim=2)


def _repeat_early(per_atom: Tensor, dim: int) -> Tensor:
    """The first atom, the first two, ... the first K - 1 of an axis: one entry for each earlier estimate."""
    return torch.cat([per_atom.narrow(dim, 0, count) for count in range(per_atom.shape[dim])], dim=dim)


def _planar_times(planar: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Columns of a planar (B, N, 2C) times the complex s (B, 2, C): real and imaginary part, (B, N, C) each."""
    (left, right), (real, imag) = planar.chunk(2, dim=2), s[:, None].unbind(2)
    return left * real - right * imag, left * imag + right * real


def _times(a: Tensor, b: Tensor) -> Tensor:
    """Complex product of arrays whose axis 1 holds the real and the imaginary part."""
    return torch.stack((a[:, 0] * b[:, 0] - a[:, 1] * b[:, 1], a[:, 0] * b[:, 1] + a[:, 1] * b[:, 0]), dim=1)


def _conj_times(a: Tensor, b: Tensor) -> Tensor:
    """conj(a) b, likewise."""
    return torch.stack((a[:, 0] * b[:, 0] + a[:, 1] * b[:, 1], a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]), dim=1)
