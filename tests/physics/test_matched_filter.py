"""The matched filter as a baseline: its NMSE is that of the dense covariances, whatever form the target has."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ris_fast.config.schema import Task
from ris_fast.physics.baselines import mean_covariance
from ris_fast.physics.channel import backproject
from ris_fast.physics.matched_filter import matched_filter, shrunk_nmse
from ris_fast.physics.random import SceneGenerator
from ris_fast.physics.real_complex import to_complex, to_pairs
from ris_fast.physics.scenes import simulate

TASK = Task(ris_horizontal=4, ris_vertical=3, bs_antennas=4, snapshots=8)


def dense(factor: torch.Tensor) -> torch.Tensor:
    """F F^H of trace N, complex128."""
    f = to_complex(factor.double())
    r = f @ f.mH
    return r * (f.shape[1] / r.diagonal(dim1=1, dim2=2).sum(-1).real)[:, None, None]


@pytest.mark.parametrize("stored", ["factor", "covariance"])
@pytest.mark.parametrize("static", [True, False])
def test_shrunk_nmse_of_matched_filter_is_the_dense_one(static: bool, stored: str) -> None:
    scenes = simulate(TASK, 64, SceneGenerator(0, "val"))
    factor = matched_filter(backproject(scenes.channel, scenes.codes, scenes.snapshots), static)
    constant, target, estimate = mean_covariance([scenes]), dense(scenes.factor), dense(factor)
    mean = to_complex(constant)
    weight = target.abs().square().sum((1, 2))
    share = (((estimate - mean).conj() * (target - mean)).sum((1, 2)).real / weight).sum() / (
        (estimate - mean).abs().square().sum((1, 2)) / weight
    ).sum()
    expected = (mean + share * (estimate - mean) - target).abs().square().sum((1, 2)) / weight
    if stored == "covariance":
        scenes = replace(scenes, factor=None, covariance=to_pairs(target))
    shrunk, alone = shrunk_nmse(factor, scenes, constant)
    torch.testing.assert_close(shrunk, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(alone, (mean - target).abs().square().sum((1, 2)) / weight, rtol=1e-5, atol=1e-6)
    assert shrunk.mean() < alone.mean()
