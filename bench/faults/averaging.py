"""Faults of the family "averaging": weights that are averaged too little, too much, or into the wrong place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from bench.faults.catalogue import Family
from bench.faults.patches import after_step, optimizer_with, snapshot, wrap
from ris_fast.training.trainer import Trainer

FAMILY = Family("averaging")


@FAMILY.patch("swaps in a copy of the first weights that nobody updates", "ema_frozen", "share:0.01")
def average_never_updated(trainer: Trainer) -> None:
    first = snapshot(trainer.model)

    @contextmanager
    def averaged() -> Iterator[None]:
        raw = snapshot(trainer.model)
        trainer.model.load_state_dict(first)
        try:
            yield
        finally:
            trainer.model.load_state_dict(raw)

    trainer.optimizer.ema = averaged


@FAMILY.patch(
    "set a decay that rounds to one",
    "ema_frozen",
    "preflight",
    twin="backprojection",
    around=lambda: optimizer_with(ema_decay=1.0 - 1e-12, ema_warmup=False),
)
def average_decay_of_one(trainer: Trainer) -> None:
    """The mistake is the option alone."""


@FAMILY.patch(
    "validates an average over ten thousand steps from the first epoch on",
    "ema_cold",
    "share:0.01",
    around=lambda: optimizer_with(ema_decay=0.9999, ema_warmup=False),
)
def average_validated_cold(trainer: Trainer) -> None:
    """The mistake is the option alone."""


@FAMILY.patch(
    "copies the averaged weights into the network for validation and does not put the raw ones back",
    "ema_saved_over_raw",
    "share:0.01",
    twin="backprojection",
    onset=8,
)
def average_left_in_place(trainer: Trainer) -> None:
    def make(ema):
        @contextmanager
        def averaged() -> Iterator[None]:
            with ema():
                kept = snapshot(trainer.model)
                yield
            trainer.model.load_state_dict(kept)

        return averaged

    wrap(trainer.optimizer, "ema", make)


@FAMILY.patch(
    "updates the average once an epoch with a decay meant for steps",
    "ema_frozen ema_cold",
    "share:0.01",
    around=lambda: optimizer_with(ema_decay=0.99, ema_warmup=False),
)
def average_updated_per_epoch(trainer: Trainer) -> None:
    kept = {}

    @torch.no_grad()
    def undo_within_epoch() -> None:
        average = {key: value for key, value in trainer.optimizer.extra_state().items() if key.startswith("ema.")}
        last_of_epoch = trainer.state.epoch_step == trainer.epoch_steps - 1
        for key, value in average.items():
            if key not in kept:
                kept[key] = value.clone()
            kept[key].copy_(value) if last_of_epoch else value.copy_(kept[key])

    after_step(trainer, undo_within_epoch)
