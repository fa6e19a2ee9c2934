"""All rules over what `watch` recorded, in their order, and those on when an optimizer steps."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import torch

from ris_fast.health.finding import Finding, ranked
from ris_fast.health.watch import rules_gradients, rules_weights
from ris_fast.health.watch.fixes import finding
from ris_fast.health.watch.records import LoopRecord, OptimizerRecord, StepRecord, is_finite
from ris_fast.health.watch.rules_parameters import parameter_findings
from ris_fast.health.watch.rules_step import single_step

MANY_PASSES = 4096  # backward passes without a step, more than anybody adds up
MANY_CLEARED = 64  # gradients thrown away before the first step, more than trials or a loss scaler take
SCALER_STEPS = 24  # a loss scale halves its way to one that fits in fewer


def find_mistakes(loop: LoopRecord) -> list[Finding]:
    """All findings, most certain first."""
    by_optimizer = (each for optimizer in loop.optimizers for each in optimizer_findings(loop, optimizer))
    return ranked([*parameter_findings(loop), *by_optimizer])


def optimizer_findings(loop: LoopRecord, optimizer: OptimizerRecord) -> list[Finding]:
    """What one optimizer's steps show."""
    if not optimizer.steps:
        return list(step_never_called(loop, optimizer))
    if lost := list(rules_weights.nonfinite_step(optimizer)):
        return lost  # whatever later steps show comes from that
    records = optimizer.records
    return [
        *(
            each
            for record in records
            for each in single_step(record, next(r for r in records if r.names == record.names))
        ),
        *rules_gradients.reversed_gradients(records),
        *rules_gradients.unused_head(optimizer, loop.frozen),
        *scaler_skips_all(records),
        *rules_weights.zero_learning_rate(optimizer, loop.frozen),
        *rules_gradients.clip_too_small(records),
        *rules_gradients.gradients_never_cleared(records),
        *step_called_twice(records),
        *rules_gradients.zeroed_gradients(records, loop.frozen),
        *rules_weights.learning_rate_too_small(records),
        *rules_weights.weight_decay_too_large(optimizer),
        *rules_weights.nonfinite_weights(optimizer),
    ]


def step_never_called(loop: LoopRecord, optimizer: OptimizerRecord) -> Iterator[Finding]:
    """Before the first step all may be well: gradients may be added up over many passes, a scaler may skip, a later
    phase may be meant.

    Gradients that are thrown away time after time betray a loop without a step, unless another optimizer steps in it.
    """
    if not optimizer.arrived:
        return
    bad = sum(not math.isfinite(norm) for norm in optimizer.arrived)
    skipped = f" {bad} of them are not finite: a loss scaler or a check may skip every step." if bad else ""
    doubt = (
        "Another optimizer makes steps: this one's may come in a later phase."
        if loop.steps
        else "If gradients are added up over several passes, the first step is still to come."
    )
    certain = not loop.steps and (optimizer.passes > MANY_PASSES or optimizer.cleared > MANY_CLEARED)
    yield finding(
        "step_never_called",
        f"{len(optimizer.arrived)} tensors have received gradients in {optimizer.passes} backward passes, "
        f"{optimizer.cleared} of which found the gradients cleared, and the optimizer has made no step.{skipped}",
        doubt="" if certain else doubt,
    )


def scaler_skips_all(records: list[StepRecord]) -> Iterator[Finding]:
    """A loss scaler is at work, and no step that was looked at had finite gradients."""
    last = records[-1].step
    if last >= SCALER_STEPS and all(record.scaled and not is_finite(record.grad_at_step) for record in records):
        yield finding(
            "scaler_skips_all",
            f"the gradients of all {len(records)} steps that were looked at are not finite.",
            last,
        )


def step_called_twice(records: list[StepRecord]) -> Iterator[Finding]:
    """Steps with the very gradients of the step before, and no backward between."""
    again = [now for last, now in pairwise(records) if _same_gradients(last, now)]
    if len(again) > 1 and any(len(record.none_grads) < len(record.hooked) for record in records):
        yield finding(
            "step_called_twice",
            f"{len(again)} of the {len(records)} steps that were looked at had the gradients of the step "
            "before: no backward came between.",
            again[0].step + 1,
        )


def _same_gradients(last: StepRecord, now: StepRecord) -> bool:
    """Whether `now` follows `last`, no hook heard a backward, and the gradients are those that `last` left."""
    no_backward = bool(now.hooked) and len(now.none_grads) == len(now.hooked) and not now.closure
    return (
        now.step == last.step + 1
        and now.names == last.names
        and no_backward
        and last.grad_after_step is not None
        and torch.equal(now.grad_at_step, last.grad_after_step)
        and float(now.grad_at_step.norm()) > 0
    )
