"""Maximum-likelihood positions: at the bound, in any unit, in any order, and the number of sources."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ris_fast.config.schema import Task
from ris_fast.localize.candidates import pursuit_sources
from ris_fast.localize.likelihood import Estimate, refine
from ris_fast.localize.sources import Sources
from ris_fast.physics.random import SceneGenerator
from ris_fast.physics.scenes import Scenes, simulate


def scenes_of(task: Task, scenes: int = 48) -> tuple[Scenes, Sources]:
    made = simulate(task, scenes, SceneGenerator(1, "test"))
    return made, Sources.of_scenes(made)


def refined(task: Task, scenes: Scenes, start: Sources, **options: object) -> Estimate:
    return refine(task, scenes.snapshots, scenes.channel, scenes.codes, scenes.snr_db, start, **options)


def found(task: Task, scenes: Scenes, count: str | Tensor = "mdl") -> Estimate:
    given = scenes.snapshots, scenes.channel, scenes.codes, scenes.snr_db
    return refine(task, *given, pursuit_sources(task, *given), count=count)


@pytest.mark.parametrize("symbols", ["static", "per_snapshot"])
@pytest.mark.parametrize("wavefront", ["fresnel", "spherical"])
def test_errors_are_as_large_as_the_deviations_say(symbols: str, wavefront: str) -> None:
    task = Task(max_sources=1, snr_min_db=20.0, snr_max_db=20.0, range_max_m=3.0, symbols=symbols, wavefront=wavefront)
    scenes, true = scenes_of(task, 400)
    estimate = refined(task, scenes, true)
    for name in ("azimuth", "elevation", "range_m", "power"):
        error = (getattr(estimate.sources, name) - getattr(true, name)) / getattr(estimate.deviations, name)
        assert 0.85 < error.square().mean().sqrt() < 1.15, name


def test_a_start_within_a_cell_leads_to_the_same_place() -> None:
    task = Task(max_sources=2, snr_min_db=15.0, snr_max_db=15.0)
    scenes, true = scenes_of(task)
    near = true._replace(azimuth=true.azimuth + 0.03, elevation=true.elevation - 0.03, range_m=true.range_m * 1.05)
    from_truth, from_near = (refined(task, scenes, start, steps=12) for start in (true, near))
    same = (from_truth.cost - from_near.cost).abs() < 1e-3 * from_truth.cost
    assert same.float().mean() > 0.9


def test_steps_bring_the_cost_down_and_stay_in_the_box() -> None:
    task = Task(snr_min_db=10.0)
    scenes, true = scenes_of(task)
    start = true._replace(azimuth=true.azimuth + 0.05, range_m=true.range_m * 1.3)
    costs = [refined(task, scenes, start, steps=steps) for steps in (0, 1, 3, 6)]
    for before, after in zip(costs, costs[1:]):
        assert (after.cost <= before.cost * 1.001).all()
    u, v, w = costs[-1].sources.cosines()[costs[-1].sources.active].unbind(-1)
    assert u.abs().max() < 0.8661 and v.abs().max() < 0.5001 and w.min() > 0.0999 and w.max() < 2.0001


def test_units_of_snapshots_and_channel_are_those_of_the_powers() -> None:
    task = Task()
    scenes, true = scenes_of(task)
    plain = refined(task, scenes, true)
    other = refined(task, replace(scenes, snapshots=1e6 * scenes.snapshots, channel=1e-3 * scenes.channel), true)
    torch.testing.assert_close(other.cost, 1e12 * plain.cost, rtol=1e-3, atol=0)
    torch.testing.assert_close(other.sources.power, 1e18 * plain.sources.power, rtol=2e-2, atol=0)
    torch.testing.assert_close(other.deviations.power, 1e18 * plain.deviations.power, rtol=2e-2, atol=0)


def test_columns_without_a_source_change_nothing() -> None:
    task = Task()
    scenes, true = scenes_of(task)
    wide = Sources(*(torch.nn.functional.pad(each, (0, 3)) for each in true[:4]), true.count)
    narrow, padded = refined(task, scenes, true), refined(task, scenes, wide)
    torch.testing.assert_close(padded.cost, narrow.cost, rtol=1e-4, atol=0)
    assert not padded.sources.power[:, 5:].any() and not padded.deviations.azimuth[:, 5:].any()


def test_a_scene_is_the_same_alone_and_with_codes_of_its_own() -> None:
    task = Task()
    scenes, _ = scenes_of(task, 8)
    together, alone = found(task, scenes), found(task, scenes.with_own_codes()[3:4])
    torch.testing.assert_close(alone.cost, together.cost[3:4], rtol=1e-4, atol=0)
    assert alone.sources.count == together.sources.count[3]


def test_number_of_sources() -> None:
    task = Task(max_sources=3, snr_min_db=20.0, snr_max_db=20.0, power="equal")
    scenes, true = scenes_of(task, 100)
    mdl, aic, given = (found(task, scenes, count) for count in ("mdl", "aic", true.count))
    assert (mdl.sources.count == true.count).float().mean() > 0.9
    assert (aic.sources.count >= mdl.sources.count).all()
    torch.testing.assert_close(given.sources.count, true.count)
    torch.testing.assert_close(mdl.count_probability.sum(1), torch.ones(100))
    torch.testing.assert_close(mdl.count_probability.argmax(1), mdl.sources.count)
    assert mdl.sources.power.shape == (100, 3) and mdl.count_probability.shape == (100, 4)


def test_noise_alone_has_no_source() -> None:
    task = Task(snr_min_db=0.0, snr_max_db=0.0)
    scenes, _ = scenes_of(task, 100)
    noise = torch.randn(scenes.snapshots.shape, generator=torch.Generator().manual_seed(0))
    estimate = found(task, replace(scenes, snapshots=noise, snr_db=torch.full((100,), -40.0)))
    assert (estimate.sources.count == 0).float().mean() > 0.9


def test_numbers_that_say_nothing_make_no_fault() -> None:
    task = Task()
    scenes, _ = scenes_of(task, 4)
    estimate = found(task, replace(scenes, snapshots=torch.zeros_like(scenes.snapshots)))
    assert not estimate.sources.count.any() and not estimate.cost.any()
    assert found(task, scenes[:0]).sources.power.shape == (0, 5)


def test_criterion_is_named() -> None:
    task = Task()
    scenes, true = scenes_of(task, 2)
    with pytest.raises(ValueError, match="refine: count is 'bic'"):
        refined(task, scenes, true, count="bic")
