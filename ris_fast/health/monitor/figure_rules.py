"""Rules over the figures of a run: what no error can be, and training beside the same scenes in evaluation mode."""

from __future__ import annotations

import math
from collections.abc import Iterator

from ris_fast.health.finding import Finding
from ris_fast.health.monitor.epoch_rules import constant, trained
from ris_fast.health.monitor.history import RunHistory

TWICE, LEARNT, NEAR, SAME = 2, 0.7, 0.9, 1.3  # epochs, and times; of the constant; of it; times training
ROUNDING, EXPLODED = 1e-4, 1e3  # of an NMSE; times the constant answer
SAME_ROWS = 8  # in which a term that is computed has not the same value
QUIET = frozenset(("count", "cross", "orthogonality"))  # zero by right where there is one source, or one column


def apart_by_mode(run: RunHistory) -> Iterator[Finding]:
    """Training scenes score in evaluation mode what they score in training; where validation alone is far above, it is
    its scenes that differ."""
    baseline, last = constant(run), run.epochs[-TWICE:]
    looks = [seen for row in last if (seen := (row.get("health") or {}).get("training_in_eval_mode"))]
    if baseline is None or len(looks) < TWICE or not all(0 < seen["trained"] <= LEARNT * baseline[1] for seen in looks):
        return
    train, score, value = looks[-1]["trained"], looks[-1]["nmse"], float(run.epochs[-1]["val_nmse_raw"])
    if not value >= NEAR * baseline[1]:
        return
    seen = (
        f"training scores {train:.3g}, {looks[-1]['scenes']} of its scenes {score:.3g} in evaluation mode, and"
        f" validation {value:.3g}, for {TWICE} epochs"
    )
    if all(each["nmse"] > TWICE * each["trained"] and each["nmse"] > 0.7 * value for each in looks):
        names = [name[12:] for name in run.info.get("settings") or {} if name.startswith("momentum of ")]
        compiled = str(run.info.get("compile", "")).startswith("compiled")
        yield run.finding(
            "batchnorm_statistics" if names else "stale_compiled_graph",
            f"{seen}: the scenes are not the reason. "
            + (
                f"{names[0]} normalises with running statistics there, or the weights that validate are not those that"
                " train. Which of the two: validate in training mode."
                if names
                else f"What {'is compiled' if compiled else 'the step calls'} answers otherwise than the network as"
                " written, which validates, or something else depends on the mode. Which of the two:"
                " training.compile=false, then validate in training mode."
            ),
            certain=False,
        )
    elif run.info.get("fresh") and all(each["nmse"] < SAME * each["trained"] for each in looks):
        yield run.finding(
            "validation_apart",
            f"{seen}: mode and weights are not the reason, and nothing is memorised, because every epoch has fresh"
            " scenes. The validation scenes or their targets are not of the same kind.",
            certain=False,
        )


def impossible_figures(run: RunHistory) -> Iterator[Finding]:
    """No error is negative, a term that is computed changes, and first weights answer in the size of the targets."""
    rows = run.steps
    terms = rows[-1].get("terms") or {}
    for name in ("cov", "cov_pred"):
        if name in terms and float(terms[name]["raw"]) < -ROUNDING and not run.info.get("loaded"):
            yield run.finding(
                "loss_sign",
                f"the term {name} is {float(terms[name]['raw']):.3g}: a normalised squared error is never negative, so"
                " what is minimised is another thing, such as a similarity or the error with its sign turned.",
            )
            return
    baseline = constant(run)
    if len(rows) == 1 and baseline is not None and trained(run, rows[0]) > EXPLODED * baseline[1]:
        yield run.finding(
            "bad_initialisation",
            f"the NMSE of the first step is {trained(run, rows[0]):.3g}, the constant answer {baseline[1]:.3g}: the"
            " first weights answer far too large, or the targets are given in another scale.",
            certain=False,
        )
    if len(rows) == SAME_ROWS:
        for name in terms.keys() - QUIET:
            values = {float((row.get("terms") or {}).get(name, {"raw": math.nan})["raw"]) for row in rows}
            if len(values) == 1 and math.isfinite(next(iter(values))):
                yield run.finding(
                    "dead_loss_term",
                    f"the term {name} is {values.pop():.4g} in each of {SAME_ROWS} reports, bit for bit.",
                    certain=False,
                )
