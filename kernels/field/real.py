"""The estimate of the field on the surface in real arithmetic, for exported graphs: ONNX has no complex numbers.

Letters: B batch, L snapshots, M base-station antennas, N = V H RIS elements (V rows of H), P fields of a scene.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]  # real and imaginary part


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
    """`reference.aperture_field`, (B, N, P, 2), line by line."""
    h, c, y = _pair(channel), _pair(codes), _pair(snapshots)
    h_conj, c_conj, h_turned = _conj(h), _conj(c), _each(h, lambda x: x.mT)
    ridge = (channel.square().sum((1, 2, 3)) / (h[0].shape[1] * 10.0 ** (snr_db / 10.0)))[:, None, None]

    def root(field: Pair) -> Pair:
        if vertical is None or horizontal is None:
            return field
        down, across, (rows, columns) = _pair(vertical), _pair(horizontal), (vertical.shape[0], horizontal.shape[0])
        square = _each(field, lambda x: x.unflatten(-1, (rows, columns)))
        turned = _matmul(_matmul(down, square), _each(across, lambda x: x.mT))
        return _each(turned, lambda x: x.flatten(-2))

    def adjoint(received: Pair) -> Pair:
        fields = _times(c_conj, _matmul(received, h_conj))
        return root(_each(fields, lambda x: x.sum(1, keepdim=True)) if static else fields)

    residual = adjoint(y)
    weights, direction, energy = _each(residual, torch.zeros_like), residual, _inner(residual, residual)
    tiny = torch.finfo(energy.dtype).tiny
    for _ in range(steps):
        image = _add(adjoint(_matmul(_times(c, root(direction)), h_turned)), direction, ridge)
        length = energy / _inner(direction, image).clamp_min(tiny)
        weights, residual = _add(weights, direction, length), _add(residual, image, -length)
        energy, last = _inner(residual, residual), energy
        direction = _add(residual, direction, energy / last.clamp_min(tiny))
    return torch.stack(root(weights), -1).transpose(1, 2)


def _pair(x: Tensor) -> Pair:
    return x[..., 0], x[..., 1]


def _each(a: Pair, change: Callable[[Tensor], Tensor]) -> Pair:
    return change(a[0]), change(a[1])


def _conj(a: Pair) -> Pair:
    return a[0], -a[1]


def _times(a: Pair, b: Pair) -> Pair:
    return a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0]


def _matmul(a: Pair, b: Pair) -> Pair:
    return a[0] @ b[0] - a[1] @ b[1], a[0] @ b[1] + a[1] @ b[0]


def _add(a: Pair, b: Pair, scale: Tensor) -> Pair:
    return a[0] + scale * b[0], a[1] + scale * b[1]


def _inner(a: Pair, b: Pair) -> Tensor:
    """Re a^H b of each field: (B, P, N) twice -> (B, P, 1)."""
    return (a[0] * b[0] + a[1] * b[1]).sum(-1, keepdim=True)
