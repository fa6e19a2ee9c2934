"""Gauss-Newton steps on the positions of a batch of scenes, each scene with a step length of its own.

Legend: B batch, K sources (padded).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ris_fast.localize.measurement import Measurement, Point


def descend(measurement: Measurement, point: Point, steps: int) -> Point:
    """Gauss-Newton steps, each scene for itself: a step that does not lower the objective is refused, and the next one
    from the same place is a quarter of it."""
    length = torch.ones_like(point.cost)
    for _ in range(steps):
        move = length[:, None, None] * measurement.step(point)
        trial = measurement.at(measurement.inside(point.position + move), point.active)
        better = trial.objective < point.objective
        length = torch.where(better, 1.0, length / 4)
        point = choose(better, trial, point)
    return point


def choose(condition: Tensor, one: Point, other: Point) -> Point:
    """Of each scene one point or the other: condition (B,)."""
    pairs = zip(one, other)
    return Point(*(torch.where(condition.view(-1, *[1] * (a.dim() - 1)), a, b) for a, b in pairs))
