"""Rules over the epochs of a run: training and validation beside each other, and both beside what they were."""

from __future__ import annotations

import math
from collections.abc import Iterator

from ris_fast.health.finding import Finding
from ris_fast.health.monitor.history import Row, Rule, RunHistory, validated
from ris_fast.physics.baseline_names import CONSTANT_BASELINES

FALLEN = 3.0  # times the best validation: what was learned is gone
IN_A_ROW, LONG = 2, 3  # epochs that show a collapse; epochs that show training and validation apart
LOW, STILL_LOW = 0.5, 1.5  # training: of the lowest constant answer; of its own lowest
OUTWEIGHS = 4.0  # times the sum of the terms
MANY, WORSE = 24, 1.3  # epochs; times the best validation
MEMORISED, NO_BETTER = 3.0, 0.97  # validation over training; of the best before, in the last third


def constant(run: RunHistory) -> tuple[str, float] | None:
    """The best constant answer and its NMSE; None where the run reports none."""
    baselines = run.info.get("baselines") or run.summary.get("baselines") or {}
    known = {name: float(baselines[name]) for name in CONSTANT_BASELINES if name in baselines}
    return min(known.items(), key=lambda each: each[1], default=None)


def trained(run: RunHistory, row: Row) -> float:
    """The NMSE of an epoch's training scenes as its terms have it, before any weight; not-a-number where no term is
    that."""
    terms = row.get("terms") or {}
    name = "cov_pred" if "cov_pred" in terms else "cov"
    blended = name == "cov" and run.info.get("blend", 0.0) > 0.0
    return float(terms[name]["raw"]) if name in terms and not blended else math.nan


def collapsed(run: RunHistory) -> Iterator[Finding]:
    """A run keeps what it has learned: validation does not go back to the constant answer, and training with it."""
    baseline, values = constant(run), [validated(row) for row in run.epochs]
    best = min((value for value in values[:-IN_A_ROW] if math.isfinite(value)), default=math.nan)
    if baseline is None or not best < 0.95 * baseline[1]:
        return
    train = [trained(run, row) for row in run.epochs]
    kept = 0 < train[-1] <= STILL_LOW * min(train)
    if all(value > max(FALLEN * best, (best + baseline[1]) / 2) for value in values[-IN_A_ROW:]) and not kept:
        yield run.finding(
            "collapsed",
            f"the validation NMSE was {best:.3g} in epoch {values.index(best) + 1} and was {values[-2]:.3g} and"
            f" {values[-1]:.3g} in the last two, beside {baseline[1]:.3g} for the constant answer '{baseline[0]}'; the"
            f" training loss went from {run.epochs[values.index(best)]['train_loss']:.3g} to"
            f" {run.epochs[-1]['train_loss']:.3g}.",
        )


def validation_apart(run: RunHistory) -> Iterator[Finding]:
    """A network that has learned its training scenes beats a constant on others of the same kind."""
    baseline, last = constant(run), run.epochs[-LONG:]
    if (
        baseline is None
        or len(last) < LONG
        or not all(validated(row) >= baseline[1] and trained(run, row) <= LOW * baseline[1] for row in last)
    ):
        return
    values = [validated(row) for row in run.epochs]
    seen = (
        f"training scores {trained(run, last[-1]):.3g} and validation {values[-1]:.3g}, no better than a constant"
        f" ({baseline[1]:.3g}), for {LONG} epochs"
    )
    if run.info.get("fresh"):
        yield run.finding(
            "validation_apart",
            f"{seen}. Training has new scenes in every epoch, so nothing is memorised: the validation scenes, their"
            " targets, or the weights or the mode that are validated are not those of training.",
        )
    elif values[-1] <= 1.1 * min(values):  # where it rose, it is overfitting, which is reported at the end
        yield run.finding(
            "validation_apart",
            f"{seen}: the validation scenes, their targets, or the weights that are validated are not those of"
            f" training, or the network has memorised its {_scenes(run)}.",
            certain=False,
        )


def overfitting_by_far(run: RunHistory) -> Iterator[Finding]:
    """While it runs: validation has long been getting worse, and is far above training."""
    values, train = [validated(row) for row in run.epochs], [trained(run, row) for row in run.epochs]
    if run.info.get("fresh", True) or len(values) < MANY or not all(map(math.isfinite, (*values, *train))):
        return
    best = min(values)
    at = values.index(best)
    if (
        2 * at < len(values)
        and train[-1] <= train[at]
        and min(values[-LONG:]) > max(WORSE * best, MEMORISED * train[-1])
    ):
        yield run.finding(
            "overfitting",
            f"training scores {train[-1]:.3g} and validation {values[-1]:.3g}, which was best, {best:.3g}, in epoch"
            f" {at + 1} of {len(values)} so far: the network memorises its {_scenes(run)}. Where their number is left"
            " from a test, give all there are.",
            certain=False,
        )


def overfitting(run: RunHistory) -> Iterator[Finding]:
    """Scenes that come again can be memorised: training goes on falling, and validation does not."""
    values, train = [validated(row) for row in run.epochs], [trained(run, row) for row in run.epochs]
    third = len(values) // 3
    if run.info.get("fresh", True) or third < 2 or not all(map(math.isfinite, (*values, *train))):
        return
    if (
        values[-1] > MEMORISED * train[-1]
        and train[-1] <= train[-third - 1]
        and min(values[-third:]) > NO_BETTER * min(values[:-third])
    ):
        best = min(values)
        yield run.finding(
            "overfitting",
            f"training scores {train[-1]:.3g} and validation {values[-1]:.3g} at the end; validation was best,"
            f" {best:.3g}, in epoch {values.index(best) + 1} of {len(values)}: the network memorises its"
            f" {_scenes(run)}.",
            certain=False,
        )


def loss_without_the_truth(run: RunHistory) -> Iterator[Finding]:
    """A loss that falls while the NMSE rises is made of other things."""
    baseline, rows = constant(run), run.epochs
    if (
        baseline is None
        or len(rows) < 5
        or any(
            not math.isfinite(float(row.get(key) or math.nan))
            for row in (rows[0], rows[-1])
            for key in ("val_loss", "val_nmse_raw")
        )
    ):
        return
    first, last = rows[0], rows[-1]
    weighted = {name: abs(term["weighted"]) for name, term in (last.get("terms") or {}).items()}
    auxiliary = [name for name in weighted if not name.startswith("cov")]
    others = sorted(auxiliary, key=weighted.__getitem__, reverse=True)[:2]
    total = sum(weighted.values())
    if (
        last["val_loss"] < 0.97 * first["val_loss"]
        and last["val_nmse_raw"] > 1.01 * first["val_nmse_raw"]
        and others
        and validated(last) >= baseline[1]
        and sum(weighted[name] for name in others) > 0.5 * total
    ):
        named = " and ".join(f"{name} ({weighted[name] / total:.0%} of the loss)" for name in others)
        yield run.finding(
            "dominating_term",
            f"between the first and the last epoch the validation loss fell from {first['val_loss']:.3g} to"
            f" {last['val_loss']:.3g} and the validation NMSE rose from {first['val_nmse_raw']:.3g} to"
            f" {last['val_nmse_raw']:.3g}, no better than a constant: what falls is {named}.",
            certain=False,
        )


def outside_the_terms(run: RunHistory) -> Iterator[Finding]:
    """The loss is the sum of its terms: what is added beside them does not outweigh them while nothing is learned."""
    rows = run.epochs[-IN_A_ROW:]
    if len(rows) < IN_A_ROW:
        return
    sums = [sum(abs(term["weighted"]) for term in (row.get("terms") or {}).values()) for row in rows]
    losses = [float(row.get("train_loss", math.nan)) for row in rows]
    first, last = trained(run, run.epochs[0]), trained(run, rows[-1])
    if not all(part > 0 and loss > OUTWEIGHS * part for part, loss in zip(sums, losses)) or last < LOW * first:
        return
    yield run.finding(
        "dominating_term",
        f"the loss of the last {IN_A_ROW} epochs is {losses[0]:.3g} and {losses[-1]:.3g}, and its terms sum to"
        f" {sums[0]:.3g} and {sums[-1]:.3g}: something beside them, as a penalty on the weights, supplies"
        f" {1 - sums[-1] / losses[-1]:.0%} of it, and the covariance is not learned.",
        certain=False,
    )


def _scenes(run: RunHistory) -> str:
    return f"{run.info['train_scenes']:,} training scenes" if "train_scenes" in run.info else "training scenes"


WHILE_IT_RUNS: tuple[Rule, ...] = (collapsed, validation_apart, outside_the_terms, overfitting_by_far)
AT_ITS_END: tuple[Rule, ...] = (overfitting, loss_without_the_truth)
