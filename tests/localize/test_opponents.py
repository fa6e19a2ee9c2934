"""Classical estimators: what theory says of their errors, and one interface for all."""

from dataclasses import replace

import pytest
import torch

from ris_fast.config.schema import Task
from ris_fast.localize.opponents import OPPONENTS, factor_of, least_squares, opponent
from ris_fast.localize.sources import Sources
from ris_fast.physics.channel import sense
from ris_fast.physics.random import SceneGenerator
from ris_fast.physics.real_complex import adjoint_matmul, power
from ris_fast.physics.scenes import Scenes, simulate


def nmse(factor: torch.Tensor, scenes: Scenes) -> torch.Tensor:
    """Of trace-normalised covariances, (B,)."""
    one, other = factor.double(), scenes.factor.double()
    one, other = (each / power(each).sum((1, 2)).sqrt()[:, None, None, None] for each in (one, other))
    pairs = [power(adjoint_matmul(a, b)).sum((1, 2)) for a, b in ((one, one), (one, other), (other, other))]
    return (pairs[0] - 2 * pairs[1] + pairs[2]) / pairs[2]


def test_factor_of_the_truth_is_the_target() -> None:
    for task in (Task(), Task(wavefront="spherical", symbols="per_snapshot")):
        scenes = simulate(task, 16, SceneGenerator(6, "test"))
        assert nmse(factor_of(task, Sources.of_scenes(scenes)), scenes).max() < 1e-6


def test_least_squares_of_one_source_errs_as_theory_says() -> None:
    """eps = 2.4 (N - 1)/(L M SNR), NMSE = 2 eps/(1 + eps) for RIS-12x12 with static symbols."""
    for snr_db in (5.0, 15.0):
        task = Task(max_sources=1, snr_min_db=snr_db, snr_max_db=snr_db)
        scenes = simulate(task, 64, SceneGenerator(6, "test"))
        eps = 2.4 * (task.elements - 1) / (task.snapshots * task.bs_antennas * 10 ** (snr_db / 10))
        found = nmse(least_squares(task, scenes).factor, scenes).mean().item()
        assert found == pytest.approx(2 * eps / (1 + eps), rel=0.12)


@pytest.mark.parametrize("symbols", ["static", "per_snapshot"])
def test_least_squares_explains_the_measurement(symbols: str) -> None:
    """With fewer measurements than elements wholly, with more as far as anything can."""
    task = Task(symbols=symbols)
    scenes = simulate(task, 8, SceneGenerator(6, "test"))
    factor = least_squares(task, scenes).factor
    assert factor.shape == (8, task.elements, 1 if symbols == "static" else task.snapshots, 2)
    if symbols == "static":
        left = scenes.snapshots - sense(scenes.channel, scenes.codes, factor[:, :, 0])
        assert (power(left).sum((1, 2)) < power(scenes.snapshots).sum((1, 2)) / (1 + 10 ** (scenes.snr_db / 10))).all()
    else:
        for snapshot in range(3):
            seen = sense(scenes.channel, scenes.codes, factor[:, :, snapshot])[:, snapshot]
            torch.testing.assert_close(seen, scenes.snapshots[:, snapshot], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("symbols", ["static", "per_snapshot"])
def test_every_opponent_answers_and_a_better_one_errs_less(symbols: str) -> None:
    task = Task(max_sources=2, snr_min_db=10.0, snr_max_db=10.0, symbols=symbols)
    scenes = simulate(task, 32, SceneGenerator(6, "test"))
    answers = {name: opponent(name, task, scenes) for name in OPPONENTS}
    error = {name: nmse(answer.factor, scenes).mean() for name, answer in answers.items()}
    assert error["blind_likelihood"] < 0.05 and error["omp"] < 0.05
    assert error["omp"] < error["lmmse"] < error["least_squares"]
    assert {name for name, answer in answers.items() if answer.sources is not None} == {"omp", "blind_likelihood"}


def test_wrong_names_and_scenes_without_channel_are_refused() -> None:
    task = Task()
    scenes = simulate(task, 2, SceneGenerator(6, "test"))
    with pytest.raises(ValueError, match="there is no 'music', expected one of least_squares"):
        opponent("music", task, scenes)
    with pytest.raises(ValueError, match="omp needs the channel"):
        opponent("omp", task, replace(scenes, channel=None))
