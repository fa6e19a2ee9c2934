"""Rules over each epoch by itself: its steps, the weights at its seams, and the weights that it validated."""

from __future__ import annotations

import math
from collections.abc import Iterator

from ris_fast.health.finding import Finding
from ris_fast.health.monitor.history import Row, Rule, RunHistory

MIN_MOVE = 1e-5  # of the first weights' norm: a move that the rounding of a prediction in float32 cannot hide
CONSTANT = 1e-12  # of the mean square of a batch's answers: their variance
UNMOVED = 1e-4  # of the raw weights' way: less than any decay that averages leaves after an epoch
BEYOND = 3.0  # times the way of the raw weights, that no average of them goes even if they come back between epochs
FURTHER = 1.5  # times the share of the way
SHORT = 0.25  # of the run: an average over fewer steps is soon warm
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
        back = between.get("back_to_first") or between.get("back_to_earlier")
        where = "the first ones" if between.get("back_to_first") else "those of an earlier epoch" if back else "others"
        callbacks = run.info.get("own_callbacks") or ()
        if callbacks and not back and not _again(run):
            return  # a callback may do it once on purpose, as one that prunes or grows a network
        whose = f" Callbacks that may have done it: {', '.join(callbacks)}." if callbacks else ""
        yield run.finding(
            "weights_reset" if back else "weights_changed_outside",
            f"{between['moved']} tensors were replaced by {where} between two epochs.{whose}",
            certain=bool(back) or not callbacks,
        )


def _again(run: RunHistory) -> bool:
    """Whether weights were changed between earlier epochs too."""
    seams = [(row.get("health") or {}).get("weight_drift_between_epochs") or {} for row in run.epochs[:-1]]
    return any(seam.get("moved") for seam in seams)


def validated_weights(run: RunHistory) -> Iterator[Finding]:
    """Validation scores the weights it says, in evaluation mode, anew each time."""
    reading = run.validation
    scores, least = reading.get("scores") or {}, MIN_MOVE * (reading.get("first_norm") or 0.0)
    raw, mean = scores.get("raw"), scores.get("ema")
    if raw is None:
        return
    if not all(score["in_eval_mode"] for score in scores.values()):
        yield _in_training_mode(run, raw.get("in_training_mode") or {})
    if mean is not None:
        yield from _averages(run, raw, mean, reading.get("distance") or 0.0, least)
    before = ((run.epochs[-2].get("health") or {}).get("scores") or {}).get("raw") if len(run.epochs) > 1 else None
    if (
        before is not None
        and before["prediction_hash"] == raw["prediction_hash"]
        and abs(before["distance"] - raw["distance"]) > least
    ):
        yield _same_for_all(run, raw) or run.finding(
            "cached_validation",
            "the network's answers to the validation scenes are those of the epoch before, bit for bit "
            f"(validation loss {raw['loss']:.6f} twice), and its weights have moved.",
        )


def _in_training_mode(run: RunHistory, seen: Row) -> Finding:
    """Which modules stay in training mode, and what that changes; dropouts alone may be kept so on purpose."""
    if not seen:
        return run.finding("train_mode_in_validation", "modules are in training mode while the network is validated.")
    names = [name or "the network" for name in seen["names"]]
    parts = [
        f"{', '.join(each[:3])} {verb}"
        for each, verb in ((seen["dropout"], "drop outputs"), (seen["statistics"], "normalise by each batch"))
        if each
    ]
    effect = "; ".join(parts) or "none of those that are named drops outputs or keeps statistics"
    how = "its eval() or train() does nothing" if names[0] == "the network" else "their mode is set apart"
    return run.finding(
        "train_mode_in_validation",
        f"{', '.join(names[:3])}{' and others' if len(names) > 3 else ''} of {seen['modules']} modules stay in training"
        f" mode while the network is validated ({how}); {effect}.",
        certain=names[0] == "the network" or bool(seen["statistics"]) or not seen["dropout"],
    )


def _same_for_all(run: RunHistory, raw: Row) -> Finding | None:
    """An answer that is the same for all scenes is no cached one: it stays as it is whatever the weights are."""
    scenes = run.validation.get("scenes") or {}
    if scenes.get("exactly_one") == 1.0:
        return run.finding(
            "dead_units",
            "the output is exactly zero for every validation scene, whatever the weights are: units are off for every"
            " input, or both factors of a product are zero. Which of the two: print what the output is made of.",
        )
    spread = run.reading.get("spread")
    if spread is not None and spread <= CONSTANT:
        return run.finding(
            "ignored_input",
            f"the answers to the validation scenes are those of the epoch before (validation loss {raw['loss']:.6f}),"
            " and the answer to every scene of a training batch is the same: the output does not depend on the input.",
        )
    return None


def _averages(run: RunHistory, raw: Row, mean: Row, distance: float, least: float) -> Iterator[Finding]:
    if raw["distance"] == mean["distance"] != distance:
        yield run.finding("raw_not_validated", "the raw weights were scored with the averaged ones in place.")
    elif raw["prediction_hash"] == mean["prediction_hash"] and abs(raw["distance"] - mean["distance"]) > least:
        yield _same_for_all(run, raw) or run.finding(
            "cached_validation", "raw and averaged weights differ and give the same answers, bit for bit."
        )
    elif distance > least and mean["distance"] <= UNMOVED * distance:
        yield run.finding(
            "ema_frozen",
            f"the averaged weights are the first ones, {'bit for bit' if mean['distance'] == 0 else 'to rounding'}; the"
            " raw ones have moved.",
        )
    elif math.isfinite(mean["distance"]) and mean["distance"] > BEYOND * max(_furthest(run), distance, least):
        from_zero = mean["distance"] <= (run.validation.get("first_norm") or 0.0)
        yield run.finding(
            "ema_cold" if from_zero else "ema_frozen",
            f"the averaged weights are {mean['distance']:.3g} away from the first ones, and the raw ones were no"
            " further"
            f" than {max(_furthest(run), distance):.3g} at any epoch's end: an average of weights lies between them. "
            + (
                "It starts at zero and is not divided by 1 - decay^steps, or it is made of something else than the"
                " weights."
                " Which of the two: whether it comes nearer with each epoch."
                if from_zero
                else "It is made of something else than the weights, or its shares do not sum to one."
            ),
            certain=False,
        )
    elif _held_before(run) and mean.get("held") and distance > least and mean["distance"] > UNMOVED * distance:
        yield run.finding(
            "ema_frozen",
            f"the average of {mean['held']} tensors is their first value while the raw ones have moved; that of the"
            " others follows them.",
        )
    elif distance > 0 and mean["distance"] < COLD * distance and not _went_further(run, mean["distance"] / distance):
        memory, planned = _memory(run, mean["distance"] / distance), _planned(run)
        if memory is None or planned is None or memory > SHORT * planned:
            spans = "" if memory is None else f", as of an average over about {memory:,.0f} steps"
            of = "" if planned is None else f"; the run has {planned:,}"
            yield run.finding(
                "ema_cold",
                f"the averaged weights have gone {mean['distance'] / distance:.1%} of the way of the raw ones when "
                f"they are validated{spans}{of}.",
                certain=memory is None or planned is None or memory > planned,
            )
    elif distance > 0 and raw["distance"] == mean["distance"] and raw["prediction_hash"] == mean["prediction_hash"]:
        yield run.finding("ema_equals_raw", "averaged and raw weights are the same, bit for bit.")
    if not math.isfinite(mean["distance"]) and math.isfinite(raw["distance"]):
        yield run.finding("ema_nonfinite", "the averaged weights are not finite; the raw ones are.")


def _memory(run: RunHistory, share: float) -> float | None:
    """The steps that an average is taken over, which has gone this share of the way of weights that go straight on:
    (1 - decay) n / 2 of it behind n steps, while that is little. None where it does not move."""
    return run.step / (2.0 * share) if share > 0 and run.step > 0 else None


def _planned(run: RunHistory) -> int | None:
    return run.steps[-1].get("planned_steps") if run.steps else None


def _furthest(run: RunHistory) -> float:
    """The largest distance of the raw weights from the first ones at the end of an epoch."""
    ways = [(row.get("health") or {}).get("distance") or 0.0 for row in run.epochs]
    return max((way for way in ways if math.isfinite(way)), default=0.0)


def _held_before(run: RunHistory) -> bool:
    """Whether an average of a tensor was its first value an epoch before too: two norms may be equal by chance."""
    reading = (run.epochs[-2].get("health") or {}) if len(run.epochs) > 1 else {}
    return bool(((reading.get("scores") or {}).get("ema") or {}).get("held"))


def _went_further(run: RunHistory, share: float) -> bool:
    """Whether an earlier epoch's average had gone a larger share of the way.

    One that is cold gets warmer: where the share falls, the raw weights sway around the first ones, as of a penalty.
    """
    for row in run.epochs[:-1]:
        reading = row.get("health") or {}
        mean = (reading.get("scores") or {}).get("ema") or {}
        if mean and reading.get("distance") and mean["distance"] > FURTHER * share * reading["distance"]:
            return True
    return False


CONTRACT_RULES: tuple[Rule, ...] = (every_batch_is_a_step, weights_at_the_seams, validated_weights)
