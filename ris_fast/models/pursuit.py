"""The constants of a task's pursuit; the pursuit itself lives with its kernel, in `ris_fast.kernels.pursuit`."""

from __future__ import annotations

import math

import torch

from ris_fast.config.schema import Task
from ris_fast.kernels.pursuit.geometry import geometry
from ris_fast.kernels.pursuit.search import Geometry
from ris_fast.physics.array import RISArray


def geometry_of(task: Task) -> tuple[Geometry, float]:
    """The constants of a task without a dictionary, and the wavenumber where the wavefront is spherical (0 where it is
    Fresnel)."""
    array = RISArray.of(task)
    high = torch.tensor(
        [math.sin(math.radians(task.azimuth_deg)), math.sin(math.radians(task.elevation_deg)), 1.0 / task.range_min_m],
        dtype=torch.float32,
    )
    low = torch.cat((-high[:2], high.new_tensor([1.0 / task.range_max_m])))
    spherical = array.wavefront == "spherical"
    return geometry(*array.positions(), array.wavenumber, low, high), array.wavenumber if spherical else 0.0
