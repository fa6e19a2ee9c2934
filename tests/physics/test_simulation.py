"""The simulator against the physics functions it is made of, and bit for bit against itself in other batches."""

from __future__ import annotations

import math

import pytest
import torch

from ris_fast.config.schema import Task
from ris_fast.physics.array import RISArray, steering
from ris_fast.physics.channel import FAR_RANGE_M, sense
from ris_fast.physics.random import SceneGenerator
from ris_fast.physics.real_complex import conj, expi, multiply, power
from ris_fast.physics.scenes import simulate

TASKS = {
    "standard": Task(),
    "spherical, moving": Task(wavefront="spherical", symbols="per_snapshot"),
    "odd": Task(ris_horizontal=7, ris_vertical=5, bs_antennas=3, snapshots=5, max_sources=3),
}


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_simulate_scene_has_the_same_bits_in_every_batch(task: Task) -> None:
    generator = SceneGenerator(seed=3)
    together = simulate(task, 501, generator)
    for size in (1, 2, 7, 16, 33):
        index = torch.randperm(501, generator=torch.Generator().manual_seed(size))[:size]
        few = simulate(task, index, generator)
        for name in ("snapshots", "channel", "factor", "snr_db", "count", "azimuth", "elevation", "range_m", "power"):
            assert torch.equal(getattr(few, name), getattr(together, name)[index]), name


@pytest.mark.parametrize("wavefront", ["fresnel", "spherical"])
def test_scene_factor_is_the_steering_of_its_sources(wavefront: str) -> None:
    task = Task(wavefront=wavefront)
    scenes = simulate(task, 200, SceneGenerator(seed=1))
    active = scenes.power > 0
    places = (each[active].double() for each in (scenes.azimuth, scenes.elevation, scenes.range_m))
    expected = steering(RISArray.of(task), *places) * scenes.power[active].double().sqrt()[:, None, None]
    error = scenes.factor.transpose(1, 2)[active] - expected
    assert (power(error).sum(1) / scenes.power[active]).sqrt().max() < 1e-5
    assert scenes.factor.transpose(1, 2)[~active].abs().max() == 0


def test_simulate_channel_without_scatter_is_line_of_sight() -> None:
    """H at a Rician factor of 1e6, less a thousandth of H at 0, is a_BS a_RIS^H, its angles the last two uniforms of
    the scene."""
    task, scatter, generator = (
        Task(rician_min=1e6, rician_max=1e6),
        Task(rician_min=0.0, rician_max=0.0),
        SceneGenerator(seed=2),
    )
    index = torch.arange(50)
    azimuth, elevation = (
        (2 * u.double() - 1) * math.radians(60) for u in generator.uniform(index, "scene", 20)[:, 18:].unbind(1)
    )
    bs = (
        expi(math.pi * (torch.arange(16) - 7.5) * (azimuth.sin() * elevation.cos())[:, None]) / 4
    )  # half a wavelength apart
    ris = steering(RISArray.of(task), azimuth, elevation, torch.full_like(azimuth, FAR_RANGE_M))
    expected = multiply(bs[:, :, None], conj(ris)[:, None])
    found = simulate(task, index, generator).channel - 1e-3 * simulate(scatter, index, generator).channel
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_simulate_snapshots_without_noise_are_the_sensed_field() -> None:
    """One source of known symbol: y_l / (H c_l o a) is one number for the whole scene."""
    scenes = simulate(Task(snr_min_db=120.0, snr_max_db=120.0, max_sources=1), 50, SceneGenerator(seed=4))
    sensed = sense(scenes.channel, scenes.codes, scenes.factor[:, :, 0])
    ratio = multiply(scenes.snapshots, conj(sensed)).sum((1, 2)) / power(sensed).sum((1, 2))[:, None]
    torch.testing.assert_close(power(ratio), torch.ones(50), rtol=1e-4, atol=0)
    error = scenes.snapshots - multiply(ratio[:, None, None], sensed)
    assert power(error).sum() < 1e-10 * power(scenes.snapshots).sum()


def test_simulate_wrong_call_says_what_to_do() -> None:
    with pytest.raises(TypeError, match=r"simulate: generator is 0, expected a SceneGenerator"):
        simulate(Task(), 8, 0)
    with pytest.raises(TypeError, match="simulate: scenes is a list"):
        simulate(Task(), [1, 2], SceneGenerator())
    with pytest.raises(ValueError, match="simulate: scenes is -1"):
        simulate(Task(), -1, SceneGenerator())
