"""Held-out faults of the family "loop": steps, schedules and batches that do not come as they should."""

from __future__ import annotations

from itertools import islice

from bench.faults.catalogue import Family
from bench.faults.patches import put, rebound, wrap
from ris_fast.training.step import build_optimizer
from ris_fast.training.trainer import Trainer

FAMILY = Family("loop")


@FAMILY.patch(
    "steps only if backbone and heads both have a gradient, while the heads are masked", "step_never_called", "steps:5"
)
def step_gated_on_both_groups(trainer: Trainer) -> None:
    def make(take):
        def gated(*args):
            masked = {id(parameter) for parameter in trainer.model.head_parameters()}
            heads = [p.grad for p in trainer.model.parameters() if id(p) in masked and p.grad is not None]
            norms = [0.0 * sum(float(grad.norm()) for grad in heads), 1.0]
            return take(*args) if min(norms) > 0.0 else None

        return gated

    wrap(trainer.optimizer, "step", make)


@FAMILY.patch("plans the schedule in batches and advances it once an epoch", "schedule_per_epoch", "steps:5")
def schedule_ticks_per_epoch(trainer: Trainer) -> None:
    trainer.optimizer.applied_steps = lambda: trainer.state.epoch


@FAMILY.patch("a group built by hand has no peak rate and falls back to zero", "zero_learning_rate", "preflight")
def one_group_without_rate(trainer: Trainer) -> None:
    trainer.optimizer.param_groups[0]["peak_lr"] = 0.0


@FAMILY.patch("builds the optimizer inside the epoch loop", "optimizer_state_lost", "share:0.01", onset=8)
def optimizer_rebuilt_each_epoch(trainer: Trainer) -> None:
    def make(epoch):
        def rebuilt() -> None:
            if trainer.state.epoch:
                put(trainer, "optimizer", build_optimizer(trainer.model, trainer.config))
                rebound(trainer)
                trainer.reporter.read_counters()
            epoch()

        return rebuilt

    wrap(trainer, "_epoch", make)


FAMILY.setting(
    "rate_far_too_small",
    "gave 1e-9 where 1e-3 is meant",
    "learning_rate_too_small",
    "share:0.01",
    {"optimizer.backbone_lr": 1e-9, "optimizer.head_lr": 1e-9},
    twin="backprojection",
)


@FAMILY.patch(
    "calls next() on the iterator inside a loop over it, and throws every other batch away",
    "batches_skipped",
    "steps:5",
    twin="backprojection",
)
def every_other_batch_skipped(trainer: Trainer) -> None:
    wrap(trainer, "_groups", lambda groups: lambda: islice(groups(), 0, None, 2))
