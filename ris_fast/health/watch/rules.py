"""What the steps that `watch` saw come to: rules over records.

Legend: T tensors, those of the model that one optimizer holds and that have a norm.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ris_fast.health.finding import Finding, ranked
from ris_fast.health.watch.fixes import BETWEEN, MEANT
from ris_fast.health.watch.fixes import found as _found
from ris_fast.health.watch.members import membership
from ris_fast.health.watch.records import EARLY, part
from ris_fast.training.telemetry.step_telemetry import norms

if TYPE_CHECKING:
    from ris_fast.health.watch.watch import OptimizerHooks, StepRecord, Watch

MANY_PASSES = 4096  # backward passes without a step, more than anybody adds up
MANY_CLEARED = 64  # gradients thrown away before the first step, more than trials or a loss scaler take
SCALER_STEPS = 24  # a loss scale halves its way to one that fits in fewer


def told(watch: Watch) -> list[Finding]:
    """All findings, most certain first. Reads the device."""
    return ranked([*membership(watch), *(found for hooks in watch.all_hooks for found in _followed(watch, hooks))])


def _followed(watch: Watch, hooks: OptimizerHooks) -> list[Finding]:
    """What one optimizer's steps say."""
    if not hooks.steps:
        return list(_never_stepped(watch, hooks))
    records = [record.on_host() for record in hooks.records]
    if burst := list(_burst(hooks, records)):
        return burst  # whatever is said of later steps comes from that
    return [
        *(found for record in records for found in _judge(record, next(r for r in records if r.names == record.names))),
        *_turned(records),
        *_unheard(watch, hooks, records),
        *_skipped(records),
        *_still(watch, hooks, records),
        *_clipped(records),
        *_uncleared(records),
        *_twice(records),
        *_zeroed(watch, records),
        *_slow(records),
        *_decayed(hooks, records),
        *_broken(hooks, records),
    ]


def _never_stepped(watch: Watch, hooks: OptimizerHooks) -> Iterator[Finding]:
    """Before the first step all may be well: gradients may be added up over many passes, a scaler may skip, a later
    phase may be meant.

    That gradients are thrown away time after time betrays a loop without a step, unless another optimizer's are made in
    it.
    """
    bad = sum(not bool(norm.isfinite()) for norm in hooks.arrived.values())
    skipped = f" {bad} of them are not finite: a loss scaler or a check may skip every step." if bad else ""
    passes, cleared = (max(counts.values(), default=0) for counts in (hooks.passes, hooks.cleared))
    later = (
        "Another optimizer makes steps: this one's may come in a later phase."
        if watch.steps
        else "If gradients are added up over several passes, the first step is still to come."
    )
    certain = not watch.steps and (passes > MANY_PASSES or cleared > MANY_CLEARED)
    if hooks.arrived:
        yield _found(
            "step_never_called",
            f"{len(hooks.arrived)} tensors have received gradients in {passes} backward passes, {cleared} "
            f"of which found the gradients cleared, and the optimizer has made no step.{skipped}",
            doubt="" if certain else later,
        )


def _unheard(watch: Watch, hooks: OptimizerHooks, records: list[StepRecord]) -> Iterator[Finding]:
    """Tensors that no gradient came to, neither from backward nor put there by hand, and that no step has changed.

    Where some came after others, or by turns, more may come.
    """
    heard = Counter(name for record in records for name in record.hooked)
    missing = Counter(
        name
        for record in records
        for name, given in zip(record.names, record.grad_at_step)
        if name in record.none_grads and given == 0
    )
    silent = [name for name, count in missing.items() if count == heard[name]]
    own, trained = hooks.own(), hooks.origin.trained()
    never = [name for name in silent if name in own and id(own[name]) not in trained]
    turns = len(never) < len(silent) or any(0 < missing[name] < heard[name] for name in heard)
    if not (never := [name for name in never if not name.startswith(watch.frozen)]):
        return
    doubt = (
        "Others are trained in turn or came later: these may be to come."
        if turns
        else "Few steps have been made so far."
    )
    certain = not turns and hooks.steps >= EARLY and max(heard[name] for name in never) > 1
    yield _found(
        "unused_head",
        f"{len(never)} of {len(heard)} trainable tensors have received no gradient so far, and no step has changed "
        f"them: {', '.join(never[:3])}.",
        records[-1].step,
        "" if certain else doubt,
    )


def _skipped(records: list[StepRecord]) -> Iterator[Finding]:
    if records[-1].step >= SCALER_STEPS and all(
        record.scaled and not _finite(record.grad_at_step) for record in records
    ):
        yield _found(
            "scaler_skips_all",
            f"the gradients of all {len(records)} steps that were looked at are not finite.",
            records[-1].step,
        )


def _still(watch: Watch, hooks: OptimizerHooks, records: list[StepRecord]) -> Iterator[Finding]:
    """Groups whose rate was zero in every step seen. A schedule may end there; a group of several may be meant to stand
    still."""
    own = {id(p): name for name, p in hooks.own().items()}
    groups = [{own.get(id(p), "") for p in group["params"]} for group in hooks.optimizer.param_groups]
    rates = [[record.rates[n] for record in records if n < len(record.rates)] for n in range(len(groups))]
    zero = [n for n, seen in enumerate(rates) if len(seen) > 1 and not any(rate > 0 for rate in seen)]
    if names := [f"group {n}" for n in zero if not all(name.startswith(watch.frozen) for name in groups[n])]:
        yield _found(
            "zero_learning_rate",
            f"{len(names)}: {', '.join(names[:3])}, in all {len(records)} steps that were looked at.",
            records[-1].step + 1,
            "" if len(zero) == len(groups) else MEANT,
        )


def _clipped(records: list[StepRecord]) -> Iterator[Finding]:
    """A factor on all gradients may be a loss scale taken out again, and means nothing to Adam: it must be seen in the
    updates.

    Where updates do not show it, norms that are the same in every step betray a threshold.
    """
    seen = [
        (record, float(record.grad_after_backward.norm()), float(record.grad_at_step.norm()))
        for record in records
        if _finite(record.grad_after_backward) and not record.closure and max(record.rates) > 0
    ]
    small = [each for each in seen if 0 < each[2] < 1e-4 * each[1]]
    if not small or len(small) < len(seen):
        return
    record, arrived, passed = small[0]
    evidence = f"norm {arrived:.3g} arrives and {passed:.3g} reaches the optimizer."
    slow = all(
        given < 1e-5 * float(each.before.norm())
        and each.moved is not None
        and float(each.moved) < 1e-5 * max(each.rates)
        for each, _, given in small
    )
    passed_on = [given for _, _, given in small]
    fixed = len(small) > 1 and max(passed_on) < (1 + 1e-4) * min(passed_on)  # as a threshold makes it
    if slow:
        yield _found(
            "clip_too_small",
            evidence,
            record.step + 1,
            "" if fixed else "It may be a loss scale taken out, late in a run.",
        )
    elif fixed and len(small) > 3 and max(passed_on) < 1e-3:
        yield _found(
            "clip_too_small",
            f"{evidence} It is the same norm in {len(small)} steps.",
            record.step + 1,
            "Adam hardly minds.",
        )


def _turned(records: list[StepRecord]) -> Iterator[Finding]:
    """Gradients that are turned round, or made one number, in all steps seen: what a threshold below zero does."""
    seen = [
        (record, float(record.grad_after_backward.norm()), float(record.grad_at_step.norm()), *record.touched.tolist())
        for record in records
        if record.touched is not None
        and float(record.grad_at_step.norm()) > 0
        and _finite(record.grad_after_backward)
        and _finite(record.grad_at_step)
    ]
    if len(seen) < 2:
        return
    record, came, given, *_ = seen[0]
    if all(before > 1e-3 and after < 1e-6 for *_, before, after in seen):
        yield _found(
            "clip_too_small",
            "all entries of the gradient are the same number when they reach the optimizer: a threshold "
            "below zero in `clip_grad_value_` does that.",
            record.step + 1,
        )
    elif all(cosine < -0.999 for *_, cosine, _, _, _ in seen):
        if all(abs(given - came) <= 1e-3 * came for _, came, given, *_ in seen):
            yield _found(
                "loss_sign",
                f"gradients are turned round between backward and the step, at the same norm ({given:.3g}).",
                record.step + 1,
                MEANT,
            )
        else:
            yield _found(
                "clip_too_small",
                f"gradients of norm {came:.3g} arrive and reach the optimizer turned round, at norm "
                f"{given:.3g}: a threshold below zero in `clip_grad_norm_` does that.",
                record.step + 1,
            )


def _burst(hooks: OptimizerHooks, records: list[StepRecord]) -> Iterator[Finding]:
    """A step that makes weights that are not finite out of weights and gradients that are."""
    for seen in records:
        broken = [name for name, after in zip(seen.names, seen.after) if not bool(after.isfinite())]
        if broken and _finite(seen.before) and _finite(seen.grad_at_step) and not seen.closure:
            yield _found(
                "nonfinite_step",
                f"weights and gradients (norm {float(seen.grad_at_step.norm()):.3g}) are finite before the step, and after it"
                f" the weights of {len(broken)} of {len(seen.names)} tensors are not: {', '.join(broken[:3])}."
                f" {_how(hooks, seen, broken)}",
                seen.step + 1,
            )
            return
        if not _finite(seen.before) or not _finite(seen.grad_at_step):
            return


def _how(hooks: OptimizerHooks, seen: StepRecord, broken: list[str]) -> str:
    """What of the optimizer's options makes a number that is not finite."""
    own = hooks.own()
    formats = {own[name].dtype for name in broken if name in own}
    for group in hooks.optimizer.param_groups:
        for kind in formats & {p.dtype for p in group["params"]}:
            eps = group.get("eps")
            if isinstance(eps, float) and float(torch.tensor(eps, dtype=kind)) == 0.0:
                name, least = str(kind).removeprefix("torch."), torch.finfo(kind).tiny * torch.finfo(kind).eps
                said = (
                    f"eps of {eps:.3g} is zero in {name}, whose smallest number is {least:.2g}"
                    if eps
                    else "eps is zero"
                )
                return (
                    f"The optimizer's {said}: where the mean square of a gradient is zero too, the step divides by"
                    " zero."
                )
    return f"The rate is {max(seen.rates):.3g}: look at the optimizer's options and at the weights' number format."


def _uncleared(records: list[StepRecord]) -> Iterator[Finding]:
    """What is left of a gradient after a step is still there at the next backward, and added to, in all of the first
    steps."""
    seen = [bool(record.uncleared) for record in records if record.uncleared is not None]
    if len(seen) > 1 and all(seen):
        yield _found(
            "gradients_never_cleared",
            f"in all {len(seen)} steps that were looked at, what came was added to the gradients of the step before.",
            records[-1].step + 1,
        )


def _twice(records: list[StepRecord]) -> Iterator[Finding]:
    """Steps with the very gradients of the step before, and no backward between."""
    again = [
        now
        for last, now in zip(records, records[1:])
        if now.step == last.step + 1
        and now.names == last.names
        and not now.closure
        and now.hooked
        and len(now.none_grads) == len(now.hooked)
        and last.left is not None
        and torch.equal(now.grad_at_step, last.left)
        and float(now.grad_at_step.norm()) > 0
    ]
    if len(again) > 1 and any(len(record.none_grads) < len(record.hooked) for record in records):
        yield _found(
            "step_called_twice",
            f"{len(again)} of the {len(records)} steps that were looked at had the gradients of the step "
            "before: no backward came between.",
            again[0].step + 1,
        )


def _zeroed(watch: Watch, records: list[StepRecord]) -> Iterator[Finding]:
    """Some tensors' gradients arrive and are zero at the step, in all steps seen; those that are None there may be
    meant to stand still."""
    counts, zero, gone = Counter[str](), Counter[str](), Counter[str]()
    for record in (each for each in records if not each.closure and float(each.grad_at_step.norm()) > 0):
        for name, came, given in zip(record.names, record.grad_after_backward, record.grad_at_step):
            if bool(came.isfinite()) and came > 0:
                counts[name] += 1
                zero[name] += bool(given == 0)
                gone[name] += name in record.no_grad
    names = [
        name
        for name, count in counts.items()
        if count > 1 and zero[name] == count and not name.startswith(watch.frozen)
    ]
    if names:
        yield _found(
            "zeroed_gradients",
            f"{len(names)} of {len(counts)} tensors' gradients arrive and are zero at every step: "
            f"{', '.join(names[:3])}.",
            records[-1].step + 1,
            MEANT if all(gone[name] for name in names) else "",
        )


def _slow(records: list[StepRecord]) -> Iterator[Finding]:
    """Updates that float32 does not see, at a rate that explains them and does not rise."""
    seen = [
        (max(record.rates), float(record.moved))
        for record in records
        if record.moved is not None and not bool(record.moved.isnan()) and max(record.rates) > 0
    ]
    if len(seen) > 1 and seen[0][0] >= seen[-1][0] and all(rate < 1e-6 and moved < 1e-8 for rate, moved in seen):
        yield _found(
            "learning_rate_too_small",
            f"a step at a rate of {seen[-1][0]:.3g} moves the weights by no more than "
            f"{max(moved for _, moved in seen):.2g} of their size.",
            records[-1].step + 1,
        )


def _decayed(hooks: OptimizerHooks, records: list[StepRecord]) -> Iterator[Finding]:
    """Optimizers that take rate times decay of the weights off in each step: AdamW and its kin, and SGD."""
    kinds = {kind.__name__ for kind in type(hooks.optimizer).__mro__}
    groups = [
        group
        for group in hooks.optimizer.param_groups
        if group.get("decoupled_weight_decay") or kinds & {"SGD", "AdamW", "FusedAdamW"}
    ]
    decay = max((float(group.get("weight_decay") or 0.0) for group in groups), default=0.0)
    share = (
        min(max(record.rates) for record in records) * decay
        if len(groups) == len(hooks.optimizer.param_groups)
        else 0.0
    )
    if share >= 0.1:
        yield _found(
            "weight_decay_too_large",
            f"a decay of {decay:.3g} takes {share:.0%} off the weights in each step.",
            records[-1].step + 1,
        )


def _broken(hooks: OptimizerHooks, records: list[StepRecord]) -> Iterator[Finding]:
    """Weights as they are now: what happens between two looks stays in them."""
    own = hooks.own()
    names = [
        name
        for name, norm in zip(own, norms([part(tensor) for tensor in own.values()]).tolist())
        if not math.isfinite(norm)
    ]
    if not names:
        return
    how = _how(hooks, records[-1], names)
    seen = f"the weights of {len(names)} of {len(own)} tensors are not finite now: {', '.join(names[:3])}."
    if "eps" in how:
        yield _found("nonfinite_step", f"{seen} {how}", hooks.steps, "No step that was looked at shows it.")
    else:
        yield _found("nonfinite_gradients", seen, hooks.steps)


def _judge(seen: StepRecord, first: StepRecord) -> list[Finding]:
    """One step: what arrived, what the optimizer was given, what moved; `first`: the first step of the same tensors."""
    arrived, passed = float(seen.grad_after_backward.norm()), float(seen.grad_at_step.norm())
    found = []
    if not _finite(seen.grad_after_backward) and _finite(seen.grad_at_step):
        found.append(
            (
                "sanitised_gradients",
                (
                    f"{int((~seen.grad_after_backward.isfinite()).sum())} tensors' gradients arrive non-finite and reach the "
                    "optimizer finite."
                ),
                "",
            )
        )
    elif not _finite(seen.grad_at_step) and not seen.scaled:
        broken = f"{int((~seen.grad_at_step.isfinite()).sum())} of {len(seen.grad_at_step)} tensors"
        if _whole_at_first(seen):
            return [
                _found(
                    "nonfinite_gradients",
                    f"{broken}, which backward leaves finite: something after backward breaks them.",
                    seen.step + 1,
                    advice=BETWEEN,
                )
            ]
        found.append(("nonfinite_gradients", f"{broken}.", ""))
    elif arrived > 0 and passed == 0:
        found.append(_emptied(seen, arrived))
    if seen.reset is not None and bool(seen.reset):
        found.append(
            (
                "weights_reset",
                "the weights are again, bit for bit, those of an earlier step; others came in between.",
                "",
            )
        )
    if (grown := _growth(seen, first)) > 10.0:
        found.append(
            (
                "learning_rate_too_large",
                f"the weights' norm has grown by a factor of {grown:.3g}.",
                "Large targets ask for that.",
            )
        )
    return [_found(cause, evidence, seen.step + 1, doubt) for cause, evidence, doubt in found]


def _whole_at_first(seen: StepRecord) -> bool:
    """Whether backward was heard and left every gradient finite."""
    return not seen.closure and len(seen.none_grads) < len(seen.hooked) and _finite(seen.grad_after_backward)


def _emptied(seen: StepRecord, arrived: float) -> tuple[str, str, str]:
    """What cleared gradients: a product with zero leaves negative zeros behind, and clearing does not."""
    if seen.touched is not None and float(seen.touched[1]) > 0:
        return (
            "clip_too_small",
            (
                f"norm {arrived:.3g} arrives and the optimizer finds zeros, some of them negative, which a product with"
                " zero leaves behind: a clip threshold of zero does that."
            ),
            "",
        )
    return ("gradients_cleared_before_step", f"norm {arrived:.3g} arrives and the optimizer finds zero.", "")


def _growth(seen: StepRecord, first: StepRecord) -> float:
    """Of the tensors that began at a usual size: what begins at zero or next to it has to grow."""
    usual = first.before >= 0.1 * torch.tensor(first.sizes)
    grown = (
        float(seen.after[usual].norm()) / float(first.before[usual].norm())
        if len(seen.after) == len(usual) and usual.any()
        else 1.0
    )
    return grown if grown == grown else 1.0  # not-a-number is told as such


def _finite(values: Tensor) -> bool:
    return bool(values.isfinite().all())
