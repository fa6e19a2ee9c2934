"""A sample covariance for the blend, from the measurements alone: the field on the surface, as a factor of one column.

Legend: B batch, L snapshots, M base-station antennas, N RIS elements.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ris_fast.kernels.scale import power_of_two
from ris_fast.physics.channel import backproject, sense
from ris_fast.physics.real_complex import power
from ris_fast.physics.scenes import Scenes

STEPS = 6


@torch.no_grad()
def least_squares_factor(scenes: Scenes, steps: int = STEPS) -> Tensor:
    """The regularised least-squares field x, all snapshots together: (B, N, 1, 2); R_samp = x x^H.

    Model: (G^H G + ridge I) x = G^H y with ridge = |H|_F^2 / (M SNR), the ratio of noise to field power per element;
        `steps` conjugate-gradient steps, enough for a blend. One field for all snapshots: it is exact for static
        symbols only.
    Raises: ValueError where the scenes carry no channel.
    Source: conjugate gradients, Golub and Van Loan, Matrix Computations, 11.3.
    """
    if scenes.channel is None:
        raise ValueError(
            "least_squares_factor: loss.beta > 0 blends a sample covariance, which needs the channel H; these "
            "scenes carry none. Set loss.beta = 0, or use data with H_full."
        )
    unit = power_of_two(scenes.channel), power_of_two(scenes.snapshots)  # squares of numbers in any unit stay finite
    scenes = replace(scenes, channel=scenes.channel * unit[0], snapshots=scenes.snapshots * unit[1])
    antennas = scenes.channel.shape[1]
    ridge = power(scenes.channel).sum((1, 2)) / (antennas * 10.0 ** (scenes.snr_db / 10.0))
    residual = backproject(scenes.channel, scenes.codes, scenes.snapshots).sum(1)
    field, direction, energy = torch.zeros_like(residual), residual, _inner(residual, residual)
    for _ in range(steps):
        image = _normal(scenes, direction) + ridge[:, None, None] * direction
        length = energy / _inner(direction, image).clamp_min(torch.finfo(energy.dtype).tiny)
        field = field + length * direction
        residual = residual - length * image
        energy, last = _inner(residual, residual), energy
        direction = residual + energy / last.clamp_min(torch.finfo(energy.dtype).tiny) * direction
    return field[:, :, None] * (unit[0] / unit[1])


def _normal(scenes: Scenes, field_BN: Tensor) -> Tensor:
    """G^H G x."""
    return backproject(scenes.channel, scenes.codes, sense(scenes.channel, scenes.codes, field_BN)).sum(1)


def _inner(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((1, 2), keepdim=True)
