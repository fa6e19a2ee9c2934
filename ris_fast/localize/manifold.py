"""The steering vectors of a task: at any position, their tangents, and a coarse grid over the box.

Positions are (u, v, w): direction cosines and w = 1/range. In w the phase of a steering vector is linear (Fresnel) or
nearly so (spherical), so that a grid and a Newton step are as good far away as near.

Legend: B batch, N RIS elements, C columns, K positions, T = 4 tangents, G grid points, U V W of them along u, v and
w. Complex arrays are planar here, (..., 2C) = [real C | imaginary C].
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ris_fast.config.schema import Task
from ris_fast.kernels.pursuit.search import Geometry, Pursuit
from ris_fast.models.pursuit import geometry_of


class Manifold:
    """The steering vectors of a task on one device; `low`, `high` (3,) bound its box of positions, and `scale` (3,) is
    the spread of phase over the aperture by u, v and w, in rad. `Manifold.of(task, device)` keeps what it makes."""

    def __init__(self, task: Task, device: torch.device) -> None:
        geometry, self.wavenumber = geometry_of(task)
        geometry = Geometry(*(each.to(device) for each in geometry))
        unread = geometry._replace(dictionary=geometry.x.new_empty(0, 1))  # nothing asked of a pursuit here reads it
        self._pursuit = {
            dtype: Pursuit(Geometry(*(each.to(dtype) for each in unread)), self.wavenumber, 0)
            for dtype in (torch.float32, torch.float64)
        }
        self.elements = geometry.x.numel()
        self.low, self.high, self.scale, self.trust = (
            each.double() for each in (geometry.low, geometry.high, geometry.scale, geometry.trust)
        )
        self.along_x, self.along_y = (torch.view_as_complex(each) for each in (geometry.along_x, geometry.along_y))
        self.separable = not self.wavenumber and self.along_x.numel() > 0
        self.grid = geometry.grid  # (G, 3)
        if self.separable:
            (depth, _, across), up = self.along_x.shape, self.along_y.shape[2]
            self.grid = self.grid.view(across, up, depth, 3).permute(2, 0, 1, 3).reshape(-1, 3)
        else:
            self.dictionary = torch.complex(*self.steer(self.grid[None])[0].chunk(2, dim=1))  # (N, G)

    @staticmethod
    @lru_cache(maxsize=8)
    def of(task: Task, device: torch.device) -> Manifold:
        return Manifold(task, device)

    def steer(self, position: Tensor) -> Tensor:
        """Unit-norm steering vectors, planar, in the precision of `position`: (B, K, 3) -> (B, N, 2K)."""
        return self._pursuit[position.dtype].steer(position)

    def tangents(self, position: Tensor) -> Tensor:
        """Each steering vector and its derivatives by scale * (u, v, w), planar: (B, K, 3) -> (B, N, 2KT).

        The mean slope of the phase is taken off: it turns the whole vector, which no covariance sees.
        """
        return self._pursuit[position.dtype].tangents(position)

    def clamp(self, position: Tensor) -> Tensor:
        """The nearest position of the box."""
        return torch.minimum(torch.maximum(position, self.low.to(position)), self.high.to(position))

    def grid_power(self, columns: Tensor) -> Tensor:
        """sum_c |column_c^H a_g|^2 for all grid points, of planar float32 columns: (B, N, 2C) -> (B, G).

        Cost: 8 C (N U + Y U V) W FLOPs a scene for an array of Y rows where the steering vectors are separable, else
            8 C N G.
        """
        real, imag = columns.chunk(2, dim=2)
        columns = torch.complex(real, -imag).mT
        if not self.separable:
            return _power(columns @ self.dictionary).sum(1)
        batch, count, _ = columns.shape
        (depth, wide, across), (_, tall, up) = self.along_x.shape, self.along_y.shape
        planes = torch.matmul(columns.reshape(-1, wide), self.along_x).view(depth, batch * count, tall, across)
        planes = torch.matmul(planes.transpose(2, 3).reshape(depth, -1, tall), self.along_y)
        power = _power(planes).view(depth, batch, count, across * up).sum(2)
        return power.transpose(0, 1).flatten(1) / self.elements


def _power(value: Tensor) -> Tensor:
    """|z|^2 of a complex tensor, without the square root of abs()."""
    return value.real.square() + value.imag.square()
