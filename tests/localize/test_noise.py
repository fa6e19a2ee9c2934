"""The SNR from the measurement alone: right on average, whatever the unit, and bounded where there is nothing."""

import pytest
import torch

from ris_fast.config.schema import Task
from ris_fast.localize.noise import LEAST_DB, estimate_snr
from ris_fast.physics.random import SceneGenerator
from ris_fast.physics.scenes import simulate


@pytest.mark.parametrize("snr_db", [-5.0, 5.0, 20.0])
def test_snr_is_found(snr_db: float) -> None:
    task = Task(snr_min_db=snr_db, snr_max_db=snr_db)
    scenes = simulate(task, 160, SceneGenerator(2, "test"))
    error = estimate_snr(task, scenes.snapshots, scenes.channel, scenes.codes) - snr_db
    assert error.median().abs() < (0.6 if snr_db < 0 else 0.2)
    assert error.abs().quantile(0.9) < (2.0 if snr_db < 0 else 0.9)


def test_snr_of_symbols_for_every_snapshot() -> None:
    task = Task(snr_min_db=12.0, snr_max_db=12.0, symbols="per_snapshot", max_sources=3)
    scenes = simulate(task, 32, SceneGenerator(2, "test"))
    error = estimate_snr(task, scenes.snapshots, scenes.channel, scenes.codes) - 12.0
    assert error.median().abs() < 0.35


def test_units_do_not_matter() -> None:
    task = Task()
    scenes = simulate(task, 32, SceneGenerator(2, "test"))
    plain = estimate_snr(task, scenes.snapshots, scenes.channel, scenes.codes)
    other = estimate_snr(task, 1e5 * scenes.snapshots, 1e-3 * scenes.channel, scenes.with_own_codes().codes)
    assert (plain - other).abs().median() < 1e-3 and (plain - other).abs().max() < 1.0


def test_snapshots_of_zeros_have_the_least_snr() -> None:
    task = Task()
    scenes = simulate(task, 4, SceneGenerator(2, "test"))
    found = estimate_snr(task, torch.zeros_like(scenes.snapshots), scenes.channel, scenes.codes)
    assert (found == LEAST_DB).all()
