"""Which estimate belongs to which true source: the assignment behind recall, precision and errors.

Legend: B batch, K true sources, E estimates (both padded).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ris_fast.localize.sources import Sources


class Tolerance(NamedTuple):
    """How far an estimate may be from the source that it is matched to, in each coordinate."""

    azimuth_deg: float
    elevation_deg: float
    range_m: float

    def __str__(self) -> str:
        return f"{self.azimuth_deg:g} deg, {self.elevation_deg:g} deg, {self.range_m:g} m"

    @property
    def short(self) -> str:
        """5/5/1"""
        return "/".join(f"{each:g}" for each in self)


WIDE = Tolerance(5.0, 5.0, 1.0)  # errors are those of sources that are matched within it
NARROW = Tolerance(1.0, 1.0, 0.3)


def match(estimate: Sources, truth: Sources, tolerance: Tolerance) -> Tensor:
    """For each true source the row of its estimate, -1 for none: (B, K) int64, on the CPU.

    Model: a pair may be matched where each of azimuth, elevation and range is within the tolerance, and no estimate or
        source is in two pairs. Of all such assignments one with the most pairs is taken, and of these the one with the
        smallest sum of squared errors in units of the tolerance.
    Args: estimate: (B, E) a row, truth: (B, K) a row, of the same scenes in the same order; powers play no part.
    Raises: ValueError where the numbers of scenes differ.
    Source: `scipy.optimize.linear_sum_assignment`, one call a scene.
    """
    if estimate.count.shape != truth.count.shape:
        raise ValueError(
            f"match: estimates are of {len(estimate.count)} scenes and the truth of {len(truth.count)}. Pass the"
            " sources of the same scenes in the same order."
        )
    cost, allowed = _costs(estimate, truth, tolerance)
    cost[~allowed] = truth.power.shape[1] + 1.0  # more than all the pairs of a scene cost together
    found = np.full(truth.power.shape, -1, dtype=np.int64)
    for scene in np.flatnonzero(allowed.any((1, 2))):
        source, row = linear_sum_assignment(cost[scene])
        near = allowed[scene, source, row]
        found[scene, source[near]] = row[near]
    return torch.from_numpy(found)


def _costs(estimate: Sources, truth: Sources, tolerance: Tolerance) -> tuple[np.ndarray, np.ndarray]:
    """Cost in 0..1 of each pair and whether it may be matched: two (B, K, E)."""
    limits = (math.radians(tolerance.azimuth_deg), math.radians(tolerance.elevation_deg), tolerance.range_m)
    squares = torch.stack(
        [
            ((_double(found)[:, None, :] - _double(true)[:, :, None]) / limit).square()
            for found, true, limit in zip(estimate[:3], truth[:3], limits)
        ]
    )
    there = truth.active.cpu()[:, :, None] & estimate.active.cpu()[:, None, :]
    return squares.mean(0).numpy(), ((squares <= 1.0).all(0) & there).numpy()


def _double(values: Tensor) -> Tensor:
    return values.detach().cpu().double()
