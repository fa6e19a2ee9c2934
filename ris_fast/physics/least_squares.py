"""The field on the surface, estimated from the measurements alone by regularised least squares.

Legend: B batch, L snapshots, M base-station antennas, N RIS elements, P fields of a scene (1, or L).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ris_fast.kernels.scale import power_of_two
from ris_fast.physics.real_complex import power
from ris_fast.physics.scenes import Scenes

STEPS = 6


@torch.no_grad()
def least_squares_factor(scenes: Scenes, steps: int = STEPS) -> Tensor:
    """A sample covariance for the blend, R_samp = x x^H, as its factor (B, N, 1, 2): x = `aperture_field`.

    Raises: ValueError where the scenes carry no channel.
    """
    if scenes.channel is None:
        raise ValueError(
            "least_squares_factor: loss.beta > 0 blends a sample covariance, which needs the channel H; these "
            "scenes carry none. Set loss.beta = 0, or use data with H_full."
        )
    unit = power_of_two(scenes.channel), power_of_two(scenes.snapshots)  # squares of numbers in any unit stay finite
    field = aperture_field(
        scenes.channel * unit[0], scenes.codes, scenes.snapshots * unit[1], scenes.snr_db, steps=steps
    )
    return field * (unit[0] / unit[1])


def aperture_field(
    channel: Tensor,
    codes: Tensor,
    snapshots: Tensor,
    snr_db: Tensor,
    *,
    static: bool = True,
    root: Callable[[Tensor], Tensor] = lambda field: field,
    steps: int = STEPS,
) -> Tensor:
    """The linear minimum-mean-square-error estimate of the field on the surface: (B, N, P, 2).

    Model: x = C^(1/2) t, (C^(1/2) G^H G C^(1/2) + ridge I) t = C^(1/2) G^H y, by `steps` conjugate-gradient steps;
        ridge = |H|_F^2 / (M SNR), the ratio of noise to field power per element where C has a unit diagonal.
    Args: channel (B, M, N, 2), codes ([B,] L, N, 2), snapshots (B, L, M, 2), snr_db (B,) finite; entries whose squares
        are representable. static: one field for all snapshots (P = 1), else one for each (P = L). root: multiplies
        planar fields (B, P, 2, N) by C^(1/2), Hermitian, the root of the prior covariance; the identity makes it
        regularised least squares.
    Source: conjugate gradients, Golub and Van Loan, Matrix Computations, 11.3.
    """
    operator = _Operator(channel, codes, static)
    ridge = (power(channel).sum((1, 2)) / (channel.shape[1] * 10.0 ** (snr_db / 10.0)))[:, None, None, None]
    residual = root(operator.adjoint(snapshots.transpose(2, 3).flatten(2)))
    weights, direction, energy = torch.zeros_like(residual), residual, _inner(residual, residual)
    tiny = torch.finfo(energy.dtype).tiny
    for _ in range(steps):
        image = root(operator.adjoint(operator(root(direction)))) + ridge * direction
        length = energy / _inner(direction, image).clamp_min(tiny)
        weights, residual = weights + length * direction, residual - length * image
        energy, last = _inner(residual, residual), energy
        direction = residual + energy / last.clamp_min(tiny) * direction
    return root(weights).permute(0, 3, 1, 2)


class _Operator:
    """G and G^H on planar arrays, which a loop over them wants: fields (B, P, 2, N), snapshots (B, L, 2M)."""

    def __init__(self, channel: Tensor, codes: Tensor, static: bool) -> None:
        re, im = channel.transpose(1, 2).unbind(-1)  # (B, N, M)
        self.channel = torch.cat((torch.cat((re, im), 2), torch.cat((-im, re), 2)), 1)  # (B, 2N, 2M)
        self.re, self.im = (each.contiguous() for each in codes.unbind(-1))
        self.static = static

    def __call__(self, field: Tensor) -> Tensor:
        re, im = field.unbind(2)
        coded = torch.cat((re * self.re - im * self.im, re * self.im + im * self.re), -1)
        return coded @ self.channel

    def adjoint(self, snapshots: Tensor) -> Tensor:
        re, im = (snapshots @ self.channel.transpose(1, 2)).chunk(2, -1)
        parts = re * self.re + im * self.im, im * self.re - re * self.im
        return torch.stack([each.sum(1, keepdim=True) for each in parts] if self.static else parts, 2)


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """Re a^H b of each planar field: (B, P, 2, N) twice -> (B, P, 1, 1)."""
    return (a * b).sum((2, 3), keepdim=True)
