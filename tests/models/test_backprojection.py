"""The default network: its solver, its pursuit and its features obey their laws, and every parameter learns."""

from __future__ import annotations

import pytest
import torch

from ris_fast.config.schema import ConfigError, Task
from ris_fast.kernels.cov_nmse.op import cov_nmse
from ris_fast.kernels.pursuit.reference import WORKING_SNR_DB
from ris_fast.kernels.pursuit.search import TANGENTS, Geometry, Pursuit, normal_equations
from ris_fast.kernels.pursuit.solve import spd_solve
from ris_fast.models import build_model
from ris_fast.models.pursuit import geometry_of
from ris_fast.models.simultaneous_pursuit import features_for
from ris_fast.physics.array import RISArray, cosine_steering
from ris_fast.physics.random import SceneGenerator
from ris_fast.physics.scenes import Scenes, simulate

SMALL = Task(bs_antennas=8, ris_horizontal=8, ris_vertical=6, snapshots=12, max_sources=3)


def scenes_of(task: Task, count: int, split: str = "test") -> Scenes:
    return simulate(task, count, SceneGenerator(3, split))


def inputs_of(scenes: Scenes) -> tuple[torch.Tensor, ...]:
    return scenes.snapshots, scenes.channel, scenes.codes, scenes.snr_db


def pursuit_of(task: Task, stages: int, dtype: torch.dtype = torch.float32) -> Pursuit:
    geometry, wavenumber = geometry_of(task)
    return Pursuit(Geometry(*(each.to(dtype) for each in geometry)), wavenumber, stages)


def atoms_alone(model: torch.nn.Module, scenes: Scenes) -> torch.Tensor:
    """The factor of the pursuit without the network: s_k a_k."""
    return model.extract.sources(model.features(*inputs_of(scenes)))


@pytest.mark.parametrize("size", [1, 2, 7, 25])
def test_spd_solve_equals_the_dense_solution(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    root = torch.randn(4, size, size + 3, generator=generator, dtype=torch.float64)
    matrix, rhs = root @ root.mT, torch.randn(4, size, generator=generator, dtype=torch.float64)
    ridge = torch.rand(4, size, generator=generator, dtype=torch.float64)
    expected = torch.linalg.solve(matrix + torch.diag_embed(ridge), rhs)
    torch.testing.assert_close(spd_solve(matrix.permute(1, 2, 0), rhs.T, ridge.T).T, expected)


def test_spd_solve_stays_finite_for_equal_atoms() -> None:
    ones = torch.ones(3, 3, 1)
    assert spd_solve(ones, torch.ones(3, 1), torch.zeros(3, 1)).isfinite().all()


def test_normal_equations_equal_the_stacked_operator() -> None:
    scenes = scenes_of(SMALL, 3)
    y, h, c = (torch.view_as_complex(each.double()) for each in (scenes.snapshots, scenes.channel, scenes.codes))
    stacked = (h[:, None] * c[None, :, None]).flatten(1, 2)
    gram, moment = stacked.mH @ stacked, (stacked.mH @ y.flatten(1)[..., None])[..., 0]
    normal = normal_equations(
        *inputs_of(scenes.apply(lambda t: t.double() if t.is_floating_point() else t, codes=True))
    )
    real, imag = normal.gram.chunk(2, dim=2)
    ours = torch.complex(real, -imag)
    scale = torch.diagonal(gram, dim1=1, dim2=2).real.mean(1)
    torch.testing.assert_close(ours, gram / scale[:, None, None])
    level = y.abs().square().mean((1, 2))
    torch.testing.assert_close(torch.view_as_complex(normal.moment), moment / (scale * level).sqrt()[:, None])


@pytest.mark.parametrize("wavefront", ["fresnel", "spherical"])
def test_pursuit_tangents_are_derivatives_of_the_steering(wavefront: str) -> None:
    task = Task(wavefront=wavefront)
    pursuit, array = pursuit_of(task, 0, torch.float64), RISArray.of(task)
    place = torch.tensor([[[0.3, -0.2, 0.7], [-0.8, 0.4, 1.9], [0.1, 0.1, 0.1]]], dtype=torch.float64)
    planes = pursuit.tangents(place).unflatten(2, (2, 3, TANGENTS))[0]
    ours = torch.complex(planes[:, 0], planes[:, 1])

    def steer(at: torch.Tensor) -> torch.Tensor:
        return torch.view_as_complex(cosine_steering(array, at[0, :, 0], at[0, :, 1], 1 / at[0, :, 2])).T

    torch.testing.assert_close(ours[..., 0], steer(place), rtol=0, atol=1e-6)  # positions are kept in float32
    for axis in range(3):
        nudge = 1e-6 * torch.nn.functional.one_hot(torch.tensor(axis), 3)
        slope = (steer(place + nudge) - steer(place - nudge)) / 2e-6 / pursuit.scale[axis]
        slope = slope - steer(place) * (steer(place).conj() * slope).sum(0)  # the phase common to all elements
        torch.testing.assert_close(ours[..., axis + 1], slope, rtol=0, atol=1e-5)


def test_pursuit_finds_a_single_source_without_noise() -> None:
    task = Task(max_sources=1, snr_min_db=60.0, snr_max_db=60.0)
    scenes = scenes_of(task, 64)
    y, h, c, snr_db = inputs_of(scenes)
    found = pursuit_of(task, 2)(normal_equations(y, h, c, snr_db.clamp(*WORKING_SNR_DB)))
    u = scenes.azimuth[:, 0].sin() * scenes.elevation[:, 0].cos()
    truth = torch.stack((u, scenes.elevation[:, 0].sin(), 1 / scenes.range_m[:, 0]), dim=1)
    strongest = found.amplitude.square().sum(1).argmax(1)
    gap = (found.position[torch.arange(64), strongest] - truth).abs().median(0).values
    assert gap.max() < 0.01


def test_pursuit_alone_beats_every_baseline() -> None:
    scenes = scenes_of(Task(), 256)
    assert cov_nmse(atoms_alone(build_model("backprojection", Task()), scenes), target_factor=scenes.factor) < 0.06


def test_backprojection_ignores_scale_and_phase_of_a_scene() -> None:
    model, scenes = build_model("backprojection", SMALL, width=16), scenes_of(SMALL, 8)
    y, h, c, snr = inputs_of(scenes)
    turned = torch.stack((-y[..., 1], y[..., 0]), dim=-1) * 1e-3
    first, second = model(y, h, c, snr).factor, model(turned, h, c, snr).factor
    torch.testing.assert_close(
        cov_nmse(first, target_factor=second.detach(), reduction="none"), torch.zeros(8), rtol=0, atol=1e-3
    )


def test_backprojection_does_not_mix_scenes_of_a_batch() -> None:
    model, scenes = build_model("backprojection", SMALL, width=16), scenes_of(SMALL, 6)
    whole, part = model(*inputs_of(scenes)).factor, model(*inputs_of(scenes[2:4])).factor
    torch.testing.assert_close(whole[2:4], part, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("task", [Task(), SMALL, Task(wavefront="spherical", max_sources=2)])
def test_backprojection_covariance_reaches_every_parameter(task: Task) -> None:
    model, scenes = build_model("backprojection", task, width=32), scenes_of(task, 8)
    factor = model(*inputs_of(scenes)).factor
    assert factor.shape == (8, task.elements, 2 * task.max_sources, 2)
    cov_nmse(factor, target_factor=scenes.factor).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_backprojection_learns_in_40_steps() -> None:
    torch.manual_seed(0)
    model = build_model("backprojection", SMALL, width=64)
    train, held = scenes_of(SMALL, 512, "train"), scenes_of(SMALL, 256, "val")
    features, held_features = model.features(*inputs_of(train)), model.features(*inputs_of(held))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    start = cov_nmse(model.trunk(held_features).factor, target_factor=held.factor)
    for _ in range(40):
        optimizer.zero_grad()
        cov_nmse(model.trunk(features).factor, target_factor=train.factor).backward()
        optimizer.step()
    end = cov_nmse(model.trunk(held_features).factor, target_factor=held.factor)
    assert start > 0.7 and end < 0.5 * start


def test_backprojection_features_do_not_depend_on_threads() -> None:
    model, scenes, threads = (
        build_model("backprojection", SMALL, width=16),
        scenes_of(SMALL, 300),
        torch.get_num_threads(),
    )
    try:
        torch.set_num_threads(2)
        two = model.features(*inputs_of(scenes))
        torch.set_num_threads(1)
        one = model.features(*inputs_of(scenes))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one.inputs, two.inputs) and torch.equal(one.basis, two.basis)


def test_backprojection_refuses_products_of_channel_and_code() -> None:
    scenes = scenes_of(SMALL, 2)
    with pytest.raises(ValueError, match="cannot carry the answer"):
        build_model("backprojection", SMALL)(scenes.snapshots, scenes.snapshots, scenes.codes, scenes.snr_db)


def test_backprojection_refuses_a_width_of_zero() -> None:
    with pytest.raises(ConfigError, match="width 0"):
        build_model("backprojection", SMALL, width=0)


def test_pursuit_features_pass_opcheck() -> None:
    model, scenes = build_model("backprojection", SMALL, width=16), scenes_of(SMALL, 3)
    constants = list(model.extract.geometry())
    torch.library.opcheck(
        torch.ops.ris_fast.pursuit_features.default,
        (*inputs_of(scenes), constants, model.extract.wavenumber, model.extract.atoms),
    )


def test_pursuit_answers_with_the_order_of_least_description_length() -> None:
    scenes = scenes_of(Task(), 256)
    features = features_for(Task())
    found = features(*inputs_of(scenes))
    order, sources = features.order(found), features.sources(found)
    assert ((sources.square().sum((1, 3)) > 0).sum(1) == order).all()
    assert order.min() >= 1 and order.max() <= 5
    every, chosen = (cov_nmse(each, target_factor=scenes.factor) for each in (features.atom_columns(found), sources))
    assert chosen < 0.8 * every


def test_pursuit_of_one_strong_source_answers_with_one() -> None:
    task = Task(max_sources=3, snr_min_db=20.0)
    scenes = scenes_of(task, 128)
    features = features_for(task)
    order = features.order(features(*inputs_of(scenes)))
    assert (order[scenes.count == 1] == 1).float().mean() > 0.9
