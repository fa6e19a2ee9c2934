"""Defines the estimate of the field on the surface in plain torch; the only reference, and what a GPU runs.

Letters: B batch, L snapshots, M base-station antennas, N = V H RIS elements (V rows of H), P fields of a scene.
"""

from __future__ import annotations

import torch
from torch import Tensor


def aperture_field(
    channel: Tensor,
    codes: Tensor,
    snapshots: Tensor,
    snr_db: Tensor,
    vertical: Tensor | None,
    horizontal: Tensor | None,
    static: bool,
    steps: int,
) -> Tensor:
    """`op.aperture_field`, (B, N, P, 2), with the two factors of the root, (V, V, 2) and (H, H, 2), or None twice.

    Source: conjugate gradients, Golub and Van Loan, Matrix Computations, 11.3.
    """
    h, c, y = (torch.view_as_complex(each.contiguous()) for each in (channel, codes, snapshots))
    h_conj, c_conj = h.conj_physical(), c.conj_physical()  # a lazy conjugate is ignored under a compiled graph
    ridge = (channel.square().sum((1, 2, 3)) / (h.shape[1] * 10.0 ** (snr_db / 10.0)))[:, None, None]

    def root(field: Tensor) -> Tensor:
        if vertical is None or horizontal is None:
            return field
        down, across = (torch.view_as_complex(each.contiguous()) for each in (vertical, horizontal))
        return (down @ field.unflatten(-1, (len(down), len(across))) @ across.mT).flatten(-2)

    def adjoint(received: Tensor) -> Tensor:
        fields = c_conj * (received @ h_conj)
        return root(fields.sum(1, keepdim=True) if static else fields)

    residual = adjoint(y)
    weights, direction, energy = torch.zeros_like(residual), residual, _inner(residual, residual)
    tiny = torch.finfo(energy.dtype).tiny
    for _ in range(steps):
        image = adjoint((c * root(direction)) @ h.mT) + ridge * direction
        length = energy / _inner(direction, image).clamp_min(tiny)
        weights, residual = weights + length * direction, residual - length * image
        energy, last = _inner(residual, residual), energy
        direction = residual + energy / last.clamp_min(tiny) * direction
    return torch.view_as_real(root(weights).transpose(1, 2).contiguous())


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """Re a^H b of each field: (B, P, N) twice -> (B, P, 1)."""
    return (torch.view_as_real(a) * torch.view_as_real(b)).sum((-2, -1))[..., None]
