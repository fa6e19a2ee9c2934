"""More of what is meant and looks like a mistake, and of mistakes that had another's name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from bench.faults.patches import on_batches
from ris_fast.health.preflight.distributions import distributions
from ris_fast.health.preflight.probe import PreflightContext
from ris_fast.health.preflight.scene_parts import physics
from ris_fast.physics.scenes import Scenes
from ris_fast.training.trainer import Trainer
from tests.health.preflight.checking import causes, small

SETTINGS: dict[str, Any] = {
    "task.bs_antennas": 4,
    "task.ris_horizontal": 6,
    "task.ris_vertical": 5,
    "task.snapshots": 8,
    "training.batch_size": 256,
}


def _inexact_labels(scenes: Scenes) -> Scenes:
    noise = torch.randn(scenes.batch, generator=torch.Generator().manual_seed(int(scenes.index.sum())))
    return replace(scenes, snr_db=scenes.snr_db + 1.5 * noise)


def _tenth_of_another(scenes: Scenes) -> Scenes:
    mixed = (scenes.index % 10 == 0).view(-1, 1, 1, 1)
    return replace(scenes, factor=torch.where(mixed, scenes.factor.roll(1, 0), scenes.factor))


@pytest.mark.parametrize(
    "change, named",
    [
        (_inexact_labels, []),
        (lambda scenes: replace(scenes, snr_db=scenes.snr_db + 6.0), ["snr_labels_differ"]),
        (_tenth_of_another, ["parts_unrelated"]),
    ],
    ids=["inexact labels", "6 dB too high", "other targets"],
)
def test_snr_labels_that_are_all_off_by_the_same_are_named_as_such(
    change: Callable[[Scenes], Scenes], named: list[str]
) -> None:
    trainer = Trainer(small("hybrid", **SETTINGS))
    on_batches(trainer, change)
    found = list(physics(PreflightContext(trainer)))
    assert [each.cause for each in found] == named
    assert all(each.certain for each in found)


def _bank(first: int, size: int, gain: float = 1.0, mean: float = 0.0) -> Callable[[Scenes], Scenes]:
    """Scenes with one of a few channels that were measured."""

    def change(scenes: Scenes) -> Scenes:
        channels = torch.randn(50, *scenes.channel.shape[1:], generator=torch.Generator().manual_seed(9))
        return replace(scenes, channel=gain * channels[first + scenes.index.cpu() % size] + mean)

    return change


@pytest.mark.parametrize(
    "channels, named",
    [
        (_bank(30, 10), []),
        (_bank(30, 3), []),
        (_bank(30, 10, gain=1.6), ["distributions_differ"]),
        (_bank(30, 10, mean=0.5), ["distributions_differ"]),
    ],
    ids=["ten others", "three others", "louder", "with a mean"],
)
def test_a_few_measured_channels_differ_between_splits(channels: Callable[[Scenes], Scenes], named: list[str]) -> None:
    trainer = Trainer(small("backprojection", **SETTINGS))
    on_batches(trainer, _bank(0, 30))
    on_batches(trainer, channels, "val")
    assert causes(distributions, trainer) == named
