"""A channel of one's own for the third set."""

from __future__ import annotations

from torch import Tensor

from ris_fast.config.schema import Task
from ris_fast.physics.random import SceneGenerator


def one_place(task: Task, index: Tensor, generator: SceneGenerator) -> Tensor:
    """Gaussian paths from each element to antennas that stand in one place: (B, M, N, 2)."""
    paths = generator.normal(index, "paths", 2 * task.elements).view(len(index), 1, task.elements, 2)
    return paths.expand(-1, task.bs_antennas, -1, -1).contiguous()
