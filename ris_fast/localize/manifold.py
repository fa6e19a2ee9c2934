"""The steering vectors of a task: at any position, their tangents, and a coarse grid over the box.

Positions are (u, v, w): direction cosines and w = 1/range. In w the phase of a steering vector is linear (Fresnel) or
nearly so (spherical), so that a grid and a Newton step are as good far away as near.

Legend: B batch, N RIS elements, C rows, K positions, T = 4 tangents, G grid points, U V W of them along u, v and w.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from ris_fast.config.schema import Task
from ris_fast.kernels.pursuit.search import TANGENTS, Geometry, Pursuit
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
            self.dictionary = self.steer(self.grid[None])[0].T.contiguous()  # (N, G)

    @staticmethod
    @lru_cache(maxsize=8)
    def of(task: Task, device: torch.device) -> Manifold:
        return Manifold(task, device)

    def steer(self, position: Tensor) -> Tensor:
        """Unit-norm steering vectors as rows, complex: (B, K, 3) -> (B, K, N), in the precision of `position`."""
        phase = self._pursuit[position.dtype].phase_slopes(position.reshape(-1, 1, 3))[0]
        size = torch.full_like(phase, 1.0 / math.sqrt(self.elements))
        return torch.polar(size, phase).view(*position.shape[:2], self.elements)

    def tangents(self, position: Tensor) -> Tensor:
        """Each steering vector and its derivatives by scale * (u, v, w), real and imaginary parts, as rows:
        (B, K, 3) -> (B, K, 2, T, N).

        The mean slope of the phase is taken off: it turns the whole vector, which no covariance sees.
        """
        pursuit, size = self._pursuit[position.dtype], 1.0 / math.sqrt(self.elements)
        phase, *slopes = (each[..., 0] for each in pursuit.phase_slopes(position.reshape(-1, 1, 3)))
        weights = [(slope - slope.mean(1, keepdim=True)) / scale for slope, scale in zip(slopes, pursuit.scale)]
        real, imag = phase.cos() * size, phase.sin() * size
        rows = [real, *(-weight * imag for weight in weights), imag, *(weight * real for weight in weights)]
        return torch.stack(rows, dim=1).view(*position.shape[:2], 2, TANGENTS, self.elements)

    def clamp(self, position: Tensor) -> Tensor:
        """The nearest position of the box."""
        return torch.minimum(torch.maximum(position, self.low.to(position)), self.high.to(position))

    def grid_power(self, rows: Tensor) -> Tensor:
        """sum_c |c^H a_g|^2 over rows c for all grid points: (B, C, N) complex64 -> (B, G).

        Cost: 8 C (N U + Y U V) W FLOPs a scene for an array of Y rows where the steering vectors are separable, else
            8 C N G.
        """
        columns = rows.conj().resolve_conj()
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
