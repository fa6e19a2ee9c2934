"""Features of a Newtonized orthogonal matching pursuit (search.py) in plain torch: what the fused kernel must equal.

Every feature is free of units and of the arbitrary phase and scale of a scene, so that a network need learn neither.

Legend: B batch, L snapshots, M base-station antennas, N RIS elements, K atoms, T tangents of an atom, F features,
R = K T + K (K - 1) / 2 columns, G grid points.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .search import TANGENTS, Atoms, Geometry, Normal, Pursuit, normal_equations

TINY = 1e-12
# An SNR beyond these is taken for the nearer one. Above 20 dB a first-order step errs more than the noise does: ridges
# as small as the noise then let near-equal atoms grow against each other, to infinity in float32 (in float64 only a
# worse answer), and features leave what a network has seen. Below -40 dB nothing is left to weigh.
WORKING_SNR_DB = (-40.0, 20.0)


@torch.no_grad()
def pursuit_features(
    snapshots: Tensor,
    channel: Tensor,
    codes: Tensor,
    snr_db: Tensor,
    constants: list[Tensor],
    wavenumber: float,
    stages: int,
) -> tuple[Tensor, Tensor]:
    """What a pursuit of `stages` atoms finds in each scene: inputs (B, F) of a network, and the columns of its factors.

    Args: snapshots (B, L, M, 2), channel (B, M, N, 2), codes (L, N, 2) or a set a scene (B, L, N, 2), snr_db (B,);
        constants: the tensors of `Geometry` in order; wavenumber: rad/m where the wavefront is spherical, 0 where it is
            Fresnel. `snr_db` is clamped to WORKING_SNR_DB.
    Returns: inputs (B, F), numbers of order one; basis (B, N, 2R) planar: for atom k s_k times its T tangents, then
        what lower orders add. All float32 or all float64.
    """
    with torch.autocast(snapshots.device.type, enabled=False):
        pursuit = Pursuit(Geometry(*constants), wavenumber, stages)
        snr_db = snr_db.clamp(*WORKING_SNR_DB)
        normal = normal_equations(snapshots, channel, codes, snr_db)
        found = pursuit(normal)
        return _inputs(pursuit, normal, found, snr_db), _basis(pursuit, found)


def _early(stages: int) -> int:
    """Atoms of all lower orders: 1 + 2 + ... K - 1."""
    return stages * (stages - 1) // 2


def rank(stages: int) -> int:
    """Columns of the basis with this many atoms."""
    return stages * TANGENTS + _early(stages)


def width(stages: int) -> int:
    """Features of a scene with this many atoms."""
    return stages * (3 + 1 + 1 + 1 + TANGENTS + 2 * stages) + 4 * _early(stages) + 2


def evidence_at(stages: int) -> int:
    """Where the features say what each order gains: log1p(fall of the cost / sigma^2) / 4 - 1, K of them."""
    return stages * (3 + 1) + 4 * _early(stages)


def _inputs(pursuit: Pursuit, normal: Normal, found: Atoms, snr_db: Tensor) -> Tensor:
    """(B, F): per atom its position, share of power, evidence and Fisher information, couplings; per order its evidence
    and the volume of its posterior; the scene."""
    noise = normal.noise[:, None]
    s, power = found.amplitude, found.amplitude.square().sum(1).clamp_min(TINY)
    middle, half = (pursuit.high + pursuit.low) / 2, (pursuit.high - pursuit.low) / 2
    position = (found.position - middle) / half.clamp_min(TINY)
    share = (power / power.sum(1, keepdim=True)).clamp_min(1e-6).log() / 4
    evidence = (found.gains.clamp_min(0) / noise).log1p() / 4 - 1
    curvature = torch.diagonal(found.gram[:, 0].flatten(3).flatten(1, 2), dim1=1, dim2=2)
    information = (power[..., None] * curvature.unflatten(1, (-1, TANGENTS)) / noise[..., None]).clamp_min(TINY)
    phase = s / power.sqrt()[:, None]
    overlap = _conj_times(phase[..., None], _times(found.gram[:, :, :, 0, :, 0], phase[:, :, None]))
    unexplained = (normal.energy - found.gains.sum(1)).clamp_min(TINY) / (normal.energy * normal.noise)
    orders = torch.arange(1, s.shape[2] + 1, device=s.device, dtype=s.dtype)
    shift = (found.order_positions - _repeat_early(found.position, 1)) * pursuit.scale
    early_power = found.order_amplitudes.square().sum(1) / power.sum(1, keepdim=True)
    parts = [
        position,
        shift.clamp(-3, 3),
        share,
        early_power.clamp_min(1e-6).log() / 4,
        evidence,
        information.log1p() / 4 - 1,
        overlap,
        (found.log_det / (5 * orders) - noise.log()) / 4 - 1,
        snr_db / 10 - 1,
        unexplained.log().clamp(-4, 4),
    ]
    return torch.cat([part.flatten(1) if part.dim() > 1 else part[:, None] for part in parts], dim=1)


def _basis(pursuit: Pursuit, found: Atoms) -> Tensor:
    """Tangents at the final positions times amplitude; then, atom by atom, how it differs at each lower order.

    The amplitudes of a scene have norm one. The differences let a network go back to a smaller model order, whose
    estimates have not been spread over atoms that are noise.
    """
    level = found.amplitude.square().sum((1, 2), keepdim=True).clamp_min(TINY).sqrt()
    now, early = found.amplitude / level, found.order_amplitudes / level
    real, imag = _planar_times(pursuit.tangents(found.position), now.repeat_interleave(TANGENTS, dim=2))
    early_real, early_imag = _planar_times(pursuit.steer(found.order_positions), early)
    early_real = early_real - _repeat_early(real[..., ::TANGENTS], 2)
    early_imag = early_imag - _repeat_early(imag[..., ::TANGENTS], 2)
    return torch.cat((real, early_real, imag, early_imag), dim=2)


def _repeat_early(per_atom: Tensor, dim: int) -> Tensor:
    """The first atom, the first two, ... the first K - 1 of an axis: one entry for each estimate of a lower order."""
    return torch.cat([per_atom.narrow(dim, 0, count) for count in range(per_atom.shape[dim])], dim=dim)


def _planar_times(planar: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Columns of a planar (B, N, 2C) times the complex s (B, 2, C): real and imaginary part, (B, N, C) each."""
    (a_re, a_im), (s_re, s_im) = planar.chunk(2, dim=2), s[:, None].unbind(2)
    return a_re * s_re - a_im * s_im, a_re * s_im + a_im * s_re


def _times(a: Tensor, b: Tensor) -> Tensor:
    """Complex product of arrays whose axis 1 holds the real and the imaginary part."""
    return torch.stack((a[:, 0] * b[:, 0] - a[:, 1] * b[:, 1], a[:, 0] * b[:, 1] + a[:, 1] * b[:, 0]), dim=1)


def _conj_times(a: Tensor, b: Tensor) -> Tensor:
    """conj(a) b, likewise."""
    return torch.stack((a[:, 0] * b[:, 0] + a[:, 1] * b[:, 1], a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]), dim=1)
