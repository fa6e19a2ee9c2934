"""The constants of a pursuit: the array in radians of phase, the box of positions, and the grid that it searches first.

The dictionary of all steering vectors on the grid is left out: on a CPU the kernel searches a Fresnel grid by its
factors and never reads it.

Legend: N RIS elements, G grid points.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .search import Geometry

CELL_RAD = (1.36, 1.36, 1.12)  # spread of phase over the aperture that one grid cell spans along u, v and w


def geometry(x: Tensor, y: Tensor, wavenumber: float, low: Tensor, high: Tensor) -> Geometry:
    """Constants of an array at x, y (N,) in metres for positions (u, v, w = 1/range) between `low` and `high` (3,).

    Returns: `Geometry` without its dictionary; `search.with_dictionary` adds it. Made on a CPU, whose values are read.
    """
    x, y = wavenumber * x, wavenumber * y
    curvature = (x * x + y * y) / (2 * wavenumber)
    scale = torch.stack([each.std(unbiased=False) for each in (x, y, curvature)]).clamp_min(1e-6)
    cells = torch.ceil((high - low) * scale / scale.new_tensor(CELL_RAD)).clamp_min(1)
    trust = (0.6 * (high - low) * scale / cells).clamp_min(1e-3)
    axes = [
        low[i] + (high[i] - low[i]) * (torch.arange(int(n), dtype=low.dtype) + 0.5) / n for i, n in enumerate(cells)
    ]
    none = x.new_empty(2 * x.numel(), 0)
    return Geometry(
        x, y, curvature, scale, low, high, trust, torch.cartesian_prod(*axes), none, *_factors(x, y, curvature, axes)
    )


def _factors(x: Tensor, y: Tensor, curvature: Tensor, axes: list[Tensor]) -> tuple[Tensor, Tensor]:
    """exp(j (u x - w c_x)) for each w, x and u, and exp(j (v y - w c_y)) for each w, y and v, c = c_x + c_y, as pairs;
    empty where the elements are no rectangle with x fastest."""
    wide = int((y == y[0]).logical_not().cumsum(0).eq(0).sum())  # elements of the first row
    none = x.new_empty(0, 0, 0, 2)
    if x.numel() % wide:
        return none, none
    rows = [each.view(-1, wide) for each in (x, y, curvature)]
    bend_x, bend_y = rows[2][0] - rows[2][0, 0], rows[2][:, 0]
    gap = (bend_y[:, None] + bend_x - rows[2]).abs().max()
    if (rows[0] != rows[0][0]).any() or (rows[1] != rows[1][:, :1]).any() or gap > 1e-5 * curvature.max():
        return none, none
    u, v, w = axes
    phases = [
        across[:, None] * position - depth[:, None, None] * bend[:, None]
        for position, across, bend, depth in ((u, rows[0][0], bend_x, w), (v, rows[1][:, 0], bend_y, w))
    ]
    first, second = (torch.stack((each.cos(), each.sin()), -1) for each in phases)
    return first, second
