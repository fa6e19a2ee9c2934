"""The maps of a spectrum peak where the sources are."""

from __future__ import annotations

import torch

from ris_fast.config.schema import Task
from ris_fast.localize.sources import Sources
from ris_fast.localize.spectrum_map import spectrum_map
from ris_fast.physics.random import SceneGenerator
from ris_fast.physics.scenes import simulate


def test_spectrum_map_of_one_source_peaks_at_it() -> None:
    task = Task(max_sources=1, range_max_m=3.0)
    scenes = simulate(task, 3, SceneGenerator(0, "test"))
    truth = Sources.of_scenes(scenes)
    for scene in range(3):
        found = spectrum_map(scenes.factor[scene : scene + 1], task, torch.ones(1, dtype=torch.int64))
        assert found.by_angle.shape == (61, 121) and found.by_range.shape == (40, 121)
        assert found.by_angle.max() == 0.0 == found.by_range.max()
        row, column = divmod(int(found.by_angle.argmax()), 121)
        assert abs(found.azimuth_deg[column] - truth.azimuth[scene, 0].rad2deg()) < 1.0
        assert abs(found.elevation_deg[row] - truth.elevation[scene, 0].rad2deg()) < 1.0
        row, column = divmod(int(found.by_range.argmax()), 121)
        assert abs(found.range_m[row] / truth.range_m[scene, 0] - 1) < 0.1
