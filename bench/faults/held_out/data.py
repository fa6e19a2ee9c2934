"""Held-out faults of the family "data": batches, labels, axes, units and channels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import repeat

import torch

from bench.faults.catalogue import Family
from bench.faults.patches import on_batches, on_features, replaced, with_labels_of, wrap
from ris_fast.models import hybrid
from ris_fast.training.trainer import Trainer

FAMILY = Family("data")


@FAMILY.patch(
    "takes the first batch of a new iterator in every step", "repeated_batch", "steps:5", twin="backprojection"
)
def iterator_restarted(trainer: Trainer) -> None:
    wrap(trainer, "_groups", lambda groups: lambda: repeat(next(iter(groups())), trainer.epoch_steps))


@FAMILY.patch("skips the header of the label file and not that of the input file", "shuffled_labels", "preflight")
def labels_off_by_one(trainer: Trainer) -> None:
    on_batches(trainer, lambda scenes: with_labels_of(scenes, torch.arange(scenes.batch).roll(1)))


@FAMILY.patch(
    "reshapes (snapshots, batch) to (batch, snapshots) where a transpose is meant", "scenes_mixed", "preflight"
)
def axes_reshaped_not_transposed(trainer: Trainer) -> None:
    on_features(trainer, lambda features: lambda y, *rest: features(y.transpose(0, 1).reshape(y.shape), *rest))


@FAMILY.around(
    "removed the normalisation of the inputs, whose power spans many decades",
    "input_scale",
    "share:0.01",
    twin="path_loss",
)
def raw_units_at_the_input() -> Iterator[None]:
    with (
        replaced(hybrid, "_coefficients", lambda re, im: (re[:, 0], im[:, 0])),
        replaced(hybrid, "rescaled", lambda a: a),
    ):
        yield


@FAMILY.patch(
    "pairs each scene's snapshots with the next scene's channel",
    "mismatched_channel inputs_withhold_answer",
    "preflight",
    twin="backprojection",
)
def channel_of_the_next_scene(trainer: Trainer) -> None:
    on_batches(trainer, lambda scenes: replace(scenes, channel=scenes.channel.roll(1, 0)))


@FAMILY.patch(
    "reads (im, re) where (re, im) was written", "wrong_layout conjugation_error", "preflight", twin="few_codes"
)
def real_and_imaginary_swapped(trainer: Trainer) -> None:
    on_batches(trainer, lambda scenes: replace(scenes, snapshots=scenes.snapshots.flip(-1)))
