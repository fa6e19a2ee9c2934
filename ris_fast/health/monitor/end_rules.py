"""Rules over a run that is over: what it was stopped for, and whether it certainly learned nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator

from ris_fast.health.finding import Finding
from ris_fast.health.monitor.epoch_rules import AT_ITS_END
from ris_fast.health.monitor.history import Rule, RunHistory, validated
from ris_fast.health.monitor.settings_rules import settings_off_plan
from ris_fast.physics.baseline_names import CONSTANT_BASELINES

NO_BETTER, UNMOVED = 0.95, 0.01  # of the lowest constant answer; relative, between the first and the last third
WHOLE_EPOCHS, ENOUGH_STEPS = 3, 100  # before which a run has not had its chance


def how_it_ended(run: RunHistory) -> Iterator[Finding]:
    """What the loop stopped for, by cause."""
    stopped = set(run.summary.get("findings") or ())
    step = int(run.summary.get("optimizer_steps") or run.step)
    if "steps_differ_from_data" in stopped:
        made, attempted = run.reading.get("steps", 1), run.reading.get("attempted", 1)
        cause = "batches_skipped" if attempted else "step_never_called"
        yield Finding(
            cause,
            f"the epoch ended after {step} steps, fewer than its data have; the last row's {made} calls made "
            f"{attempted} optimizer steps.",
            step,
        )
    if "steps_skipped" in stopped:
        row = run.steps[-1] if run.steps else {}
        scale = row.get("loss_scale") or 1.0
        if run.reading.get("nonfinite_scenes"):
            yield Finding("nonfinite_data", "the steps that were skipped had scenes that are not finite.", step)
        else:
            seen = f"{run.summary.get('skipped_steps')} of {step} steps were skipped for gradients that are not finite"
            finite = math.isfinite(float(row.get("train_loss", 0.0)))
            by_scale = scale > 1.0 and finite
            if scale != 1.0:
                seen += f"; the loss scale is {scale:g} and the loss is {row.get('train_loss', math.nan):.3g}: " + (
                    "the scale overflows, or the network does in float16. Which of the two: training.precision=fp32"
                    if by_scale
                    else "no scale makes that finite, so the scale is not the cause"
                    + (
                        ""
                        if finite
                        else ": the network leaves float16, or a term of the loss is not finite. Which of"
                        " the two: training.precision=fp32"
                    )
                )
            in_half = run.info.get("precision") == "fp16" and not finite
            cause = "scaler_skips_all" if by_scale else "fp16_overflow" if in_half else "nonfinite_gradients"
            yield Finding(cause, f"{seen}.", step, certain=not in_half)


def stalled_at_baseline(run: RunHistory) -> Iterator[Finding]:
    """A run that came to its own end knows no more than a constant answer, and neither loss moved on the way."""
    whole = [row for row in run.epochs if not (row.get("health") or {"cut_short": True}).get("cut_short")]
    best, baselines = run.summary.get("best_val_nmse"), run.summary.get("baselines") or {}
    constants = {name: baselines[name] for name in CONSTANT_BASELINES if name in baselines}
    if (
        run.summary.get("verdict") != "stalled"
        or len(whole) < WHOLE_EPOCHS
        or run.step < ENOUGH_STEPS
        or not constants
        or best is None
    ):
        return
    name = min(constants, key=constants.__getitem__)
    moved = {
        what: _moved([figure(row) for row in whole])
        for what, figure in (("training", lambda row: float(row["train_loss"])), ("validation", validated))
    }
    if best >= NO_BETTER * constants[name] and all(share <= UNMOVED for share in moved.values()):
        yield run.finding(
            "stalled_at_baseline",
            f"after {run.step} steps and {len(whole)} whole epochs the best validation NMSE is {best:.4g}, beside"
            f" {constants[name]:.4g} for the constant answer '{name}'; between the first and the last third of the"
            f" epochs the training loss changed by {moved['training']:.2%} and validation by"
            f" {moved['validation']:.2%}.",
        )


def _moved(values: list[float]) -> float:
    """Relative change of the mean from the first third to the last; not-a-number where a value is."""
    third = max(1, len(values) // 3)
    first, last = (sum(part) / third for part in (values[:third], values[-third:]))
    return abs(last - first) / max(abs(first), 1e-30)


END_RULES: tuple[Rule, ...] = (how_it_ended, stalled_at_baseline, *AT_ITS_END, settings_off_plan)
