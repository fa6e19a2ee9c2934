"""The sources of a batch of scenes, true or estimated, as one padded record.

Legend: B batch, K sources (padded).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ris_fast.physics.array import direction_cosines
from ris_fast.physics.scenes import Scenes


class Sources(NamedTuple):
    """Up to K sources a scene, the strongest first; rows from `count` on are zeros."""

    azimuth: Tensor  # (B, K) rad
    elevation: Tensor  # (B, K) rad
    range_m: Tensor  # (B, K) m
    power: Tensor  # (B, K) linear; zero where there is no source
    count: Tensor  # (B,)   int64

    @property
    def active(self) -> Tensor:
        """(B, K) bool: the rows that hold a source."""
        return torch.arange(self.power.shape[1], device=self.count.device) < self.count[:, None]

    @classmethod
    def of_scenes(cls, scenes: Scenes) -> Sources:
        """The truth of scenes that carry it, strongest first."""
        order = scenes.power.argsort(dim=1, descending=True, stable=True)
        parts = (scenes.azimuth, scenes.elevation, scenes.range_m, scenes.power)
        return cls(*(each.gather(1, order) for each in parts), scenes.count)

    @classmethod
    def of_cosines(cls, position: Tensor, power: Tensor, count: Tensor) -> Sources:
        """Sources at positions (B, K, 3) of direction cosines u, v and w = 1/range, sorted by power (B, K).

        Rows beyond the `count` strongest become zeros. A direction outside the unit circle, which a Fresnel array
        allows, is taken to its edge.
        """
        power, order = power.sort(dim=1, descending=True, stable=True)
        u, v, w = position.gather(1, order[..., None].expand(-1, -1, 3)).unbind(-1)
        elevation = v.clamp(-1, 1).asin()
        azimuth = (u / elevation.cos().clamp_min(1e-6)).clamp(-1, 1).asin()
        there = torch.arange(power.shape[1], device=count.device) < count[:, None]
        zero = torch.zeros_like(power)
        return cls(*(torch.where(there, each, zero) for each in (azimuth, elevation, 1.0 / w, power)), count)

    def cosines(self) -> Tensor:
        """u, v and w = 1/range, (B, K, 3); zeros where there is no source."""
        u, v = direction_cosines(self.azimuth, self.elevation)
        w = torch.where(self.active, 1.0 / torch.where(self.active, self.range_m, 1.0), 0.0)
        return torch.stack((u, v, w), dim=-1)

    def cartesian(self) -> Tensor:
        """Positions in metres, x along a row of the array, y along a column, z away from it: (B, K, 3)."""
        u, v = direction_cosines(self.azimuth, self.elevation)
        depth = self.azimuth.cos() * self.elevation.cos()
        return torch.stack((u, v, depth), dim=-1) * self.range_m[..., None]

    def take(self, rows: slice | Tensor) -> Sources:
        """The same of some scenes."""
        return Sources(*(each[rows] for each in self))


class Deviations(NamedTuple):
    """Standard deviations of `Sources`, one for one; zeros where there is no source."""

    azimuth: Tensor  # (B, K) rad
    elevation: Tensor  # (B, K) rad
    range_m: Tensor  # (B, K) m
    power: Tensor  # (B, K) linear
