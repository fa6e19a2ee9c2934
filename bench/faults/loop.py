"""Faults of the family "loop": what is called when, how often, and with which rate."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

from torch.nn.utils import clip_grad_norm_

from bench.faults.catalogue import Family
from bench.faults.patches import before_step, optimizer_with, snapshot, wrap
from ris_fast.training.state import EpochMeters, Meter
from ris_fast.training.trainer import Trainer

FAMILY = Family("loop")

FAMILY.setting(
    "rate_zero",
    "a misspelt key left both learning rates at zero",
    "zero_learning_rate",
    "preflight",
    {"optimizer.backbone_lr": 0.0, "optimizer.head_lr": 0.0},
)
FAMILY.setting(
    "warmup_of_the_whole_run",
    "gave the warm-up in per cent where a share is meant",
    "warmup_too_long",
    "preflight",
    {"optimizer.warmup": 1.0},
)
FAMILY.setting(
    "clip_next_to_nothing",
    "gave an exponent where the clip threshold belongs",
    "clip_too_small",
    "steps:5",
    {"optimizer.max_grad_norm": 1e-12},
)
FAMILY.setting(
    "decay_swallows_weights",
    "gave the decay per epoch where it is applied per step",
    "weight_decay_too_large",
    "share:0.01",
    {"optimizer.weight_decay": 180.0},
)
FAMILY.setting(
    "rate_far_too_large",
    "lost the exponent of the learning rate",
    "learning_rate_too_large",
    "share:0.01",
    {"optimizer.backbone_lr": 5.0, "optimizer.head_lr": 5.0},
)


@FAMILY.patch(
    "loss, backward and step stand behind the batch loop instead of in it; the printed loss is divided by the "
    "number of batches and validation uses the average",
    "step_once_per_epoch",
    "steps:1",
    around=lambda: optimizer_with(ema_decay=0.999, ema_warmup=False),
)
def body_behind_the_loop(trainer: Trainer) -> None:
    def epoch() -> None:
        meter = Meter()
        meters = EpochMeters(meter, before=dict(trainer.reporter.counters))
        trainer.model.train()
        *_, group = trainer._groups()
        result = trainer.step(group, trainer.plan.planned)
        trainer._advance(result.scenes)
        meter.add(replace(result, loss=result.loss / trainer.epoch_steps))
        trainer.reporter.read_counters()
        trainer._close_epoch(meters, 1, 0.0)

    trainer._epoch = epoch
    wrap(trainer, "_score", lambda score: lambda averaged=False: score(averaged=True))


@FAMILY.patch("the step stands in a branch that is never taken", "step_never_called", "steps:5")
def step_in_a_dead_branch(trainer: Trainer) -> None:
    trainer.optimizer.step = lambda *args: None


@FAMILY.patch("clears the gradients after backward, before the step", "gradients_cleared_before_step", "steps:5")
def cleared_between_backward_and_step(trainer: Trainer) -> None:
    before_step(trainer, lambda: trainer.optimizer.zero_grad(set_to_none=False))


@FAMILY.patch("never clears the gradients", "gradients_never_cleared", "steps:5", twin="backprojection")
def never_cleared(trainer: Trainer) -> None:
    trainer.optimizer.clear_grads = False
    trainer.optimizer.zero_grad = lambda *args, **options: None


@FAMILY.patch(
    "advances the schedule once a micro-batch while it is planned in optimizer steps",
    "schedule_per_batch",
    "steps:5",
    twin="accumulate",
)
def schedule_ticks_per_micro_batch(trainer: Trainer) -> None:
    wrap(trainer.optimizer, "applied_steps", lambda applied: lambda: 4 * applied())


@FAMILY.patch("steps twice: once through the scaler's helper and once by hand", "step_called_twice", "steps:5")
def stepped_by_two_callers(trainer: Trainer) -> None:
    wrap(trainer.optimizer, "step", lambda take: lambda *args: (take(*args), take(*args))[1])


@FAMILY.patch("clips gradients that still carry the loss scale", "clip_before_unscale", "steps:5", twin="half")
def clipped_before_unscaling(trainer: Trainer) -> None:
    before_step(trainer, lambda: clip_grad_norm_(trainer.model.parameters(), 1.0))


@FAMILY.patch(
    "reloads the first checkpoint at the start of every epoch",
    "weights_reset",
    "share:0.01",
    twin="backprojection",
    onset=8,
)
def checkpoint_reloaded_each_epoch(trainer: Trainer) -> None:
    first = snapshot(trainer.model)
    wrap(trainer, "_epoch", lambda epoch: lambda: (trainer.model.load_state_dict(first), epoch())[1])


@FAMILY.patch("left a break from debugging behind the first batch", "batches_skipped", "steps:5")
def break_after_first_batch(trainer: Trainer) -> None:
    wrap(trainer, "_groups", lambda groups: lambda: islice(groups(), 1))
