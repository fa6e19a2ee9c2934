"""Rules on the rows of other trainers: what losses and gradient norms show by themselves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ris_fast.health.finding import Finding
from ris_fast.health.monitor.history import RunHistory

ROUNDING = 5e-7  # relative: sums in float32 in another order
MIN_DIGITS = 5  # of a figure that is the same in every epoch, to rule out chance and rounding
STEADY, RISEN, FALLEN = 1.02, 1.1, 0.7


def symptoms(run: RunHistory) -> list[Finding]:
    """Findings over rows of another trainer, the likeliest first; none is certain."""
    if any("health" in row for row in (*run.steps, *run.epochs)):
        return []
    losses = [value for row in run.epochs if (value := validation_loss(row)) is not None]
    nonfinite = _nonfinite_loss(run)
    return [
        *nonfinite,
        *(_step_once_per_epoch(run, losses) or _constant_validation(run, losses)),
        *_overfitting(run),
        *([] if nonfinite else _grad_norms(run)),
    ]


def _nonfinite_loss(run: RunHistory) -> list[Finding]:
    """A loss that is not finite from some row on."""
    for rows, name in ((run.steps, "train_loss"), (run.epochs, "train_loss"), (run.epochs, "val_loss")):
        values = [row[name] for row in rows if isinstance(row.get(name), (int, float))]
        bad = next((index for index, value in enumerate(values) if not math.isfinite(value)), None)
        if bad is not None and not any(map(math.isfinite, values[bad:])):
            before = f", {values[bad - 1]:.4g} in the one before" if bad else ""
            return [
                _likely(
                    "nonfinite_gradients",
                    f"{name} is {values[bad]} from row {bad + 1} of {len(values)} on{before}: one step with "
                    "gradients that are not finite was applied, and the weights have been lost since.",
                    run,
                )
            ]
    return []


def _step_once_per_epoch(run: RunHistory, losses: Sequence[float]) -> list[Finding]:
    """A printed training loss that is the validation loss over the number of batches, epoch after epoch."""
    pairs = _pairs(run)
    if len(pairs) < 2 or not all(train > 0 and value > 0 for train, value in pairs):
        return []
    ratios, batches = [value / train for train, value in pairs], run.epochs[0].get("batches")
    steady = max(ratios) < 1.1 * min(ratios) and min(ratios) > 3
    if not steady or (batches is not None and abs(ratios[0] - batches) > 0.25 * batches):
        return []
    still = " and hardly changes" if _is_steady([train for train, _ in pairs]) else ""
    counted = f", and an epoch has {batches:.0f} batches" if batches else ""
    unapplied = (
        f" The validation loss is {_shown(losses)} in all {len(losses)} epochs, so not even that step is applied: it is"
        " never called, or it is skipped because its gradients are not finite."
        if _is_constant(losses) and _digits(losses[0]) >= MIN_DIGITS
        else ""
    )
    return [
        _likely(
            "step_once_per_epoch",
            f"in every epoch the training loss is the validation loss divided by {ratios[0]:.1f}{counted}{still}: that"
            " is what the loss of one batch over the number of batches looks like, so forward, backward and the"
            f" optimizer's step run once an epoch, behind the loop over batches.{unapplied}",
            run,
        )
    ]


def _constant_validation(run: RunHistory, losses: Sequence[float]) -> list[Finding]:
    """A validation loss that is the same in every epoch."""
    if not _is_constant(losses):
        return []
    digits, train = _digits(losses[0]), [loss for loss, _ in _pairs(run)]
    same = f"the validation loss is {_shown(losses)} in all {len(losses)} epochs"
    if digits < MIN_DIGITS:
        return [
            _likely(
                "cached_validation",
                f"{same}, but with {digits} digits that may be rounding: either the validated weights or "
                "answers never change, or the run learns next to nothing. Log more digits.",
                run,
            )
        ]
    if _is_steady(train):
        return [
            _likely(
                "step_never_called",
                f"{same}, and the training loss stays within {STEADY - 1:.0%} ({min(train):.6g} to "
                f"{max(train):.6g}): no weight seems to move, because the step is never called or never applied.",
                run,
            )
        ]
    return [
        _likely(
            "cached_validation",
            f"{same}, to the last digit: the weights that are validated, or the answers, never change.",
            run,
        )
    ]


def _is_constant(losses: Sequence[float]) -> bool:
    """Whether all are the same but for rounding."""
    return (
        len(losses) > 2 and all(map(math.isfinite, losses)) and max(losses) - min(losses) <= ROUNDING * abs(max(losses))
    )


def _shown(losses: Sequence[float]) -> str:
    """A constant loss as it was written, or without its rounding."""
    return repr(losses[0]) if len(set(losses)) == 1 else f"{losses[0]:.6g}, but for rounding,"


def _overfitting(run: RunHistory) -> list[Finding]:
    """Training that keeps falling while validation rises."""
    pairs = [pair for pair in _pairs(run) if all(map(math.isfinite, pair))]
    if len(pairs) < 5:
        return []
    best = min(range(len(pairs)), key=lambda index: pairs[index][1])
    (train, value), (train_then, value_then) = pairs[-1], pairs[best]
    if best >= 2 * len(pairs) // 3 or not (0 < RISEN * value_then < value and 0 < train < FALLEN * train_then):
        return []
    return [
        _likely(
            "overfitting",
            f"validation was best, {value_then:.4g}, in epoch {best + 1} of {len(pairs)} and rose to {value:.4g}, while"
            f" training fell from {train_then:.4g} to {train:.4g}: the network memorises its training scenes.",
            run,
        )
    ]


def _grad_norms(run: RunHistory) -> list[Finding]:
    norms = [
        float(row["grad_norm"]) for row in (*run.steps, *run.epochs) if isinstance(row.get("grad_norm"), (int, float))
    ]
    if norms and not any(norms):
        return [_likely("zeroed_gradients", f"the gradient norm is zero in all of {len(norms)} rows.", run)]
    if norms and not any(map(math.isfinite, norms)):
        return [_likely("nonfinite_gradients", f"the gradient norm is not finite in any of {len(norms)} rows.", run)]
    return []


def _likely(cause: str, evidence: str, run: RunHistory) -> Finding:
    return Finding(cause, evidence, run.step, certain=False)


def validation_loss(row: Mapping[str, Any]) -> float | None:
    """Of an epoch, under any of its keys; None where there is none."""
    values = (row.get(key) for key in ("val_loss", "val", "val_nmse_raw"))
    return next((float(value) for value in values if isinstance(value, (int, float))), None)


def _pairs(run: RunHistory) -> list[tuple[float, float]]:
    """Training and validation loss of the epochs that have both."""
    return [
        (float(row["train_loss"]), value)
        for row in run.epochs
        if isinstance(row.get("train_loss"), (int, float)) and (value := validation_loss(row)) is not None
    ]


def _is_steady(values: Sequence[float]) -> bool:
    return len(values) > 2 and min(values) > 0 and max(values) <= STEADY * min(values)


def _digits(value: float) -> int:
    """Significant digits that a figure was written with."""
    return (
        len(repr(value).partition("e")[0].replace(".", "").replace("-", "").strip("0")) if math.isfinite(value) else 0
    )
