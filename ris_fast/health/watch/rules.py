"""All rules over what `watch` recorded, in their order, with those on one step and on when an optimizer steps."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import torch

from ris_fast.health.finding import Finding, ranked
from ris_fast.health.watch import (
    rules_batches,
    rules_changes,
    rules_clip,
    rules_construction,
    rules_data,
    rules_forward,
    rules_gradients,
    rules_guards,
    rules_helpers,
    rules_inside,
    rules_layers,
    rules_layout,
    rules_loss,
    rules_modes,
    rules_objective,
    rules_outcome,
    rules_parameters,
    rules_ranks,
    rules_rates,
    rules_scale,
    rules_scenes,
    rules_schedules,
    rules_state,
    rules_told,
    rules_zero,
)
from ris_fast.health.watch.describe import describe_steps, describe_tensors
from ris_fast.health.watch.fixes import LOOK_AFTER_BACKWARD, MAY_BE_MEANT, finding
from ris_fast.health.watch.records import LoopRecord, OptimizerRecord, StepRecord, is_finite

EXPLAINS = {  # what follows from a cause
    "dead_units": ["ignored_input"],
    "constant_targets": ["target_scale_differs"],
    "fp16_overflow": ["dead_units", "ignored_input"],
    "constant_input": ["ignored_input", "zeroed_gradients"],
    "non_differentiable": ["vanishing_gradient"],
    "clamped_loss": ["vanishing_gradient", "scenes_left_out"],
    "zero_loss_weight": ["vanishing_gradient"],
    "sanitised_gradients": ["vanishing_gradient", "zeroed_gradients"],
    "stale_compiled_graph": ["unused_head", "loss_rebuilt", "detached_backbone"],
    "stale_optimizer_parameters": ["unused_head", "loss_rebuilt"],
    "duplicate_parameters": ["gradients_cleared_before_step"],  # which another's step has used
    "loss_sign": ["nonfinite_gradients"],
    "bad_initialisation": ["ignored_input"],
    "gradient_underflow": ["dead_units"],
    "learning_rate_too_large": ["ignored_input"],  # units that were driven off
}
DIVERGED = {"learning_rate_too_large", "nonfinite_gradients"}
UNLEARNED = {"ignored_input", "stalled_at_baseline", "dead_units", "saturated_output", "collapsed", "shuffled_labels"}
FEW_PASSES = 64  # backward passes that an optimizer waits while others step
MANY_PASSES = 4096  # backward passes without a step, more than anybody adds up
SCALER_STEPS = 24  # a loss scale halves its way to one that fits in fewer
GROWN, FALLEN = 10.0, 0.25  # factors on the weights' norm, and on the loss
SETTLED = 0.01  # of the weights, a step at rest
PUT_BACK = "Later steps are finite: a search for the largest learning rate that puts the weights back looks the same."
SCALER = "GradScaler"
OTHERS_STEP = "Another optimizer makes steps: this one's may come in a later phase."


def find_mistakes(loop: LoopRecord) -> list[Finding]:
    """All findings, most certain first."""
    by_optimizer = (each for optimizer in loop.optimizers for each in optimizer_findings(loop, optimizer))
    found = [
        *rules_parameters.parameter_findings(loop),
        *rules_forward.forward_findings(loop),
        *rules_inside.inside_findings(loop),
        *rules_layers.layer_findings(loop),
        *rules_construction.construction_findings(loop),
        *rules_loss.loss_findings(loop),
        *rules_told.told_findings(loop),
        *rules_objective.objective_findings(loop),
        *rules_layout.layout_findings(loop),
        *rules_data.data_findings(loop),
        *rules_schedules.schedule_findings(loop),
        *rules_state.state_findings(loop),
        *rules_batches.batch_findings(loop),
        *rules_scenes.scene_findings(loop),
        *rules_modes.mode_findings(loop),
        *rules_helpers.helper_findings(loop),
        *by_optimizer,
        *rules_ranks.rank_findings(loop),
    ]
    left_in = next((each for each in found if each.cause == "gradient_scale_differs" and SCALER in each.evidence), None)
    if left_in is not None:
        found = [_after_scale(each, left_in) if each.cause == "nonfinite_gradients" else each for each in found]
    found += rules_outcome.outcome_findings(loop, found)
    if any(each.cause == "learning_rate_off_plan" and rules_rates.UPHILL in each.evidence for each in found):
        found = [each for each in found if each.cause not in DIVERGED]
    found = [warmup_instead(each, loop) if each.cause == "learning_rate_too_small" else each for each in found]
    explained = {effect for each in found for effect in EXPLAINS.get(each.cause, ())}
    causes = {each.cause for each in found}
    if not causes & (DIVERGED | UNLEARNED):
        explained.add("accumulation_not_divided")  # a rate may allow for it
    elif "accumulation_not_divided" in causes and not any(
        "Adam" in kind for by in loop.optimizers for kind in by.kinds
    ):
        explained |= UNLEARNED  # follow from steps that are too large
        found = [
            replace(each, certain=each.certain and each.step < 2) if each.cause in DIVERGED else each for each in found
        ]
    return ranked(found, muted=explained)


def warmup_instead(found: Finding, loop: LoopRecord) -> Finding:
    """Steps that are too small at a rate that rises all the time: a warm-up that the run does not get through."""
    for by in loop.optimizers:
        for history in by.plain.rates.values():
            rises = history.last == history.largest > 4 * history.first > 0
            if rises and by.steps >= 100 and history.changes >= 0.9 * (by.steps - 2) and not found.certain:
                evidence = f"the rate has risen in all {by.steps} steps, from {history.first:.3g} to {history.last:.3g}"
                return finding("warmup_too_long", f"{evidence}; {found.evidence}", found.step, MAY_BE_MEANT)
    return found


def _after_scale(found: Finding, left_in: Finding) -> Finding:
    """What follows from a loss scale that is still in the gradients, where it may."""
    first = left_in.evidence.partition(". ")[0]
    return replace(found, evidence=f"{first}: look there first. Then: {found.evidence}", advice=left_in.advice)


def optimizer_findings(loop: LoopRecord, optimizer: OptimizerRecord) -> list[Finding]:
    """What one optimizer's steps show."""
    if not optimizer.steps:
        return list(rules_rates.built_anew(optimizer)) or list(step_never_called(loop, optimizer))
    if lost := list(rules_parameters.nonfinite_step(optimizer)):
        return lost  # whatever later steps show comes from that
    records, learned = optimizer.records, has_learned(loop) or has_settled(optimizer.records)
    return [
        *(each for record in records for each in single_step(record, optimizer, learned)),
        *rules_guards.guard_findings(records),
        *(rules_guards.loss_not_finite(loop, records) if len(loop.optimizers) == 1 else ()),
        *rules_gradients.reversed_gradients(records, rules_objective.is_negated(loop)),
        *rules_gradients.scaled_on_the_way(optimizer),
        *rules_gradients.unused_head(optimizer, loop.frozen),
        *rules_gradients.last_micro_batch_only(optimizer),
        *rules_gradients.steps_stopped(loop, optimizer),
        *scaler_skips_all(records),
        *scale_or_clip(optimizer),
        *rules_scale.scale_left_in(loop, optimizer),
        *rules_gradients.gradients_never_cleared(optimizer),
        *step_called_twice(records),
        *rules_gradients.zeroed_gradients(records, loop.frozen),
        *rules_zero.zero_findings(loop, optimizer),
        *rules_zero.dead_units(loop, optimizer),
        *rules_zero.zeros_now_and_then(loop, optimizer),
        *rules_zero.symmetric_init(optimizer),
        *rules_zero.gradient_underflow(loop, optimizer),
        *rules_rates.rate_findings(loop, optimizer),
        *rules_changes.change_findings(loop, optimizer),
        *rules_parameters.nonfinite_weights(optimizer),
        *(rules_clip.clipped_in_part(records) if loop.ranks is None else ()),
    ]


def scale_or_clip(optimizer: OptimizerRecord) -> list[Finding]:
    """A known loss scale explains small gradients better than a threshold."""
    return list(rules_scale.scale_findings(optimizer)) or list(rules_gradients.clip_too_small(optimizer.records))


def step_never_called(loop: LoopRecord, optimizer: OptimizerRecord) -> Iterator[Finding]:
    """Before the first step all may be well: gradients may be added up over many passes, a scaler may skip, a later
    phase may be meant.

    Thousands of passes betray a loop without a step, unless another optimizer steps in it. Gradients that are thrown
    away may be kept elsewhere first, one scene at a time.
    """
    bad = sum(not math.isfinite(norm) for norm in optimizer.arrived)
    skipped = f" {bad} of them are not finite: a loss scaler or a check may skip every step." if bad else ""
    doubt = "If gradients are added up over several passes, the first step is still to come."
    others = loop.steps or optimizer.rivals
    certain = not others and optimizer.passes > MANY_PASSES
    adds_up = not optimizer.cleared and optimizer.passes <= FEW_PASSES
    scaled = loop.scales or any(each.chain[:1] == ["Mul"] for each in loop.met)  # by a scale
    if bad == len(optimizer.arrived) > 0 and optimizer.passes > SCALER_STEPS and not others:
        yield finding(
            "scaler_skips_all" if scaled else "nonfinite_gradients",
            f"none of the gradients of {bad} tensors is finite after {optimizer.passes} backward passes, and the"
            " optimizer has made no step: a loss scaler skips them all.",
            doubt="A scaler that is made anew begins at its first scale again; so does one that is never updated.",
            advice="Make one `torch.amp.GradScaler` before the first epoch, and call `update()` after each step.",
        )
        return
    if optimizer.arrived and not (loop.steps and optimizer.passes <= FEW_PASSES) and not adds_up:
        yield finding(
            "step_never_called",
            f"{len(optimizer.arrived)} tensors have received gradients in {optimizer.passes} backward passes, "
            f"{optimizer.cleared} of which found the gradients cleared, and the optimizer has made no step.{skipped}",
            doubt="" if certain else OTHERS_STEP if others else doubt,
        )


def scaler_skips_all(records: list[StepRecord]) -> Iterator[Finding]:
    """A loss scaler is at work, and no step that was looked at had finite gradients."""
    skipped = all(record.scaled and not is_finite(record.grad_at_step) for record in records)
    if skipped and (last := records[-1].step) >= SCALER_STEPS:
        yield finding(
            "scaler_skips_all", f"the gradients of all {len(records)} steps that were looked at are not finite.", last
        )


def step_called_twice(records: list[StepRecord]) -> Iterator[Finding]:
    """Steps with the very gradients of the step before, and no backward between. Where the weights were put back in
    between, the step is tried again with another rate, as a line search does."""
    pairs = [(last, now) for last, now in pairwise(records) if rules_changes.same_gradients(last, now)]
    again = [now for last, now in pairs if not rules_changes.tried_again(last, now)]
    if len(again) > 1 and any(len(record.none_grads) < len(record.hooked) for record in records):
        yield finding(
            "step_called_twice",
            f"{len(again)} of the {len(records)} steps that were looked at had the gradients of the step "
            "before: no backward came between.",
            again[0].step + 1,
        )


def has_learned(loop: LoopRecord) -> bool:
    """Whether the loss has come to a part of what it was."""
    values = [float(each.value) for each in loop.met if each.value is not None]
    positive = len(values) >= 8 and all(0 < value < math.inf for value in values)
    return positive and sum(values[-4:]) / 4 < FALLEN * values[0]


def has_settled(records: list[StepRecord]) -> bool:
    """Whether no step was as large as the weights, and the last ones are small beside them: what has grown so has come
    to where it stays."""
    steps = [float(each.update_ratio) for each in records if each.update_ratio is not None]
    late = steps[-len(steps) // 4 :]
    return len(steps) >= 16 and max(steps) < 1 and sum(late) < SETTLED * len(late)


def single_step(record: StepRecord, optimizer: OptimizerRecord, learned: bool = False) -> list[Finding]:
    """What one step shows: of the gradients, and of the weights unless something after backward broke the gradients.
    `learned`: the loss has fallen, or the weights have settled, so that they have grown for it."""
    heard = not record.closure and len(record.none_grads) < len(record.hooked)
    broken_there = is_finite(record.grad_after_backward) and not is_finite(record.grad_at_step)
    if heard and broken_there and not record.scaled:
        evidence = f"{_broken(record, optimizer)}. Backward leaves them finite: something after backward breaks them."
        return [finding("nonfinite_gradients", evidence, record.step + 1, advice=LOOK_AFTER_BACKWARD)]
    first = next(each for each in optimizer.records if each.names == record.names)
    return [*_gradients(record, optimizer), *(() if learned else _weights(record, first))]


def _broken(record: StepRecord, optimizer: OptimizerRecord) -> str:
    """Which tensors' gradients are not finite in a step, and in which others some are not."""
    sizes = {tensor.name: tensor.size for tensor in optimizer.tensors}
    broken = {
        name: sizes.get(name, 0) for name, norm in zip(record.names, record.grad_at_step) if not bool(norm.isfinite())
    }
    steps = [each.step + 1 for each in optimizer.records if not is_finite(each.grad_at_step)]
    return f"{describe_tensors(broken, sum(sizes.values()))}; {describe_steps(steps, len(optimizer.records))}"


def _gradients(record: StepRecord, optimizer: OptimizerRecord) -> Iterator[Finding]:
    """What the optimizer found. A product with zero leaves negative zeros behind, and clearing does not."""
    (arrived, reached), step = record.gradient_norms(), record.step + 1
    if not is_finite(record.grad_at_step) and not record.scaled:
        doubt = PUT_BACK if _recovers(record, optimizer.records[-1]) else ""
        yield finding("nonfinite_gradients", f"{_broken(record, optimizer)}.", step, doubt)
    elif arrived > 0 and reached == 0 and record.grad_change is not None and float(record.grad_change[1]) > 0:
        yield finding(
            "clip_too_small",
            f"norm {arrived:.3g} arrives and the optimizer finds zeros, some of them negative, which a product with"
            " zero leaves behind: a clip threshold of zero does that.",
            step,
        )


def _recovers(record: StepRecord, last: StepRecord) -> bool:
    """Whether weights and gradients are finite in the end: a step that such gradients take would have left NaN."""
    return last is not record and is_finite(last.grad_at_step) and is_finite(last.weights_after)


def _weights(record: StepRecord, first: StepRecord) -> Iterator[Finding]:
    """Where the weights are; `first`: the first step of the same tensors."""
    if (grown := _growth(record, first)) > GROWN:
        evidence = f"the weights' norm has grown by a factor of {grown:.3g}."
        yield finding("learning_rate_too_large", evidence, record.step + 1, "Large targets ask for that.")


def _growth(record: StepRecord, first: StepRecord) -> float:
    """Factor on the norm of tensors that began at a usual size: what begins at zero or next to it has to grow."""
    usual = first.weights_before >= 0.1 * torch.tensor(first.usual_norms)
    if len(record.weights_after) != len(usual) or not usual.any():
        return 1.0
    grown = float(record.weights_after[usual].norm()) / float(first.weights_before[usual].norm())
    return grown if grown == grown else 1.0  # another rule reports NaN
