"""Codes a scene, (B, L, N, 2), mean what each scene alone with its codes (L, N, 2) means: in every network, estimator
and operator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ris_fast.config.schema import Loss, Task
from ris_fast.health.preflight.inputs import hidden_change
from ris_fast.kernels.native import loader
from ris_fast.models import build_model
from ris_fast.physics.baselines import baselines, mean_covariance
from ris_fast.physics.channel import backproject, effective_channel, sense
from ris_fast.physics.least_squares import least_squares_factor
from ris_fast.physics.matched_filter import least_squares_channel
from ris_fast.physics.random import SceneGenerator
from ris_fast.physics.real_complex import expi, to_complex
from ris_fast.physics.scenes import Scenes, simulate
from ris_fast.training.loss import CovarianceLoss

TASK = Task(bs_antennas=6, ris_horizontal=5, ris_vertical=4, snapshots=7, max_sources=2, snr_min_db=10.0)
HYBRID = {"width": 32, "layers": 1, "heads": 2, "feedforward": 32, "grid": 5}


def drawn(scenes: int, task: Task = TASK) -> Scenes:
    phases = 6.2832 * torch.rand(scenes, task.snapshots, task.elements, generator=torch.Generator().manual_seed(1))
    return simulate(task, scenes, SceneGenerator(3, "train"), codes=expi(phases))


def network(name: str, **options: object) -> Callable[[Scenes], Tensor]:
    torch.manual_seed(0)
    model = build_model(name, TASK, **options).eval()
    return lambda s: model(s.snapshots, s.channel, s.codes, s.snr_db).factor.detach()


WHO = {
    "sense": lambda: lambda s: sense(s.channel, s.codes, s.factor[:, :, 0]),
    "backproject": lambda: lambda s: backproject(s.channel, s.codes, s.snapshots),
    "effective channel": lambda: lambda s: effective_channel(s.channel, s.codes),
    "simulate": lambda: lambda s: simulate(TASK, s.index, SceneGenerator(3, "train"), codes=s.codes).snapshots,
    "least squares": lambda: least_squares_factor,
    "least-squares channel": lambda: lambda s: least_squares_channel(effective_channel(s.channel, s.codes), s.codes),
    "backprojection": lambda: network("backprojection", width=32, depth=1),
    "hybrid": lambda: network("hybrid", **HYBRID),
    "hybrid, effective channel": lambda: network("hybrid", inputs="effective_channel", **HYBRID),
    "loss with a blend": lambda: (
        lambda s: CovarianceLoss(Loss(beta=0.3), TASK).nmse(s.factor.roll(1, 1), s, blend=True)
    ),
}


@pytest.mark.parametrize("compiler", [True, False], ids=["C++", "torch"])
@pytest.mark.parametrize("who", WHO)
def test_codes_per_scene_equal_each_scene_alone(who: str, compiler: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiler:
        monkeypatch.setattr(loader, "available", lambda: False)
    scenes, answer = drawn(4), WHO[who]()
    together = answer(scenes)
    alone = torch.cat([answer(replace(scenes[row : row + 1], codes=scenes.codes[row])) for row in range(4)])
    # conjugate gradients at 10 dB magnify the rounding of float32 to 2e-3 of a field
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-3 * float(alone.abs().max()))
    other = answer(replace(scenes, codes=scenes.codes.roll(1, 0)))
    assert (other - together).norm() > 1e-2 * together.norm()


def test_with_own_codes_changes_no_bit() -> None:
    scenes = simulate(TASK, 5, SceneGenerator(3, "train"))
    for who in ("backprojection", "hybrid", "simulate"):
        answer = WHO[who]()
        assert torch.equal(answer(scenes), answer(scenes.with_own_codes())), who


def test_scenes_rows_and_concatenate_carry_their_codes() -> None:
    scenes, shared = drawn(6), simulate(TASK, 2, SceneGenerator(3, "train"))
    rows = torch.tensor([4, 1])
    assert torch.equal(scenes[rows].codes, scenes.codes[rows])
    joined = Scenes.concatenate([scenes[rows], shared, scenes[:1]])
    assert joined.batch == 5 and torch.equal(
        joined.codes, torch.cat((scenes.codes[rows], shared.codes.expand(2, -1, -1, -1), scenes.codes[:1]))
    )
    assert scenes.to("meta").codes.device.type == "meta"
    assert torch.equal(scenes.apply(lambda value: value[:1]).codes, scenes.codes[:1])


def test_baselines_do_not_depend_on_the_codes() -> None:
    scenes = drawn(8)
    shared = replace(scenes, codes=scenes.codes[0])
    assert baselines(mean_covariance([scenes]), [scenes]) == baselines(mean_covariance([shared]), [shared])


def test_hidden_change_keeps_the_effective_channel() -> None:
    scenes = drawn(3)
    hidden = hidden_change(scenes)
    assert (hidden.channel - scenes.channel).norm() > 0.1 * scenes.channel.norm()
    torch.testing.assert_close(
        effective_channel(hidden.channel, scenes.codes),
        effective_channel(scenes.channel, scenes.codes),
        atol=1e-5,
        rtol=1e-4,
    )


def test_simulate_uses_the_given_codes() -> None:
    quiet = drawn(3, replace(TASK, snr_min_db=110.0, snr_max_db=120.0, max_sources=1))
    field = quiet.factor[:, :, 0]
    clean, given = (
        to_complex(sense(quiet.channel, quiet.codes, field)).flatten(1),
        to_complex(quiet.snapshots).flatten(1),
    )
    assert ((clean.conj() * given).sum(1).abs() / (clean.norm(dim=1) * given.norm(dim=1)) - 1).abs().max() < 1e-4


def test_simulate_takes_complex_codes_and_names_other_shapes() -> None:
    scenes, generator = drawn(2), SceneGenerator(3, "train")
    assert torch.equal(simulate(TASK, 2, generator, codes=to_complex(scenes.codes)).snapshots, scenes.snapshots)
    with pytest.raises(
        ValueError, match=r"simulate: codes is \(2, 6, 20, 2\), expected \(7, 20, 2\) .* or \(2, 7, 20, 2\)"
    ):
        simulate(TASK, 2, generator, codes=scenes.codes[:, :6])
    with pytest.raises(TypeError, match="simulate: codes is a list"):
        simulate(TASK, 2, generator, codes=[1.0])
