"""The evidence: against an integral by brute force, and beside the description length."""

import math

import pytest
import torch

from ris_fast.config.schema import Task
from ris_fast.localize.candidates import pursuit_sources
from ris_fast.localize.descent import descend
from ris_fast.localize.evidence import evidence, gaussian_symbols
from ris_fast.localize.likelihood import refine
from ris_fast.localize.measurement import Measurement
from ris_fast.localize.sources import Sources
from ris_fast.physics.random import SceneGenerator
from ris_fast.physics.scenes import simulate

SMALL = {"bs_antennas": 4, "ris_horizontal": 6, "ris_vertical": 5, "snapshots": 8, "max_sources": 1}


def copies(task: Task, scene: int, number: int) -> tuple[Measurement, Sources]:
    """One scene, many times over."""
    scenes = simulate(task, 8, SceneGenerator(2, "test"))[torch.full((number,), scene)]
    given = scenes.snapshots, scenes.channel, scenes.codes, scenes.snr_db
    return Measurement(task, *(each.double() for each in given)), Sources.of_scenes(scenes)


@pytest.mark.parametrize("power", ["path_loss", "equal"])
def test_it_is_the_mean_likelihood_of_the_prior(power: str) -> None:
    task, number = Task(**SMALL, power=power, snr_min_db=5.0, snr_max_db=5.0), 5_000
    generator, differences = torch.Generator().manual_seed(0), []
    for scene in range(3):
        measurement, true = copies(task, scene, 1)
        point = descend(measurement, measurement.start(Sources(*(e.double() for e in true[:4]), true.count)), 20)
        law = point.position[..., 2].square() if power == "path_loss" else torch.ones(1, 1)
        level = measurement.mean_square(point) / law
        azimuth, elevation, share = torch.rand(3, number, 1, dtype=torch.float64, generator=generator)
        azimuth, elevation = (2 * azimuth - 1) * math.radians(60), (2 * elevation - 1) * math.radians(30)
        ranges = task.range_min_m + (task.range_max_m - task.range_min_m) * share
        drawn = Sources(azimuth, elevation, ranges, torch.ones_like(ranges), torch.ones(number, dtype=torch.int64))
        many, _ = copies(task, scene, number)
        trials = many.at(drawn.cosines(), drawn.active)
        law = ranges.square().reciprocal() if power == "path_loss" else torch.ones_like(ranges)
        exact = math.log(number) - (-gaussian_symbols(many, trials, level * law)).logsumexp(0)
        differences.append((evidence(measurement, point)[0] - exact).item())
    assert all(abs(each) < 1.0 for each in differences), differences


def test_it_gives_the_true_number_more_than_the_description_length_does() -> None:
    task = Task(max_sources=3, snr_min_db=0.0, snr_max_db=10.0)
    scenes = simulate(task, 300, SceneGenerator(4, "test"))
    given = scenes.snapshots, scenes.channel, scenes.codes, scenes.snr_db
    start = pursuit_sources(task, *given, task.max_sources + 1)
    found, plain = (refine(task, *given, start, count=count, steps=2) for count in ("evidence", "mdl"))
    chance, other = (each.count_probability.gather(1, scenes.count[:, None]).mean() for each in (found, plain))
    assert chance > other
    assert (found.sources.count == scenes.count).sum() >= (plain.sources.count == scenes.count).sum()


def test_a_side_of_the_box_that_the_task_fixes_is_no_fault() -> None:
    task = Task(max_sources=2, elevation_deg=0.0)
    scenes = simulate(task, 16, SceneGenerator(4, "test"))
    given = scenes.snapshots, scenes.channel, scenes.codes, scenes.snr_db
    found = refine(task, *given, pursuit_sources(task, *given, 3), count="evidence")
    assert found.count_probability.isfinite().all() and (found.sources.count > 0).any()
