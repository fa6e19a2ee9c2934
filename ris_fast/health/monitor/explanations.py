"""Why a run that did not learn may not have: each usual explanation as likely, not looked at, or ruled out, and by
which measurement."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ris_fast.health.finding import Finding
from ris_fast.health.monitor.epoch_rules import constant, trained
from ris_fast.health.monitor.history import RunHistory, validated
from ris_fast.health.monitor.scene_rules import BY_ORDER
from ris_fast.health.monitor.standstill import fitted, inputs_figure
from ris_fast.health.preflight import run as preflight
from ris_fast.physics.baseline_names import CONSTANT_BASELINES

LIKELY, NOT_LOOKED_AT, RULED_OUT = "likely", "not looked at", "ruled out"
ORDER = (LIKELY, NOT_LOOKED_AT, RULED_OUT)
FEW_STEPS, FAR = 200, 1000.0  # a network that learns shows it within as many; times as many steps as were made
STILL = 0.01  # relative change of validation between thirds of the run
SHORT_WAY, LONG_WAY = 0.1, 0.5  # of its size, that the median tensor may have moved in the whole run
LARGE_STEP = 0.03  # of its size, in one step
GAP = 0.6  # training over validation
MOSTLY = 0.5  # of the loss
LOUDER = 0.5  # error of the scenes of the highest SNR over that of the others
AT_THE_BOUND = 1.5
QUIET_DB = 5.0  # above it another reason than noise keeps an estimator from the sources
LEAVES = 0.9  # of the constant answer, that a bound leaves below it

CHECKED: dict[str, tuple[Any, ...]] = {
    "the data, their targets and what belongs together": (
        preflight.targets, preflight.scenes, preflight.scene_parts, preflight.truth, preflight.information,
        preflight.inputs, preflight.validation,
    ),
    "the network, its gradient and the loss": (
        preflight.parameters, preflight.network, preflight.gradient, preflight.terms, preflight.loss,
        preflight.own_terms, preflight.kernels, preflight.calls,
    ),
    "the optimizer's step and its schedule": (preflight.schedule, preflight.one_step, preflight.several_steps),
}  # fmt: skip


@dataclass(frozen=True)
class Explanation:
    """One reason why a run may not have learned.

    Args: reason: what it would be; status: one of ORDER; by: the measurement, or why there is none; next: what to try,
        or how to look; cause: what a finding would call it; found: it is a finding.
    """

    reason: str
    status: str
    by: str
    next: str = ""
    cause: str = ""
    found: bool = False

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def explanations(run: RunHistory, findings: Sequence[Finding] = (), checks: Sequence[Any] = ()) -> list[Explanation]:
    """All of them, the likeliest first.

    Args: findings: what the rules found, ranked; checks: results of preflight, where they are at hand; else the names
        in the run's start say which passed.
    """
    found = [
        Explanation(each.meaning, LIKELY, each.evidence.rstrip("."), each.advice, each.cause, found=True)
        for each in findings
        if each.certain or each is findings[0]
    ]
    causes = {each.cause for each in findings}
    for measure in MEASURES:
        found += [each for each in measure(run) if each.cause not in causes]
    found += _checked(run, checks)
    return sorted(found, key=lambda each: ORDER.index(each.status))


# ---- measurements --------------------------------------------------------------------------------------------------


def _below_its_inputs(run: RunHistory) -> Iterator[Explanation]:
    figure, best, baselines = inputs_figure(run), run.summary.get("best_val_nmse"), run.info.get("baselines") or {}
    known = {name: float(value) for name, value in baselines.items() if name not in CONSTANT_BASELINES}
    reason, lowest = "the network's inputs do not hold the answer", constant(run)
    if figure is not None:
        yield Explanation(
            reason,
            RULED_OUT,
            f"{figure.name} on the same inputs has {figure.nmse:.3g} without a network, on training or validation"
            " scenes, whichever is worse",
        )
        if best is not None and best > figure.nmse:
            yield Explanation(
                "the network makes less of its inputs than a classical estimator",
                LIKELY,
                f"{best:.3g} beside {figure.nmse:.3g} of {figure.name}",
                "give the network that estimate as an input, or use model.name=backprojection",
                "stalled_above_inputs",
            )
    elif known and lowest is not None:
        name = min(known, key=known.__getitem__)
        yield Explanation(
            reason,
            LIKELY,
            f"{name.replace('_', ' ')} on the same inputs has {known[name]:.3g}, the constant answer {lowest[1]:.3g}",
            "more snapshots, a higher SNR, or inputs with the channel",
            "inputs_withhold_answer",
        )
    else:
        yield Explanation(
            reason, NOT_LOOKED_AT, "the network has no classical() estimate to compare with", "ris-fast estimators"
        )


def _length(run: RunHistory) -> Iterator[Explanation]:
    """Whether more steps would do, on the line through the validations on the logarithm of the steps."""
    reason, lowest = "the run is too short", constant(run)
    rows = [row for row in run.epochs if math.isfinite(validated(row)) and row.get("step", 0) > 0]
    if run.step < FEW_STEPS and len(rows) < 3:
        yield Explanation(reason, LIKELY, f"{run.step} steps", "train longer")
        return
    late = [row for row in rows if row["step"] >= run.step / 4]
    if len(late) < 3 or lowest is None:
        yield Explanation(reason, NOT_LOOKED_AT, f"{len(late)} validations are too few for a trend", "train longer")
        return
    line = fitted([math.log2(row["step"]) for row in late], [validated(row) for row in late], [1.0] * len(late))
    figure = inputs_figure(run)
    target = min(lowest[1], figure.nmse if figure else math.inf)
    now, _ = line.at(math.log2(run.step))
    times = 2.0 ** min(60.0, (now - target) / -line.slope) if line.slope < 0 else math.inf
    falls = line.slope < -2 * line.slope_error and -line.slope > STILL * now
    seen = f"validation changes by {line.slope:+.2g} in each doubling of the steps"
    if now <= target:
        yield Explanation(
            reason,
            LIKELY if falls else RULED_OUT,
            f"{seen}, and at {now:.3g} it is below {target:.3g} already",
            "training.epochs times 2" if falls else "",
        )
    elif falls and times <= FAR:
        factor = max(2.0, times)
        yield Explanation(
            reason,
            LIKELY,
            f"{seen}; on that line {target:.3g} is reached with {factor:.2g} times as many, {factor * run.step:,.0f}",
            f"training.epochs times {math.ceil(factor)}",
        )
    elif run.step < FEW_STEPS:
        yield Explanation(reason, LIKELY, f"{run.step} steps, in which {seen}", "train longer")
    else:
        yield Explanation(reason, RULED_OUT, f"{seen}, so {target:.3g} is out of its reach")


def _rates(run: RunHistory) -> Iterator[Explanation]:
    readings = [reading for row in run.steps if "update_ratio" in (reading := row.get("health") or {})]
    ratios = [
        (float(each["update_ratio"]), float(each.get("steps") or 1))
        for each in readings
        if math.isfinite(float(each["update_ratio"]))
    ]
    if not ratios:
        for reason in ("the learning rate is too small", "the learning rate is too large"):
            yield Explanation(reason, NOT_LOOKED_AT, "no step's update was measured", "report.every_steps=10")
        return
    way, largest = math.fsum(ratio * made for ratio, made in ratios), max(ratio for ratio, _ in ratios)
    middle = sorted(ratio for ratio, _ in ratios)[len(ratios) // 2]
    moved = f"the median tensor may have moved by {way:.2g} times its size in the run"
    if way < SHORT_WAY:
        factor = LONG_WAY / max(way, 1e-12)
        yield Explanation(
            "the learning rate is too small",
            LIKELY,
            moved,
            f"rates times {min(factor, 1e4):.0f}, or as many more steps",
            "learning_rate_too_small",
        )
    elif way >= LONG_WAY:
        yield Explanation("the learning rate is too small", RULED_OUT, moved)
    large = f"a step moves the median tensor by {middle:.1e} of itself, at most {largest:.1e}"
    yield Explanation(
        "the learning rate is too large",
        LIKELY if middle > LARGE_STEP else RULED_OUT,
        large,
        "a tenth of the rates" if middle > LARGE_STEP else "",
        "learning_rate_too_large",
    )


def _generalisation(run: RunHistory) -> Iterator[Explanation]:
    reason, last = "too few scenes, which are memorised", run.epochs[-1] if run.epochs else None
    train, value = (math.nan, math.nan) if last is None else (trained(run, last), validated(last))
    if run.info.get("fresh"):
        yield Explanation(reason, RULED_OUT, "every epoch has new scenes")
    elif not math.isfinite(train) or not math.isfinite(value):
        yield Explanation(reason, NOT_LOOKED_AT, "training has no figure that validation has too", "loss.cov_pred=1")
    elif train <= GAP * value:
        yield Explanation(
            reason,
            LIKELY,
            f"training scores {train:.3g} and validation {value:.3g}",
            "more scenes, or data.fixed=false",
            "overfitting",
        )
    else:
        yield Explanation(reason, RULED_OUT, f"training scores {train:.3g}, no better than validation, {value:.3g}")


def _scenes(run: RunHistory) -> Iterator[Explanation]:
    seen = ((run.epochs[-1].get("health") or {}).get("scenes") or {}) if run.epochs else {}
    if not seen:
        yield Explanation("a part of the scenes spoils the mean", NOT_LOOKED_AT, "scenes were not scored one by one")
        return
    low, high = seen["quantiles"][0], seen["quantiles"][-1]
    told = {name: share for name, share in seen["told_by"].items() if name not in BY_ORDER}
    name = max(told, key=told.__getitem__, default="")
    apart = low < MOSTLY * high and told.get(name, 0.0) > 0.3
    worst = max(seen["by"][name], key=lambda row: row[2]) if apart else None
    yield Explanation(
        "a part of the scenes spoils the mean",
        LIKELY if worst else RULED_OUT,
        f"nine in ten scenes score {low:.3g} to {high:.3g}"
        + (f"; the worst have {name} {worst[0]}, {worst[2]:.3g}" if worst else ""),
        "judge these scenes apart, or train on more of them" if worst else "",
        "part_not_learned",
    )
    rows = seen["by"].get("SNR (dB)") or []
    if len(rows) > 1:
        quiet, loud = rows[0], rows[-1]
        rest = sum(row[1] * row[2] for row in rows[:-1]) / sum(row[1] for row in rows[:-1])
        seen = (
            f"scenes of the highest SNR ({loud[0]} dB) score {loud[2]:.3g}, of the lowest ({quiet[0]} dB)"
            f" {quiet[2]:.3g}"
        )
        if loud[2] < LOUDER * rest:
            status, possible = LIKELY, ""
        else:
            status, possible = _at_these_snrs(run, float(loud[0].rpartition(" ")[2]))
        yield Explanation(
            "the noise is too strong",
            status,
            f"{seen}{possible}",
            "" if status == RULED_OUT else "a higher task.snr_min_db shows whether it learns without noise",
        )


def _at_these_snrs(run: RunHistory, highest_db: float) -> tuple[str, str]:
    """Whether the noise leaves more than a constant answer, where scenes of every SNR are as bad: what shows it, as the
    end of a sentence."""
    lowest, bound, figure = constant(run), run.summary.get("mmse_bound"), inputs_figure(run)
    if figure is not None:
        return RULED_OUT, f"; at these SNRs {figure.name} without a network has {figure.nmse:.3g}"
    if lowest is not None and bound:
        beside = f"; the MMSE bound at these SNRs is {bound:.3g}, the constant answer {lowest[1]:.3g}"
        return RULED_OUT if bound < LEAVES * lowest[1] else LIKELY, beside
    known = {k: float(v) for k, v in (run.info.get("baselines") or {}).items() if k not in CONSTANT_BASELINES}
    if known and lowest is not None:
        name = min(known, key=known.__getitem__)
        return LIKELY if highest_db < QUIET_DB else NOT_LOOKED_AT, (
            f"; {name.replace('_', ' ')} at these SNRs has {known[name]:.3g}, no better than the constant answer,"
            f" {lowest[1]:.3g}"
        )
    return NOT_LOOKED_AT, "; whether more is possible at these SNRs, no estimator says"


def _bound(run: RunHistory) -> Iterator[Explanation]:
    bound, best = run.summary.get("mmse_bound"), run.summary.get("best_val_nmse")
    if not bound or best is None or best >= AT_THE_BOUND * bound:
        return
    baselines = run.info.get("baselines") or {}
    name = min(baselines, key=lambda each: float(baselines[each]), default="")
    seen = f"{best:.3g} beside {bound:.3g}, the MMSE bound"
    if name and float(baselines[name]) < best:
        seen = f"{name.replace('_', ' ')} has {float(baselines[name]):.3g} on the same scenes without a network; {seen}"
        yield Explanation("nothing better is possible", RULED_OUT, seen)
    else:
        yield Explanation("nothing better is possible", LIKELY, seen)


def _loss(run: RunHistory) -> Iterator[Explanation]:
    terms = (run.steps[-1].get("terms") or {}) if run.steps else {}
    weighted = {name: abs(float(term["weighted"])) for name, term in terms.items()}
    total = sum(weighted.values())
    if not total or not math.isfinite(total):
        return
    share = sum(value for name, value in weighted.items() if name.startswith("cov")) / total
    name = max(weighted, key=weighted.__getitem__)
    yield Explanation(
        "another term outweighs the covariance",
        RULED_OUT if share >= MOSTLY else LIKELY,
        f"the covariance is {share:.0%} of the weighted loss",
        "" if share >= MOSTLY else f"a smaller loss.{name}",
        "dominating_term",
    )


def _numbers(run: RunHistory) -> Iterator[Explanation]:
    steps, skipped = run.summary.get("optimizer_steps") or run.step, run.summary.get("skipped_steps")
    if steps and skipped is not None:
        many = skipped > 0.1 * steps
        yield Explanation(
            "numbers that are not finite",
            LIKELY if many else RULED_OUT,
            f"{skipped} of {steps} steps were skipped for them",
            "training.precision=fp32" if many else "",
            "nonfinite_gradients",
        )


MEASURES: tuple[Callable[[RunHistory], Iterator[Explanation]], ...] = (
    _bound, _below_its_inputs, _rates, _length, _generalisation, _loss, _scenes, _numbers,
)  # fmt: skip


# ---- what preflight looked at --------------------------------------------------------------------------------------


def _names(modules: Sequence[Any]) -> list[str]:
    tables = [getattr(module, key, {}) for module in modules for key in ("CHECKS", "SMALL_BATCH", "WHOLE_STEP")]
    return [name for table in tables for name in table]


def _checked(run: RunHistory, checks: Sequence[Any]) -> Iterator[Explanation]:
    """Groups of checks: passed, or why not looked at."""
    passed = {check.name for check in checks if check.passed} or set(run.info.get("preflight") or ())
    failed = {check.name: check.failed for check in checks if check.failed}
    if not passed and not failed:
        yield Explanation(
            "a mistake in the data, the network, the loss or the step",
            NOT_LOOKED_AT,
            "no preflight check ran (health.preflight=false, or a run resumed without its metrics.jsonl)",
            "ris-fast check",
        )
        return
    for what, modules in CHECKED.items():
        names = _names(modules)
        if good := [name for name in names if name in passed]:
            yield Explanation(f"a mistake in {what}", RULED_OUT, f"{len(good)} preflight checks passed")
        if bad := [name for name in names if name in failed]:
            yield Explanation(f"a mistake in {what}", NOT_LOOKED_AT, f"'{bad[0]}' could not run, {failed[bad[0]]}")
    yield from _overfit(checks, passed)


def _overfit(checks: Sequence[Any], passed: set[str]) -> Iterator[Explanation]:
    (name,) = preflight.LEARNING
    reason = "the network cannot even learn a few scenes"
    result: Mapping[str, Any] = {check.name: check for check in checks}
    if (check := result.get(name)) is not None and check.passed:
        yield Explanation(
            reason,
            RULED_OUT if check.reached else NOT_LOOKED_AT,
            check.note,
            "" if check.reached else "train on 8 scenes: data.train_scenes=8 data.fixed=true",
        )
    elif name in passed:
        yield Explanation(reason, RULED_OUT, "preflight's overfit check reached its goal")
    elif not checks:
        yield Explanation(
            reason, NOT_LOOKED_AT, "preflight did not reach its goal in the time for it", "ris-fast check"
        )
