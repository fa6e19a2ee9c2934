"""The MUSIC spectrum of one scene over its box of positions, as two maps to look at.

Legend: N RIS elements, Q factor columns, A azimuths, E elevations, R ranges.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ris_fast.config.schema import Task
from ris_fast.localize.manifold import Manifold
from ris_fast.localize.spectrum import check_factor, decompose, signal_basis
from ris_fast.physics.array import direction_cosines

ANGLE_STEP_DEG, RANGES = 1.0, 40
SMALLEST_NULL = 1e-6


class SpectrumMap(NamedTuple):
    """In dB, 0 at the highest peak; on the CPU."""

    azimuth_deg: Tensor  # (A,)
    elevation_deg: Tensor  # (E,)
    range_m: Tensor  # (R,)    evenly spaced in its logarithm
    by_angle: Tensor  # (E, A)  the highest of all ranges
    by_range: Tensor  # (R, A)  the highest of all elevations


@torch.no_grad()
def spectrum_map(factor: Tensor, task: Task, count: Tensor) -> SpectrumMap:
    """Model: 1 / (1 - |B^H a|^2), B the signal subspace of `count` (1,) sources; see `ris_fast.localize.spectrum`.

    Args: factor (1, N, Q, 2). Cost: 8 N Q A E R FLOPs; the steering vectors of one range at a time are in memory.
    """
    parts = decompose(check_factor("spectrum_map", factor, task))
    basis = signal_basis(parts, count).to(torch.complex64)
    device = factor.device
    manifold = Manifold.of(task, device)
    azimuth, elevation = (_angles(limit, device) for limit in (task.azimuth_deg, task.elevation_deg))
    near, far = math.log(task.range_min_m), math.log(task.range_max_m)
    range_m = torch.linspace(near, far, RANGES, device=device).exp()
    grid = torch.meshgrid(elevation.deg2rad(), azimuth.deg2rad(), indexing="ij")
    u, v = (each.flatten() for each in direction_cosines(grid[1], grid[0]))
    planes = torch.stack([_spectrum(manifold, basis, u, v, w).view(grid[0].shape) for w in 1 / range_m])  # (R, E, A)
    decibel = 10.0 * planes.log10()
    decibel = (decibel - decibel.amax()).cpu()
    return SpectrumMap(azimuth.cpu(), elevation.cpu(), range_m.cpu(), decibel.amax(0), decibel.amax(1))


def _spectrum(manifold: Manifold, basis: Tensor, u: Tensor, v: Tensor, w: Tensor) -> Tensor:
    steer = manifold.steer(torch.stack((u, v, w.expand_as(u)), dim=-1)[None])
    return 1.0 / (1.0 - (basis.mH @ steer).abs().square().sum(1)[0]).clamp_min(SMALLEST_NULL)


def _angles(limit_deg: float, device: torch.device) -> Tensor:
    return torch.linspace(-limit_deg, limit_deg, max(2, round(2 * limit_deg / ANGLE_STEP_DEG) + 1), device=device)
