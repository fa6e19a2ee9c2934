"""Laws of the simulated scenes, by Monte Carlo and by identity; scene i is scene i; splits never meet."""

from __future__ import annotations

import math

import pytest
import torch

from ris_fast.config.schema import Task
from ris_fast.physics.channel import backproject, effective_channel, sense
from ris_fast.physics.random import SceneGenerator
from ris_fast.physics.real_complex import matmul, power, to_complex
from ris_fast.physics.scenes import Scenes, simulate

TASK = Task()


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return simulate(TASK, 4096, SceneGenerator(seed=3, split="train"))


def operator(scenes: Scenes) -> torch.Tensor:
    """G, dense and complex128: (B, L*M, N)."""
    channel, codes = to_complex(scenes.channel.double()), to_complex(scenes.codes.double())
    return (channel[:, None] * codes[None, :, None]).flatten(1, 2)


def test_simulate_draws_within_the_ranges_of_the_task(scenes: Scenes) -> None:
    active = scenes.power > 0
    assert active.sum(1).equal(scenes.count)
    for k in range(1, 6):
        share = (scenes.count == k).float().mean().item()
        assert abs(share - 0.2) < 5 * math.sqrt(0.16 / 4096)
    assert scenes.azimuth.abs().max() <= math.radians(60) and scenes.elevation.abs().max() <= math.radians(30)
    assert 0.5 <= scenes.range_m[active].min() and scenes.range_m.max() <= 10
    assert scenes.range_m[~active].abs().max() == 0
    assert -5 <= scenes.snr_db.min() < -4.9 and 19.9 < scenes.snr_db.max() <= 20


def test_simulate_measured_snr_is_the_label(scenes: Scenes) -> None:
    static = _noise_free(scenes)
    noise = power(scenes.snapshots - static).mean((1, 2))
    ratio = power(static).mean((1, 2)) / noise / 10 ** (scenes.snr_db / 10)
    assert abs(ratio.log().mean().item()) < 5 / math.sqrt(256 * 4096)
    assert abs(ratio.log().std().item() - 1 / 16) < 0.005  # 256 complex noise samples a scene


def _noise_free(scenes: Scenes) -> torch.Tensor:
    """The clean snapshots of the same draws, from a twin task without noise."""
    quiet = Task(snr_min_db=120.0, snr_max_db=120.0)
    return simulate(quiet, scenes.index, SceneGenerator(seed=3, split="train")).snapshots


def test_simulate_channel_power_follows_the_rician_factor() -> None:
    kappa = 4.0
    task = Task(rician_min=kappa, rician_max=kappa)
    channel = to_complex(simulate(task, 2000, SceneGenerator(seed=5)).channel)
    total = channel.abs().square().sum((1, 2)).mean().item()
    assert total == pytest.approx(kappa / (kappa + 1) + 144 / (kappa + 1), rel=0.01)
    strong = simulate(Task(rician_min=1e6, rician_max=1e6), 64, SceneGenerator(seed=5)).channel
    torch.testing.assert_close(power(strong).sum((1, 2)), torch.ones(64), rtol=2e-3, atol=0)  # rank-one, unit norm


def test_scene_factor_has_the_power_and_rank_of_its_sources(scenes: Scenes) -> None:
    torch.testing.assert_close(power(scenes.factor).sum(1), scenes.power, rtol=1e-4, atol=1e-12)
    effective_rank = _effective_rank(scenes)
    for sources, expected in ((1, 1.0), (2, 1.4), (3, 1.7), (5, 2.2)):
        assert effective_rank[scenes.count == sources].mean().item() == pytest.approx(expected, abs=0.12)


def _effective_rank(scenes: Scenes) -> torch.Tensor:
    factor = to_complex(scenes.factor)
    gram = factor.mH @ factor
    return gram.diagonal(dim1=1, dim2=2).real.sum(-1).square() / gram.abs().square().sum((1, 2))


def test_simulate_source_power_is_path_loss_or_equal() -> None:
    generator = SceneGenerator(seed=7)
    near = simulate(Task(range_min_m=1.0, range_max_m=1.0), 3000, generator)
    far = simulate(Task(range_min_m=10.0, range_max_m=10.0), 3000, generator)
    torch.testing.assert_close(near.power, far.power * 100, rtol=1e-4, atol=0)
    equal = simulate(Task(power="equal"), 3000, generator).power
    assert equal[equal > 0].mean().item() == pytest.approx(1.0, abs=0.05)


def test_sense_and_backproject_are_their_dense_forms(scenes: Scenes) -> None:
    few = scenes[:4]
    g = operator(few)
    field, snapshots = torch.randn(4, 144, 2), torch.randn(4, 16, 16, 2)
    dense = (g @ to_complex(field.double())[..., None])[..., 0]
    torch.testing.assert_close(to_complex(sense(few.channel, few.codes, field)).flatten(1), dense.to(torch.complex64))
    matched = (g.mH @ to_complex(snapshots.double()).flatten(1)[..., None])[..., 0].to(torch.complex64)
    torch.testing.assert_close(to_complex(backproject(few.channel, few.codes, snapshots).sum(1)), matched)
    direct = torch.einsum("bmn,ln->blm", to_complex(few.channel), to_complex(few.codes))
    torch.testing.assert_close(to_complex(effective_channel(few.channel, few.codes)), direct)


def test_least_squares_recovers_the_field_at_high_snr() -> None:
    scenes = simulate(Task(snr_min_db=80.0, snr_max_db=80.0), 16, SceneGenerator(seed=2))
    estimate = torch.linalg.lstsq(
        operator(scenes), to_complex(scenes.snapshots.double()).flatten(1)[..., None]
    ).solution
    span = to_complex(scenes.factor.double())
    span = span / span.norm(dim=1, keepdim=True).clamp_min(1e-30)
    residual = estimate - span @ torch.linalg.lstsq(span, estimate, driver="gelsd").solution
    assert (residual.norm(dim=1) / estimate.norm(dim=1)).max() < 1e-3


@pytest.mark.parametrize("symbols", ["static", "per_snapshot"])
def test_simulate_scene_is_the_same_in_any_batch_or_order(symbols: str) -> None:
    task, generator = Task(symbols=symbols), SceneGenerator(seed=11, split="val")
    together = simulate(task, 40, generator)
    order = torch.tensor([39, 0, 17])
    alone = simulate(task, order, generator)
    for name in ("snapshots", "channel", "factor", "snr_db", "count", "azimuth", "range_m"):
        torch.testing.assert_close(getattr(alone, name), getattr(together, name)[order], rtol=1e-5, atol=1e-9)
    assert alone.count.equal(together.count[order]) and alone.azimuth.equal(together.azimuth[order])


def test_simulate_splits_and_seeds_never_share_a_scene() -> None:
    prints = [
        simulate(TASK, 3000, SceneGenerator(seed, split)).snapshots[:, 0, :2].flatten(1)
        for seed in (0, 1)
        for split in ("train", "val", "test")
    ]
    every = torch.cat(prints)
    assert every.unique(dim=0).shape == every.shape


def test_simulate_per_snapshot_symbols_change() -> None:
    quiet = {"snr_min_db": 120.0, "snr_max_db": 120.0, "max_sources": 1}
    static, moving = (
        simulate(Task(symbols=kind, **quiet), 32, SceneGenerator(4)) for kind in ("static", "per_snapshot")
    )
    for scenes, still in ((static, True), (moving, False)):
        field = sense(scenes.channel, scenes.codes, scenes.factor[:, :, 0])
        ratio = to_complex(scenes.snapshots)[:, :, 0] / to_complex(field)[:, :, 0]
        spread = (ratio - ratio[:, :1]).abs().amax(1) / ratio.abs().amax(1)
        assert (spread < 1e-3).all() if still else (spread > 0.05).all()


def test_simulate_empty_batch_has_shapes() -> None:
    empty = simulate(TASK, 0, SceneGenerator())
    assert empty.snapshots.shape == (0, 16, 16, 2) and empty.factor.shape == (0, 144, 5, 2)


def test_simulate_takes_other_sizes() -> None:
    task = Task(ris_horizontal=5, ris_vertical=3, bs_antennas=4, snapshots=9, max_sources=2, wavefront="spherical")
    scenes = simulate(task, 7, SceneGenerator())
    assert scenes.snapshots.shape == (7, 9, 4, 2) and scenes.channel.shape == (7, 4, 15, 2)


def test_matmul_is_the_complex_product() -> None:
    a, b = torch.randn(3, 4, 5, 2), torch.randn(3, 5, 6, 2)
    torch.testing.assert_close(to_complex(matmul(a, b)), to_complex(a) @ to_complex(b))


def test_scene_generator_names_a_wrong_split() -> None:
    with pytest.raises(ValueError, match="split is 'validation'"):
        SceneGenerator(split="validation")
