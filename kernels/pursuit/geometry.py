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

    Returns: `Geometry` without its dictionary; `search.with_dictionary` adds it.
    """
    x, y = wavenumber * x, wavenumber * y
    curvature = (x * x + y * y) / (2 * wavenumber)
    scale = torch.stack([each.std(unbiased=False) for each in (x, y, curvature)]).clamp_min(1e-6)
    cells = torch.ceil((high - low) * scale / scale.new_tensor(CELL_RAD)).clamp_min(1)
    trust = (0.6 * (high - low) * scale / cells).clamp_min(1e-3)
    return Geometry(
        x, y, curvature, scale, low, high, trust, _cell_centres(low, high, cells), x.new_empty(2 * x.numel(), 0)
    )


def _cell_centres(low: Tensor, high: Tensor, cells: Tensor) -> Tensor:
    """Centres of a box cut into cells[i] equal parts along axis i: (G, 3)."""
    axes = [
        low[i] + (high[i] - low[i]) * (torch.arange(int(n), dtype=low.dtype) + 0.5) / n for i, n in enumerate(cells)
    ]
    return torch.cartesian_prod(*axes)
