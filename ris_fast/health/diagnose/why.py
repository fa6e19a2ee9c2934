"""Says afterwards why a run did not learn: the rules over its rows, and what was found while it ran."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ris_fast.health.diagnose.other_trainers import symptoms
from ris_fast.health.finding import Finding, explained, ranked
from ris_fast.health.monitor.history import Run
from ris_fast.health.monitor.step_rules import replay

SUMMARY, CONFIG, METRICS = "summary.json", "config.toml", "metrics.jsonl"


@dataclass(frozen=True)
class Answer:
    """Findings of a finished or stopped run, most certain first, and its figures beside the baselines."""

    run: str
    findings: tuple[Finding, ...]
    verdict: str
    figures: str
    plain: bool = False  # rows of another trainer, which have losses and little else

    @property
    def text(self) -> str:
        if not self.findings and self.verdict == "learned":
            return f"{self.run}: learned, and no rule found a mistake. {self.figures}"
        if not self.findings:
            return (
                f"{self.run}: {self.verdict}. No rule found a mistake in what the run reported."
                f" {self.figures}\n{self.next_step}"
            )
        return f"{self.run}: {self.verdict}. {self.figures}\n{explained(self.findings, more=True)}"

    @property
    def next_step(self) -> str:
        if self.plain:
            return (
                "Losses alone show few mistakes. next: ris_fast.health.watch.watch(model, optimizer) in that loop says"
                " more, or ris-fast train, which checks and watches its own"
            )
        return (
            f"next: ris-fast check {shlex.quote(str(Path(self.run) / CONFIG))}"
            if (Path(self.run) / CONFIG).is_file()
            else "next: ris-fast check"
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "run": self.run,
            "verdict": self.verdict,
            "figures": self.figures,
            "findings": [finding.to_json() for finding in self.findings],
        }


def why(
    place: str | Path,
    rows: Iterable[Mapping[str, Any]],
    summary: Mapping[str, Any] | None = None,
    muted: Iterable[str] = (),
) -> Answer:
    """Replays the rules over a run's rows.

    Args: rows: events of its metrics.jsonl; summary: of its summary.json, where it has one.
    """
    run = run_of(rows, summary or {})
    told = [
        Finding(**{key: entry[key] for key in ("cause", "evidence", "step", "severity", "advice", "certain")})
        for entry in run.summary.get("evidence", ())
    ]
    findings = ranked([*told, *replay(run)], muted)
    plain = not run.info and not run.summary
    names = {finding.cause for finding in findings} | set(muted)
    findings += [
        finding for finding in symptoms(run) if finding.cause not in names
    ]  # in their own order, the likeliest first
    return Answer(
        str(place),
        tuple(findings),
        str(run.summary.get("verdict", "another trainer's rows" if plain else "unfinished")),
        _figures(run),
        plain,
    )


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
    """The summary of a run folder, or of the folder that a metrics file lies in; empty where there is none.

    Raises ValueError naming a file that is damaged, and what to do.
    """
    file = (place if place.is_dir() else place.parent) / SUMMARY
    try:
        found = json.loads(file.read_bytes()) if file.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}). Remove it: {METRICS} beside it has the run's rows.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds no summary of a run. Remove it: {METRICS} beside it has the run's rows.")
    return found


def _figures(run: Run) -> str:
    best, baselines = run.summary.get("best_val_nmse"), run.summary.get("baselines") or {}
    if best is None:
        counts = [_counted(len(run.steps), "step row"), _counted(len(run.epochs), "epoch")]
        read = " and ".join(filter(None, counts)) or "no rows"
        return f"{read} {'was' if len(run.steps) + len(run.epochs) == 1 else 'were'} read."
    return (
        f"Best validation NMSE {best:.3f}, beside {baselines.get('mean', math.nan):.3f} for the constant answer, after "
        f"{run.summary.get('optimizer_steps')} steps."
    )


def _counted(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}" if number else ""
