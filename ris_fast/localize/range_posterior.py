"""Ranges from their posterior within the ranges of a task, where the likelihood alone says little.

Model: the likelihood is a Gaussian in w = 1/range, so that the deviation of a range grows with its square: metres for a
weak source at ten. Sources are uniform in range between the task's limits; the posterior density of range is then that
Gaussian at 1/range, cut at the limits.

Legend: B batch, K sources (padded), G points of a grid.
"""

from __future__ import annotations

import torch
from torch import Tensor

GRID = 64
REACH = 5.0  # deviations of w on either side that the grid covers
SMALLEST = 1e-7  # deviation of w over w, below which float32 tells no two points of the grid apart


def range_posterior(inverse: Tensor, deviation: Tensor, least: float, most: float) -> tuple[Tensor, Tensor]:
    """Posterior median and standard deviation of ranges.

    The median, of all the summaries of a posterior: it has the recall of the mean within 1 m, more within 0.3 m, and
    inside the limits it does not depend on whether ranges or their inverses are asked for.

    Args: inverse, deviation (...): 1/range at the maximum of the Gaussian, inside the limits or not, and its standard
        deviation; least, most: limits of range in metres.
    Returns: two tensors (...), metres; the median is inside the limits.
    Numerics: trapezia on points equally spaced in log range.
    """
    inside = inverse.clamp(1.0 / most, 1.0 / least)
    deviation = torch.maximum(deviation, SMALLEST * inside)
    near = 1.0 / (inside + REACH * deviation).clamp_max(1.0 / least)
    far = 1.0 / (inside - REACH * deviation).clamp_min(1.0 / most)
    share = torch.linspace(0.0, 1.0, GRID, dtype=inverse.dtype, device=inverse.device)
    at = near[..., None] * (far / near)[..., None] ** share  # (..., G)
    exponent = -0.5 * ((1.0 / at - inverse[..., None]) / deviation[..., None]).square()
    density = at * (exponent - exponent.amax(-1, keepdim=True)).exp()  # of log range
    mass, middle = ((each[..., 1:] + each[..., :-1]) / 2 for each in (density, at))
    mass = mass / mass.sum(-1, keepdim=True)
    mean = (mass * middle).sum(-1, keepdim=True)
    return _median(at, mass), (mass * (middle - mean).square()).sum(-1).sqrt()


def _median(at: Tensor, mass: Tensor) -> Tensor:
    """Where half of the mass (..., G - 1) between points (..., G) is passed, on a straight line between them."""
    upto = mass.cumsum(-1)
    cell = (upto < 0.5).sum(-1, keepdim=True).clamp_max(mass.shape[-1] - 1)
    before, here, low, high = (each.gather(-1, cell)[..., 0] for each in (upto - mass, mass, at[..., :-1], at[..., 1:]))
    return low + (high - low) * ((0.5 - before) / here).clamp(0.0, 1.0)
