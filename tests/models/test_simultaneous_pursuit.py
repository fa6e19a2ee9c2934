"""The pursuit for symbols of every snapshot: what it finds, and what its features must not depend on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ris_fast.config.schema import Task
from ris_fast.kernels.pursuit.solve import spd_solve
from ris_fast.models import build_model, simultaneous_pursuit
from ris_fast.models.prediction import Prediction
from ris_fast.models.simultaneous_pursuit import SimultaneousFeatures, SimultaneousPursuit, inverse_cholesky
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


def test_simultaneous_features_of_no_scenes_are_empty() -> None:
    features = SimultaneousFeatures(SMALL, SMALL.max_sources)
    found = features(*(each[:0] for each in inputs_of(scenes_of(2).with_own_codes())))
    assert found.inputs.shape == (0, features.width) and found.basis.shape == (0, SMALL.elements, 2 * features.rank)


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


def test_inverse_cholesky_is_the_inverse_of_the_lower_triangular_factor() -> None:
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(2, 3, 5, 9, dtype=torch.complex128, generator=generator)
    gram, ridge = root @ root.mH, torch.tensor([0.1, 2.0], dtype=torch.float64)
    loaded = gram + ridge[:, None, None, None] * torch.eye(5)
    torch.testing.assert_close(inverse_cholesky(gram, ridge), torch.linalg.inv(torch.linalg.cholesky(loaded)))


def test_inverse_cholesky_of_equal_atoms_is_finite() -> None:
    gram = torch.ones(1, 1, 3, 3, dtype=torch.complex64)
    assert torch.view_as_real(inverse_cholesky(gram, torch.zeros(1))).isfinite().all()


def test_simultaneous_search_by_factors_is_the_search_by_dictionary() -> None:
    scenes = scenes_of(5)
    by_factors, by_dictionary = (SimultaneousFeatures(SMALL, SMALL.max_sources) for _ in range(2))
    by_dictionary.along_x = by_dictionary.along_x[:0]  # an array that is no rectangle has no factors
    by_dictionary._complete()
    assert not by_factors.dictionary.shape[1] and by_dictionary.dictionary.shape[1]
    back, found = torch.randn(5, 12, 48, 2, generator=torch.Generator().manual_seed(0)), []
    for features in (by_factors, by_dictionary):
        pursuit = SimultaneousPursuit(features, *(each[:5] for each in inputs_of(scenes.with_own_codes())))
        search = pursuit._by_dictionary if pursuit.factors is None else pursuit._by_factors
        found.append(search(back, *(pursuit.factors or ())))
    torch.testing.assert_close(found[0], SMALL.elements * found[1])  # factors have entries of modulus one


@pytest.mark.parametrize("changes", [{}, {"wavefront": "spherical"}])
def test_simultaneous_step_has_the_slope_and_the_information_of_its_cost(changes: dict[str, str]) -> None:
    """The slope against finite differences of the cost of ridge least squares; the information against the projector
    formed as a matrix. In float64."""
    task = replace(SMALL, **changes)
    scenes = simulate(task, 2, SceneGenerator(3, "test"))
    features = SimultaneousFeatures(task, 2).eval()
    inputs = [each.double() for each in inputs_of(scenes.with_own_codes())]
    for name, value in features.named_buffers():
        setattr(features, name, value.double())
    pursuit = SimultaneousPursuit(features, *inputs)
    middle = (pursuit.search.low + pursuit.search.high) / 2
    position = middle + torch.tensor([[0.2, 0.1, -0.3], [-0.3, 0.05, 0.2]], dtype=torch.float64).expand(2, 2, 3)

    def weighted(at: torch.Tensor) -> torch.Tensor:  # its square is the cost: residual, and the ridge's share of it
        fit = pursuit._fit(pursuit._images(at, 1)[..., 0, :])
        share = pursuit.ridge.sqrt()[:, None, None] * fit.amplitude
        return torch.view_as_real(torch.cat((fit.residual.flatten(1), share.flatten(1)), 1)).flatten(1)

    step = 1e-6 / pursuit.search.scale
    gradient = torch.zeros(2, 2, 3, dtype=torch.float64)
    for k in range(2):
        for axis in range(3):
            moved = position.clone()
            moved[:, k, axis] += step[axis]
            back = position.clone()
            back[:, k, axis] -= step[axis]
            change = weighted(moved).square().sum(1) - weighted(back).square().sum(1)
            gradient[:, k, axis] = -change / 4e-6  # half the slope of the cost, downhill
    images = pursuit._images(position)
    fit = pursuit._fit(images[..., 0, :])
    jacobian = images[..., 1:, :] * fit.amplitude[:, :, None, None]  # (B, L, M, 3, K)
    slope = (jacobian.conj() * fit.residual[..., None, None]).sum((1, 2)).real.mT
    torch.testing.assert_close(slope, gradient, rtol=1e-4, atol=1e-6)
    loaded = fit.steer.mH @ fit.steer + pursuit.ridge[:, None, None, None] * torch.eye(2)
    left = jacobian.flatten(3) - fit.steer @ torch.linalg.solve(loaded, fit.steer.mH @ jacobian.flatten(3))
    information = (jacobian.flatten(3).conj() * left).sum((1, 2)).real.unflatten(1, (3, 2)).mT
    found = pursuit._refined(position, images, fit)[1] * pursuit.noise[:, None, None]
    torch.testing.assert_close(found, information)


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
