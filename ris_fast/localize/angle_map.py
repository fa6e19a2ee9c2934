"""The spectrum of one scene over azimuth and elevation, for a figure: the largest value over range.

Legend: N RIS elements in rows of X, Y rows; C basis columns, E elevations, A azimuths, W ranges.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ris_fast.config.schema import Task
from ris_fast.localize.count import count_sources
from ris_fast.localize.spectrum import LOADING, check_factor, decompose, signal_basis
from ris_fast.physics.array import RISArray, cosine_steering, direction_cosines
from ris_fast.physics.real_complex import to_complex

SMALLEST_NULL = 1e-6  # 1 - |B^H a|^2 in float32: less is rounding
ROWS = 8  # elevations worked on at once


class AngleMap(NamedTuple):
    """A spectrum over the angles of a task, linear, at least 1 (nothing there)."""

    azimuth: Tensor  # (A,)   rad
    elevation: Tensor  # (E,)   rad
    level: Tensor  # (E, A) 1 / (1 - |B^H a|^2), largest over range
    range_m: Tensor  # (E, A) where it is

    def peaks(self, count: int) -> tuple[Tensor, Tensor]:
        """Azimuth and elevation of the `count` highest local maxima, highest first; fewer where there are fewer.

        Neighbours of a maximum are suppressed, so that one lobe gives one peak; of a plateau its every point counts.
        """
        around = torch.nn.functional.max_pool2d(self.level[None], 3, stride=1, padding=1)[0]
        height = torch.where(self.level >= around, self.level, 0.0).flatten()
        height, where = height.topk(min(count, height.numel()))
        where = where[height > 1.0]
        return self.azimuth[where % len(self.azimuth)], self.elevation[where // len(self.azimuth)]


@torch.no_grad()
def angle_map(
    factor: Tensor,
    task: Task,
    *,
    count: int | None = None,
    method: str = "music",
    loading: float = LOADING,
    shape: tuple[int, int, int] = (181, 361, 20),
) -> AngleMap:
    """The MUSIC or MVDR spectrum of one scene's factor, (N, Q, 2) or complex (N, Q), over the angles of the task.

    Args: count, method, loading: as `locate` has them; shape: elevations, azimuths and ranges, these
            uniform in 1/range.
    Cost: 8 E A W X C FLOPs for a Fresnel grid, N / X times that for a spherical wavefront or elements anywhere, which
        have no factors.
    Raises: TypeError or ValueError that names the argument.
    """
    pairs = check_factor("angle_map", factor[None] if isinstance(factor, Tensor) else factor, task)
    parts = decompose(pairs)
    number = count_sources(parts, task.max_sources) if count is None else torch.full_like(parts.rank, count)
    planar = signal_basis(parts, number, parts.value.shape[1], method, loading)[0].to(torch.complex64)
    axes = [
        torch.linspace(low, high, points, dtype=torch.float32, device=planar.device)
        for low, high, points in zip(
            (-math.radians(task.elevation_deg), -math.radians(task.azimuth_deg), 1.0 / task.range_max_m),
            (math.radians(task.elevation_deg), math.radians(task.azimuth_deg), 1.0 / task.range_min_m),
            shape,
        )
    ]
    array, conjugate = RISArray.of(task), planar.conj().resolve_conj()
    rows = _fresnel_rows if array.grid and array.wavefront == "fresnel" else _any_rows
    power, plane = zip(*(rows(array, conjugate, part, *axes[1:]).max(1) for part in axes[0].split(ROWS)))
    level = 1.0 / (1.0 - torch.cat(power)).clamp(SMALLEST_NULL, 1.0)
    return AngleMap(axes[1], axes[0], level, 1.0 / axes[2][torch.cat(plane)])


def _fresnel_rows(array: RISArray, columns: Tensor, elevation: Tensor, azimuth: Tensor, near: Tensor) -> Tensor:
    """|B^H a|^2 at some elevations from conj(B), (N, C): (E,), (A,), (W,) -> (E, W, A); a sum over y, then over x."""
    x, y = (each.view(array.vertical, array.horizontal) for each in array.positions(columns.device))
    x, y, k = x[0], y[:, 0], array.wavenumber
    up = _unit(k * (elevation.sin()[:, None, None] * y - near[:, None] * y * y / 2))  # (E, W, Y)
    bend = _unit(-k * near[:, None] * x * x / 2)  # (W, X)
    planes = columns.view(array.vertical, array.horizontal, -1).transpose(1, 2).flatten(1)  # (Y, C X)
    planes = (up @ planes).unflatten(2, (-1, array.horizontal)) * bend[:, None] / math.sqrt(array.elements)
    cosine = azimuth.sin() * elevation.cos()[:, None]
    across = _unit(k * x[:, None] * cosine[:, None])  # (E, X, A)
    return _power(planes.flatten(1, 2) @ across).unflatten(1, (len(near), -1)).sum(2)


def _any_rows(array: RISArray, columns: Tensor, elevation: Tensor, azimuth: Tensor, near: Tensor) -> Tensor:
    """The same for any wavefront and any array, by the steering vectors themselves, one elevation after the other."""
    shape, rows = (len(near), len(azimuth)), []
    for each in elevation:
        u, v = direction_cosines(azimuth, each.expand_as(azimuth))
        steer = cosine_steering(array, u.expand(shape), v.expand(shape), (1.0 / near)[:, None].expand(shape))
        rows.append(_power(to_complex(steer) @ columns).sum(-1))
    return torch.stack(rows)


def _unit(phase: Tensor) -> Tensor:
    return torch.polar(torch.ones_like(phase), phase)


def _power(value: Tensor) -> Tensor:
    return value.real.square() + value.imag.square()
