"""Which scenes are served, in which order and with which weights; what of them is in both splits, and what was lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.faults.healthy import changed, healthy_config
from bench.faults.patches import LABELS, on_batches, on_factor, rebound, wrap
from ris_fast.health.preflight import (
    dependent,
    distributions,
    information,
    inputs,
    labels,
    padding,
    scene_parts,
    scene_weights,
    scenes,
)
from ris_fast.health.preflight.order import order
from ris_fast.health.preflight.probe import PreflightContext
from ris_fast.health.preflight.rereads import scenes_again
from ris_fast.physics.scenes import Scenes
from ris_fast.training.step import Group
from ris_fast.training.trainer import Trainer
from tests.health.preflight.checking import causes, small

FIXED = {"data.fixed": True}


def served(numbers: Callable[[Trainer, Tensor], Tensor], **settings: Any) -> Trainer:
    """A trainer that is served other numbers in the place of an epoch's."""
    trainer = Trainer(small("hybrid", **FIXED, **settings))

    def make(groups: Callable[[], Iterator[Group]]) -> Callable[[], Iterator[Group]]:
        def other() -> Iterator[Group]:
            old = list(groups())
            new = numbers(trainer, torch.cat([part for group in old for part in group]))
            for group in old:
                parts = new[: group.scenes].split([len(part) for part in group])
                new = new[group.scenes :]
                yield Group(parts, group.scenes, group.neighbour)

        return other

    wrap(trainer, "_index_groups", make)
    return trainer


def sorted_by(name: str) -> Callable[[Trainer, Tensor], Tensor]:
    def numbers(trainer: Trainer, drawn: Tensor) -> Tensor:
        values = getattr(trainer.source.batch("train", drawn), name)
        return drawn[(values if values.dim() == 1 else values[:, 0]).argsort()]

    return numbers


@pytest.mark.parametrize("name", ["azimuth", "count", "snr_db"])
@pytest.mark.parametrize("settings", [{}, {"data.train_scenes": 2048}], ids=["whole epoch", "first steps"])
def test_order_names_scenes_that_are_sorted(name: str, settings: dict[str, Any]) -> None:
    assert causes(order, served(sorted_by(name), **settings)) == ["distributions_differ"]


def in_blocks(trainer: Trainer, drawn: Tensor) -> Tensor:
    """Batches of scenes with as many sources, in any order."""
    blocks = drawn[trainer.source.batch("train", drawn).count.argsort()].view(8, 32)
    return blocks[torch.tensor([5, 0, 7, 2, 6, 1, 4, 3])].flatten()


def with_replacement(trainer: Trainer, drawn: Tensor) -> Tensor:
    return torch.randint(256, (256,), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("numbers", [lambda trainer, drawn: drawn, in_blocks, with_replacement])
def test_order_and_distinct_are_silent_about_other_ways_to_draw(numbers: Any) -> None:
    trainer = served(numbers)
    context = PreflightContext(trainer)
    assert [*scenes.distinct(context), *order(context)] == []


def test_order_names_a_part_that_is_drawn_again_and_again() -> None:
    trainer = served(lambda trainer, drawn: drawn % 24)
    context = PreflightContext(trainer)
    (finding,) = [*scenes.distinct(context), *order(context)]
    assert finding.cause == "repeated_batch" and not finding.certain
    loud = served(
        lambda trainer, drawn: (
            chosen := (trainer.source.batch("train", torch.arange(256)).snr_db > 16).nonzero()[:, 0]
        )[drawn % len(chosen)]
    )
    assert causes(order, loud) == ["distributions_differ"]


# ---- weights


@pytest.mark.parametrize(
    "weight, found",
    [
        (lambda scenes: 10 ** (scenes.snr_db / 2 - 5), True),
        (lambda scenes: torch.where(scenes.count == 1, 1.0, 1e-3), True),
        (lambda scenes: 0.2 + scenes.snr_db / 10, False),
        (lambda scenes: torch.ones(scenes.batch), False),
    ],
    ids=["by the ratio", "by the class", "mildly", "not at all"],
)
def test_scene_weights_are_of_one_order(weight: Callable[[Scenes], Tensor], found: bool) -> None:
    trainer = Trainer(small("hybrid"))
    make = lambda nmse: lambda factor, scenes, *, blend: weight(scenes) * nmse(factor, scenes, blend=blend)  # noqa: E731
    wrap(trainer.loss, "nmse", make)
    assert causes(scene_weights.scene_weights, trainer) == ["scenes_left_out"] * found


# ---- copies in both splits


@pytest.mark.parametrize("apart", [True, False])
def test_splits_names_windows_of_one_recording(apart: bool) -> None:
    trainer = Trainer(small("hybrid", **FIXED))

    def make(batch: Callable[..., Scenes]) -> Callable[..., Scenes]:
        def windows(split: str, index: Tensor) -> Scenes:
            recordings = batch(split if apart else "train", index % 32)
            noise = torch.randn(
                512, *recordings.snapshots.shape[1:], generator=torch.Generator().manual_seed(len(split))
            )
            size = 0.1 * recordings.snapshots.square().mean((1, 2, 3), keepdim=True).sqrt()
            return replace(recordings, snapshots=recordings.snapshots + size * noise[index % 512], index=index)

        return windows

    wrap(trainer.source, "batch", make)
    assert causes(scenes.splits, trainer) == ["split_overlap"] * (not apart)


# ---- labels of others in a second reading


def test_splits_is_silent_about_the_few_fields_of_a_small_array() -> None:
    trainer = Trainer(changed(healthy_config(212), {"data.fixed": True}))  # four elements, a quarter wavelength apart
    assert causes(scenes.splits, trainer) == []


@pytest.mark.parametrize(
    "names, cause",
    [(LABELS, "shuffled_labels"), (("channel",), "mismatched_channel"), (("snapshots",), "stale_cache")],
    ids=["labels", "channel", "snapshots"],
)
def test_scenes_again_names_what_is_of_another_scene(names: tuple[str, ...], cause: str) -> None:
    trainer = Trainer(small("hybrid"))
    rolled = lambda scenes: replace(scenes, **{name: getattr(scenes, name).roll(1, 0) for name in names})  # noqa: E731
    on_batches(trainer, rolled)
    assert causes(scenes_again, trainer) == [cause]


# ---- what was taken out


@pytest.mark.parametrize(
    "change, found",
    [
        (lambda y: y / y.square().mean((1, 3), keepdim=True).sqrt(), True),
        (lambda y: y / y.square().mean((2, 3), keepdim=True).sqrt(), True),
        (lambda y: y / y.square().sum(3, keepdim=True).sqrt(), True),
        (lambda y: y.clamp(-(edge := 0.5 * float(y.square().mean().sqrt())), edge), True),
        (lambda y: (y / (step := float(y.abs().max()) / 3)).round() * step, True),
        (lambda y: y / y.square().mean((1, 2, 3), keepdim=True).sqrt(), False),
        (lambda y: y.half().float(), False),
        (lambda y: (y / (step := float(y.abs().max()) / 2000)).round() * step, False),
    ],
    ids=["by antenna", "by snapshot", "phases", "cut off", "few bits", "by scene", "half", "twelve bits"],
)
def test_removed_names_what_snapshots_lost(change: Callable[[Tensor], Tensor], found: bool) -> None:
    trainer = Trainer(small("hybrid"))
    on_batches(trainer, lambda scenes: replace(scenes, snapshots=change(scenes.snapshots)))
    assert causes(dependent.removed, trainer) == ["inputs_withhold_answer"] * found


def test_labels_of_targets_names_places_on_a_grid() -> None:
    trainer = Trainer(small("hybrid"))
    on_batches(trainer, lambda scenes: replace(scenes, azimuth=(scenes.azimuth / 0.3).round() * 0.3))
    assert causes(labels.labels_of_targets, trainer) == ["parts_unrelated"]


def test_physics_names_sources_that_some_targets_lack() -> None:
    def weak_left_out(scenes: Scenes) -> Scenes:
        weak = scenes.power < 0.5 * scenes.power.amax(1, keepdim=True)
        power = torch.where(weak, 0.0, scenes.power)
        factor = torch.where(weak[:, None, :, None], 0.0, scenes.factor)
        return replace(scenes, power=power, factor=factor, count=(power > 0).sum(1))

    trainer = Trainer(small("path_loss"))
    on_batches(trainer, weak_left_out)
    assert causes(scene_parts.physics, trainer) == ["parts_unrelated"]


# ---- padding


class Padded(nn.Module):
    """Reads the elements of a factor as a sequence that is padded to twice its length."""

    def __init__(self, elements: int, wrong: bool) -> None:
        super().__init__()
        self.elements, self.wrong = elements, wrong
        self.embed, self.read = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, factor: Tensor) -> Tensor:
        rows = factor.flatten(2)
        embedded = self.embed(nn.functional.pad(rows, (0, 0, 0, self.elements)))
        there = torch.arange(2 * self.elements) < self.elements
        kept = torch.where((there != self.wrong)[:, None], embedded, 0.0)
        return factor + self.read(kept.mean(1))[:, None].unflatten(2, (4, 2))


@pytest.mark.parametrize("wrong", [True, False])
def test_padding_that_is_read_in_place_of_scenes_is_named(wrong: bool) -> None:
    trainer = Trainer(small("hybrid"))
    part = Padded(4, wrong)
    on_factor(trainer.model, part)
    trainer.model.part = part
    rebound(trainer)
    assert causes(padding.reads_no_padding, trainer) == ["ignored_input"] * wrong


# ---- what the network is given


class Seen(nn.Module):
    """Adds to a factor what a layer makes of a change of it, which depends on no weight."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.change, self.layer = change, nn.Linear(32, 32)

    def forward(self, factor: Tensor) -> Tensor:
        return factor + self.layer(self.change(factor.detach().flatten(1))).view_as(factor)


@pytest.mark.parametrize(
    "change, cause",
    [
        (lambda x: (x / x.abs().amax(1, keepdim=True)).round(), "inputs_withhold_answer"),
        (lambda x: nn.functional.one_hot(x.argmax(1), 32).float(), "inputs_withhold_answer"),
        (lambda x: x.abs().clamp(0, 0.3 * float(x.abs().mean())), "inputs_withhold_answer"),
        (lambda x: torch.cat((1e-5 * x[:, :31], x[:, 31:]), 1), "input_scale"),
        (lambda x: x, ""),
        (lambda x: x * (x.abs() >= x.abs().sort(1).values[:, 20:21]), ""),
    ],
    ids=["rounded", "argmax", "cut off", "one of another unit", "as it is", "the largest ones"],
)
def test_scale_names_inputs_that_lost_their_numbers(change: Callable[[Tensor], Tensor], cause: str) -> None:
    trainer = Trainer(small("hybrid"))
    part = Seen(change)
    on_factor(trainer.model, part)
    trainer.model.part = part
    rebound(trainer)
    assert causes(inputs.scale, trainer) == [cause] * bool(cause)


@pytest.mark.parametrize("rank_one", [True, False])
def test_input_information_names_antennas_that_see_the_same(rank_one: bool) -> None:
    trainer = Trainer(small("few_codes"))
    if rank_one:
        on_batches(trainer, lambda scenes: replace(scenes, channel=scenes.channel[:, :1].expand_as(scenes.channel)))
    assert causes(information.input_information, trainer) == ["inputs_withhold_answer"] * rank_one


# ---- a later epoch


def test_physics_and_distributions_look_at_a_later_epoch() -> None:
    trainer = Trainer(small("hybrid", **FIXED))

    def shuffled_at_its_end(batch: Callable[..., Scenes]) -> Callable[..., Scenes]:
        def read(split: str, index: Tensor) -> Scenes:
            epoch = trainer.state.epoch
            others = batch(split, (index + 7 * epoch * (split == "train")) % trainer.source.size(split))
            return replace(batch(split, index), **{name: getattr(others, name) for name in LABELS})

        return read

    assert causes(scene_parts.physics, trainer) == []
    wrap(trainer.source, "batch", shuffled_at_its_end)
    assert causes(scene_parts.physics, trainer) == ["parts_unrelated"] and trainer.state.epoch == 0


@pytest.mark.parametrize("widens", [True, False])
def test_distributions_allow_a_curriculum_that_ends(widens: bool) -> None:
    trainer = Trainer(small("hybrid"))
    pool = torch.arange(2048)
    narrow = pool[trainer.source.batch("train", pool).azimuth.abs().amax(1) < 0.3]

    def make(groups: Callable[[], Iterator[Group]]) -> Callable[[], Iterator[Group]]:
        def chosen() -> Iterator[Group]:
            some = pool if widens and trainer.state.epoch else narrow
            for group in groups():
                yield Group([some[part % len(some)] for part in group], group.scenes, group.neighbour)

        return chosen

    wrap(trainer, "_index_groups", make)
    assert causes(distributions.distributions, trainer) == ["distributions_differ"] * (not widens)
