"""Phase errors and errors of the channel estimate: what they change in a scene, what they leave, and how large they
are."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import pytest
import torch

from ris_fast.config.schema import Task
from ris_fast.health.preflight.pairing import as_believed, belonging
from ris_fast.health.preflight.snr import as_measured, labels_differ
from ris_fast.physics.miscalibration import phase_errors, true_codes
from ris_fast.physics.random import SceneGenerator
from ris_fast.physics.real_complex import expi, multiply, power
from ris_fast.physics.scenes import Scenes, simulate, task_codes

SMALL = Task(bs_antennas=8, ris_horizontal=8, ris_vertical=6, snapshots=8, max_sources=3)
TRAIN = SceneGenerator(3, "train")


def differing(one: Scenes, other: Scenes) -> set[str]:
    """Names of the fields that are not the same bit for bit."""
    pairs = ((item.name, getattr(one, item.name), getattr(other, item.name)) for item in fields(Scenes))
    return {name for name, a, b in pairs if a is not None and not torch.equal(a, b)}


@pytest.mark.parametrize("surface", [0, 7])
@pytest.mark.parametrize("symbols", ["static", "per_snapshot"])
def test_phase_errors_change_the_snapshots_alone(symbols: str, surface: int) -> None:
    task = replace(SMALL, symbols=symbols, phase_error_surface=surface)
    off, on = (simulate(replace(task, phase_error_deg=deg), 20, TRAIN) for deg in (0.0, 10.0))
    assert differing(off, on) == {"snapshots"}


@pytest.mark.parametrize("surface", [0, 7])
def test_phase_errors_act_as_codes_that_nobody_is_told(surface: int) -> None:
    task = replace(SMALL, phase_error_deg=15.0, phase_error_surface=surface)
    index = torch.arange(9)
    shown = true_codes(task, task_codes(task, "cpu"), index, TRAIN)
    told = simulate(SMALL, index, TRAIN, codes=shown)
    assert torch.equal(simulate(task, index, TRAIN).snapshots, told.snapshots)
    turned = multiply(task_codes(task, "cpu"), expi(phase_errors(task, index, TRAIN))[..., None, :, :])
    torch.testing.assert_close(turned, shown)


def test_phase_errors_have_their_rms() -> None:
    task = replace(SMALL, phase_error_deg=12.0)
    drawn = phase_errors(task, torch.arange(4000), TRAIN)
    assert drawn.shape == (4000, 48) and abs(float(drawn.mean())) < 0.002
    assert float(drawn.square().mean().sqrt()) == pytest.approx(math.radians(12.0), rel=0.01)
    assert float((drawn[:, 0] * drawn[:, 1]).mean()) < 0.05 * math.radians(12.0) ** 2


def test_phase_errors_of_a_surface_are_those_of_every_scene_split_and_seed() -> None:
    def errors(surface: int, generator: SceneGenerator, first: int = 0) -> torch.Tensor:
        task = replace(SMALL, phase_error_deg=10.0, phase_error_surface=surface)
        return phase_errors(task, torch.arange(first, first + 4), generator)

    assert torch.equal(errors(5, TRAIN), errors(5, SceneGenerator(8, "test"), 90)) and errors(5, TRAIN).shape == (48,)
    assert not torch.equal(errors(5, TRAIN), errors(6, TRAIN))
    own = errors(0, TRAIN)
    assert len(own.unique(dim=0)) == 4 and torch.equal(own[2:], errors(0, TRAIN, 2)[:2])
    assert not torch.equal(own, errors(0, SceneGenerator(3, "val")))


@pytest.mark.parametrize("snr_db", [10.0, 30.0])
def test_channel_error_has_its_snr_and_changes_the_channel_alone(snr_db: float) -> None:
    off, on = (simulate(replace(SMALL, channel_snr_db=each), 400, TRAIN) for each in (0.0, snr_db))
    assert differing(off, on) == {"channel"}
    error = on.channel - off.channel
    ratio = power(error).mean((1, 2)) / power(off.channel).mean((1, 2))
    assert float(10 * ratio.mean().log10()) == pytest.approx(-snr_db, abs=0.1)
    assert float(ratio.std() / ratio.mean()) == pytest.approx(384**-0.5, rel=0.2)  # M N independent numbers a scene
    assert abs(float((error * off.channel).sum() / (error.norm() * off.channel.norm()))) < 0.01


def test_channel_error_of_a_scene_does_not_depend_on_its_batch() -> None:
    task = replace(SMALL, channel_snr_db=20.0, phase_error_deg=10.0)
    together, alone = simulate(task, 6, TRAIN), simulate(task, torch.tensor([4]), TRAIN)
    assert torch.equal(together.channel[4:5], alone.channel)
    torch.testing.assert_close(together.snapshots[4:5], alone.snapshots, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("symbols", ["static", "per_snapshot"])
def test_believed_snr_is_what_nominal_codes_and_channel_explain(symbols: str) -> None:
    task = replace(SMALL, phase_error_deg=25.0, channel_snr_db=15.0, symbols=symbols, snr_min_db=10.0)
    scenes = simulate(task, 400, TRAIN)
    assert belonging(as_believed(scenes, task), symbols == "static").group()[0] == pytest.approx(1.0, abs=0.02)
    assert belonging(scenes, symbols == "static").group()[0] < 0.85
    assert labels_differ("test", as_believed(scenes, task), symbols == "static")[0] is None
    assert labels_differ("test", scenes, symbols == "static")[0] is not None


def test_labels_of_scenes_without_the_errors_of_the_task_are_right() -> None:
    """As of files that were made with exact codes, described by a task with phase errors."""
    exact = replace(SMALL, snr_min_db=10.0, snr_max_db=30.0)
    task, scenes = replace(exact, phase_error_deg=10.0), simulate(exact, 200, TRAIN)
    assert labels_differ("test", as_believed(scenes, task), True)[0] is not None
    assert labels_differ("test", as_measured("test", scenes, task), True)[0] is None
    wrong = replace(scenes, snr_db=scenes.snr_db.flip(0))
    assert labels_differ("test", as_measured("test", wrong, task), True)[0] is not None
