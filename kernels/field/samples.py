"""Inputs on which the estimate of the field is tested and measured, and what a call must cost at least.

Letters: B batch, L snapshots, M base-station antennas, N = V H RIS elements (V rows of H), P fields of a scene.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..registry import Cost, Sample


def _root(size: int, draw: torch.Generator) -> Tensor:
    """Hermitian, (size, size, 2) float64, with eigenvalues of 0.75 to 1.75: so few iterations magnify no rounding."""
    a = torch.randn(size, size, generator=draw, dtype=torch.complex128) / math.sqrt(size)
    return torch.view_as_real(0.25 * a @ a.mH + 0.75 * torch.eye(size))


def _sample(
    name: str,
    batch: int,
    antennas: int,
    rows: int,
    columns: int,
    snapshots: int,
    *,
    static: bool = True,
    root: bool = True,
    own_codes: bool = False,
    strided: bool = False,
    steps: int = 8,
    small: bool = False,
) -> Sample:
    """own_codes: a set of codes for each scene; strided: no tensor is contiguous."""
    elements = rows * columns

    def make(device: torch.device | str, dtype: torch.dtype) -> tuple[Any, ...]:
        draw = torch.Generator().manual_seed(0)
        normal = lambda *shape: torch.randn(*shape, 2, generator=draw, dtype=torch.float64)  # noqa: E731
        put = lambda x: (x.mT.contiguous().mT if strided and x.dim() > 1 else x).to(device, dtype)  # noqa: E731
        turns = 2 * math.pi * torch.rand(*[batch] * own_codes, snapshots, elements, generator=draw, dtype=torch.float64)
        channel = normal(batch, antennas, elements) / math.sqrt(2 * antennas)
        codes, received = torch.stack((turns.cos(), turns.sin()), -1), normal(batch, snapshots, antennas)
        snr_db = 10 * torch.rand(batch, generator=draw, dtype=torch.float64) - 10
        factors = [put(_root(size, draw)) if root else None for size in (rows, columns)]
        return *(put(each) for each in (channel, codes, received, snr_db)), *factors, static, steps

    return Sample(name, make, small=small)


SAMPLES = (
    _sample("standard", 64, 16, 12, 12, 16),
    _sample("standard-each-snapshot", 16, 16, 12, 12, 16, static=False),
    _sample("identity", 8, 16, 12, 12, 16, root=False, steps=6),
    _sample("wide", 2, 16, 24, 32, 16),
    _sample("odd", 5, 7, 5, 3, 11, own_codes=True, strided=True),
    _sample("odd-each-snapshot", 3, 5, 3, 7, 6, static=False, own_codes=True),
    _sample("one-of-each", 3, 1, 1, 1, 1),
    _sample("no-steps", 2, 3, 2, 2, 3, steps=0),
    _sample("empty-batch", 0, 4, 2, 3, 4),
    _sample("small", 3, 4, 3, 2, 5, small=True),
    _sample("small-each-snapshot", 2, 4, 2, 3, 3, static=False, root=False, steps=6, small=True),
)


def cost(
    channel: Tensor,
    codes: Tensor,
    snapshots: Tensor,
    snr_db: Tensor,
    vertical: Tensor | None,
    horizontal: Tensor | None,
    static: bool,
    steps: int,
) -> Cost:
    """Least bytes, each array once, and the FLOPs of G, of its adjoint and of the root."""
    (batch, antennas, elements, _), length = channel.shape, snapshots.shape[1]
    fields = 1 if static else length
    tensors = [each for each in (channel, codes, snapshots, snr_db, vertical, horizontal) if each is not None]
    written = channel.element_size() * 2 * batch * elements * fields
    measured = 8 * length * elements * (antennas + 1) * (2 * steps + 1)
    rooted = 0 if vertical is None or horizontal is None else 8 * elements * (len(vertical) + len(horizontal)) * fields
    return Cost(sum(each.nbytes for each in tensors) + written, batch * (measured + 2 * (steps + 1) * rooted))
