"""Says afterwards why a run did not learn: the rules over its rows, and what was found while it ran."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterable, Mapping

from ris_fast.health.finding import Finding, ranked
from ris_fast.health.rules import replay
from ris_fast.health.run import Run

SUMMARY = "summary.json"


@dataclass(frozen=True)
class Answer:
    """Findings of a finished or stopped run, most certain first, and its figures beside the floors."""

    run: str
    findings: tuple[Finding, ...]
    verdict: str
    figures: str

    @property
    def text(self) -> str:
        if not self.findings and self.verdict == "learned":
            return f"{self.run}: learned, and no rule found a mistake. {self.figures}"
        if not self.findings:
            return (f"{self.run}: {self.verdict}. No rule found a mistake in what the run reported. {self.figures}\n"
                    f"next: ris-fast check, with the run's config.toml")
        first, others = self.findings[0], ", ".join(finding.cause for finding in self.findings[1:])
        return (f"{self.run}: {self.verdict}. {self.figures}\n{first}\n  more: ris-fast why --explain {first.cause}"
                + (f"\nalso seen, less telling: {others}" if others else ""))

    def to_json(self) -> dict[str, Any]:
        return {"run": self.run, "verdict": self.verdict, "figures": self.figures,
                "findings": [finding.to_json() for finding in self.findings]}


def why(place: str | Path, rows: Iterable[Mapping[str, Any]], summary: Mapping[str, Any] | None = None,
        muted: Iterable[str] = ()) -> Answer:
    """Replays the rules over a run's rows.

    Args: rows: events of its metrics.jsonl; summary: of its summary.json, where it has one.
    """
    run = run_of(rows, summary or {})
    told = [Finding(**{key: entry[key] for key in ("cause", "evidence", "step", "severity", "advice", "certain")})
            for entry in run.summary.get("evidence", ())]
    findings = ranked([*told, *replay(run), *symptoms(run)], muted)
    return Answer(str(place), tuple(findings), str(run.summary.get("verdict", "unfinished")), _figures(run))


def run_of(rows: Iterable[Mapping[str, Any]], summary: Mapping[str, Any]) -> Run:
    """Rows sorted into a run; a row without an event is an epoch if it has a validation figure, else a step."""
    run = Run(summary=summary)
    for number, row in enumerate(rows):
        event = row.get("event") or ("epoch" if any(key.startswith("val") for key in row) else "step")
        if event == "start":
            run.info = row
        elif event in ("step", "epoch"):
            (run.epochs if event == "epoch" else run.steps).append({"step": number + 1, **row})
    return run


def summary_beside(place: Path) -> dict[str, Any]:
    """The summary of a run folder, or of the folder that a metrics file lies in; empty where there is none."""
    file = (place if place.is_dir() else place.parent) / SUMMARY
    return json.loads(file.read_text()) if file.is_file() else {}


# ---- from plain losses alone -------------------------------------------------------------------------------------------


def symptoms(run: Run) -> list[Finding]:
    """What losses and gradient norms give away by themselves, in rows that another trainer wrote."""
    if any("health" in row for row in (*run.steps, *run.epochs)):
        return []
    found = _divided(run)
    losses = [value for row in run.epochs if (value := _validation(row)) is not None]
    if len(losses) > 2 and len(set(losses)) == 1:
        found.append(Finding("cached_validation", f"the validation loss is {losses[0]!r} in all of {len(losses)} epochs, to the last "
                             f"digit: the weights that are validated, or the answers, never change.", run.step, certain=False))
    norms = [float(row["grad_norm"]) for row in (*run.steps, *run.epochs) if isinstance(row.get("grad_norm"), (int, float))]
    if norms and not any(norms):
        found.append(Finding("zeroed_gradients", f"the gradient norm is zero in all of {len(norms)} rows.", run.step, certain=False))
    elif norms and not any(map(math.isfinite, norms)):
        found.append(Finding("nonfinite_gradients", f"the gradient norm is not finite in any of {len(norms)} rows.", run.step,
                             certain=False))
    return found


def _divided(run: Run) -> list[Finding]:
    """A printed training loss that is the validation loss over the number of batches, epoch after epoch."""
    pairs = [(float(row["train_loss"]), value) for row in run.epochs
             if isinstance(row.get("train_loss"), (int, float)) and (value := _validation(row)) is not None]
    if len(pairs) < 2 or not all(train > 0 and value > 0 for train, value in pairs):
        return []
    ratios, batches = [value / train for train, value in pairs], run.epochs[0].get("batches")
    steady = max(ratios) < 1.1 * min(ratios) and min(ratios) > 3
    if not steady or (batches is not None and abs(ratios[0] - batches) > 0.25 * batches):
        return []
    return [Finding("step_once_per_epoch", f"the training loss is the validation loss over {ratios[0]:.1f} in every epoch"
                    f"{f', which has {batches} batches' if batches else ''}: one batch's loss was divided by the number of batches.",
                    run.step, certain=False)]


def _validation(row: Mapping[str, Any]) -> float | None:
    values = (row.get(key) for key in ("val_loss", "val", "val_nmse_raw"))
    return next((float(value) for value in values if isinstance(value, (int, float))), None)


def _figures(run: Run) -> str:
    best, floors = run.summary.get("best_val_nmse"), run.summary.get("floors") or {}
    if best is None:
        return f"{len(run.steps)} step rows and {len(run.epochs)} epochs were read."
    return (f"Best validation NMSE {best:.3f}, beside {floors.get('mean', math.nan):.3f} for the constant answer, after "
            f"{run.summary.get('optimizer_steps')} steps.")
