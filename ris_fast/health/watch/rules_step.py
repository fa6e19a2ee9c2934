"""Rules of `watch` on one step by itself: what arrived, what the optimizer found, where the weights were."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ris_fast.health.finding import Finding
from ris_fast.health.watch.fixes import LOOK_AFTER_BACKWARD, finding
from ris_fast.health.watch.records import StepRecord, is_finite

GROWN = 10.0  # factor on the weights' norm


def single_step(record: StepRecord, first: StepRecord) -> list[Finding]:
    """Findings on one step; `first`: the first step of the same tensors."""
    if _broken_after_backward(record):
        return [
            finding(
                "nonfinite_gradients",
                f"{_broken(record)}, which backward leaves finite: something after backward breaks them.",
                record.step + 1,
                advice=LOOK_AFTER_BACKWARD,
            )
        ]
    return [*_gradients(record), *_weights(record, first)]


def _broken_after_backward(record: StepRecord) -> bool:
    """Whether a hook heard a backward that left every gradient finite, and the optimizer found them broken."""
    heard = not record.closure and len(record.none_grads) < len(record.hooked)
    return heard and is_finite(record.grad_after_backward) and not is_finite(record.grad_at_step) and not record.scaled


def _broken(record: StepRecord) -> str:
    return f"{int((~record.grad_at_step.isfinite()).sum())} of {len(record.grad_at_step)} tensors"


def _gradients(record: StepRecord) -> Iterator[Finding]:
    arrived, reached = float(record.grad_after_backward.norm()), float(record.grad_at_step.norm())
    if not is_finite(record.grad_after_backward) and is_finite(record.grad_at_step):
        bad = int((~record.grad_after_backward.isfinite()).sum())
        yield finding(
            "sanitised_gradients",
            f"{bad} tensors' gradients arrive non-finite and reach the optimizer finite.",
            record.step + 1,
        )
    elif not is_finite(record.grad_at_step) and not record.scaled:
        yield finding("nonfinite_gradients", f"{_broken(record)}.", record.step + 1)
    elif arrived > 0 and reached == 0:
        yield _emptied(record, arrived)


def _emptied(record: StepRecord, arrived: float) -> Finding:
    """What cleared gradients: a product with zero leaves negative zeros behind, and clearing does not."""
    if record.grad_change is not None and float(record.grad_change[1]) > 0:
        return finding(
            "clip_too_small",
            f"norm {arrived:.3g} arrives and the optimizer finds zeros, some of them negative, which a product with"
            " zero leaves behind: a clip threshold of zero does that.",
            record.step + 1,
        )
    return finding(
        "gradients_cleared_before_step",
        f"norm {arrived:.3g} arrives and the optimizer finds zero.",
        record.step + 1,
    )


def _weights(record: StepRecord, first: StepRecord) -> Iterator[Finding]:
    if record.reset is not None and bool(record.reset):
        yield finding(
            "weights_reset",
            "the weights are again, bit for bit, those of an earlier step; others came in between.",
            record.step + 1,
        )
    if (grown := _growth(record, first)) > GROWN:
        yield finding(
            "learning_rate_too_large",
            f"the weights' norm has grown by a factor of {grown:.3g}.",
            record.step + 1,
            "Large targets ask for that.",
        )


def _growth(record: StepRecord, first: StepRecord) -> float:
    """Factor on the norm of tensors that began at a usual size: what begins at zero or next to it has to grow."""
    usual = first.weights_before >= 0.1 * torch.tensor(first.usual_norms)
    if len(record.weights_after) != len(usual) or not usual.any():
        return 1.0
    grown = float(record.weights_after[usual].norm()) / float(first.weights_before[usual].norm())
    return grown if grown == grown else 1.0  # another rule reports NaN
