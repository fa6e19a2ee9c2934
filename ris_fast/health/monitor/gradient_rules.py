"""Rules over gradients by scene, by micro-batch and by step, and over what steps do with them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ris_fast.health.finding import Finding
from ris_fast.health.monitor.history import Row, Rule, RunHistory
from ris_fast.health.monitor.settings_rules import TRUTH, settings_of

LOOKS = 3  # rows that must show the same
MANY = 0.25  # of all tensors
SEEN_STEPS = 16  # in which a gradient was always zero
LEFT_OUT = 0.05  # of the scenes
WHOLE = 1e-3  # relative: of the sum of shares
MOVES = 1e-5  # of its size, which a tensor moves by in a step


def _window(run: RunHistory) -> Mapping[str, Any]:
    return run.reading.get("window") or {}


def _sampled(run: RunHistory) -> list[Row]:
    """Readings of the steps that were looked at closely, oldest first."""
    return [reading for row in run.steps if "raw_norm" in (reading := row.get("health") or {})]


def _when(seen: Mapping[str, Any]) -> str:
    """'step 5', '3 steps, the first step 5', 'every 4th step since step 8'."""
    if seen["every"] and seen["every"] > 1:
        return f"every {seen['every']} steps since step {seen['first']}"
    return f"step {seen['first']}" if seen["steps"] == 1 else f"{seen['steps']} steps, the first step {seen['first']}"


def no_gradient_arrives(run: RunHistory) -> Iterator[Finding]:
    """The loss reaches the factors, and through them every tensor that is trained."""
    last = _sampled(run)[-LOOKS:]
    if len(last) < LOOKS or run.reading is not last[-1]:
        return
    told = any(value for name, value in settings_of(run).items() if name in TRUTH)
    if told and all(reading.get("output_detached") for reading in last):
        sampled = _sampled(run)
        without = sum(bool(reading.get("output_detached")) for reading in sampled)
        if without < len(sampled):  # a graph was there: what is done with it changed
            yield run.finding(
                "forwards_without_backward",
                f"{without} of the {len(sampled)} steps that were read had no backward, the last {LOOKS} among them,"
                " and the others had one: something leaves steps out, as a guard against spikes does.",
                certain=False,
            )
            return
        yield run.finding(
            "detached_loss",
            "backward never reaches the factors, though terms of the loss compare them with the truth.",
            certain=False,
        )
        return
    if all(reading["raw_norm"] == 0 for reading in last):
        output = last[-1].get("at_output") or {}
        zero = output.get("scenes") and output["without"] == output["scenes"]
        yield run.finding(
            "clamped_loss" if zero else "vanishing_gradient",
            f"backward leaves a gradient that is exactly zero in {LOOKS} steps"
            + (
                ", and it is zero at the output already: the loss has no slope there, or its two factors are zero at"
                " once. Which of the two: whether the validation NMSE is exactly 1."
                if zero
                else ", and it is not zero at the output: it is lost inside the network, by a rounding or comparison or"
                " by units that are off for every input. Which of the two: print the gradient of each layer."
            ),
            certain=False,
        )
        return
    lacking = last[-1].get("without_path")
    if lacking and all((each.get("without_path") or {}).get("names") == lacking["names"] for each in last):
        behind = lacking.get("from_the_first") and lacking["share"] < 1.0
        yield run.finding(
            "detached_backbone" if behind else "unused_head",
            f"{lacking['tensors']} tensors ({lacking['share']:.0%} of the weights) have had no gradient in any step,"
            f" the first {', '.join(lacking['names'][:3])}: "
            + (
                "the first layers are among them, so gradients stop inside the network, or nothing calls these layers."
                if behind
                else "no term of the loss uses them, or something detaches what they give."
            ),
            certain=False,
        )


def always_zero(run: RunHistory) -> Iterator[Finding]:
    """No tensor's gradient is exactly zero at every step."""
    windows = [each for row in run.steps if (each := (row.get("health") or {}).get("window"))]
    seen = _window(run).get("without_gradient")
    if not seen or sum(each["recorded"] for each in windows) < SEEN_STEPS or len(windows) < LOOKS:
        return
    names = set(seen["names"])
    for each in windows:
        names &= set((each.get("without_gradient") or {}).get("names", ()))
    lacking = (_sampled(run)[-1].get("without_path") or {}) if _sampled(run) else {}
    names -= set(lacking.get("names", ()))
    quiet = tuple(name for name, term in (run.steps[-1].get("terms") or {}).items() if term["raw"] == 0)
    names = {name for name in names if not name.startswith(quiet)}  # a head that has one answer to give
    frozen = ((settings_of(run).get("membership") or {}).get("frozen") or {}).get("count", 0)
    silent = seen["tensors"] - lacking.get("tensors", 0) - frozen
    if names and silent >= MANY * max(each.get("tensors", 1) for each in _sampled(run)) and _has_gradient(run):
        yield run.finding(
            "vanishing_gradient",
            f"{silent} tensors receive a gradient that is exactly zero in every"
            f" step, the first {', '.join(sorted(names)[:3])}: units behind them are off for every input, or a rounding"
            " or a product with zero is in their path.",
            certain=False,
        )


def _has_gradient(run: RunHistory) -> bool:
    return (run.reading.get("raw_norm") or 1.0) > 0


def scenes_with_a_gradient(run: RunHistory) -> Iterator[Finding]:
    """Every scene of a step has a gradient at the output."""
    seen = [each["at_output"] for each in _sampled(run)[-LOOKS:] if each.get("at_output")]
    if len(seen) < LOOKS or not run.reading.get("at_output") or run.reading.get("zero_scenes"):
        return
    if not all(LEFT_OUT * each["scenes"] <= each["without"] < each["scenes"] for each in seen):
        return
    same = len({str(each["first"]) for each in seen}) == 1
    where = ", always the same places in the batch" if same else ""
    yield run.finding(
        "scenes_left_out",
        f"{seen[-1]['without']} of {seen[-1]['scenes']} scenes have a gradient of exactly zero at the output in each of"
        f" {LOOKS} steps{where}.",
        certain=same,
    )


def micro_batches(run: RunHistory) -> Iterator[Finding]:
    """The micro-batches of a step add up, each with its share, and reach the same tensors."""
    last = _sampled(run)[-LOOKS:]
    seen = [each["micro_batches"] for each in last if each.get("micro_batches")]
    share = run.reading.get("share_of_losses")
    if share is not None and "ranks" not in run.reading and abs(share - 1.0) > WHOLE:
        yield run.finding(
            "accumulation_not_divided",
            f"the losses of a step's micro-batches are summed with shares that make {share:.4g}.",
        )
    if len(seen) < LOOKS or not run.reading.get("micro_batches"):
        return
    if all(each["cleared_between"] for each in seen):
        yield run.finding(
            "last_micro_batch_only",
            "before a later micro-batch of a step there is no gradient left of the earlier ones, in each of"
            f" {LOOKS} steps.",
        )
    elif all(any(each["without"]) for each in seen):
        places = {tuple(bool(count) for count in each["without"]) for each in seen}
        now = seen[-1]
        which = [str(place + 1) for place, count in enumerate(now["without"]) if count]
        yield (
            run.finding(
                "micro_batches_differ",
                f"{max(now['without'])} of {now['tensors']} tensors receive no gradient from micro-batch"
                f" {', '.join(which[:4])} of {len(now['without'])}, the first {', '.join(now['names'][:3])}.",
                certain=False,
            )
            if len(places) == 1
            else run.finding(
                "micro_batches_differ",
                f"in each of {LOOKS} steps some of {now['tensors']} tensors receive no gradient from some micro-batch,"
                f" the first {', '.join(now['names'][:3])}, not always from the same one: a layer that only some inputs"
                " reach does that too.",
                certain=False,
            )
        )


def steps_without_gradient(run: RunHistory) -> Iterator[Finding]:
    """No single step has a gradient of zero between others that have one."""
    window, scaled = _window(run), (run.steps[-1].get("loss_scale") or 1.0) != 1.0
    seen = window.get("zero_steps")
    if seen and seen["steps"] < window["recorded"]:
        regular = seen["every"] is not None and seen["every"] > 1
        yield run.finding(
            "gradient_underflow" if scaled else "zeroed_gradients",
            f"the optimizer finds a gradient of exactly zero in {_when(seen)}, of {window['recorded']} steps: something"
            " clears what backward leaves, or no backward runs, as behind a guard that leaves batches out.",
            certain=regular and not scaled,
        )
    some, tensors = window.get("partly_zero_steps"), window.get("partly_zero")
    if some and tensors and some["every"] is not None and some["every"] > 1:
        yield run.finding(
            "zeroed_gradients",
            f"{tensors['tensors']} tensors have a gradient of exactly zero in {_when(some)}, the first"
            f" {', '.join(tensors['names'][:3])}: a term or a branch that is on in some steps only, or something that"
            " clears them.",
            certain=False,
        )


def steps_that_move_nothing(run: RunHistory) -> Iterator[Finding]:
    """A step with a gradient and a rate moves the network's weights, and finite gradients make finite weights."""
    window, reading, row = _window(run), run.reading, run.steps[-1]
    if broken := window.get("nonfinite_updates"):
        yield run.finding(
            "nonfinite_step",
            f"gradients are finite and weights or their update are not after {_when(broken)}, first in"
            f" {broken['tensor']}.",
        )
    elif reading.get("nonfinite_after") and not reading.get("nonfinite_before") and not reading.get("raw_nonfinite"):
        yield run.finding(
            "nonfinite_step",
            f"before step {row['step']} all weights and its gradients are finite, and after it"
            f" {reading['nonfinite_after']} tensors are not.",
        )
    rates = list((row.get("lr") or {}).values())
    if reading.get("skipped") or not rates or not all(math.isfinite(rate) and rate > 0 for rate in rates):
        return
    moving = (reading.get("raw_norm") or 0.0) > 0 and reading.get("attempted") == reading.get("steps")
    if moving and reading.get("moved") == 0 and reading.get("nonfinite_after") == 0:
        if (reading.get("update_ratio") or 0.0) > MOVES:
            yield run.finding(
                "stale_optimizer_parameters",
                f"the optimizer says that it moved the median tensor by {reading['update_ratio']:.1e} of itself, and no"
                f" tensor of the network has moved.",
            )
        elif not reading.get("update_ratio"):
            yield run.finding(
                "step_without_effect",
                f"a gradient of norm {reading['raw_norm']:.3g} and rates above zero, and no tensor has moved.",
                certain=False,
            )
    elif (still := window.get("unmoved_steps")) and still["steps"] < window["recorded"]:
        yield run.finding(
            "step_without_effect",
            f"gradients are above zero and no tensor moves in {_when(still)}, of {window['recorded']} steps.",
            certain=False,
        )


def weights_stay_where_the_step_left_them(run: RunHistory) -> Iterator[Finding]:
    """Nothing but the optimizer moves a weight, and nothing rounds it."""
    window, reading = _window(run), run.reading
    coarse, looks = reading.get("coarse_format"), _sampled(run)[-2:]
    moving = reading.get("moved") and (reading.get("update_ratio") or 0.0) > 0
    if coarse and moving and len(looks) == 2 and all(each.get("coarse_format") == coarse for each in looks):
        yield run.finding(
            "low_precision_weights",
            f"after a step that moved it every number of the largest tensor is one of {coarse}, though it is kept in"
            " float32: something rounds the weights.",
        )
        return
    callbacks: Sequence[str] = run.info.get("step_callbacks") or ()
    whose = f" Callbacks that may: {', '.join(callbacks)}." if callbacks else ""
    if _seen_at_an_epoch(run):
        return
    seen = window.get("changed_outside")
    if seen and seen["first"] in {int(row.get("step", 0)) + 1 for row in run.epochs}:
        return  # between two epochs, which the row of the second says more of
    if seen:
        yield run.finding(
            "weights_changed_outside",
            f"between two steps the norm of {seen['tensors']} tensors changes by more than the optimizer moves them, at"
            f" {_when(seen)}; the first {', '.join(seen['names'][:3])}.{whose}",
            certain=not callbacks,
        )
    elif reading.get("touched_after"):
        yield run.finding(
            "weights_changed_outside",
            f"{reading['touched_after']} tensors have another norm than the optimizer's step left them with.{whose}",
            certain=False,
        )


def _seen_at_an_epoch(run: RunHistory) -> bool:
    """Whether the change is one that an epoch's row names: in validation, or between epochs."""
    seams = ("weight_drift_in_validation", "weight_drift_between_epochs")
    return any(((row.get("health") or {}).get(seam) or {}).get("moved") for row in run.epochs for seam in seams)


GRADIENT_RULES: tuple[Rule, ...] = (
    no_gradient_arrives,
    always_zero,
    scenes_with_a_gradient,
    micro_batches,
    steps_without_gradient,
    steps_that_move_nothing,
    weights_stay_where_the_step_left_them,
)
