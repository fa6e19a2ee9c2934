"""The sensing operator that the BS-RIS channel makes with the codes, and free-space loss.

Legend: B batch, L snapshots, M base-station antennas, N RIS elements, P right-hand sides. Codes are one set
for all scenes, (L, N, 2), or one for each, (B, L, N, 2).
"""

from __future__ import annotations

import math

from torch import Tensor

from ris_fast.physics.real_complex import adjoint_matmul, conj, matmul, multiply

FAR_RANGE_M = 100.0  # of the base station, as the surface sees it


def sense(channel: Tensor, codes: Tensor, field: Tensor) -> Tensor:
    """G x: the noise-free snapshots of a static field, y_l = H (c_l o x).

    Args: channel (B, M, N, 2), codes ([B,] L, N, 2), field (B, N, 2). Returns: (B, L, M, 2).
    """
    coded = multiply(codes.transpose(-3, -2), field[:, :, None])
    return matmul(channel, coded).transpose(1, 2)


def backproject(channel: Tensor, codes: Tensor, snapshots: Tensor) -> Tensor:
    """G^H y, one snapshot at a time: conj(c_l) o (H^H y_l); the sum over l is the matched filter.

    Args: channel (B, M, N, 2), codes ([B,] L, N, 2), snapshots (B, L, M, 2). Returns: (B, L, N, 2).
    """
    field = adjoint_matmul(channel, snapshots.transpose(1, 2))
    return multiply(conj(codes), field.transpose(1, 2))


def effective_channel(channel: Tensor, codes: Tensor) -> Tensor:
    """H c_l, all that the original pipeline's network was shown.

    Args: channel (B, M, N, 2), codes ([B,] L, N, 2). Returns: (B, L, M, 2).
    """
    right = codes.transpose(-3, -2).expand(channel.shape[0], -1, -1, -1)
    return matmul(channel, right).transpose(1, 2)


def free_space_amplitude(range_m: Tensor, wavelength_m: float) -> Tensor:
    """wavelength / (4 pi r): the amplitude of a source of unit power at range r metres."""
    return wavelength_m / (4.0 * math.pi * range_m)
