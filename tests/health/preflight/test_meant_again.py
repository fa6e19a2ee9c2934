"""More of what is meant and looks like a mistake, and of mistakes that had another's name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from bench.faults.patches import on_batches
from ris_fast.health.preflight.probe import PreflightContext
from ris_fast.health.preflight.scene_parts import physics
from ris_fast.physics.scenes import Scenes
from ris_fast.training.trainer import Trainer
from tests.health.preflight.checking import small


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
    settings: dict[str, Any] = {"task.bs_antennas": 4, "task.ris_horizontal": 6, "task.ris_vertical": 5}
    trainer = Trainer(small("hybrid", **settings, **{"task.snapshots": 8, "training.batch_size": 256}))
    on_batches(trainer, change)
    found = list(physics(PreflightContext(trainer)))
    assert [each.cause for each in found] == named
    assert all(each.certain for each in found)
