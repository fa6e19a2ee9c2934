"""The pursuit for symbols of every snapshot: what it finds, and what its features must not depend on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ris_fast.config.schema import Task
from ris_fast.kernels.pursuit.solve import spd_solve
from ris_fast.models import build_model, simultaneous_pursuit
from ris_fast.models.prediction import Prediction
from ris_fast.models.simultaneous_pursuit import SimultaneousFeatures, _eliminated
from ris_fast.physics.random import SceneGenerator
from ris_fast.physics.scenes import Scenes, simulate
from ris_fast.training.validation import scene_nmse

SMALL = Task(bs_antennas=8, ris_horizontal=8, ris_vertical=6, snapshots=12, max_sources=3, symbols="per_snapshot")


def scenes_of(count: int, **changes: float) -> Scenes:
    return simulate(replace(SMALL, **changes), count, SceneGenerator(3, "test"))


def inputs_of(scenes: Scenes) -> tuple[torch.Tensor, ...]:
    return scenes.snapshots, scenes.channel, scenes.codes, scenes.snr_db


def test_simultaneous_features_find_sources_at_high_snr() -> None:
    scenes = scenes_of(200, snr_min_db=20.0, snr_max_db=20.0)
    features = SimultaneousFeatures(SMALL, SMALL.max_sources)
    nmse = scene_nmse(Prediction(features.sources(features(*inputs_of(scenes)))), scenes)
    assert nmse.median() < 0.005 and nmse.mean() < 0.1


@pytest.mark.parametrize("unit", [1e-20, 1e-3, 1e20])
def test_simultaneous_features_ignore_unit_and_phase(unit: float) -> None:
    scenes = scenes_of(16)
    features = SimultaneousFeatures(SMALL, SMALL.max_sources)
    turns = torch.polar(torch.ones(16, 12, 1), 6.28 * torch.rand(16, 12, 1, generator=torch.Generator().manual_seed(0)))
    turned = torch.view_as_real(torch.view_as_complex(scenes.snapshots) * turns * unit)
    for a, b in zip(features(*inputs_of(scenes)), features(turned, *inputs_of(scenes)[1:])):
        assert (a - b).norm() < 1e-3 * a.norm()


def test_simultaneous_features_of_zeros_have_no_basis() -> None:
    scenes = scenes_of(3)
    features = SimultaneousFeatures(SMALL, SMALL.max_sources)(scenes.snapshots * 0, *inputs_of(scenes)[1:])
    assert features.inputs.isfinite().all() and not features.basis.any()


def test_simultaneous_features_are_the_same_scene_by_scene(monkeypatch: pytest.MonkeyPatch) -> None:
    scenes = scenes_of(6)
    features = SimultaneousFeatures(SMALL, SMALL.max_sources)
    together = features(*inputs_of(scenes))
    monkeypatch.setattr(simultaneous_pursuit, "CHUNK_BYTES", 1)
    alone = features(scenes.snapshots, scenes.channel, scenes.codes.expand(6, -1, -1, -1), scenes.snr_db)
    assert together.inputs.shape == (6, features.width) and together.basis.shape == (
        6,
        SMALL.elements,
        2 * features.rank,
    )
    for a, b in zip(together, alone):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_eliminated_is_the_schur_complement() -> None:
    generator = torch.Generator().manual_seed(0)
    root, right = torch.randn(5, 7, 9, generator=generator).double(), torch.randn(5, 7, generator=generator).double()
    matrix, ridge = root @ root.mT, torch.rand(5, 4, generator=generator).double()
    inner = matrix[:, :4, :4] + torch.diag_embed(ridge)
    solved = torch.linalg.solve(inner, torch.cat((matrix[:, :4, 4:], right[:, :4, None]), 2))
    expected = torch.cat((matrix[:, 4:, 4:], right[:, 4:, None]), 2) - matrix[:, 4:, :4] @ solved
    found = _eliminated(matrix.permute(1, 2, 0), right.T, ridge.T)
    torch.testing.assert_close(torch.cat((found[0], found[1][:, None]), 1).permute(2, 0, 1), expected)


def test_spd_solve_takes_several_right_sides() -> None:
    generator = torch.Generator().manual_seed(1)
    root, sides = torch.randn(4, 6, 6, generator=generator).double(), torch.randn(6, 3, 4, generator=generator).double()
    matrix, ridge = (root @ root.mT).permute(1, 2, 0), torch.rand(6, 4, generator=generator).double()
    one_by_one = torch.stack([spd_solve(matrix, sides[:, i], ridge) for i in range(3)], 1)
    torch.testing.assert_close(spd_solve(matrix, sides, ridge), one_by_one)


def test_backprojection_per_snapshot_reaches_every_parameter() -> None:
    scenes, model = scenes_of(8), build_model("backprojection", SMALL, width=32)
    scene_nmse(model(*inputs_of(scenes)), scenes).mean().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in model.parameters())
