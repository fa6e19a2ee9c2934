"""Faults of the family "data": what reaches the network is repeated, stale, mixed up, scaled or shared between
splits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from bench.faults.catalogue import Family
from bench.faults.patches import on_batches, replaced, with_labels_of, wrap
from ris_fast.models import hybrid
from ris_fast.models.prediction import Prediction
from ris_fast.physics.scenes import Scenes
from ris_fast.training.trainer import Trainer

FAMILY = Family("data")


@FAMILY.patch("cached the first batch and serves it whatever index is asked for", "repeated_batch", "steps:5")
def first_batch_served_always(trainer: Trainer) -> None:
    kept: dict[int, Scenes] = {}

    def make(batch):
        return lambda split, index: (
            kept.setdefault(len(index), batch(split, index)) if split == "train" else batch(split, index)
        )

    wrap(trainer.source, "batch", make)


@FAMILY.patch("a double buffer hands out the snapshots of the batch before", "stale_cache shuffled_labels", "steps:5")
def snapshots_of_the_last_batch(trainer: Trainer) -> None:
    kept: dict[tuple, Tensor] = {}

    def stale(scenes: Scenes) -> Scenes:
        last = kept.get(tuple(scenes.snapshots.shape), scenes.snapshots)
        kept[tuple(scenes.snapshots.shape)] = scenes.snapshots
        return replace(scenes, snapshots=last)

    on_batches(trainer, stale, "train")


@FAMILY.patch("one slot of four in the device cache was never filled", "empty_cache_slot", "steps:5")
def cache_slot_of_zeros(trainer: Trainer) -> None:
    calls = iter(range(10**9))

    def empty(scenes: Scenes) -> Scenes:
        if next(calls) % 4:
            return scenes
        return replace(scenes, snapshots=torch.zeros_like(scenes.snapshots), channel=torch.zeros_like(scenes.channel))

    on_batches(trainer, empty, "train")


@FAMILY.patch(
    "shuffles inputs and targets with two different permutations", "shuffled_labels", "preflight", twin="backprojection"
)
def targets_shuffled(trainer: Trainer) -> None:
    on_batches(trainer, lambda scenes: with_labels_of(scenes, torch.randperm(scenes.batch)), "train")


@FAMILY.patch("attends over the batch axis where the sequence axis is meant", "scenes_mixed", "preflight")
def attention_over_the_batch(trainer: Trainer) -> None:
    block = trainer.model.blocks[0]
    wrap(block, "_mix", lambda mix: lambda qkv: mix(qkv.transpose(0, 1)).transpose(0, 1))


@FAMILY.around("multiplied the normalised inputs by 1e-6", "input_scale", "preflight")
def inputs_a_million_times_too_small() -> Iterator[None]:
    right = hybrid._coefficients
    with replaced(hybrid, "_coefficients", lambda *field: tuple(1e-6 * each for each in right(*field))):
        yield


@FAMILY.patch("broadcasts the first scene's measurements over the batch", "constant_input", "preflight")
def measurements_of_the_first_scene(trainer: Trainer) -> None:
    on_batches(
        trainer,
        lambda scenes: replace(
            scenes,
            snapshots=scenes.snapshots[:1].expand_as(scenes.snapshots),
            channel=scenes.channel[:1].expand_as(scenes.channel),
            snr_db=scenes.snr_db[:1].expand_as(scenes.snr_db),
        ),
    )


@FAMILY.patch("caches the network's validation outputs by batch", "cached_validation", "share:0.01")
def validation_outputs_cached(trainer: Trainer) -> None:
    kept: dict[int, Prediction] = {}

    def make(predict):
        return lambda scenes: (
            predict(scenes) if torch.is_grad_enabled() else kept.setdefault(int(scenes.index[0]), predict(scenes))
        )

    wrap(trainer.step, "predict", make)


@FAMILY.patch("draws validation scenes with the training split's seed, 123 further on", "split_overlap", "preflight")
def validation_from_training_scenes(trainer: Trainer) -> None:
    wrap(
        trainer.source,
        "batch",
        lambda batch: lambda split, index: batch("train", index + 123) if split == "val" else batch(split, index),
    )


@FAMILY.patch(
    "a stuck generator gives every scene the same sources in the label",
    "constant_targets",
    "preflight",
    twin="backprojection",
)
def targets_of_the_first_scene(trainer: Trainer) -> None:
    first = trainer.source.batch("train", torch.zeros(1, dtype=torch.int64)).factor
    on_batches(trainer, lambda scenes: replace(scenes, factor=first.expand_as(scenes.factor)))


@FAMILY.patch("one scene in 97 was written with NaN in it", "nonfinite_data", "steps:5", onset=8)
def nan_in_some_scenes(trainer: Trainer) -> None:
    def broken(scenes: Scenes) -> Scenes:
        hurt = (scenes.index % 97 == 0).view(-1, 1, 1, 1)
        return replace(scenes, snapshots=scenes.snapshots.masked_fill(hurt, float("nan")))

    on_batches(trainer, broken, "train")
