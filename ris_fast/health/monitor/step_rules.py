"""Rules over the steps of a run: its optimizer steps, gradients, scenes, modes, learning rates and weights."""

from __future__ import annotations

import math
from collections.abc import Iterator

from ris_fast.health.finding import Finding
from ris_fast.health.monitor.history import Row, Rule, RunHistory, named
from ris_fast.health.monitor.settings_rules import peaks, settings_of
from ris_fast.health.own_schedule import out_of_plan

SOME = 0.1  # of a step's scenes: fewer may be zeros by chance, of a mask
TOUCHED = 0.02  # relative: more than rounding in a sum
MORE_THAN_DRAWN, NEARLY_ALL = 0.7, 0.9  # of a step's scenes: 1 - 1/e come again in an epoch of draws with replacement
ENOUGH_SCENES = 8  # of one step, or of several together, of which more than half were served before
JUMP, STILL = 0.5, 1e-8  # of a weight in one step
GROWN, SHRUNK = 10.0, 0.2  # of the first weights' norm
NEXT_TO_ZERO = 0.01  # rms of all weights
USUAL = 0.2  # rms of a weight; first weights have a tenth of that


def one_update_a_step(run: RunHistory) -> Iterator[Finding]:
    """The optimizer is stepped once for each call of the step."""
    calls, attempted = run.reading.get("steps", 0), run.reading.get("attempted")
    if not calls or attempted is None:
        return
    earlier = [row["health"]["applied"] for row in run.steps[:-1] if "applied" in (row.get("health") or {})]
    if earlier and run.reading.get("applied", 0) < max(earlier):
        yield run.finding(
            "optimizer_state_lost",
            f"the optimizer's count of updates falls from {max(earlier)} to "
            f"{run.reading['applied']}: it was built anew.",
        )
        return  # the count says nothing of the steps then
    if attempted <= 0:
        yield run.finding(
            "step_never_called", f"{calls} calls of the step up to step {run.step} made no optimizer step."
        )
    elif attempted < calls and len(run.steps) > 1:
        yield run.finding(
            "step_never_called",
            f"{calls} calls of the step up to step {run.step} made {attempted} optimizer steps: the others made none.",
        )
    elif attempted >= 2 * calls:
        yield run.finding("step_called_twice", f"{calls} calls of the step made {attempted} optimizer steps.")


def untouched_gradient(run: RunHistory) -> Iterator[Finding]:
    """What backward leaves is what the optimizer receives, and nothing is left from the step before."""
    reading, row = run.reading, run.steps[-1]
    raw, scale = reading.get("raw_norm"), row.get("loss_scale") or 1.0
    if raw is None or reading.get("attempted") != reading.get("steps"):
        return
    seen = row["grad_norm"] * scale
    if reading["raw_nonfinite"] and math.isfinite(seen) and not reading["skipped"]:
        yield run.finding(
            "sanitised_gradients",
            f"backward leaves {reading['raw_nonfinite']} tensors with values that are not finite and "
            f"the optimizer receives a gradient of norm {seen:.3g}.",
        )
    elif (
        reading["raw_nonfinite"] and reading["skipped"] and scale == 1.0 and not _of_all_ranks(run, "nonfinite_scenes")
    ):
        yield run.finding(
            "nonfinite_gradients",
            f"{reading['raw_nonfinite']} tensors have gradients that are not finite{_on_ranks(run, 'nonfinite')},"
            " though the scenes are.",
        )
    elif math.isfinite(raw) and raw > 0 and scale == 1.0:
        if seen == 0:
            yield run.finding(
                "gradients_cleared_before_step",
                f"backward leaves a gradient of norm {raw:.3g} and the optimizer finds zero.",
            )
        elif seen < (1 - TOUCHED) * raw:
            yield run.finding(
                "zeroed_gradients",
                f"between backward and the optimizer the gradient's norm falls from {raw:.3g} to {seen:.3g}.",
            )
    elif math.isfinite(raw) and raw > 0 and math.isfinite(seen) and not reading["skipped"]:
        # The scale may have grown or fallen behind the step.
        seen = min((seen, 2 * seen, seen / 2), key=lambda each: abs(each - raw))
        if seen < 0.4 * raw:
            yield run.finding(
                "clip_before_unscale",
                f"between backward and the optimizer the norm of a gradient that carries the loss scale {scale:g} falls"
                f" from {raw:.3g} to {seen:.3g}: it is clipped before it is unscaled, or something else shrinks it.",
                certain=False,
            )
    if (reading.get("residual_grad_norm") or 0.0) > 1e-3 * max(raw if math.isfinite(raw) else 0.0, 1e-30):
        yield run.finding(
            "gradients_never_cleared",
            f"after clearing, the gradients still have norm {reading['residual_grad_norm']:.3g}.",
        )


def nonfinite_between_reports(run: RunHistory) -> Iterator[Finding]:
    """Steps that no report looked at closely were not skipped for gradients that are not finite."""
    reading, window = run.reading, run.reading.get("window") or {}
    scaled = (run.steps[-1].get("loss_scale") or 1.0) != 1.0  # a scaler finds its scale by overflowing
    if (
        window.get("nonfinite_steps")
        and not scaled
        and not reading.get("raw_nonfinite")
        and not _of_all_ranks(run, "nonfinite_scenes")
    ):
        yield run.finding(
            "nonfinite_gradients",
            f"{window['nonfinite_steps']} of the last {window['recorded']} steps had gradients that are not finite and"
            f" were not applied, first step {window['first_nonfinite_step']} in {window['first_nonfinite_tensor']};"
            " their scenes were not looked at.",
            certain=False,
        )


def served_scenes(run: RunHistory) -> Iterator[Finding]:
    """No step has empty or broken scenes, or scenes that it or another step of the epoch has had."""
    reading = run.reading
    scenes = _of_all_ranks(run, "scenes")
    if count := _of_all_ranks(run, "nonfinite_scenes"):
        where = _on_ranks(run, "nonfinite_scenes")
        yield run.finding("nonfinite_data", f"{count} of {scenes} scenes of a step are not finite{where}.")
    count = _of_all_ranks(run, "zero_scenes")
    if count and not run.info.get("masked_anew"):  # a mask may take out all of a scene
        where = _on_ranks(run, "zero_scenes")
        yield run.finding(
            "empty_cache_slot",
            f"{count} of {scenes} scenes of a step are all zeros{where}.",
            certain=count > SOME * scenes,
        )
    if run.info.get("masked_anew"):
        return  # bytes say nothing of which scene it is then
    repeated, scenes = _repeated(run)
    if 2 * (reading.get("repeated_with_other_target") or 0) > (reading.get("scenes") or 0):
        return  # an earlier batch's snapshots with the targets of this one: another rule names it
    if reading.get("repeated") and repeated > max(1, scenes * MORE_THAN_DRAWN):
        where = "a step" if scenes == reading["scenes"] else "the last steps that were read"
        yield run.finding(
            "repeated_batch",
            f"{repeated} of {scenes} scenes of {where} were in it twice or in another step of the same epoch.",
            # A sampler may draw with replacement, and an epoch be several passes over few scenes.
            certain=bool(run.info.get("fresh", True)) and repeated > NEARLY_ALL * scenes,
        )


def _of_all_ranks(run: RunHistory, key: str) -> int:
    """A count of the step that was read, over all ranks."""
    return sum((run.reading.get("ranks") or {}).get(key) or [run.reading.get(key) or 0])


def _on_ranks(run: RunHistory, key: str) -> str:
    """Where a count is not zero; empty for one rank."""
    counts = (run.reading.get("ranks") or {}).get(key) or []
    return f", on {named([rank for rank, count in enumerate(counts) if count])}" if any(counts) else ""


def _repeated(run: RunHistory) -> tuple[int, int]:
    """Scenes that were served before, and all: of the last step that was read, or of the last ones where a step has
    few.

    Data may hold copies of a scene; a batch that comes again is more than half of a step.
    """
    epoch, repeated, scenes = run.steps[-1].get("epoch"), 0, 0
    for row in reversed(run.steps):
        reading = row.get("health") or {}
        if scenes >= ENOUGH_SCENES or row.get("epoch") != epoch:
            break
        repeated, scenes = repeated + (reading.get("repeated") or 0), scenes + (reading.get("scenes") or 0)
    return repeated, scenes


def training_mode(run: RunHistory) -> Iterator[Finding]:
    """Every module is in training mode while it trains, but for those that are frozen."""
    count, seen = run.reading.get("modules_in_eval_mode") or 0, run.reading.get("eval_mode") or {}
    if not count or seen and seen["frozen"] == count:
        return
    matter = [*seen.get("dropout", ()), *seen.get("statistics", ())]
    partly = bool(seen) and count < seen["modules"]
    yield run.finding(
        "eval_mode_in_training",
        f"{count} modules train in evaluation mode, first {run.reading['first_module_in_eval_mode'] or 'the network'}"
        + (f"; of these {', '.join(matter[:3])} work otherwise than in training mode." if matter else ".")
        + (" It is no mistake where their statistics are to stay as they are." if _only_statistics(seen) else ""),
        certain=not (partly and _only_statistics(seen)),
    )


def _only_statistics(seen: Row) -> bool:
    """Whether all modules in evaluation mode are layers that keep statistics, which fine-tuning leaves alone."""
    return bool(seen) and len(seen["statistics"]) == len(seen["names"]) and not seen["dropout"]


def planned_rate(run: RunHistory) -> Iterator[Finding]:
    """The learning rate of a report's last step is the one that the count of updates stands for, in the plan that this
    step used.

    On a GPU the host hears of a skipped step one report later, and until then sets the rate of one update too many.
    """
    row, before = run.steps[-1], (run.steps[-2].get("health") or {}) if len(run.steps) > 1 else {}
    reading, planned, made = run.reading, row.get("lr_planned") or {}, run.reading.get("steps")
    if not made or reading.get("attempted") != made or reading.get("skipped") or before.get("skipped"):
        return
    if run.info.get("own_schedule"):
        yield from _own_rates(run)
        return
    for name, rate in planned.items():
        if not _same_rate(row["lr"][name], rate):
            yield run.finding(
                _off_plan(run, name),
                f"the learning rate of {name} is {row['lr'][name]:.3g} and should be {rate:.3g} "
                f"after {reading['applied']} updates.",
            )
            return


def _own_rates(run: RunHistory) -> Iterator[Finding]:
    """Rates that a schedule of the user's own sets are no plan's, and do nothing that none is meant to do."""
    epoch, total = run.info.get("epoch_steps") or 0, run.steps[-1].get("planned_steps") or 0
    for name, peak in peaks(settings_of(run)):
        rows = [row for row in run.steps if name in (row.get("lr") or {})]
        shares = [(int(row["step"]) - 1, row["lr"][name] / peak) for row in rows if peak > 0]
        if epoch and shares and (seen := out_of_plan(shares, epoch, total)):
            yield run.finding(
                "zero_learning_rate" if shares[-1][1] == 0 else "learning_rate_off_plan",
                f"a schedule of your own sets the rates: that of {name} {seen}, of a run of {total:,} updates with a"
                f" peak rate of {peak:.3g}.",
                certain=False,
            )
            return


def _off_plan(run: RunHistory, name: str) -> str:
    """Which way a rate has left its plan, by the rates of earlier reports."""
    row, earlier = run.steps[-1], [each for each in run.steps[:-1] if name in (each.get("lr_planned") or {})]
    rate, plan = row["lr"][name], row["lr_planned"][name]
    highest = max((each["lr_planned"][name] for each in earlier), default=plan)
    held = any(_same_rate(rate, each["lr_planned"][name]) for each in earlier)
    if rate == 0:
        return "zero_learning_rate"
    if held or earlier and _same_rate(rate, earlier[-1]["lr"][name]):
        return "schedule_per_epoch"
    return "schedule_per_batch" if rate > plan >= highest else "learning_rate_off_plan"


def _same_rate(one: float, other: float) -> bool:
    return abs(one - other) <= 1e-5 * max(other, 1e-30)


def only_the_optimizer_moves_weights(run: RunHistory) -> Iterator[Finding]:
    """Between two updates no weight changes."""
    reading, callbacks = run.reading, run.info.get("step_callbacks") or ()
    if not reading.get("moved_before"):
        return
    back = reading["back_to_first"] or reading.get("back_to_earlier")
    where = "to their first values" if reading["back_to_first"] else "to those of an earlier step"
    whose = f" Callbacks that may: {', '.join(callbacks)}." if callbacks else ""
    yield run.finding(
        "weights_reset" if back else "weights_changed_outside",
        f"{reading['moved_before']} tensors were changed {where if back else 'by something else than the optimizer'}"
        f" between two steps.{whose}",
        certain=bool(back) or not callbacks,
    )


def movement(run: RunHistory) -> Iterator[Finding]:
    """Weights move by a small share of themselves in a step, and keep their size."""
    reading, first = run.reading, (run.steps[0].get("health") or {})
    ratio = reading.get("update_ratio")
    if ratio is None or not reading.get("attempted") or reading.get("skipped"):
        return
    numbers = math.sqrt(max(1, run.info.get("parameters") or 1))
    size, before = reading["weight_norm"] / numbers, first.get("weight_norm", math.inf) / numbers
    # What starts next to zero moves by all of itself, and grows by any factor to the size that weights have.
    usual = before if before > NEXT_TO_ZERO else USUAL
    if size > GROWN * usual or ratio > JUMP and size > NEXT_TO_ZERO:
        yield run.finding(
            "learning_rate_too_large",
            f"the median tensor moves by {ratio:.0%} of itself in one step; the weights' norm "
            f"went from {first.get('weight_norm', math.nan):.3g} to {reading['weight_norm']:.3g}.",
            certain=not size < USUAL,
        )  # weights that begin tiny grow fast and learn
    elif reading["weight_norm"] < SHRUNK * first.get("weight_norm", 0.0):
        yield run.finding(
            "weight_decay_too_large",
            f"the weights' norm fell from {first['weight_norm']:.3g} to {reading['weight_norm']:.3g}.",
        )
    elif 0 < ratio < STILL and len(run.steps) >= 5:
        yield run.finding("learning_rate_too_small", f"the median tensor moves by {ratio:.1e} of itself in one step.")


STEP_RULES: tuple[Rule, ...] = (
    one_update_a_step,
    untouched_gradient,
    nonfinite_between_reports,
    served_scenes,
    training_mode,
    planned_rate,
    only_the_optimizer_moves_weights,
    movement,
)
