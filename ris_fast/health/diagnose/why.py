"""Why a finished run did not learn: the rules over its rows, and what was found while it ran."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ris_fast.files import CONFIG, METRICS, SUMMARY
from ris_fast.health.diagnose.other_trainers import symptoms
from ris_fast.health.finding import Finding, explained, ranked
from ris_fast.health.monitor.explanations import explanations
from ris_fast.health.monitor.history import RunHistory
from ris_fast.health.monitor.rules import replay
from ris_fast.old_names import current_names


@dataclass(frozen=True)
class Diagnosis:
    """Findings of a finished or stopped run, most certain first, and its figures beside the baselines."""

    run: str
    findings: tuple[Finding, ...]
    verdict: str
    figures: str
    plain: bool = False  # rows of another trainer, which have losses and little else
    explanations: tuple[dict[str, str], ...] = ()  # of a run that stalled: `Explanation.to_json` of each

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
                "Losses alone show few mistakes. next: ris_fast.health.watch(model, optimizer) in that loop says"
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
            "explanations": list(self.explanations),
        }


def why(
    run: str | Path,
    rows: Iterable[Mapping[str, Any]],
    summary: Mapping[str, Any] | None = None,
    muted: Iterable[str] = (),
) -> Diagnosis:
    """Replays the rules over a run's rows.

    Args: run: its folder or file, as it is shown; rows: events of its metrics.jsonl; summary: of its summary.json,
        where it has one; muted: causes that are left out.
    """
    history = sort_rows(rows, summary or {})
    reported = [
        Finding(**{key: entry[key] for key in ("cause", "evidence", "step", "severity", "advice", "certain")})
        for entry in history.summary.get("evidence", ())
    ]
    findings = ranked([*reported, *replay(history)], muted)
    plain = not history.info and not history.summary
    names = {finding.cause for finding in findings} | set(muted)
    # In their own order, the likeliest first.
    findings += [finding for finding in symptoms(history) if finding.cause not in names]
    return Diagnosis(
        str(run),
        tuple(findings),
        str(history.summary.get("verdict", "another trainer's rows" if plain else "unfinished")),
        _figures(history),
        plain,
        _explanations(history, findings),
    )


def _explanations(run: RunHistory, findings: Sequence[Finding]) -> tuple[dict[str, str], ...]:
    """Those that the run itself ended with, which knew more, or else what its rows say."""
    if run.summary.get("verdict") != "stalled":
        return ()
    written = run.summary.get("explanations")
    return tuple(written if written else (each.to_json() for each in explanations(run, findings)))


def sort_rows(rows: Iterable[Mapping[str, Any]], summary: Mapping[str, Any]) -> RunHistory:
    """The rows as a run: a row without an event is an epoch if it has a validation figure, else a step."""
    run = RunHistory(summary=summary)
    for number, row in enumerate(rows):
        event = row.get("event") or ("epoch" if any(key.startswith("val") for key in row) else "step")
        if event == "start":
            run.info = row
        elif event in ("step", "epoch"):
            (run.epochs if event == "epoch" else run.steps).append({"step": number + 1, **row})
    return run


def summary_beside(path: Path) -> dict[str, Any]:
    """The summary of a run folder, or of the folder that a metrics file is in; empty where there is none.

    Raises: ValueError with the file that is damaged, and what to do.
    """
    file = (path if path.is_dir() else path.parent) / SUMMARY
    try:
        text = file.read_text(encoding="utf-8") if file.is_file() else "{}"
        summary = current_names(json.loads(text), text, file)
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}). Remove it: {METRICS} beside it has the run's rows.") from error
    if not isinstance(summary, dict):
        raise ValueError(f"{file} holds no summary of a run. Remove it: {METRICS} beside it has the run's rows.")
    return summary


def _figures(run: RunHistory) -> str:
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
