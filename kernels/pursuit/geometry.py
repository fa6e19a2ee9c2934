"""The constants of a pursuit: the array in radians of phase, the box of places, and the grid that it searches first.

Legend: N RIS elements, G grid points.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .search import Geometry, Pursuit

CELL_RAD = (1.36, 1.36, 1.12)    # spread of phase over the aperture that one grid cell spans along u, v and w


def geometry(x: Tensor, y: Tensor, wavenumber: float, low: Tensor, high: Tensor, spherical: bool) -> Geometry:
    """Constants of an array at x, y (N,) in metres for places (u, v, w = 1/range) between `low` and `high` (3,).

    Cost: the dictionary takes 16 N G bytes, G about N^2 / 31 for the ranges of RIS-12x12: 1.5 MB there, 0.6 GB at 32 x 32.
    """
    x, y = wavenumber * x, wavenumber * y
    curvature = (x * x + y * y) / (2 * wavenumber)
    scale = torch.stack([each.std(unbiased=False) for each in (x, y, curvature)]).clamp_min(1e-6)
    cells = torch.ceil((high - low) * scale / torch.tensor(CELL_RAD)).clamp_min(1)
    trust = (0.6 * (high - low) * scale / cells).clamp_min(1e-3)
    found = Geometry(x, y, curvature, scale, low, high, trust, _cell_centres(low, high, cells), x)
    return found._replace(dictionary=_correlator(Pursuit(found, wavenumber if spherical else 0.0, 0)))


def _cell_centres(low: Tensor, high: Tensor, cells: Tensor) -> Tensor:
    """Centres of a box cut into cells[i] equal parts along axis i: (G, 3)."""
    axes = [low[i] + (high[i] - low[i]) * (torch.arange(int(n)) + 0.5) / n for i, n in enumerate(cells)]
    return torch.cartesian_prod(*axes)


def _correlator(pursuit: Pursuit) -> Tensor:
    """The dictionary as one real matrix (2N, 2G)."""
    real, imag = pursuit.steer(pursuit.grid[None])[0].chunk(2, dim=1)
    return torch.stack((torch.cat((real, -imag), 1), torch.cat((imag, real), 1)), dim=1).flatten(0, 1)
