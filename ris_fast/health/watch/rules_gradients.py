"""Rules of `watch` on gradients over many steps: those that never come, are changed on their way, or stay."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

from ris_fast.health.finding import Finding
from ris_fast.health.watch.fixes import MAY_BE_MEANT, finding
from ris_fast.health.watch.records import EARLY, OptimizerRecord, StepRecord, is_finite


def unused_head(optimizer: OptimizerRecord, frozen: tuple[str, ...]) -> Iterator[Finding]:
    """Tensors that no gradient came to, neither from backward nor put there by hand, and that no step has changed.

    Where some came after others, or by turns, more may come.
    """
    hooked = Counter(name for record in optimizer.records for name in record.hooked)
    missing = Counter(
        name
        for record in optimizer.records
        for name, norm in zip(record.names, record.grad_at_step.tolist())
        if norm == 0 and name in record.none_grads
    )
    silent = [name for name, count in missing.items() if count == hooked[name]]
    trained = {tensor.name for tensor in optimizer.trained}
    unchanged = [name for name in silent if name in optimizer.weight_norms and name not in trained]
    turns = len(unchanged) < len(silent) or any(0 < missing[name] < hooked[name] for name in hooked)
    doubt = "Others are trained in turn or came later: these may be to come."
    if unused := [name for name in unchanged if not name.startswith(frozen)]:
        certain = not turns and optimizer.steps >= EARLY and max(hooked[name] for name in unused) > 1
        yield finding(
            "unused_head",
            f"{len(unused)} of {len(hooked)} trainable tensors have received no gradient so far, and no step has "
            f"changed them: {', '.join(unused[:3])}.",
            optimizer.records[-1].step,
            "" if certain else doubt if turns else "Few steps have been made so far.",
        )


def clip_too_small(records: list[StepRecord]) -> Iterator[Finding]:
    """A factor on all gradients may be a loss scale taken out again, and means nothing to Adam: it must be seen in the
    updates.

    Where updates do not show it, norms that are the same in every step betray a threshold.
    """
    steps = [
        (record, *record.gradient_norms())
        for record in records
        if is_finite(record.grad_after_backward) and not record.closure and max(record.rates) > 0
    ]
    small = [(record, at_step) for record, arrived, at_step in steps if 0 < at_step < 1e-4 * arrived]
    if not small or len(small) < len(steps):
        return
    record, arrived, at_step = steps[0]
    norms = [norm for _, norm in small]
    fixed = len(small) > 1 and max(norms) < (1 + 1e-4) * min(norms)  # as a threshold makes it
    evidence = f"norm {arrived:.3g} arrives and {at_step:.3g} reaches the optimizer."
    if all(_hardly_moves(each, norm) for each, norm in small):
        doubt = "" if fixed else "It may be a loss scale taken out, late in a run."
        yield finding("clip_too_small", evidence, record.step + 1, doubt)
    elif fixed and len(small) > 3 and max(norms) < 1e-3:
        evidence = f"{evidence} It is the same norm in {len(small)} steps."
        yield finding("clip_too_small", evidence, record.step + 1, "Adam hardly minds.")


def _hardly_moves(record: StepRecord, at_step: float) -> bool:
    """Whether gradients and updates are next to nothing beside the weights."""
    return (
        at_step < 1e-5 * float(record.weights_before.norm())
        and record.update_ratio is not None
        and float(record.update_ratio) < 1e-5 * max(record.rates)
    )


def reversed_gradients(records: list[StepRecord]) -> Iterator[Finding]:
    """Gradients that are turned round, or made one number, in all steps: what a threshold below zero does. Turned round
    by hand where the norm stays the same."""
    finite = [each for each in records if is_finite(each.grad_after_backward) and is_finite(each.grad_at_step)]
    steps = [each for each in finite if each.grad_change is not None and float(each.grad_at_step.norm()) > 0]
    if len(steps) < 2:
        return
    changes, norms = [each.grad_change.tolist() for each in steps], [each.gradient_norms() for each in steps]
    (arrived, at_step), step = norms[0], steps[0].step + 1
    if all(spread > 1e-3 and spread_at_step < 1e-6 for _, _, spread, spread_at_step in changes):
        yield finding(
            "clip_too_small",
            "all entries of the gradient are the same number when they reach the optimizer: a threshold "
            "below zero in `clip_grad_value_` does that.",
            step,
        )
    elif any(cosine >= -0.999 for cosine, *_ in changes):
        return
    elif all(abs(after - before) <= 1e-3 * before for before, after in norms):
        yield finding(
            "loss_sign",
            f"gradients are turned round between backward and the step, at the same norm ({at_step:.3g}).",
            step,
            MAY_BE_MEANT,
        )
    else:
        yield finding(
            "clip_too_small",
            f"gradients of norm {arrived:.3g} arrive and reach the optimizer turned round, at norm {at_step:.3g}: a "
            "threshold below zero in `clip_grad_norm_` does that.",
            step,
        )


def gradients_never_cleared(records: list[StepRecord]) -> Iterator[Finding]:
    """A gradient is still there at the backward after a step, and added to, in all of the first steps."""
    uncleared = [bool(record.uncleared) for record in records if record.uncleared is not None]
    if len(uncleared) > 1 and all(uncleared):
        yield finding(
            "gradients_never_cleared",
            f"in all {len(uncleared)} steps that were looked at, what came was added to the gradients of the step"
            " before.",
            records[-1].step + 1,
        )


def zeroed_gradients(records: list[StepRecord], frozen: tuple[str, ...]) -> Iterator[Finding]:
    """Some tensors' gradients arrive and are zero at every step; those that are None there may be meant to stand
    still."""
    seen = [
        (name, bool(at_step == 0), name in record.no_grad)
        for record in records
        if not record.closure and float(record.grad_at_step.norm()) > 0
        for name, before, at_step in zip(record.names, record.grad_after_backward, record.grad_at_step)
        if 0 < before < math.inf
    ]
    arrived, zero = Counter(name for name, *_ in seen), Counter(name for name, zero, _ in seen if zero)
    zeroed = [name for name, count in arrived.items() if count > 1 and zero[name] == count]
    if names := [name for name in zeroed if not name.startswith(frozen)]:
        yield finding(
            "zeroed_gradients",
            f"{len(names)} of {len(arrived)} tensors' gradients arrive and are zero at every step: "
            f"{', '.join(names[:3])}.",
            records[-1].step + 1,
            MAY_BE_MEANT if {name for name, _, none in seen if none}.issuperset(names) else "",
        )
