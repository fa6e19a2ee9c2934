"""Blind maximum likelihood: no worse a likelihood than the pursuit's, at the number of sources asked for."""

import pytest
import torch

from ris_fast.config.schema import Task
from ris_fast.localize.blind import maximum_likelihood
from ris_fast.localize.candidates import pursuit_sources
from ris_fast.localize.likelihood import refine
from ris_fast.localize.sources import Sources
from ris_fast.physics.random import SceneGenerator
from ris_fast.physics.scenes import simulate


@pytest.mark.parametrize("symbols", ["static", "per_snapshot"])
def test_likelihood_is_no_worse_than_that_of_one_start(symbols: str) -> None:
    task = Task(max_sources=4, snr_min_db=10.0, symbols=symbols)
    scenes = simulate(task, 24, SceneGenerator(4, "test"))
    given = scenes.snapshots, scenes.channel, scenes.codes, scenes.snr_db
    one = refine(task, *given, pursuit_sources(task, *given, 5), count=scenes.count)
    many = maximum_likelihood(task, *given, count=scenes.count)
    assert many.sources.count.equal(scenes.count)
    assert (many.cost <= 1.01 * one.cost).all() and many.cost.sum() < one.cost.sum()


def test_it_finds_what_a_search_from_the_truth_finds() -> None:
    task = Task(max_sources=3, snr_min_db=15.0, snr_max_db=15.0)
    scenes = simulate(task, 64, SceneGenerator(4, "test"))
    given = scenes.snapshots, scenes.channel, scenes.codes, scenes.snr_db
    from_truth = refine(task, *given, Sources.of_scenes(scenes), steps=8)
    blind = maximum_likelihood(task, *given, count=scenes.count)
    assert (blind.cost < 1.01 * from_truth.cost).float().mean() > 0.9


def test_number_of_sources_has_the_least_description() -> None:
    task = Task(max_sources=3, snr_min_db=20.0, power="equal")
    scenes = simulate(task, 64, SceneGenerator(4, "test"))
    found = maximum_likelihood(task, scenes.snapshots, scenes.channel, scenes.codes, scenes.snr_db)
    assert (found.sources.count == scenes.count).float().mean() > 0.85
    torch.testing.assert_close(found.count_probability.argmax(1), found.sources.count)
