"""Counts, places and powers beside the target; element orders; inputs that are kept by a key that two splits share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.faults.patches import on_batches
from ris_fast.health.preflight.labels import element_orders, labels_of_targets
from ris_fast.health.preflight.probe import PreflightContext
from ris_fast.health.preflight.scene_parts import physics
from ris_fast.health.preflight.scenes import splits
from ris_fast.physics.array import RISArray
from ris_fast.physics.scenes import Scenes
from ris_fast.training.trainer import Trainer
from tests.health.preflight.checking import causes, small


def served(change: Callable[[Scenes], Scenes], twin: str = "hybrid", **settings: Any) -> Trainer:
    trainer = Trainer(small(twin, **settings))
    on_batches(trainer, change)
    return trainer


def both(change: Callable[[Tensor], Tensor]) -> Callable[[Scenes], Scenes]:
    return lambda scenes: replace(scenes, azimuth=change(scenes.azimuth), elevation=change(scenes.elevation))


@pytest.mark.parametrize(
    "change, cause",
    [
        (lambda scenes: replace(scenes, count=(scenes.count - 1).clamp_min(1)), "parts_unrelated"),
        (lambda scenes: replace(scenes, count=scenes.count.roll(1)), "shuffled_labels"),
        (lambda scenes: replace(scenes, azimuth=scenes.elevation, elevation=scenes.azimuth), "wrong_layout"),
        (both(torch.sin), "wrong_units"),
        (both(lambda value: value.roll(1, 0)), "shuffled_labels"),
        (lambda scenes: replace(scenes, range_m=scenes.range_m.roll(1, 0)), "parts_unrelated"),
    ],
    ids=["count from zero", "count of another", "angles exchanged", "sines", "angles of another", "ranges of another"],
)
def test_labels_that_are_not_those_of_the_target_are_named_for_certain(change: Any, cause: str) -> None:
    # An array of four elements hardly tells a sine from its angle.
    trainer = served(change, **{"task.ris_horizontal": 6, "task.ris_vertical": 6})
    (finding,) = labels_of_targets(PreflightContext(trainer))
    assert finding.cause == cause and finding.certain


def test_powers_that_enter_the_target_twice_are_named_by_the_exponent() -> None:
    trainer = served(lambda each: replace(each, factor=each.factor * each.power.sqrt()[:, None, :, None]), "path_loss")
    (finding,) = labels_of_targets(PreflightContext(trainer))
    assert finding.cause == "parts_unrelated" and "square of the powers" in finding.evidence and not finding.certain


@pytest.mark.parametrize("wavefront", ["fresnel", "spherical"])
def test_labels_in_another_order_than_the_columns_are_no_mistake(wavefront: str) -> None:
    names = ("azimuth", "elevation", "range_m")

    def exchanged(scenes: Scenes) -> Scenes:
        several = (scenes.count > 1)[:, None]
        return replace(
            scenes, **{name: torch.where(several, (v := getattr(scenes, name)).flip(1), v) for name in names}
        )

    assert causes(labels_of_targets, served(exchanged, **{"task.wavefront": wavefront})) == []


def test_every_order_of_a_grid_is_another_one() -> None:
    orders = [rows.tolist() for _, rows in element_orders(RISArray(3, 2))]
    assert len(orders) == len({tuple(each) for each in orders}) == 5
    assert all(sorted(each) == list(range(6)) and each != list(range(6)) for each in orders)


@pytest.mark.parametrize(
    "change, seen",
    [
        (lambda each: replace(each, factor=each.factor[:, _columns_first()]), "target's elements counted"),
        (lambda each: replace(each, channel=each.channel[:, :, _columns_first()]), "channel's elements counted"),
        (lambda each: replace(each, snapshots=each.snapshots.flip(2)), "antennas in reversed order"),
    ],
    ids=["target", "channel", "antennas"],
)
def test_parts_in_another_order_are_named_by_the_order_that_mends_them(change: Any, seen: str) -> None:
    trainer = served(change, "backprojection", **{"task.ris_horizontal": 4, "task.ris_vertical": 3})
    (finding,) = physics(PreflightContext(trainer))
    assert finding.cause == "wrong_layout" and seen in finding.evidence


def _columns_first() -> Tensor:
    return torch.arange(12).view(3, 4).T.flatten()


def test_inputs_kept_by_number_alone_are_a_stale_cache_and_no_overlap() -> None:
    kept: dict[int, Tensor] = {}

    def cached(scenes: Scenes) -> Scenes:
        rows = [kept.setdefault(int(number), scenes.snapshots[row]) for row, number in enumerate(scenes.index)]
        return replace(scenes, snapshots=torch.stack(rows))

    assert causes(splits, served(cached)) == ["stale_cache"]
