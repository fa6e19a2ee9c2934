"""Rules of `watch` on gradients that are taken away between backward and the step: replaced, cleared, or left out.

A guard that leaves a few steps out, as those with a spike or with NaN, is healthy. It is a mistake where it leaves out
nearly all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import median

from ris_fast.health.finding import Finding
from ris_fast.health.watch.describe import describe_steps
from ris_fast.health.watch.fixes import finding
from ris_fast.health.watch.records import LoopRecord, StepRecord, is_finite

SEVERAL, NEARLY_ALL, MANY = 4, 0.9, 0.25  # steps, and shares of those that were looked at
AGAIN, ORDINARY = 2, 1.5  # how often, and in units of the median norm, without a spike
GUARD = "A guard that leaves such steps out on purpose looks so."


def guard_findings(records: list[StepRecord]) -> Iterator[Finding]:
    """What most steps that were looked at show, or many."""
    looks = [each for each in records if each.hooked and len(each.none_grads) < len(each.hooked)]
    bad = [each for each in looks if not is_finite(each.grad_after_backward) and is_finite(each.grad_at_step)]
    yield from _not_finite(bad, looks)
    finite = [each for each in looks if is_finite(each.grad_after_backward)]
    yield from _cleared([each for each in finite if _is_cleared(each)], looks)


def loss_not_finite(loop: LoopRecord, records: Sequence[StepRecord]) -> Iterator[Finding]:
    """Losses that are not finite, of which finite gradients come."""
    finite = {each.step for each in records if is_finite(each.grad_after_backward)}
    values = [float(each.value) for each in (*loop.met, *loop.losses) if each.value is not None and each.step in finite]
    bad = [each for each in values if not math.isfinite(each)]
    if len(bad) >= SEVERAL and len(bad) >= MANY * len(values):
        yield finding(
            "nonfinite_gradients",
            f"{len(bad)} of {len(values)} losses that were looked at are {bad[0]}, and gradients are finite: a number"
            " on the way has left the range of its format (fp16_overflow), or is divided by zero.",
            0,
            "Where the loss is printed only, steps are right.",
            "Take sums, squares and logarithms in float32.",
        )


def _not_finite(bad: list[StepRecord], looks: list[StepRecord]) -> Iterator[Finding]:
    """Gradients that arrive with NaN or infinities, and of which the optimizer finds numbers, or none."""
    replaced = [each for each in bad if _replaced(each)]
    if bad and (replaced or len(bad) >= MANY * len(looks)):
        first = (replaced or bad)[0]
        count = int((~first.grad_after_backward.isfinite()).sum())  # type: ignore[union-attr]
        when = describe_steps([each.step + 1 for each in replaced or bad], len(looks))
        found = "finite numbers" if replaced else "none" if first.no_grad else "zeros"
        yield finding(
            "sanitised_gradients" if replaced else "nonfinite_gradients",
            f"the gradients of {count} tensors arrive with NaN or infinities, and the optimizer finds {found} of them,"
            f" {when}.",
            first.step + 1,
            "" if _nearly_all(replaced or bad, looks) else GUARD,
        )


def _replaced(record: StepRecord) -> bool:
    """Whether numbers take the place of what was not finite, or zeros in single tensors; None, or zeros in all of
    them, leave a step out."""
    broken = [name for name, norm in zip(record.names, record.grad_after_backward) if not bool(norm.isfinite())]
    numbers = float(record.grad_at_step.norm()) > 0  # type: ignore[union-attr]
    return numbers and not set(broken) <= set(record.no_grad)


def _is_cleared(record: StepRecord) -> bool:
    """Whether something arrives and nothing is left; negative zeros are those of a product."""
    arrived, reached = record.gradient_norms()
    product = record.grad_change is not None and float(record.grad_change[1]) > 0
    return arrived > 0 and reached == 0 and not product


def _cleared(cleared: list[StepRecord], looks: list[StepRecord]) -> Iterator[Finding]:
    if cleared and (len(cleared) >= MANY * len(looks) or _without_spike(cleared, looks)):
        found = "none" if cleared[0].no_grad else "zeros"
        yield finding(
            "gradients_cleared_before_step",
            f"gradients of norm {cleared[0].gradient_norms()[0]:.3g} arrive and the optimizer finds {found},"
            f" {describe_steps([each.step + 1 for each in cleared], len(looks))}.",
            cleared[0].step + 1,
            ""
            if _nearly_all(cleared, looks)
            else f"{GUARD} These gradients are no larger than others."
            if _without_spike(cleared, looks)
            else GUARD,
        )


def _without_spike(cleared: list[StepRecord], looks: list[StepRecord]) -> bool:
    """Whether it happens again and again to gradients that are no larger than others, as no guard asks for."""
    left = {each.step for each in cleared}
    others = [each.gradient_norms()[0] for each in looks if each.step not in left]
    others = [each for each in others if math.isfinite(each)]
    usual = median(others) if others else 0.0
    return len(cleared) >= AGAIN and all(each.gradient_norms()[0] <= ORDINARY * usual for each in cleared)


def _nearly_all(some: Sequence[StepRecord], looks: Sequence[StepRecord]) -> bool:
    return len(some) >= SEVERAL and len(some) >= NEARLY_ALL * len(looks)
