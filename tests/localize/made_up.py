"""Sources that tests of scores share: those of simulated scenes, a bound for each, and estimates around them."""

from __future__ import annotations

import math

import torch

from ris_fast.config.schema import Task
from ris_fast.localize.sources import Deviations, Sources
from ris_fast.physics.random import SceneGenerator
from ris_fast.physics.scenes import Scenes, simulate


def some_scenes(count: int = 1000) -> Scenes:
    """Of a small array: their positions are as those of RIS-12x12."""
    task = Task(bs_antennas=2, ris_horizontal=2, ris_vertical=2, snapshots=2)
    return simulate(task, count, SceneGenerator(0, "test"))


def some_bound(truth: Sources, seed: int = 1) -> Deviations:
    """0.01 to 0.1 degrees, 1 to 10 cm."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.rand(truth.power.shape, generator=generator).double() * 0.9 + 0.1
    return Deviations(*(truth.active * size * each for each in (math.radians(0.1), math.radians(0.1), 0.1, 1.0)))


def around(truth: Sources, bound: Deviations, seed: int = 2) -> Sources:
    """Estimates that are off by normal errors of these standard deviations."""
    generator = torch.Generator().manual_seed(seed)
    normal = [torch.randn(truth.power.shape, generator=generator).double() for _ in range(3)]
    moved = (value + each * sd for value, each, sd in zip(truth[:3], normal, bound))
    return Sources(*moved, truth.power, truth.count)
