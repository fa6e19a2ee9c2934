"""Rules over each epoch by itself: its steps, the weights at its seams, and the weights that it validated."""

from __future__ import annotations

import math
from collections.abc import Iterator

from ris_fast.health.finding import Finding
from ris_fast.health.monitor.history import Row, Rule, RunHistory

MIN_MOVE = 1e-5  # of the first weights' norm: a move that the rounding of a prediction in float32 cannot hide
COLD = 0.2  # of the raw weights' way, below which the averaged weights are mostly the first ones


def every_batch_is_a_step(run: RunHistory) -> Iterator[Finding]:
    """An epoch makes as many steps as its batches."""
    reading = run.validation
    made, read, wanted = reading.get("steps"), reading.get("optimizer_batches"), reading.get("epoch_steps")
    if made is None or made >= wanted or reading.get("cut_short"):
        return
    if made == 1 and read > 1:
        yield run.finding(
            "step_once_per_epoch",
            f"the epoch read {read} batches and made 1 optimizer step: the step stands behind the "
            "loop over batches, not in it.",
        )
    elif run.epochs[-1].get("epoch", 1) > 1 or read is not None:
        yield run.finding(
            "batches_skipped",
            f"the epoch made {made} optimizer steps on {read} groups of batches; its data have {wanted}.",
        )


def weights_at_the_seams(run: RunHistory) -> Iterator[Finding]:
    """Neither validation nor the time between epochs moves a weight."""
    seams = run.validation
    around, between = seams.get("weight_drift_in_validation") or {}, seams.get("weight_drift_between_epochs") or {}
    if around.get("moved"):
        yield run.finding(
            "ema_saved_over_raw",
            f"validation left {around['moved']} tensors changed: the averaged weights stayed in the network.",
        )
    if between.get("moved"):
        where = "the first ones" if between.get("back_to_first") else "others"
        yield run.finding("weights_reset", f"{between['moved']} tensors were replaced by {where} between two epochs.")


def validated_weights(run: RunHistory) -> Iterator[Finding]:
    """Validation scores the weights it says, in evaluation mode, anew each time."""
    reading = run.validation
    scores, least = reading.get("scores") or {}, MIN_MOVE * (reading.get("first_norm") or 0.0)
    raw, mean = scores.get("raw"), scores.get("ema")
    if raw is None:
        return
    if not all(score["in_eval_mode"] for score in scores.values()):
        yield run.finding("train_mode_in_validation", "modules are in training mode while the network is validated.")
    if mean is not None:
        yield from _averages(run, raw, mean, reading.get("distance") or 0.0, least)
    before = ((run.epochs[-2].get("health") or {}).get("scores") or {}).get("raw") if len(run.epochs) > 1 else None
    if (
        before is not None
        and before["prediction_hash"] == raw["prediction_hash"]
        and abs(before["distance"] - raw["distance"]) > least
    ):
        yield run.finding(
            "cached_validation",
            "the network's answers to the validation scenes are those of the epoch before, bit for bit "
            f"(validation loss {raw['loss']:.6f} twice), and its weights have moved.",
        )


def _averages(run: RunHistory, raw: Row, mean: Row, distance: float, least: float) -> Iterator[Finding]:
    if raw["distance"] == mean["distance"] != distance:
        yield run.finding("raw_not_validated", "the raw weights were scored with the averaged ones in place.")
    elif raw["prediction_hash"] == mean["prediction_hash"] and abs(raw["distance"] - mean["distance"]) > least:
        yield run.finding(
            "cached_validation", "raw and averaged weights differ and give the same answers, bit for bit."
        )
    elif distance > least and mean["distance"] == 0:
        yield run.finding(
            "ema_frozen", "the averaged weights are the first ones, bit for bit; the raw ones have moved."
        )
    elif distance > 0 and mean["distance"] < COLD * distance:
        yield run.finding(
            "ema_cold",
            f"the averaged weights have gone {mean['distance'] / distance:.1%} of the way of the raw ones when "
            "they are validated.",
        )
    elif distance > 0 and raw["distance"] == mean["distance"] and raw["prediction_hash"] == mean["prediction_hash"]:
        yield run.finding("ema_equals_raw", "averaged and raw weights are the same, bit for bit.")
    if not math.isfinite(mean["distance"]) and math.isfinite(raw["distance"]):
        yield run.finding("ema_nonfinite", "the averaged weights are not finite; the raw ones are.")


CONTRACT_RULES: tuple[Rule, ...] = (every_batch_is_a_step, weights_at_the_seams, validated_weights)
