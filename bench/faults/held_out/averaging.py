"""Held-out faults of the family "averaging": averages that are poisoned, keep nothing or pass for the raw weights."""

from __future__ import annotations

import torch

from bench.faults.catalogue import Family
from bench.faults.patches import after_step, optimizer_with, wrap
from ris_fast.training.trainer import Trainer

FAMILY = Family("averaging")


@FAMILY.patch("one infinite update entered the average and never leaves it", "ema_nonfinite", "share:0.01", onset=3)
def ema_poisoned(trainer: Trainer) -> None:
    @torch.no_grad()
    def poison() -> None:
        if trainer.state.step == 3:
            average = [value for key, value in trainer.optimizer.extra_state().items() if key.startswith("ema.")]
            average[0].view(-1)[0] = float("nan")

    after_step(trainer, poison)


@FAMILY.patch(
    "gave the weight of the new value where the decay is meant",
    "ema_equals_raw",
    "preflight",
    around=lambda: optimizer_with(ema_decay=0.001),
)
def average_decays_at_once(trainer: Trainer) -> None:
    """The mistake is the option alone."""


@FAMILY.patch(
    "reports the average's validation as that of the raw weights",
    "raw_not_validated",
    "share:0.01",
    twin="backprojection",
)
def average_validated_as_raw(trainer: Trainer) -> None:
    wrap(trainer, "_score", lambda score: lambda averaged=False: score(averaged=True))
