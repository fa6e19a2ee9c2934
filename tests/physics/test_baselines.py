"""The baselines are what the formulas say, and what a dense computation says."""

from __future__ import annotations

import pytest
import torch

from ris_fast.config.schema import Task
from ris_fast.physics.baselines import baselines, constant_nmse, mean_covariance, target_energy
from ris_fast.physics.random import SceneGenerator
from ris_fast.physics.real_complex import to_complex
from ris_fast.physics.scenes import simulate


def dense(factor: torch.Tensor) -> torch.Tensor:
    """Trace-N covariance, complex128 (B, N, N)."""
    s = to_complex(factor.double())
    cov = s @ s.mH
    return cov * (cov.shape[-1] / cov.diagonal(dim1=1, dim2=2).real.sum(-1))[:, None, None]


def test_baselines_of_the_standard_task() -> None:
    train = simulate(Task(), 2000, SceneGenerator(split="train"))
    validation = simulate(Task(), 2000, SceneGenerator(split="val"))
    found = baselines(mean_covariance([train]), [validation[:1500], validation[1500:]])
    assert found["zero"] == 1.0
    assert found["identity"] == pytest.approx(0.988, abs=0.003)
    assert found["mean"] == pytest.approx(0.980, abs=0.004)


def test_low_rank_baselines_are_the_dense_ones() -> None:
    scenes = simulate(Task(ris_horizontal=4, ris_vertical=4), 30, SceneGenerator())
    cov = dense(scenes.factor)
    torch.testing.assert_close(target_energy(scenes), cov.abs().square().sum((1, 2)))
    mean = mean_covariance([scenes[:10], scenes[10:]])
    torch.testing.assert_close(to_complex(mean), cov.mean(0))
    expected = (cov - cov.mean(0)).abs().square().sum((1, 2)) / cov.abs().square().sum((1, 2))
    torch.testing.assert_close(constant_nmse(mean, scenes), expected)


def test_baselines_of_a_dense_target_are_the_same() -> None:
    from dataclasses import replace

    scenes = simulate(Task(ris_horizontal=4, ris_vertical=4), 30, SceneGenerator())
    files = replace(scenes, factor=None, covariance=torch.view_as_real(3.0 * dense(scenes.factor)).float())
    assert baselines(mean_covariance([files]), [files]) == pytest.approx(
        baselines(mean_covariance([scenes]), [scenes]), rel=1e-5
    )


def test_mean_covariance_of_no_scenes_is_an_error() -> None:
    with pytest.raises(ValueError, match="no scenes"):
        mean_covariance([])
