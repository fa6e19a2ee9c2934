"""Round trips from true covariances to positions and powers, and the laws that `locate` keeps on any factor."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from ris_fast.config.schema import Task
from ris_fast.localize.locate import locate
from ris_fast.localize.sources import Sources
from ris_fast.physics.random import SceneGenerator
from ris_fast.physics.real_complex import to_complex
from ris_fast.physics.scenes import Scenes, simulate

WAVEFRONTS = ("fresnel", "spherical")


def scenes_with(task: Task, sources: int, scenes: int = 100) -> Scenes:
    drawn = simulate(task, 10 * scenes, SceneGenerator(11, "test"))
    return drawn[(drawn.count == sources).nonzero()[:scenes, 0]]


def errors(found: Sources, scenes: Scenes) -> torch.Tensor:
    """|azimuth| and |elevation| in degrees and |range| in metres of matched sources, infinite if missed: (n, 3)."""
    truth, rows = Sources.of_scenes(scenes), []
    for scene in range(scenes.batch):
        here, there = int(found.count[scene]), int(truth.count[scene])
        parts = [
            (getattr(found, name)[scene, :here, None] - getattr(truth, name)[scene, None, :there]).abs().double() * unit
            for name, unit in (("azimuth", 180 / math.pi), ("elevation", 180 / math.pi), ("range_m", 1.0))
        ]
        distance = torch.stack(parts, dim=-1)
        error = torch.full((there, 3), torch.inf, dtype=torch.float64)
        mine, theirs = linear_sum_assignment((distance / torch.tensor([5.0, 5.0, 1.0])).sum(-1).clamp_max(10.0))
        error[theirs] = distance[mine, theirs]
        rows.append(error)
    return torch.cat(rows)


def recall(found: Sources, scenes: Scenes) -> float:
    """Share of sources found within 5 degrees, 5 degrees and 1 m."""
    return float((errors(found, scenes) < torch.tensor([5.0, 5.0, 1.0])).all(1).double().mean())


@pytest.mark.parametrize("wavefront", WAVEFRONTS)
@pytest.mark.parametrize("sources", (1, 2))
@pytest.mark.parametrize("method", ("music", "mvdr"))
def test_round_trip_finds_every_one_of_few_sources(wavefront: str, sources: int, method: str) -> None:
    """From the true covariance, the number of sources not given: within 0.05 degrees and 1 cm, and its power."""
    task = Task(wavefront=wavefront)
    scenes = scenes_with(task, sources)
    found = locate(scenes.factor, task, method=method)
    assert torch.equal(found.count, scenes.count)
    assert (errors(found, scenes).amax(0) < torch.tensor([0.05, 0.05, 0.01])).all()
    truth = Sources.of_scenes(scenes)
    torch.testing.assert_close(found.power, truth.power.double(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("wavefront", WAVEFRONTS)
@pytest.mark.parametrize("sources, least", [(3, 0.98), (5, 0.97)])
def test_round_trip_finds_nearly_all_of_several_sources(wavefront: str, sources: int, least: float) -> None:
    task = Task(wavefront=wavefront)
    scenes = scenes_with(task, sources)
    assert recall(locate(scenes.factor, task, count=scenes.count), scenes) >= least


def test_locate_degrades_with_the_error_of_the_factor() -> None:
    """More noise in the factor, fewer sources found and farther off; a tenth of the columns' norm still serves."""
    task = Task()
    scenes = scenes_with(task, 2, 60)
    size = scenes.factor.square().sum((1, 2, 3), keepdim=True).sqrt()
    noise = torch.randn(scenes.factor.shape, generator=torch.Generator().manual_seed(0))
    noise = noise / noise.square().sum((1, 2, 3), keepdim=True).sqrt()
    found = [locate(scenes.factor / size + level * noise, task, count=2) for level in (0.01, 0.1, 0.6)]
    shares = [recall(each, scenes) for each in found]
    assert shares[0] > shares[1] > shares[2] and shares[1] > 0.9
    medians = [errors(each, scenes)[:, 0].median() for each in found]
    assert medians[0] < medians[1] < medians[2]


def test_locate_does_not_see_scale_nor_mixing() -> None:
    """F and c F have the same positions, and powers |c|^2 apart; F and F U the same of both; complex or in pairs."""
    task = Task()
    scenes = scenes_with(task, 3, 20)
    plain = locate(scenes.factor, task, count=3)
    mix = torch.linalg.qr(torch.randn(5, 5, dtype=torch.complex64, generator=torch.Generator().manual_seed(0)))[0]
    mixed = to_complex(scenes.factor) @ mix
    for other, scale in ((scenes.factor * 1e-12, 1e-24), (scenes.factor * 1e15, 1e30), (mixed, 1.0)):
        found = locate(other, task, count=torch.full((20,), 3))
        for name in ("azimuth", "elevation", "range_m"):
            torch.testing.assert_close(getattr(found, name), getattr(plain, name), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.power, plain.power * scale, rtol=1e-3, atol=0)
    assert torch.equal(locate(to_complex(scenes.factor), task, count=3).azimuth, plain.azimuth)


def test_locate_does_not_see_the_batch() -> None:
    """A scene has the same sources alone, and whatever blocks the batch is cut into."""
    task = Task()
    scenes = simulate(task, 150, SceneGenerator(1, "test"))
    together = locate(scenes.factor, task)
    for rows in (slice(0, 1), slice(60, 70), slice(149, 150)):
        for alone, among in zip(locate(scenes.factor[rows], task), together.take(rows)):
            torch.testing.assert_close(alone, among, rtol=1e-6, atol=1e-7)
    assert locate(scenes.factor[:0], task).power.shape == (0, task.max_sources)


@pytest.mark.parametrize("default", (torch.float64, torch.bfloat16))
def test_locate_does_not_see_the_default_dtype(default: torch.dtype) -> None:
    task = Task(ris_horizontal=8, range_max_m=9.0 if default == torch.float64 else 8.0)  # constants made afresh
    scenes = simulate(task, 8, SceneGenerator(1, "test"))
    try:
        torch.set_default_dtype(default)
        found = locate(scenes.factor, task)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(locate(scenes.factor, task).azimuth, found.azimuth)
    assert recall(found, scenes) > 0.9


def test_factors_without_an_answer_have_no_source() -> None:
    """Zeros and numbers that are not finite give count 0 and zeros, and leave other scenes alone."""
    task = Task()
    scenes = scenes_with(task, 2, 4)
    factor = scenes.factor.clone()
    factor[0] = 0
    factor[1, 7, 0, 0] = torch.nan
    factor[2, 3, 4, 1] = -torch.inf
    for count in (None, 2):
        found = locate(factor, task, count=count)
        assert found.count.tolist() == [0, 0, 0, 2]
        assert all((each[:3] == 0).all() for each in found) and all(each.isfinite().all() for each in found)
        torch.testing.assert_close(found.azimuth[3], locate(scenes.factor, task, count=count).azimuth[3])


def test_locate_finds_no_more_sources_than_the_rank() -> None:
    task = Task()
    found = locate(scenes_with(task, 1, 5).factor, task, count=4)
    assert found.count.tolist() == [1] * 5 and (found.active == (found.power > 0)).all()


@pytest.mark.parametrize(
    "count, error, said",
    [
        (2.0, TypeError, "count is a float, expected a whole number or an integer tensor"),
        (torch.ones(3), TypeError, "count is torch.float32"),
        (torch.ones(2, dtype=torch.int64), ValueError, r"count is \(2,\), expected \(3,\)"),
        (-1, ValueError, "count goes from -1 to -1, expected 0 to 5"),
        (torch.tensor([1, 6, 2]), ValueError, "count goes from 1 to 6, expected 0 to 5. Set task.max_sources"),
    ],
)
def test_locate_names_a_wrong_count(count: object, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        locate(torch.ones(3, 144, 2, 2), Task(), count=count)
