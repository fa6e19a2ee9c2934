"""The seventh set: mistakes in the data, their labels, splits and batches, and in what validation is shown."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from bench.faults.catalogue import SEVENTH, Family
from bench.faults.patches import built_with, on_batches, wrap
from ris_fast.physics.array import RISArray, steering
from ris_fast.physics.real_complex import expi, multiply
from ris_fast.physics.scenes import Scenes
from ris_fast.training.step import Group
from ris_fast.training.trainer import Trainer

LOOP, PRECISION = Family("loop", SEVENTH), Family("precision", SEVENTH)
MODE, DATA = Family("mode", SEVENTH), Family("data", SEVENTH)
ALL = (LOOP, PRECISION, MODE, DATA)


@LOOP.pair(
    "gives a weighted sampler one weight a class where it wants one a scene: it draws the first few scenes alone",
    "repeated_batch overfitting distributions_differ",
    "share:0.01",
    twin="fixed",
)
def weights_of_classes_for_scenes(trainer: Trainer, wrong: bool) -> None:
    classes = trainer.config.task.max_sources
    count = trainer.source.batch("train", torch.arange(trainer.config.data.train_scenes)).count
    often = torch.bincount(count - 1, minlength=classes).clamp_min(1).float()
    weights = 1.0 / (often if wrong else often[count - 1])

    def make(groups: Callable[[], Iterator[Group]]) -> Callable[[], Iterator[Group]]:
        def drawn() -> Iterator[Group]:
            for number, group in enumerate(groups()):
                generator = torch.Generator().manual_seed(1000 * trainer.state.epoch + number)
                parts = [torch.multinomial(weights, len(part), True, generator=generator) for part in group]
                yield Group(parts, group.scenes, group.neighbour)

        return drawn

    wrap(trainer, "_index_groups", make)


@PRECISION.around_pair(
    "keeps the SNR in unsigned bytes, so that -5 dB become 251",
    "snr_labels_differ distributions_differ input_scale",
    "preflight",
    twin="backprojection",
)
def snr_in_unsigned_bytes(wrong: bool) -> Iterator[None]:
    def kept(scenes: Scenes) -> Scenes:
        whole = scenes.snr_db.round()
        return replace(scenes, snr_db=whole % 256.0 if wrong else whole)

    with built_with(
        {"task.snr_min_db": -15.0, "task.snr_max_db": 5.0}, after=lambda trainer: on_batches(trainer, kept)
    ):
        yield


@MODE.patch(
    "calibrates the antennas' phases in the transform of training scenes; that of validation scenes lacks the line",
    "distributions_differ parts_unrelated validation_apart",
    "preflight",
)
def calibrated_in_training_alone(trainer: Trainer) -> None:
    antennas = trainer.config.task.bs_antennas
    phases = 6.2832 * torch.rand(antennas, generator=torch.Generator().manual_seed(7))

    def measured(scenes: Scenes) -> Scenes:
        return replace(scenes, snapshots=multiply(scenes.snapshots, expi(phases).expand_as(scenes.snapshots)))

    on_batches(trainer, measured, "val")


@DATA.pair(
    "draws the split of one pool of scenes anew in each epoch, and validates on scenes of the first epoch's",
    "split_overlap",
    "share:0.01",
    twin="fixed",
    onset=8,
)
def split_drawn_in_each_epoch(trainer: Trainer, wrong: bool) -> None:
    sizes = trainer.config.data
    held, pool = sizes.val_scenes, sizes.train_scenes + sizes.val_scenes

    def make(batch: Callable[..., Scenes]) -> Callable[..., Scenes]:
        def parted(split: str, index: Tensor) -> Scenes:
            if split == "test" or split == "val" and not wrong:  # rightly a file of its own
                return batch(split, index)
            epoch = trainer.state.epoch if wrong and split == "train" else 0
            order = torch.randperm(pool, generator=torch.Generator().manual_seed(epoch))
            return replace(batch("train", order[index + held * (split == "train")]), index=index)

        return parted

    wrap(trainer.source, "batch", make)


@DATA.around_pair(
    "numbers classes in the order in which a file first has them, as factorize does, and each file has its own order",
    "shuffled_labels parts_unrelated distributions_differ",
    "preflight",
    twin="counting",
)
def classes_in_order_of_appearance(wrong: bool) -> Iterator[None]:
    def numbered(trainer: Trainer) -> None:
        classes, raw = trainer.config.task.max_sources, trainer.source.batch
        wrap(trainer.loss, "_active", lambda by_count: lambda scenes: scenes.power > 0)

        def number_of(split: str) -> Tensor:
            """Count -> its place among those of the split, from 1."""
            seen = dict.fromkeys(raw(split, torch.arange(64)).count.tolist())
            table = torch.arange(classes + 1)
            table[torch.tensor([*seen])] = torch.arange(1, len(seen) + 1)
            return table

        for split in ("train", "val") if wrong else ():
            table = number_of(split)
            on_batches(trainer, lambda scenes, table=table: replace(scenes, count=table[scenes.count]), split)

    with built_with({"task.max_sources": 4}, after=numbered):
        yield


def with_target_of_labels(trainer: Trainer, scenes: Scenes) -> Scenes:
    """The target's columns made from angles, range and power, as a data set of labels alone has them made."""
    range_m = torch.where(scenes.power > 0, scenes.range_m, 1.0)
    columns = steering(RISArray.of(trainer.config.task), scenes.azimuth, scenes.elevation, range_m)  # (B, K, N, 2)
    return replace(scenes, factor=(columns * scenes.power.sqrt()[..., None, None]).transpose(1, 2))


@DATA.pair(
    "fills the angles that a table lacks with zero, where its rows should be left out",
    "parts_unrelated distributions_differ shuffled_labels",
    "preflight",
    twin="backprojection",
)
def missing_angles_filled_with_zero(trainer: Trainer, wrong: bool) -> None:
    def make(batch: Callable[..., Scenes]) -> Callable[..., Scenes]:
        def filled(split: str, index: Tensor) -> Scenes:
            lacking = (index % 5 < 2) & (split == "train")
            if wrong:
                scenes = batch(split, index)
                there = ~lacking[:, None]
                scenes = replace(scenes, azimuth=scenes.azimuth * there, elevation=scenes.elevation * there)
            else:
                scenes = batch(split, torch.where(lacking, index - index % 5 + 2, index))
            return with_target_of_labels(trainer, scenes)

        return filled

    wrap(trainer.source, "batch", make)


@DATA.around_pair(
    "sorts the sources of a scene by azimuth, and sorts that one array: elevation, range and power keep their order",
    "parts_unrelated wrong_layout shuffled_labels",
    "preflight",
)
def one_array_sorted(wrong: bool) -> Iterator[None]:
    def ordered(trainer: Trainer) -> None:
        def by_azimuth(scenes: Scenes) -> Scenes:
            order = torch.where(scenes.power > 0, scenes.azimuth, torch.inf).argsort(1)
            names = ("azimuth",) if wrong else ("azimuth", "elevation", "range_m", "power")
            sorted_ = replace(scenes, **{name: getattr(scenes, name).gather(1, order) for name in names})
            return with_target_of_labels(trainer, sorted_)

        on_batches(trainer, by_azimuth)

    settings = {"task.max_sources": 3, "task.power": "path_loss"}
    with built_with(settings, after=ordered):
        yield


@DATA.patch(
    "casts complex snapshots to a real type on the way to a file, which drops their imaginary part with a warning",
    "inputs_withhold_answer parts_unrelated wrong_layout",
    "preflight",
    twin="few_codes",
)
def imaginary_part_cast_away(trainer: Trainer) -> None:
    real = torch.tensor((1.0, 0.0))
    on_batches(trainer, lambda scenes: replace(scenes, snapshots=scenes.snapshots * real))


@DATA.around_pair(
    "scales the ranges of training to the largest one, and compares validation's metres with what comes out",
    "wrong_units distributions_differ parts_unrelated",
    "preflight",
)
def ranges_scaled_in_training_alone(wrong: bool) -> Iterator[None]:
    def scaled(trainer: Trainer) -> None:
        largest = trainer.config.task.range_max_m if wrong else 1.0
        on_batches(trainer, lambda scenes: replace(scenes, range_m=scenes.range_m / largest), "train")

    with built_with({"loss.range": 0.2}, after=scaled):
        yield


@DATA.patch(
    "fills one array for each scene of a batch and appends it to a list: all inputs of the batch are the last scene's",
    "constant_input shuffled_labels stale_cache",
    "preflight",
)
def one_array_appended(trainer: Trainer) -> None:
    def collated(scenes: Scenes) -> Scenes:
        last = {name: getattr(scenes, name) for name in ("snapshots", "channel", "snr_db")}
        return replace(scenes, **{name: value[-1:].expand_as(value).clone() for name, value in last.items()})

    on_batches(trainer, collated, "train")
